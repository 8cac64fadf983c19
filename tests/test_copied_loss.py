"""The losses as what others take: pasted into their own loop, or into a Hugging Face Trainer (examples/trainer.py)."""

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch

import batches
import tiny
from bash import bash_loss
from rac import rac_loss
from sft import sft_loss

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "trainer.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("trainer_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def rows():
    """Eight rows of unequal lengths, of D_s and D_r at once: some tokens of y_hat and z_bar differ from y and z."""
    g = torch.Generator().manual_seed(0)

    def draw(n: int) -> list[int]:
        return torch.randint(3, 60, (n,), generator=g).tolist()

    def change(ids: list[int]) -> list[int]:
        return [(i + 1) % 60 if k % 3 == 0 else i for k, i in enumerate(ids)]

    made = []
    for i in range(8):
        y, z = draw(3 + i % 4), draw(2 + i % 5)
        made.append({"id": i, "x": draw(2 + i % 3), "y": y, "y_hat": change(y), "z": z, "z_bar": change(z)})
    return made


def of(rows: list[dict], *names: str) -> list[dict]:
    return [{name: row[name] for name in ("x", "y", *names)} for row in rows]


def paste(function) -> object:
    """The function from its source alone, with torch and F in scope: what a copy has."""
    scope = {"torch": torch, "F": torch.nn.functional}
    exec("from __future__ import annotations\n" + inspect.getsource(function), scope)
    return scope[function.__name__]


def test_the_example_imports_nothing_from_here_and_its_losses_are_ours_word_for_word(example):
    text = EXAMPLE.read_text()
    ours = {path.stem for path in ROOT.glob("*.py")}
    imported = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert not imported & ours
    for function in (bash_loss, rac_loss):
        assert inspect.getsource(function) in text


@pytest.mark.parametrize("names", [("y_hat",), ("z", "z_bar")])
def test_its_joint_loss_is_that_of_the_stages(example, rows, names):
    model, rows = tiny.model("llama"), of(rows, *names)
    x, y = ([row[name] for row in rows] for name in ("x", "y"))
    own, learnt = ([row[name] for row in rows] for name in (names[0], "z_bar" if names[0] == "z" else "y"))
    if names[0] == "z":
        terms = {"sft": (sft_loss, y, y), "rac": (rac_loss, own, own, learnt)}
    else:
        terms = {"sft": (sft_loss, y, y), "bash": (bash_loss, own, learnt)}
    sums = batches.losses(model, x, terms)
    counts = (sum(map(len, y)), sum(map(len, own)))
    expected = sum(float(value.detach()) / n for value, n in zip(sums.values(), counts))
    found = float(example.joint_loss(model, example.collate(rows), names[0] == "z").detach())
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [bash_loss, rac_loss])
def test_a_pasted_loss_trains_in_a_plain_loop(rows, loss):
    """Ten lines of one's own around the pasted function: prompts of one length, so without any padding but the end."""
    pasted, model = paste(loss), tiny.model("gpt2")
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    rows = [row | {"x": row["x"][:2]} for row in rows]
    own, learnt = ("z", "z_bar") if loss is rac_loss else ("y_hat", "y")

    def padded(name):
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True)

    mask = padded(own).new_tensor([[j < len(row[own]) for j in range(padded(own).shape[1])] for row in rows])
    for _ in range(8):
        logits = model(torch.cat([padded("x"), padded(own)], dim=1)).logits[:, 1:-1]
        targets = (padded("z"), padded("z_bar")) if loss is rac_loss else (padded(learnt),)
        total, n = pasted(logits, *targets, mask)
        (total / n).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(total.detach() / n))
    assert seen[-1] < 0.8 * seen[0]


@pytest.mark.parametrize("names", [("y_hat",), ("z", "z_bar")])
def test_the_example_in_a_plain_loop_of_ones_own(example, rows, names):
    model, rows = tiny.model("gpt_neox"), of(rows, *names)
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(8):
        loss = example.joint_loss(model, example.collate(rows), rac="z_bar" in names)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(loss.detach()))
    assert seen[-1] < 0.8 * seen[0]


def test_accumulation_is_exact_for_bash(example, rows):
    """Micro-batches divided by the tokens of the step add up to the loss of the step. Not the mean of their means."""
    model, rows = tiny.model("llama"), of(rows, "y_hat")
    whole = float(example.joint_loss(model, example.collate(rows), rac=False).detach())
    n = sum(len(row["y"]) for row in rows)
    parts = [example.joint_loss(model, example.collate(part), False, n).item() for part in (rows[:3], rows[3:])]
    assert sum(parts) == pytest.approx(whole, rel=1e-5)


def test_accumulation_in_the_trainer_is_exact_for_bash(tmp_path, example, rows):
    """Two micro-batches a step, of other lengths: the weights after it are those of one."""
    after = []
    for size, accumulation in ((8, 1), (4, 2)):
        settings = example.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=1,
            learning_rate=1e-3, optim="sgd", max_grad_norm=0, remove_unused_columns=False, report_to=[],
            warmup_steps=0, use_cpu=True,
        )  # fmt: skip
        pairs, model = datasets.Dataset.from_list(of(rows, "y_hat")), tiny.model("llama")
        example.SelfGenerated(model, settings, train_dataset=pairs, data_collator=example.collate).train()
        after.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    before = torch.cat([p.detach().flatten() for p in tiny.model("llama").parameters()])
    assert (after[0] - before).norm() > 1e-5
    assert (after[0] - after[1]).norm() < 1e-3 * (after[0] - before).norm()


@pytest.mark.parametrize("names", [("y_hat",), ("z", "z_bar")])
def test_the_whole_example_with_the_trainer(tmp_path, rows, names):
    tiny.model("llama").save_pretrained(tmp_path / "model")
    tiny.word_tokenizer().save_pretrained(tmp_path / "model")
    datasets.Dataset.from_list(of(rows, *names)).save_to_disk(tmp_path / "pairs")
    flags = ["--model", tmp_path / "model", "--pairs", tmp_path / "pairs", "--out", tmp_path / "out"]
    done = subprocess.run([sys.executable, EXAMPLE, *map(str, flags)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "model.safetensors").exists()
