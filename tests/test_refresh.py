"""--refresh-every: new data by the current model under one optimiser and one schedule, against its definition."""

import json
import math
import runpy
import shutil

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import bash
import data
import ddp_utils
import generate
import rac
import stage
from core import arrow, ranks
from sft import sft_loss
from test_stages import base, fails, run
from test_training import HERE, largest_difference, launch, log

__all__ = ["base"]  # pytest finds fixtures by name
# 9 rows in batches of 4: 3 steps an epoch, 6 in all; D_1 before step 1, D_2 before step 5
SIX = ["--epochs", "2", "--refresh-every", "4"]
OWN = {"bash": ["--beta", "0.5"], "rac": ["--max-reference", "200"]}


def d_of(stage, out):
    """The D folders of a run, in order."""
    found = [path for path in out.glob("D_*") if path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("_")[2]))


# ------------------------------------------------------------------------------------------------ which rows, when
@pytest.mark.parametrize("every", [1, 4, 5, 100])
def test_each_step_reads_its_rows_from_the_newest_d(tmp_path, monkeypatch, every):
    """The batches are those of batch_rows, whatever is refreshed; each D holds what its steps read, in order."""
    rows = datasets.Dataset.from_list([{"id": 10 + i, "x": [i] * (1 + i % 3), "y": [i]} for i in range(9)])
    flags = f"--model m --task toy --out {tmp_path} --batch-size 4 --checkpoint-every 0 --max-steps 7"
    fake = ddp_utils.Run.__new__(ddp_utils.Run)
    fake.args, fake.phase, fake.stopped, fake._signal = stage.parser("").parse_args(flags.split()), 0, False, False
    fake.params, fake.resume = [torch.nn.Parameter(torch.zeros(1))], {"phase": 0, "step": 0}
    made = {}

    def make(some, number):
        made[number] = some["id"]
        return some.map(lambda row: {"y_hat": [number] * len(row["y"])})

    read = []
    for k, step in enumerate(fake.steps(ddp_utils.Refresh(rows, every, make), 3)):
        picked = ddp_utils.batch_rows(9, k, 4, ranks.fold_in(0, 0))
        assert sorted(step.ids) == sorted(10 + i for i in picked)
        assert {tuple(row["y_hat"]) for row in step.rows} == {(k // every + 1,)}  # of the newest D
        assert all(row["y"] == [row["id"] - 10] for row in step.rows)
        assert (step.last, step.pause) == (k == 6, k == 6 or (k + 1) % every == 0)
        read.append(step.ids)
        fake._step = None
    assert len(read) == 7 and sorted(made) == [*range(1, math.ceil(7 / every) + 1)]
    for number, ids in made.items():
        assert ids == sorted({i for some in read[(number - 1) * every : number * every] for i in some})


# ------------------------------------------------------------------------------------------------ the algorithms
@pytest.mark.parametrize("name", ["bash", "rac"])
def test_a_run_without_a_second_d_is_the_plain_run(base, tmp_path, monkeypatch, name):
    plain = run(monkeypatch, name, base, tmp_path / "plain", "--epochs", "2", *OWN[name])
    fresh = run(monkeypatch, name, base, tmp_path / "fresh", "--epochs", "2", "--refresh-every", "6", *OWN[name])
    assert largest_difference(plain, fresh) == 0
    one, other = (datasets.load_from_disk(str(d_of(name, out)[0])) for out in (plain, fresh))
    assert one.to_list() == other.to_list() and len(d_of(name, fresh)) == 1


@pytest.mark.parametrize("name", ["bash", "rac"])
def test_one_optimiser_and_one_schedule(base, tmp_path, monkeypatch, name):
    """Against a plain loop: all rows anew at steps 1 and 5, one AdamW, one cosine, the loss as it is written."""
    out = run(monkeypatch, name, base, tmp_path / "out", *SIX, *OWN[name])
    assert len(d_of(name, out)) == 2
    model = AutoModelForCausalLM.from_pretrained(base / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    rows, _ = data.examples(
        "ultrachat", tokenizer, data=str(base / "train.jsonl"), columns="response=response", max_response=12,
        max_reference=200,
    )  # fmt: skip
    rows, optimizer = rows.to_list(), torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for k in range(6):
        if k % 4 == 0:  # of all rows, though not all of them are read
            seed, (x, y, ids) = ranks.fold_in(0, k // 4 + 1), ([row[c] for row in rows] for c in ("x", "y", "id"))
            if name == "bash":
                inputs = generate.mix(model, x, y, beta=0.5, seed=seed, ids=ids, method="token")
                targets = y
            else:
                drawn = generate.generate(model, x, max_new_tokens=12, eos_token_id=1, seed=seed, ids=ids)
                inputs = [z for (z,) in drawn]
                targets = rac.rac_labels(model, [row["f"] for row in rows], inputs)
        picked = ddp_utils.batch_rows(9, k, 4, ranks.fold_in(0, 0))
        sums = {}
        for i in picked:
            for term, loss, read, learnt in (
                ("own", bash.bash_loss if name == "bash" else rac.rac_loss, inputs[i], targets[i]),
                ("sft", sft_loss, y[i], y[i]),
            ):
                logits = model(torch.tensor([x[i] + read]), use_cache=False).logits[:, len(x[i]) - 1 : -1]
                told = [torch.tensor([row]) for row in ([read, learnt] if loss is rac.rac_loss else [learnt])]
                total, n = loss(logits, *told, torch.ones(1, len(read)))
                sums[term] = [a + b for a, b in zip(sums.get(term, [0, 0]), (total, n))]
        sum(total / n for total, n in sums.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = ddp_utils.learning_rate(k, 6, 1e-3, 0.1)
        optimizer.step(), optimizer.zero_grad()
    found = load_file(out / "model.safetensors")
    for key, value in model.named_parameters():
        if key in found:
            assert torch.allclose(found[key], value, atol=2e-5), key
    assert [row["lr"] for row in log(out)] == [ddp_utils.learning_rate(k, 6, 1e-3, 0.1) for k in range(6)]


# ------------------------------------------------------------------------------------------------ interrupted
class Killed(BaseException):
    """As a kill: nothing that the run would do at its end is done."""


def dies(monkeypatch, attribute, times):
    """The `times`-th call of that function of the run is the last."""
    plain, calls = getattr(ddp_utils.Run, attribute), []

    def call(*args, **kw):
        calls.append(1)
        if len(calls) == times:
            raise Killed
        return plain(*args, **kw)

    monkeypatch.setattr(ddp_utils.Run, attribute, call)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """An undisturbed run of each: D_1 ... D_3, new ones before steps 3 and 5."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("whole")
        for name in OWN:
            run(patch, name, base, folder / name, "--epochs", "2", "--refresh-every", "2", *OWN[name])
    return folder


KILLS = {  # the call that never returns: of which function, and which one
    "before the first refresh": ("update", 2),
    "right after the first refresh": ("update", 3),
    "after it": ("update", 4),
    "in the second": ("offline", 3),
    "after the second": ("update", 6),
}


@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize("name, checkpoints", [("bash", "500"), ("rac", "3")])
def test_a_killed_run_goes_on_bitwise(base, whole, tmp_path, monkeypatch, name, checkpoints, kill):
    attribute, times = KILLS[kill]
    flags = ["--epochs", "2", "--refresh-every", "2", "--checkpoint-every", checkpoints, *OWN[name]]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dies(patch, attribute, times)
        run(patch, name, base, tmp_path / "out", *flags)
    steps = [int(path.name.rpartition("-")[2]) for path in (tmp_path / "out" / "checkpoints").glob("*")]
    done = 4 if attribute == "offline" else times - 1  # a checkpoint lies before each refresh, and where one is due
    due = [k for k in range(1, done + 1) if k % 2 == 0 or k % int(checkpoints) == 0]
    assert sorted(steps) == due[-2:]
    out = run(monkeypatch, name, base, tmp_path / "out", *flags)
    assert largest_difference(out, whole / name) == 0
    assert [row | {"seconds": 0} for row in log(out)] == [row | {"seconds": 0} for row in log(whole / name)]
    for a, b in zip(d_of(name, out), d_of(name, whole / name), strict=True):
        assert datasets.load_from_disk(str(a)).to_list() == datasets.load_from_disk(str(b)).to_list()


def test_a_d_that_is_gone_and_cannot_be_made_again(base, tmp_path, monkeypatch, capsys):
    flags = ["--epochs", "2", "--refresh-every", "2", "--checkpoint-every", "3"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dies(patch, "update", 4)
        run(patch, "bash", base, tmp_path / "out", *flags)
    shutil.rmtree(tmp_path / "out" / "D_s_2")  # the run stands at step 3, it was made after step 2
    line = fails(monkeypatch, capsys, "bash", base, tmp_path / "out", *flags)
    assert "D_s_2 is gone, and cannot be made again by weights that have moved on" in line


def test_two_ranks_are_one(base, tmp_path, monkeypatch):
    """The last D is of one row, for two ranks. RAC's first z come from a file (--z)."""
    (tmp_path / "llama").symlink_to(base / "model")
    rows = (base / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:7]))  # in batches of 6: steps of 6 and of 1
    z = [{"id": i, "response": [5 + i, 6, 1]} for i in range(7)]
    (tmp_path / "z.jsonl").write_text("".join(json.dumps(row) + "\n" for row in z))
    words = [HERE / "all_stages.py", tmp_path]
    runs = ["llama", "--runs", "bash-refresh,rac-refresh", "--epochs", "3"]
    launch(*words, "two", *runs, ranks=2)
    monkeypatch.setattr("sys.argv", [str(word) for word in ["all_stages.py", tmp_path, "one", *runs]])
    runpy.run_path(str(HERE / "all_stages.py"))
    for name in OWN:
        one, two = (tmp_path / f"{ranks}-llama-{name}-refresh" for ranks in ("one", "two"))
        assert largest_difference(one, two) < 1e-5 and len(log(two)) == 6
        last = [datasets.load_from_disk(str(d_of(name, out)[-1])).to_list() for out in (one, two)]
        assert len(last[0]) == 1 and last[0] == last[1]
    first = datasets.load_from_disk(str(tmp_path / "two-llama-rac-refresh" / "D_r_1"))
    assert first["z"][:] == [row["response"] for row in z]


# ------------------------------------------------------------------------------------------------ flags
@pytest.mark.parametrize("flags, message", [
    (["--iterations", "2"], "--refresh-every makes new data in one schedule, --iterations begins it again: choose"),
    (["--pairs", "D_s_1"], "--refresh-every makes its data itself, --pairs brings them: choose"),
])  # fmt: skip
def test_what_it_takes_the_place_of(base, tmp_path, monkeypatch, capsys, flags, message):
    for name in OWN:
        assert message in fails(monkeypatch, capsys, name, base, tmp_path / "o", "--refresh-every", "2", *flags)


def test_labels_of_the_start(base, tmp_path, monkeypatch):
    """--labels-from start: from the second D on, z is the current model's, and z_bar what --model says."""
    flags = ["--epochs", "2", "--refresh-every", "3", "--labels-from", "start", "--lr", "0.05", *OWN["rac"]]
    out = run(monkeypatch, "rac", base, tmp_path / "out", *flags)
    model = AutoModelForCausalLM.from_pretrained(base / "model").eval()
    z = arrow.Rows(datasets.load_from_disk(str(out / "D_z_2")))
    d_r = arrow.Rows(datasets.load_from_disk(str(out / "D_r_2")))
    assert [row["z"] for row in z] == [row["z"] for row in d_r]
    labels = rac.rac_labels(model, [row["f"] for row in z], [row["z"] for row in z])
    assert labels == [row["z_bar"] for row in d_r]
    first = arrow.Rows(datasets.load_from_disk(str(out / "D_r_1")))
    assert np.any([a["z"] != b["z"] for a, b in zip(first, d_r)])
    assert json.loads((out / "D_r_2.json").read_text())["tokens_corrected"] > 0
