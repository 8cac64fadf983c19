"""SPIN, DPO, NEFTune and RAC beyond the paper: each against its definition, and as commands."""

import inspect
import json
import math
import random
from argparse import Namespace
from pathlib import Path

import datasets
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import batches
import data
import ddp_utils
import dpo
import generate
import preferences
import rac
import rac_options
import sft
import spin
import tiny
from core import fsdp
from core.ranks import cli, fold_in
from test_training import largest_difference, launch, log

STAGES = {"sft": sft, "spin": spin, "dpo": dpo, "rac": rac}
EOS = tiny.word_tokenizer().eos_token_id


def text(rng, longest):
    return " ".join(str(rng.randrange(40)) for _ in range(rng.randint(1, longest)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with tiny models, train.jsonl and pairs.jsonl."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer, rng = tiny.word_tokenizer(), random.Random(0)
    for arch in ("llama", "gpt2"):
        tiny.model(arch, vocab=len(tokenizer)).save_pretrained(folder / arch)
        tokenizer.save_pretrained(folder / arch)
    rows = [{"prompt": text(rng, 6), "response": text(rng, 9)} for _ in range(9)]
    pairs = [{"prompt": text(rng, 6), "chosen": "1 " + text(rng, 9), "rejected": "2 " + text(rng, 5)} for _ in range(9)]
    for name, some in {"train": rows, "pairs": pairs}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


def run(monkeypatch, stage, base, out, *flags):
    """Runs a stage's main in this process, as its command line would."""
    file = "pairs" if stage == "dpo" else "train"
    command = [f"{stage}.py", "--model", base / "llama", "--task", "ultrachat", "--data", base / f"{file}.jsonl"]
    command += ["--out", out, "--batch-size", "4", "--lr", "1e-3", "--max-response", "12"]
    command += [] if stage == "dpo" else ["--columns", "response=response"]
    monkeypatch.setattr("sys.argv", [str(word) for word in [*command, *flags]])
    STAGES[stage].main()
    return out


def fails(monkeypatch, capsys, *args):
    """The one line that a failing command prints, with nothing long begun."""
    monkeypatch.setattr(ddp_utils.Run, "offline", None)
    monkeypatch.setattr(ddp_utils.Run, "steps", None)
    with pytest.raises(SystemExit) as stop:
        cli(lambda: run(monkeypatch, *args))
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed.strip().splitlines()[-1]


def log_p(model, x, y):
    """log p(y|x) by one plain forward over one row."""
    logits = model(torch.tensor([x + y]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(logits[len(x) + j - 1, token] for j, token in enumerate(y))


# ------------------------------------------------------------------------------------------------ the losses
@pytest.mark.parametrize("loss", [dpo.dpo_loss, spin.spin_loss])
@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_pair_losses(loss, beta):
    """-log sigmoid(beta * log ratio), pair by pair in Python's float64; and pasted elsewhere."""
    sums = -torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) * 3
    total, n = loss(*sums, beta)
    expected = 0.0
    for y, z, reference_y, reference_z in sums.double().T.tolist():
        expected += math.log1p(math.exp(-beta * ((y - z) - (reference_y - reference_z))))
    assert total.dtype == torch.float32 and n == 6
    assert float(total) == pytest.approx(expected, rel=1e-6)
    total, n = loss(*sums[:, :0], beta)
    assert total == 0 and n == 0
    scope = {"torch": torch, "F": F}
    exec("from __future__ import annotations\n" + inspect.getsource(loss), scope)
    assert torch.equal(scope[loss.__name__](*sums, beta)[0], loss(*sums, beta)[0])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
def test_soft_loss(reverse, masked):
    """Against its definition, token by token in float64: KL(q || p) + H(q) over K tokens, KL(p || q) over K + 1."""
    g, (B, L, V, K) = torch.Generator().manual_seed(0), (3, 5, 11, 4)
    logits, reference = torch.randn(2, B, L, V, generator=g) * 2
    top_logp, top_ids = reference.log_softmax(-1).topk(K)
    z_bar, z = top_ids[..., 0], torch.randint(V, (B, L), generator=g)
    z = torch.where(torch.rand(B, L, generator=g) < 0.5, z, z_bar)
    mask = torch.arange(L) < torch.tensor([5, 3, 0])[:, None]
    logits.requires_grad_()
    loss, n = rac_options.rac_soft_loss(logits, z, z_bar, top_ids, top_logp, mask, masked, reverse)
    learn = mask & (z != z_bar) if masked else mask
    assert 0 < learn.sum() < B * L and n == mask.sum()
    expected = 0.0
    for b, j in learn.nonzero().tolist():
        p, q = (t[b, j].detach().double().softmax(-1)[top_ids[b, j]] for t in (logits, reference))
        if reverse:
            p, q = (torch.cat([t, 1 - t.sum()[None]]) for t in (p, q))
            expected += float((p * (p / q).log()).sum())
        else:
            q = q / q.sum()
            expected += float((q * (q / p).log()).sum() - (q * q.log()).sum())
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, learn)


def test_soft_loss_with_all_its_mass_on_one_token_is_the_hard_one():
    g = torch.Generator().manual_seed(0)
    logits, z_bar = torch.randn(2, 3, 7, generator=g), torch.randint(7, (2, 3), generator=g)
    mask, z = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.long)
    soft = rac_options.rac_soft_loss(logits, z, z_bar, z_bar[..., None], torch.zeros(2, 3, 1), mask)[0]
    assert torch.allclose(soft, rac.rac_loss(logits, z, z_bar, mask)[0])
    assert torch.isfinite(
        rac_options.rac_soft_loss(logits * 99, z, z_bar, z_bar[..., None], torch.zeros(2, 3, 1), mask, True, True)[0]
    )


@pytest.mark.parametrize("chunk", [2**26, 64 * 3])
@pytest.mark.parametrize("share_prompt", [False, True])
@pytest.mark.parametrize("arch", ["llama", "mistral", "gpt2", "qwen3"])
def test_log_probs(arch, share_prompt, chunk, monkeypatch):
    """Sums by row, and their gradients, are those of plain forwards; an empty row gives 0."""
    monkeypatch.setattr(batches, "CHUNK", chunk)
    model, rng = tiny.model(arch), random.Random(1)
    x, y, z = ([[rng.randrange(64) for _ in range(n)] for n in sizes] for sizes in ((5, 2, 9), (4, 0, 7), (1, 3, 0)))
    found = dpo.log_probs(model, x, {"y": y, "z": z}, share_prompt)
    weight = {"y": torch.tensor([1.0, 5.0, -2.0]), "z": torch.tensor([3.0, 0.5, 5.0])}
    sum((found[name] * weight[name]).sum() for name in found).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for name, rows in {"y": y, "z": z}.items():
        for i, row in enumerate(rows):
            expected = log_p(model, x[i], row) if row else torch.tensor(0.0)
            assert found[name][i].item() == pytest.approx(expected.item(), rel=1e-5)
            if row:
                (expected * weight[name][i]).backward()
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert torch.allclose(grad, p.grad, atol=1e-4 * float(p.grad.abs().max() + 1))


# ------------------------------------------------------------------------------------------------ NEFTune
def noise_of(model, rows, alpha, seed=3):
    """What a training pass over rows adds to the embeddings [B, S, d], by its difference."""
    seen = []
    inner = model.get_input_embeddings()
    watch = model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).detach()), with_kwargs=True
    )
    x, y = ([row[name] for row in rows] for name in ("x", "y"))
    for a in (alpha, 0):
        with sft.neftune(model, rows, a, seed):
            loss = batches.losses(model, x, {"sft": (sft.sft_loss, y, y)})["sft"]
    assert not inner._forward_hooks
    watch.remove()
    return seen[0] - seen[1], loss


def test_neftune_is_uniform_with_the_scale_of_each_example_and_none_on_padding():
    model = tiny.model("llama", hidden_size=256)
    rows = [{"id": i, "x": [5] * a, "y": [6] * b} for i, (a, b) in enumerate([(40, 30), (7, 80), (3, 1)])]
    noise, _ = noise_of(model, rows, alpha=5.0)
    for b, (row, first) in enumerate(zip(rows, (0, 33, 37), strict=True)):
        x, y = len(row["x"]), len(row["y"])
        scale = 5 / math.sqrt((x + y) * 256)
        own = noise[b, first : first + x + y - 1]
        assert noise[b].abs().sum() == pytest.approx(float(own.abs().sum()))  # nothing elsewhere
        assert (noise[b, :first] == 0).all() and (noise[b, first + x + y - 1 :] == 0).all()
        assert own.abs().max() <= scale * 1.001 and own.abs().max() > 0.98 * scale
        assert abs(own.mean()) < 5 * scale / math.sqrt(3 * own.numel())  # 5 standard errors
        assert own.var() == pytest.approx(scale**2 / 3, rel=0.1)
        quarters = torch.histc(own / scale, 4, -1, 1) / own.numel()
        assert torch.allclose(quarters, torch.full((4,), 0.25), atol=0.05)


def test_neftune_belongs_to_seed_step_and_example():
    """Not to the micro-batch or the order; and an example with nothing to learn takes no part."""
    model = tiny.model("llama")
    rows = [{"id": i, "x": [5] * (3 + i), "y": [6] * (9 - i)} for i in range(3)]
    together, _ = noise_of(model, rows, 5.0)
    empty = {"id": 9, "x": [5] * 9, "y": []}
    for b, row in enumerate(rows):
        x, length = len(row["x"]), len(row["x"]) + len(row["y"]) - 1
        alone, _ = noise_of(model, [empty, row], 5.0)
        assert torch.allclose(alone[0, :length], together[b, 5 - x : 5 - x + length], atol=1e-6)
    other, _ = noise_of(model, rows, 5.0, seed=4)
    assert not torch.allclose(other, together, atol=1e-3)
    assert noise_of(model, [empty], 5.0)[1] == 0


def test_neftune_is_off_outside_of_training_steps(base, tmp_path, monkeypatch):
    """Its first loss differs from plain SFT's, an alpha of 0 is plain SFT, and what it leaves behind has no noise."""
    plain = run(monkeypatch, "sft", base, tmp_path / "plain")
    zero = run(monkeypatch, "sft", base, tmp_path / "zero", "--neftune-alpha", "0")
    noisy = run(monkeypatch, "sft", base, tmp_path / "noisy", "--neftune-alpha", "5")
    again = run(monkeypatch, "sft", base, tmp_path / "again", "--neftune-alpha", "5", "--micro-batch-size", "1")
    assert largest_difference(plain, zero) == 0
    assert log(noisy)[0]["loss"] != pytest.approx(log(plain)[0]["loss"], rel=1e-3)
    assert log(noisy)[0]["loss"] == pytest.approx(log(plain)[0]["loss"], rel=0.5)
    assert [r["loss"] for r in log(again)] == pytest.approx([r["loss"] for r in log(noisy)], rel=1e-5)


# ------------------------------------------------------------------------------------------------ SPIN
@pytest.fixture(scope="module")
def two_iterations(base, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return run(patch, "spin", base, tmp_path_factory.mktemp("spin") / "out", "--iterations", "2", "--beta", "0.5")


def test_d_spin_is_drawn_and_weighed_by_the_opponent(base, two_iterations, tmp_path, monkeypatch):
    """Iteration 1 by --model, iteration 2 by what iteration 1 ends in, which then weighs the older z, too."""
    first = run(monkeypatch, "spin", base, tmp_path / "first", "--beta", "0.5")
    assert [r["loss"] for r in log(first)] == [r["loss"] for r in log(two_iterations)][:3]
    sets = {
        name: datasets.load_from_disk(str(two_iterations / name)) for name in ("D_spin_1", "D_spin_2", "D_spin_1_again")
    }
    opponents = {"D_spin_1": base / "llama", "D_spin_2": first, "D_spin_1_again": first}
    for name, rows in sets.items():
        assert set(rows.column_names) == {"id", "x", "y", "z", "y_logp", "z_logp"}
        opponent = fsdp.load_model(str(opponents[name]))
        if name != "D_spin_1_again":
            seed = fold_in(0, int(name[-1]))
            z = generate.generate(opponent, rows["x"][:], max_new_tokens=12, eos_token_id=EOS, seed=seed)
            assert [samples[0] for samples in z] == rows["z"][:]
        for row in rows:
            assert row["y_logp"] == pytest.approx(float(log_p(opponent, row["x"], row["y"])), rel=1e-5)
            assert row["z_logp"] == pytest.approx(float(log_p(opponent, row["x"], row["z"])), rel=1e-5)
    assert sets["D_spin_1"]["z"][:] == sets["D_spin_1_again"]["z"][:] != sets["D_spin_2"]["z"][:]


def test_spin_steps(two_iterations):
    """Each iteration begins at log 2, margin 0; the second has twice the pairs; and y wins ever more often."""
    lines = log(two_iterations)
    phases = [[r for r in lines if r["phase"] == phase] for phase in (1, 2)]
    assert [len(phase) for phase in phases] == [3, 5]  # 9 and 18 pairs, 4 a step
    for phase in phases:
        assert phase[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert phase[0]["reward_margin"] == pytest.approx(0, abs=1e-4)
        assert phase[-1]["reward_margin"] > 0.1 and phase[-1]["reward_accuracy"] > 0.5
    assert all(0 <= r["reward_accuracy"] <= 1 for r in lines)


@pytest.mark.parametrize("step", [2, 5])
def test_an_interrupted_spin_ends_in_the_same_weights(base, two_iterations, tmp_path, monkeypatch, step):
    """Stopped in its first and in its second iteration; the same command goes on, and ends bitwise equal."""
    out, update = tmp_path / "out", ddp_utils.Run.update

    def stop(self, **also):
        self._signal = self.total + 1 == step
        return update(self, **also)

    monkeypatch.setattr(ddp_utils.Run, "update", stop)
    with pytest.raises(SystemExit, match=f"stopped after step {step if step < 4 else step - 3}"):
        run(monkeypatch, "spin", base, out, "--iterations", "2", "--beta", "0.5")
    monkeypatch.setattr(ddp_utils.Run, "update", update)
    run(monkeypatch, "spin", base, out, "--iterations", "2", "--beta", "0.5")
    one, two = (load_file(folder / "model.safetensors") for folder in (two_iterations, out))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [r["loss"] for r in log(out)] == [r["loss"] for r in log(two_iterations)]


# ------------------------------------------------------------------------------------------------ DPO
def test_dpo(base, tmp_path, monkeypatch):
    out = run(monkeypatch, "dpo", base, tmp_path / "out", "--epochs", "8", "--beta", "0.1")
    rows = [json.loads(line) for line in (base / "pairs.jsonl").read_text().splitlines()]
    tokenizer, model = fsdp.load_tokenizer(str(base / "llama")), fsdp.load_model(str(base / "llama"))
    for row, made in zip(rows, datasets.load_from_disk(str(out / "D_ref")), strict=True):
        assert made["x"] == tokenizer(data.chat(tokenizer, row["prompt"]))["input_ids"]
        assert made["y"] == tokenizer(row["chosen"])["input_ids"] + [EOS]
        assert made["z"] == tokenizer(row["rejected"])["input_ids"] + [EOS]
        assert made["y_logp"] == pytest.approx(float(log_p(model, made["x"], made["y"])), rel=1e-5)
        assert made["z_logp"] == pytest.approx(float(log_p(model, made["x"], made["z"])), rel=1e-5)
    lines = log(out)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[-1]["loss"] < 0.3 and lines[-1]["reward_accuracy"] == 1 and lines[-1]["reward_margin"] > 1
    again = run(monkeypatch, "dpo", base, tmp_path / "again", "--epochs", "8", "--beta", "0.1", "--share-prompt")
    assert [r["loss"] for r in log(again)] == pytest.approx([r["loss"] for r in lines], rel=1e-4)


def test_dpo_with_columns_of_its_own_and_held_out_rows(base, tmp_path, monkeypatch):
    """--columns names three columns of the pairs; of the held-out rows the prompt's alone."""
    pairs = [json.loads(line) for line in (base / "pairs.jsonl").read_text().splitlines()]
    pairs = [{"q": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in pairs]
    held = [{"q": row["q"], "messages": row["good"]} for row in pairs[:3]]
    for name, rows in (("pairs", pairs), ("held", held)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", tmp_path / "pairs.jsonl", "--columns", "prompt=q,chosen=good,rejected=bad", "--max-steps", "2"]
    flags += ["--eval-every", "1", "--eval-data", tmp_path / "held.jsonl", "--eval-samples", "1"]
    out = run(monkeypatch, "dpo", base, tmp_path / "out", *flags)
    assert all(row["held_nll"] > 0 and row["samples"][0]["prompt"] for row in log(out))
    plain = run(monkeypatch, "dpo", base, tmp_path / "plain", "--max-steps", "2")
    assert [row["loss"] for row in log(plain)] == [row["loss"] for row in log(out)]


def test_dpo_of_a_step_is_the_mean_over_its_pairs(base, tmp_path, monkeypatch):
    """The second step of a run, rebuilt from the definition: one unpadded row at a time, in float64."""
    out = run(
        monkeypatch, "dpo", base, tmp_path / "out", "--max-steps", "2", "--beta", "0.3", "--micro-batch-size", "3"
    )
    one = run(monkeypatch, "dpo", base, tmp_path / "one", "--max-steps", "1", "--beta", "0.3", "--warmup", "0")
    two = run(monkeypatch, "dpo", base, tmp_path / "two", "--max-steps", "2", "--beta", "0.3", "--warmup", "0")
    assert log(out)[0]["loss"] == pytest.approx(log(two)[0]["loss"], rel=1e-5)
    pairs, model = datasets.load_from_disk(str(two / "D_ref")), fsdp.load_model(str(one))
    picked = ddp_utils.batch_rows(len(pairs), 1, 4, fold_in(0, 0))
    margins = []
    for row in (pairs[i] for i in picked):
        y, z = (log_p(model, row["x"], row[name]) - row[f"{name}_logp"] for name in ("y", "z"))
        margins.append(0.3 * float(y - z))
    second = log(two)[1]
    assert second["dpo"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 4, rel=1e-4)
    assert second["reward_margin"] == pytest.approx(sum(margins) / 4, rel=1e-3, abs=1e-4)
    assert second["reward_accuracy"] == sum(m > 0 for m in margins) / 4


USER, GOOD, BAD = (
    {"role": role, "content": words} for role, words in (("user", "3"), ("assistant", "4"), ("assistant", "5"))
)
FORMS = [
    {"prompt": "3", "chosen": "4", "rejected": "5"},
    {"prompt": "3", "chosen": [USER, GOOD], "rejected": [USER, BAD]},  # UltraFeedback binarized
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": "3", "chosen": [GOOD], "rejected": "5"},
    {"chosen": [{"role": "system", "content": ""}, USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
]


def load(tmp_path, *rows, **flags):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"data": str(path), "task": "ultrachat", "columns": "", "limit": 0, "max_prompt": 0, "max_response": 0}
    given |= {"max_length": 1024} | flags
    found, notes = preferences.load_preferences(Namespace(**given), tiny.word_tokenizer())
    if given["task"] == "ultrachat":  # whose template has words that this tokenizer does not know
        assert f"{len(found)} rows hold words that the tokenizer does not know (<unk>)" in notes.pop()
    return found, notes


@pytest.mark.parametrize("row", FORMS)
def test_forms_of_a_pair(tmp_path, row):
    (made,), notes = load(tmp_path, row)
    tokenizer = tiny.word_tokenizer()
    assert made == {
        "id": 0, "x": data.tokenize(tokenizer, data.chat(tokenizer, "3")),
        "y": [*tokenizer("4")["input_ids"], EOS], "z": [*tokenizer("5")["input_ids"], EOS],
    }  # fmt: skip
    assert len(notes) == 1


def test_pairs_that_are_cut_or_left_out(tmp_path):
    rows = [{"prompt": "3", "chosen": "4 4 4 4", "rejected": "5"}, {"prompt": "3", "chosen": "4", "rejected": " 4 "}]
    rows += [{"prompt": "3", "chosen": "", "rejected": "4"}, {"prompt": "3 " * 50, "chosen": "4", "rejected": "5"}]
    rows += [{"prompt": "3", "chosen": "4 4 4 4 5", "rejected": "4 4 4 4 6"}]
    (made,), notes = load(tmp_path, *rows, max_prompt=20, max_length=8)
    x = len(made["x"])
    assert (made["id"], len(made["y"]), len(made["z"])) == (0, 8 - x, 2) and made["y"][-1] != EOS == made["z"][-1]
    assert notes == [
        f"1 pairs, templates of task ultrachat, from {tmp_path}/d.jsonl",
        "1 rows left out: x over 7 tokens (--max-prompt), first: row 3",
        "1 rows left out: chosen or rejected is empty, first: row 2",
        "1 rows left out: chosen equals rejected, first: row 1",
        "1 rows left out: chosen and rejected are equal as far as they are read (--max-length, --max-response), "
        "first: row 4",
        "1 responses cut (--max-length, --max-response), without EOS",
    ]
    (made,), _ = load(tmp_path, {"q": "3", "a": "4", "b": "5"}, columns="prompt=q,chosen=a,rejected=b", task="toy")
    assert made["x"] == tiny.word_tokenizer()("3")["input_ids"]


ROW = FORMS[0]
OTHER = {"role": "user", "content": "7"}


@pytest.mark.parametrize(
    "row, flags, message",
    [
        ({"prompt": "3", "chosen": "4"}, "", "row 1: no rejected (column 'rejected'); there are prompt, chosen"),
        (ROW | {"chosen": None}, "", "row 1: no chosen (column 'chosen'); there are prompt, rejected"),
        (ROW | {"prompt": None}, "", "row 1: no prompt (column 'prompt'); there are chosen, rejected"),
        (ROW | {"prompt": " "}, "", "row 1: empty prompt"),
        (ROW | {"rejected": 5}, "", "row 1: column 'rejected' is int, not text"),
        (ROW | {"rejected": {"role": "assistant"}}, "", "row 1: column 'rejected' is dict, not text"),
        (ROW | {"chosen": [USER, GOOD], "rejected": [OTHER, BAD]}, "", "chosen and rejected answer different prompts"),
        (ROW | {"chosen": [OTHER, GOOD]}, "", "row 1: chosen and rejected answer different prompts"),
        (ROW | {"chosen": []}, "", "row 1: chosen must answer one user turn, and no system turn; its turns are user"),
        (ROW | {"chosen": [USER, GOOD, USER, GOOD]}, "", "its turns are user, assistant, user, assistant"),
        (ROW | {"chosen": [{"role": "system", "content": "Be brief."}, USER, GOOD]}, "", "its turns are system, user,"),
        (ROW | {"chosen": [USER, "4"]}, "", "row 1: chosen or its prompt holds a turn that is no message"),
        (ROW | {"chosen": [USER, GOOD | {"content": None}]}, "", "row 1: column 'chosen' is NoneType, not text"),
        (ROW, "--columns response=chosen", "give it as prompt=NAME,chosen=NAME,rejected=NAME"),
        (ROW, "--max-prompt 1", "no pair is left: 2 rows left out: x over 1 tokens"),
        (ROW, "--data missing.jsonl", "--data missing.jsonl: no such file"),
        (ROW, "--beta=-1", "argument --beta: '-1' is not a number of at least 0"),
        (ROW, "--max-length 1", "argument --max-length: '1' is not a whole number of at least 2"),
        (ROW | {"rejected": "5 " * 300}, "--max-response 400", "the model has 256 positions"),
    ],
)  # fmt: skip
def test_bad_pairs_are_one_line(base, tmp_path, monkeypatch, capsys, row, flags, message):
    (tmp_path / "d.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(row) + "\n")
    words = ("--data", tmp_path / "d.jsonl", *flags.split())
    assert message in fails(monkeypatch, capsys, "dpo", base, tmp_path / "out", *words)
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "rows, message",
    [
        ([ROW | {"rejected": "4"}], "no pair is left: 1 rows left out: chosen equals rejected, first: row 0"),
        ([ROW | {"rejected": " "}], "no pair is left: 1 rows left out: chosen or rejected is empty, first: row 0"),
        ([], "d.jsonl: no rows"),
    ],
)
def test_nothing_to_prefer(tmp_path, rows, message):
    with pytest.raises(ValueError, match="d.jsonl|no pair") as error:
        load(tmp_path, *rows)
    assert message in str(error.value)


# ------------------------------------------------------------------------------------------------ RAC beyond the paper
def test_top_labels_are_those_of_one_plain_pass_each():
    model, rng = tiny.model("mistral", vocab=40), random.Random(3)
    f, z = ([[rng.randrange(40) for _ in range(n)] for n in sizes] for sizes in ((9, 3, 17), (4, 8, 1)))
    labels = rac_options.rac_top_labels(model, f, z, k=5, batch_size=2)
    assert [row["z_bar"] for row in labels] == rac.rac_labels(model, f, z)
    for prompt, own, row in zip(f, z, labels, strict=True):
        logp = model(torch.tensor([prompt + own]), use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert row["top_ids"].tolist() == logp.topk(5).indices.tolist()
        assert torch.allclose(torch.tensor(row["top_logp"]), logp.topk(5).values, atol=1e-5)


@pytest.mark.parametrize("flags", ["", "--unmasked", "--kl reverse", "--first-correction-only"])
def test_soft_labels_of_a_first_step(base, tmp_path, monkeypatch, flags):
    """The first logged loss against the definition: the start model, one unpadded row at a time, all of z counts."""
    soft = ["--labels", "topk", "--topk", "4", *flags.split()]
    out = run(monkeypatch, "rac", base, tmp_path / "out", *soft, "--max-steps", "1", "--batch-size", "9")
    d_r = datasets.load_from_disk(str(out / "D_r_1"))
    model, total, n = fsdp.load_model(str(base / "llama")).double(), 0.0, 0
    for row in d_r:
        x, z, z_bar = (torch.tensor(row[name])[None] for name in ("x", "z", "z_bar"))
        logits = model(torch.cat([x, z], 1), use_cache=False).logits[:, x.shape[1] - 1 : -1]
        mask = torch.ones_like(z)
        if "first" in flags:
            differ = (z != z_bar).long()
            mask = differ * (differ.cumsum(1) == 1)
        top = (torch.tensor(row[name])[None] for name in ("top_ids", "top_logp"))
        kind = {"masked": "--unmasked" not in flags, "reverse": "reverse" in flags}
        total += float(rac_options.rac_soft_loss(logits, z, z_bar, *top, mask, **kind)[0].detach())
        n += z.shape[1]
    assert log(out)[0]["rac"] == pytest.approx(total / n, rel=1e-4)


def test_first_correction_only():
    assert rac_options.to_first_correction([1, 2, 3, 4], [1, 5, 3, 6]) == ([1, 2], [1, 5])
    assert rac_options.to_first_correction([1, 2], [1, 2]) == ([], [])


def test_labels_from_the_start(base, tmp_path, monkeypatch):
    """z of the second iteration by the first one's model, its labels by --model; the first iteration is as ever."""
    out = run(monkeypatch, "rac", base, tmp_path / "out", "--iterations", "2", "--labels-from", "start", "--lr", "1e-2")
    first = run(monkeypatch, "rac", base, tmp_path / "first", "--lr", "1e-2")
    assert [r["loss"] for r in log(first)] == [r["loss"] for r in log(out)][:3]
    d_r, f = datasets.load_from_disk(str(out / "D_r_2")), datasets.load_from_disk(str(out / "D_z_2"))["f"][:]
    assert set(d_r.column_names) == {"id", "x", "y", "z", "z_bar"}
    start, trained = fsdp.load_model(str(base / "llama")), fsdp.load_model(str(first))
    z = generate.generate(trained, d_r["x"][:], max_new_tokens=12, eos_token_id=EOS, seed=fold_in(0, 2))
    assert d_r["z"][:] == [samples[0] for samples in z]
    assert d_r["z_bar"][:] == rac.rac_labels(start, f, d_r["z"][:]) != rac.rac_labels(trained, f, d_r["z"][:])


def test_implausible_corrections_are_left_out(base, tmp_path, monkeypatch):
    """D_r is as without the flag, but for the labels that the model, not shown the reference, thinks unlikely."""
    whole, kept = (
        datasets.load_from_disk(
            str(run(monkeypatch, "rac", base, tmp_path / name, "--max-steps", "1", *flags) / "D_r_1")
        )
        for name, flags in (("whole", ()), ("kept", ("--plausible", "0.02")))
    )
    assert whole["z"][:] == kept["z"][:]
    start = fsdp.load_model(str(base / "llama"))
    z_bar = rac_options.plausible_labels(start, whole["x"][:], whole["z"][:], whole["z_bar"][:], 0.02)
    assert kept["z_bar"][:] == z_bar and z_bar != whole["z_bar"][:] and z_bar != whole["z"][:]


@pytest.mark.parametrize(("limit", "flags", "share"), [(0.9, (), 1), (0.9, ("--plausible", "0.01"), 1), (1e-9, (), 0)])
def test_implausible_corrections_are_counted(base, tmp_path, monkeypatch, capsys, limit, flags, share):
    monkeypatch.setattr(rac_options, "IMPLAUSIBLE", limit)
    run(monkeypatch, "rac", base, tmp_path / "out", "--max-steps", "1", *flags)
    printed = capsys.readouterr().err
    assert f"D_r_1: {share:.0%} of the corrections have a chance under {limit} without the reference" in printed
    assert ("--plausible leaves" in printed) == (share == 1 and not flags)
    found = json.loads((tmp_path / "out" / "D_r_1.json").read_text())
    assert found["implausible"] == share
    d_r = datasets.load_from_disk(str(tmp_path / "out" / "D_r_1"))  # of a run that goes on nothing is counted again
    rac_options.report(d_r, tiny.word_tokenizer(), "ultrachat", tmp_path / "out" / "D_r_1.json")
    assert json.loads((tmp_path / "out" / "D_r_1.json").read_text()) == found


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row | {"top_ids": row["top_ids"][:-1]},
        lambda row: row | {"top_ids": [ids[:2] for ids in row["top_ids"]]},
        lambda row: row | {"top_logp": [*row["top_logp"][:-1], row["top_logp"][-1][:1]]},
        lambda row: row | {"top_ids": [[10**6] * 3 for _ in row["z"]]},
        lambda row: row | {"top_ids": [[-1] * 3 for _ in row["z"]]},
        lambda row: row | {"top_logp": [[0.5] * 3 for _ in row["z"]]},
        lambda row: row | {"top_logp": [[float("nan")] * 3 for _ in row["z"]]},
        lambda row: row | {"top_logp": [[None] * 3 for _ in row["z"]]},
    ],
)
def test_soft_labels_that_do_not_fit_their_row(base, tmp_path, monkeypatch, capsys, change):
    """Each row is looked at, before the first step."""
    soft = ("--labels", "topk", "--topk", "3")
    made = run(monkeypatch, "rac", base, tmp_path / "made", *soft, "--epochs", "0")
    first, second, *rows = datasets.load_from_disk(str(made / "D_r_1")).to_list()
    assert second["z"]
    datasets.Dataset.from_list([first, change(second), *rows]).save_to_disk(str(tmp_path / "other"))
    line = fails(monkeypatch, capsys, "rac", base, tmp_path / "out", *soft, "--pairs", tmp_path / "other")
    assert "other, row 1: top_ids and top_logp must be 3 token ids and log-probabilities for each token of z" in line


def test_rac_says_where_there_is_no_correction(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rac, "rac_labels", lambda model, f, z, batch_size: z)
    run(monkeypatch, "rac", base, tmp_path / "out", "--max-steps", "1")
    assert "WARNING: no token of z is corrected: Eq. 7 has nothing to learn" in capsys.readouterr().err


def test_rac_flags_that_do_not_fit(base, tmp_path, monkeypatch, capsys):
    made = run(monkeypatch, "rac", base, tmp_path / "made", "--labels", "topk", "--topk", "3", "--max-steps", "1")
    pairs = ["--pairs", made / "D_r_1"]
    read = run(
        monkeypatch, "rac", base, tmp_path / "read", "--labels", "topk", "--topk", "3", "--max-steps", "1", *pairs
    )
    assert [r["loss"] for r in log(read)] == [r["loss"] for r in log(made)]
    monkeypatch.setattr(rac_options, "report", None)

    def refused(*flags):
        return fails(monkeypatch, capsys, "rac", base, tmp_path / "refused", *flags)

    told = "row 0: top_ids and top_logp must be 4 token ids and log-probabilities for each token of z"
    assert told in refused("--labels", "topk", "--topk", "4", *pairs)
    datasets.load_from_disk(str(made / "D_r_1")).remove_columns("top_ids").save_to_disk(str(tmp_path / "hard"))
    assert "was not made with --labels topk" in refused("--labels", "topk", "--topk", "3", "--pairs", tmp_path / "hard")
    assert "--topk 999: the model's vocabulary has" in refused("--labels", "topk", "--topk", "999")
    assert "choose" in refused("--unmasked", "--first-correction-only")
    assert "choose" in refused("--unmasked", "--plausible", "0.1")
    assert "--plausible: '2' is not a number in [0, 1]" in refused("--plausible", "2")
    assert "invalid choice: 'soft'" in refused("--labels", "soft")


# ------------------------------------------------------------------------------------------------ ranks
EXTRA = ("neftune", "spin", "dpo", "rac-soft", "bon", "dco")


@pytest.fixture(scope="module")
def ranks(base):
    """The stages of this file, by one process and by two ranks, with different micro-batches."""
    here = Path(__file__).parent / "all_stages.py"
    words = ["llama", "--runs", ",".join(EXTRA)]
    launch(here, base, "one", *words, "--micro-batch-size", 5)
    launch(here, base, "two", *words, "--micro-batch-size", 2, ranks=2)
    return base


@pytest.mark.parametrize("name", EXTRA)
def test_two_ranks_equal_one(ranks, name):
    """Losses to 1e-5, weights to 1e-4; 9 rows in batches of 6 and 3, so that a rank is idle in the last one."""
    one, two = ranks / f"one-llama-{name}", ranks / f"two-llama-{name}"
    assert len(log(one)) == len(log(two)) >= 4
    for a, b in zip(log(one), log(two), strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-5)
        if "reward_margin" in a:  # differences of sums of about 100; at a first step rounding alone
            assert a["reward_margin"] == pytest.approx(b["reward_margin"], rel=1e-3, abs=1e-4)
            assert a["step"] == 1 or a["reward_accuracy"] == b["reward_accuracy"]
    assert largest_difference(one, two) < 1e-4
    for made in one.glob("D_*[0-9f]"):
        for a, b in zip(datasets.load_from_disk(str(made)), datasets.load_from_disk(str(two / made.name)), strict=True):
            floats = ("y_logp", "z_logp", "top_logp")
            assert {k: v for k, v in a.items() if k not in floats} == {k: v for k, v in b.items() if k not in floats}
            for key in a.keys() & set(floats):
                assert torch.allclose(torch.tensor(a[key]), torch.tensor(b[key]), atol=1e-4)
