"""--track and --eval-samples: what a tracker is told is what log.jsonl has, texts included."""

import importlib.util
import json
import sys

import pytest

import evaluate
import rac
from core import chat, fsdp, ranks, track
from test_stages import base, fails, run
from test_training import largest_difference, launch, log
from tools.corrections import coloured, marked

__all__ = ["base"]  # pytest finds fixtures by name
WATCHED = ["--eval-every", "2", "--epochs", "2", "--max-reference", "200", "--eval-rows", "3"]


def watched(base, *flags):
    return [*WATCHED, "--eval-data", base / "train.jsonl", *flags]


def test_samples_are_what_the_model_says(base, tmp_path, monkeypatch):
    """In each line that has held-out numbers; the last ones by the saved model, its corrections by its own labels."""
    out = run(monkeypatch, "rac", base, tmp_path / "out", *watched(base))
    lines = log(out)
    assert ["samples" in row for row in lines] == ["held_nll" in row for row in lines] == [False, True] * 3
    tokenizer, model = fsdp.load_tokenizer(str(out)), fsdp.load_model(str(out))
    rows = [json.loads(line) for line in (base / "train.jsonl").read_text().splitlines()][:2]
    assert len(lines[-1]["samples"]) == 2
    for row, said in zip(rows, lines[-1]["samples"], strict=True):
        x = chat.token_ids(tokenizer, chat.chat(tokenizer, row["prompt"]))
        (z,) = evaluate.generate.generate(model, [x], max_new_tokens=12, eos_token_id=1, temperature=0)[0]
        f = f"{row['prompt']}\nAnswer this question based on the following reference response: {row['response']}"
        f = chat.token_ids(tokenizer, chat.chat(tokenizer, f, evaluate.data.RAC_SYSTEM))
        (z_bar,) = rac.rac_labels(model, [f], [z])
        assert said == {
            "prompt": tokenizer.decode(x), "reference": row["response"], "answer": chat.response_text(tokenizer, z),
            "corrections": coloured(marked(tokenizer, z, z_bar), colour=False),
        }  # fmt: skip
    assert any("→" in said["corrections"] for row in lines for said in row.get("samples", []))


def test_samples_change_nothing(base, tmp_path, monkeypatch):
    plain = run(monkeypatch, "bash", base, tmp_path / "plain", "--epochs", "2")
    flags = ["--eval-every", "3", "--epochs", "2", "--eval-data", base / "train.jsonl"]
    out = run(monkeypatch, "bash", base, tmp_path / "out", *flags)
    assert largest_difference(plain, out) == 0 and "corrections" not in log(out)[-1]["samples"][0]
    none = run(monkeypatch, "bash", base, tmp_path / "none", *flags, "--eval-samples", "0")
    assert [row["loss"] for row in log(none)] == [row["loss"] for row in log(plain)]
    assert not any("samples" in row for row in log(none))


# ------------------------------------------------------------------------------------------------ trackers
class Told:
    """In the place of a tracker's module."""

    def __init__(self):
        self.steps, self.begun, self.ended = [], {}, 0

    def init(self, **how):
        self.begun = how

    def log(self, record, step):
        self.steps.append((step, record))

    def finish(self):
        self.ended += 1


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_a_tracker_is_told_what_the_log_has(base, tmp_path, monkeypatch, kind):
    """Step by step over two phases, the flags as its config; it is ended with the run."""
    told = Told()
    monkeypatch.setitem(sys.modules, kind, told)
    monkeypatch.setattr(track, "check", lambda kind: None)
    out = run(monkeypatch, "rac", base, tmp_path / "out", *watched(base, "--track", kind, "--sft-epochs", "1"))
    assert [step for step, _ in told.steps] == [*range(1, 10)] and told.ended == 1
    for (_, record), line in zip(told.steps, log(out), strict=True):
        said, texts = record.pop("samples", ""), line.pop("samples", [])
        assert {"step": line["step"], **record} == line and bool(said) == bool(texts)
        assert said == "\n\n".join(f"**{key}**: {text}" for sample in texts for key, text in sample.items())
    # trackio goes on with the run of a name: that of another folder has another
    assert told.begun["config"]["temperature"] == 1.0
    assert told.begun["name"] == "out" if kind == "wandb" else told.begun["name"].startswith("out-")
    assert ("id" in told.begun) == (kind == "wandb")


def test_tensorboard(base, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = run(monkeypatch, "rac", base, tmp_path / "out", *watched(base, "--track", "tensorboard"))
    found = EventAccumulator(str(out / "tensorboard"))
    found.Reload()
    lines = log(out)
    for name in ("loss", "rac", "lr", "held_nll"):
        told = [(event.step, event.value) for event in found.Scalars(name)]
        assert told == [(k, pytest.approx(row[name], rel=1e-6)) for k, row in enumerate(lines, 1) if name in row]
    texts = found.Tensors("samples/text_summary")
    assert [event.step for event in texts] == [2, 4, 6]
    assert lines[-1]["samples"][0]["prompt"] in texts[-1].tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_offline(base, tmp_path, kind):
    """The package itself, without a network."""
    pytest.importorskip(kind, reason=f"pip install {kind}")
    words = ["sft.py", "--model", base / "model", "--task", "toy", "--data", base / "train.jsonl", "--out"]
    words += [tmp_path / "out", "--batch-size", "9", "--eval-every", "1", "--eval-data", base / "train.jsonl"]
    launch(*words, "--track", kind, WANDB_MODE="offline", TRACKIO_DIR=str(tmp_path / "trackio"))
    folder, ending = {"wandb": ("out/wandb", ".wandb"), "trackio": ("trackio", ".db")}[kind]
    found = [path for path in (tmp_path / folder).rglob(f"*{ending}")]
    assert len(found) == 1 and b"held_nll" in found[0].read_bytes()


def test_a_tracker_that_fails_does_not_end_the_run(base, tmp_path, monkeypatch, capsys):
    class Fails(Told):
        def log(self, record, step):
            if step == 2:
                raise RuntimeError("run deleted on the server\nmore")
            super().log(record, step)

        def finish(self):
            raise RuntimeError("no such run")

    told = Fails()
    monkeypatch.setitem(sys.modules, "wandb", told)
    monkeypatch.setattr(track, "check", lambda kind: None)
    out = run(monkeypatch, "sft", base, tmp_path / "out", "--track", "wandb", "--epochs", "1")
    assert [step for step, _ in told.steps] == [1] and len(log(out)) == 3 and (out / "model.safetensors").exists()
    assert "WARNING: --track wandb has failed, nothing more is told to it: run deleted on" in capsys.readouterr().err


def test_what_is_not_there_is_one_line(base, tmp_path, monkeypatch, capsys):
    plain = importlib.util.find_spec
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: None if name == "wandb" else plain(name))
    line = fails(monkeypatch, capsys, "sft", base, tmp_path / "out", "--track", "wandb")
    assert line == "sft.py: error: --track wandb needs that package: pip install wandb"
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_cannot_begin_is_one_line(base, tmp_path, monkeypatch, capsys):
    class Offline(Told):
        def init(self, **how):
            raise RuntimeError("no API key configured\nuse login")

    monkeypatch.setitem(sys.modules, "wandb", Offline())
    monkeypatch.setattr(track, "check", lambda kind: None)
    line = fails(monkeypatch, capsys, "sft", base, tmp_path / "out", "--track", "wandb")
    assert line == "sft.py: error: --track wandb: no API key configured (offline: WANDB_MODE=offline)"
    assert ranks.RANK == 0
