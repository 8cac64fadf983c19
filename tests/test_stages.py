"""The stages as commands: what they write, Algorithm 1 and 2 against their definition, and what a mistake is told."""

import json
import random
import shutil
from pathlib import Path

import datasets
import pytest
import torch

import bash
import data
import ddp_utils
import folders
import generate
import rac
import rac_options
import scs
import sft
import tiny
from core import fsdp, ranks

ROOT = Path(__file__).parent.parent
STAGES = {"sft": sft, "scs": scs, "bash": bash, "rac": rac}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny model and train.jsonl: `base / "model"`, `base / "train.jsonl"`."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer, rng = tiny.word_tokenizer(), random.Random(0)
    tiny.model("llama", vocab=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": text(rng, 6), "response": text(rng, 9)} for _ in range(9)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def text(rng, longest):
    return " ".join(str(rng.randrange(40)) for _ in range(rng.randint(1, longest)))


def run(monkeypatch, stage, base, out, *flags, data_file="train.jsonl", model="model", task="ultrachat"):
    """Runs a stage's main in this process, as its command line would."""
    command = [f"{stage}.py", "--model", base / model, "--task", task, "--data", base / data_file, "--out", out]
    command += ["--columns", "response=response", "--batch-size", "4", "--lr", "1e-3", "--max-response", "12", *flags]
    monkeypatch.setattr("sys.argv", [str(word) for word in command])
    STAGES[stage].main()
    return out


def fails(monkeypatch, capsys, *args, **kw):
    """The one line that a failing command prints."""
    with pytest.raises(SystemExit) as stop:
        ranks.cli(lambda: run(monkeypatch, *args, **kw))
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed.strip().splitlines()[-1]


# ------------------------------------------------------------------------------------------------ the algorithms
@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_rac_labels_are_the_step_by_step_arg_max(arch):
    """z_bar^j = arg max p(. | f(x, y), z^{<j}), position by position, without a batch, padding or a shift."""
    model, rng = tiny.model(arch, vocab=40), random.Random(3)
    f = [[rng.randrange(40) for _ in range(n)] for n in (9, 3, 17, 5)]
    z = [[rng.randrange(40) for _ in range(n)] for n in (4, 8, 1, 6)]
    labels = rac.rac_labels(model, f, z, batch_size=3)
    for prompt, own, row in zip(f, z, labels, strict=True):
        assert len(row) == len(own)
        for j, label in enumerate(row):
            logits = model(torch.tensor([prompt + own[:j]]), use_cache=False).logits[0, -1]
            assert label == int(logits.argmax())
    assert rac.rac_labels(model, f, z, batch_size=1) == labels


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_plausible_labels_token_by_token(arch):
    """A label stays where the model gives it at least P after (x, z^{<j}); elsewhere z^j stands, which is masked."""
    model, rng = tiny.model(arch, vocab=40), random.Random(4)
    x = [[rng.randrange(40) for _ in range(n)] for n in (9, 3, 17, 5)]
    z, z_bar = ([[rng.randrange(40) for _ in range(n)] for n in (4, 8, 1, 6)] for _ in range(2))
    chances = [
        [
            float(model(torch.tensor([prompt + own[:j]]), use_cache=False).logits[0, -1].detach().softmax(0)[label])
            for j, label in enumerate(row)
        ]
        for prompt, own, row in zip(x, z, z_bar, strict=True)
    ]
    p = sorted(sum(chances, []))[8] * 0.999  # eleven of the nineteen stay
    kept = rac_options.plausible_labels(model, x, z, z_bar, p, batch_size=3)
    for own, row, chance, found in zip(z, z_bar, chances, kept, strict=True):
        assert found == [label if c >= p else token for token, label, c in zip(own, row, chance, strict=True)]
    assert rac_options.plausible_labels(model, x, z, z_bar, 0.0) == z_bar


def test_d_r_is_made_as_algorithm_2_says(base, tmp_path, monkeypatch):
    """z drawn given x, labels given the task's own f(x, y): rebuilt here from the start model and the templates."""
    out = run(monkeypatch, "rac", base, tmp_path / "rac", "--temperature", "0")
    d_r = datasets.load_from_disk(str(out / "D_r_1"))
    assert {"id", "x", "y", "z", "z_bar"} == set(d_r.column_names)
    tokenizer, model = fsdp.load_tokenizer(str(base / "model")), fsdp.load_model(str(base / "model"))
    rows = data.load_rows("ultrachat", str(base / "train.jsonl"), columns="response=response")
    for row, made in zip(rows, d_r, strict=True):
        x = tokenizer(f"<|system|>\n<eos>\n<|user|>\n{row['prompt']}<eos>\n<|assistant|>\n")["input_ids"]
        assert made["x"] == x and made["y"] == tokenizer(row["response"])["input_ids"] + [tokenizer.eos_token_id]
        z = generate.generate(model, [x], max_new_tokens=12, eos_token_id=tokenizer.eos_token_id, temperature=0)[0][0]
        assert made["z"] == z
        f = tokenizer(data.qa_f(row, tokenizer, 0))["input_ids"]
        assert made["z_bar"] == rac.rac_labels(model, [f], [z])[0]


def test_d_s_mixes_y_with_the_models_tokens(base, tmp_path, monkeypatch):
    out = run(monkeypatch, "bash", base, tmp_path / "bash", "--beta", "0.5", "--seed", "3")
    d_s = datasets.load_from_disk(str(out / "D_s_1"))
    model = fsdp.load_model(str(base / "model"))
    expected = generate.mix(model, d_s["x"][:], d_s["y"][:], beta=0.5, seed=ranks.fold_in(3, 1), method="token")
    assert d_s["y_hat"][:] == expected != d_s["y"][:]


def test_bash_with_beta_0_is_sft_with_twice_the_gradient(base, tmp_path, monkeypatch):
    """y_hat = y, so both terms are equal; where the gradient is always clipped, the run equals plain SFT's."""
    flags = ["--epochs", "3", "--batch-size", "9", "--clip", "0.01"]
    one = read_log(run(monkeypatch, "sft", base, tmp_path / "sft", *flags))
    two = read_log(run(monkeypatch, "bash", base, tmp_path / "bash", *flags, "--beta", "0"))
    for a, b in zip(one, two, strict=True):
        assert b["bash"] == pytest.approx(b["sft"], rel=1e-6) and b["sft"] == pytest.approx(a["sft"], rel=1e-4)


def test_two_iterations_are_two_runs_in_a_row_and_the_second_uses_fresh_data(base, tmp_path, monkeypatch):
    both = run(monkeypatch, "bash", base, tmp_path / "both", "--iterations", "2", "--beta", "0.5")
    first = run(monkeypatch, "bash", base, tmp_path / "first", "--iterations", "1", "--beta", "0.5")
    assert [r["loss"] for r in read_log(first)] == [r["loss"] for r in read_log(both)][:3]
    model = fsdp.load_model(str(first))
    d_s = datasets.load_from_disk(str(both / "D_s_2"))
    assert d_s["y_hat"][:] == generate.mix(model, d_s["x"][:], d_s["y"][:], beta=0.5, seed=ranks.fold_in(0, 2))


def test_sft_first_is_a_phase_of_its_own(base, tmp_path, monkeypatch):
    whole = read_log(run(monkeypatch, "rac", base, tmp_path / "whole", "--sft-epochs", "2"))
    alone = read_log(run(monkeypatch, "sft", base, tmp_path / "alone", "--epochs", "2"))
    assert [r["loss"] for r in whole[:6]] == [r["loss"] for r in alone]
    assert [r["phase"] for r in whole] == [1] * 6 + [2] * 3 and "rac" not in whole[5] and "rac" in whole[6]


@pytest.mark.parametrize("stage", ["scs", "bash", "rac"])
def test_sft_weight(base, tmp_path, monkeypatch, stage):
    """The first step's terms do not depend on the weight; 0 leaves the SFT term out (Table 6)."""
    with_sft = read_log(run(monkeypatch, stage, base, tmp_path / "with", "--sft-weight", "0.5"))[0]
    without = read_log(run(monkeypatch, stage, base, tmp_path / "without", "--sft-weight", "0"))[0]
    assert without[stage] == pytest.approx(with_sft[stage]) and "sft" not in without
    assert with_sft["loss"] == pytest.approx(with_sft[stage] + with_sft["sft"])


def test_z_is_read_up_to_its_last_correction(base, tmp_path, monkeypatch):
    """What follows changes neither loss nor gradient; rows without a correction are not read at all."""
    assert rac.to_last_correction([1, 2, 3], [1, 5, 3]) == ([1, 2], [1, 5])
    assert rac.to_last_correction([1, 2], [1, 2]) == ([], [])
    cut = read_log(run(monkeypatch, "rac", base, tmp_path / "cut"))
    monkeypatch.setattr(rac, "to_last_correction", lambda z, z_bar: (z, z_bar))
    whole = read_log(run(monkeypatch, "rac", base, tmp_path / "whole"))
    for a, b in zip(cut, whole, strict=True):
        assert (a["rac"], a["grad_norm"]) == pytest.approx((b["rac"], b["grad_norm"]), rel=1e-5)


def test_unmasked_is_eq_6(base, tmp_path, monkeypatch):
    masked = read_log(run(monkeypatch, "rac", base, tmp_path / "masked"))[0]
    unmasked = read_log(run(monkeypatch, "rac", base, tmp_path / "unmasked", "--unmasked"))[0]
    assert unmasked["rac"] > masked["rac"] > 0


def test_pairs_made_elsewhere_are_read_in(base, tmp_path, monkeypatch):
    made = run(monkeypatch, "rac", base, tmp_path / "made")
    read = run(monkeypatch, "rac", base, tmp_path / "read", "--pairs", str(made / "D_r_1"))
    assert [r["loss"] for r in read_log(made)] == [r["loss"] for r in read_log(read)]
    foreign = datasets.load_from_disk(str(made / "D_r_1")).select_columns(["x", "y", "z", "z_bar"])
    foreign.save_to_disk(str(tmp_path / "foreign"))
    flags = ("--pairs", str(tmp_path / "foreign"), "--data", "is-not-read")
    again = run(monkeypatch, "rac", base, tmp_path / "again", *flags)
    assert [r["loss"] for r in read_log(again)] == [r["loss"] for r in read_log(made)]


def test_plausible_holds_for_pairs_too(base, tmp_path, monkeypatch):
    made = run(monkeypatch, "rac", base, tmp_path / "made")
    whole = run(monkeypatch, "rac", base, tmp_path / "whole", "--plausible", "0.02")
    read = run(monkeypatch, "rac", base, tmp_path / "read", "--plausible", "0.02", "--pairs", str(made / "D_r_1"))
    labels = [datasets.load_from_disk(str(folder / "D_r_1"))["z_bar"][:] for folder in (made, whole, read)]
    assert labels[0] != labels[1] == labels[2]
    assert [r["loss"] for r in read_log(read)] == [r["loss"] for r in read_log(whole)]


def test_describe():
    rows = [
        {"y": [1, 2], "z": [1, 2], "z_bar": [1, 2]},
        {"y": [1, 2], "z": [1, 3, 4], "z_bar": [1, 2, 4]},
        {"y": [1, 2], "z": [5, 5, 5], "z_bar": [1, 5, 1]},
    ]
    assert rac_options.describe(datasets.Dataset.from_list(rows)) == {
        "tokens_corrected": 3 / 8, "z_equals_y": 1 / 3, "rows_without_correction": 1 / 3,
    }  # fmt: skip


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--beta", "1.5"], "argument --beta: '1.5' is not a number in [0, 1]"),
        (["--beta", "nan"], "argument --beta: 'nan' is not a number in [0, 1]"),
        (["--temperature", "-1"], "argument --temperature: '-1' is not a number of at least 0"),
        (["--lr", "nan"], "argument --lr: 'nan' is not a number of at least 0"),
        (["--batch-size", "0"], "argument --batch-size: '0' is not a whole number of at least 1"),
        (["--batch-size", "2.5"], "argument --batch-size: '2.5' is not a whole number"),
        (["--task", "poetry"], "argument --task: invalid choice: 'poetry'"),
        (["--dtype", "float8"], "argument --dtype: invalid choice"),
        (["--bta", "0.2"], "unrecognized arguments: --bta 0.2"),
        (["--data", "missing.jsonl"], "--data missing.jsonl: no such file"),
        (["--model", "./missing"], "--model ./missing: no such folder"),
        (["--model", "tests/missing"], "--model tests/missing: no such folder"),
        (["--columns", "response=answer"], "row 0: no column 'answer' for the response; there are prompt, response"),
        (["--max-prompt", "2"], "no example is left"),
        (["--pairs", "missing"], "--pairs missing: not a folder written by"),
    ],
)
def test_a_wrong_flag_is_one_line(base, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(ROOT)
    assert message in fails(monkeypatch, capsys, "bash", base, tmp_path / "out", *flags)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_model_that_does_not_fit(base, tmp_path, monkeypatch, capsys):
    tokenizer = tiny.word_tokenizer()
    for name, kw in {"short": {"max_position_embeddings": 8}, "small": {"vocab": 30}}.items():
        tiny.model("llama", **{"vocab": len(tokenizer), **kw}).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    tiny.model("llama").save_pretrained(tmp_path / "bare")
    line = fails(monkeypatch, capsys, "sft", base, tmp_path / "o1", model=tmp_path / "short")
    assert "the model has 8 positions" in line and "--max-prompt" in line
    tiny.model("llama", vocab=len(tokenizer), max_position_embeddings=90).save_pretrained(tmp_path / "tight")
    tokenizer.save_pretrained(tmp_path / "tight")
    tight = {"model": tmp_path / "tight"}
    run(monkeypatch, "sft", base, tmp_path / "o1a", "--max-response", "60", "--epochs", "1", **tight)
    line = fails(
        monkeypatch, capsys, "rac", base, tmp_path / "o1b", "--max-response", "60", **tight
    )  # before any z is drawn
    assert "the model has 90 positions" in line
    line = fails(monkeypatch, capsys, "sft", base, tmp_path / "o2", model=tmp_path / "small")
    assert "model and tokenizer do not belong together" in line
    line = fails(monkeypatch, capsys, "sft", base, tmp_path / "o3", model=tmp_path / "bare")
    assert "no tokenizer could be loaded" in line
    no_eos = tiny.word_tokenizer()
    no_eos.eos_token = None
    tiny.model("llama").save_pretrained(tmp_path / "endless")
    no_eos.save_pretrained(tmp_path / "endless")
    line = fails(monkeypatch, capsys, "sft", base, tmp_path / "o4", model=tmp_path / "endless")
    assert "no EOS token" in line


def test_pairs_that_do_not_fit(base, tmp_path, monkeypatch, capsys):
    made = run(monkeypatch, "rac", base, tmp_path / "made")
    d_r = datasets.load_from_disk(str(made / "D_r_1"))

    def refused(rows, name):
        rows.save_to_disk(str(tmp_path / name))
        return fails(monkeypatch, capsys, "rac", base, tmp_path / f"o-{name}", "--pairs", str(tmp_path / name))

    assert "no column z_bar" in refused(d_r.remove_columns("z_bar"), "column")
    assert "row 0: z has" in refused(d_r.map(lambda r: {"z": r["z"] + [1]}), "length")
    assert "row 0: y has ids from 10000 to 10000" in refused(d_r.map(lambda r: {"y": [10000]}), "id")
    assert "row 0: y has ids from -1" in refused(d_r.map(lambda r: {"y": [-1, 1]}), "negative")
    assert "row 0: x must be a list of token ids, and not empty" in refused(d_r.map(lambda r: {"x": []}), "empty")
    assert "row 0: z must be a list of token ids" in refused(d_r.map(lambda r: {"z": "a b"}), "text")
    (made / "D_r_1" / "source.json").write_text('{"tokenizer": "another"}')
    line = fails(monkeypatch, capsys, "rac", base, tmp_path / "o", "--pairs", str(made / "D_r_1"))
    assert "was made with another tokenizer" in line


def test_out_folders_are_guarded(base, tmp_path, monkeypatch, capsys):
    out = run(monkeypatch, "sft", base, tmp_path / "out", "--epochs", "1")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as stop:  # the same command: nothing to do
        run(monkeypatch, "sft", base, out, "--epochs", "1")
    assert not stop.value.code
    line = fails(monkeypatch, capsys, "sft", base, out, "--epochs", "3", "--lr", "1e-2")
    assert "belongs to another run (--epochs 1.0 -> 3.0, --lr 0.001 -> 0.01)" in line
    assert "did not make" in fails(monkeypatch, capsys, "sft", base, base / "model")
    assert "(script sft.py -> scs.py)" in fails(monkeypatch, capsys, "scs", base, out)  # not its checkpoints, or model
    data_file, model = tmp_path / "copy.jsonl", tmp_path / "model"
    data_file.write_text((base / "train.jsonl").read_text())
    shutil.copytree(base / "model", model)
    inputs = {"data_file": data_file, "model": model}
    made = run(monkeypatch, "sft", base, tmp_path / "made", **inputs)
    with pytest.raises(SystemExit):
        run(monkeypatch, "sft", base, made, **inputs)
    shutil.copy(out / "model.safetensors", model)  # retrained in place
    line = fails(monkeypatch, capsys, "sft", base, made, **inputs)
    assert "(what --model holds " in line and "--data" not in line
    shutil.copy(base / "model" / "model.safetensors", model)
    folders.open_out.lock.close()
    data_file.write_text(data_file.read_text().replace("1", "2"))
    assert "(what --data holds " in fails(monkeypatch, capsys, "sft", base, made, **inputs)
    (tmp_path / "file").write_text("")
    line = fails(monkeypatch, capsys, "sft", base, tmp_path / "file" / "out")
    assert f"--out {tmp_path / 'file' / 'out'} cannot be written" in line
    assert (out / "model.safetensors").read_bytes() == before


def test_a_diverging_run_stops_and_names_step_and_rows(base, tmp_path, monkeypatch, capsys):
    model = tiny.model("llama", vocab=len(tiny.word_tokenizer()))
    model.lm_head.weight.data[5, 0] = float("inf")
    model.save_pretrained(tmp_path / "nan")
    tiny.word_tokenizer().save_pretrained(tmp_path / "nan")
    line = fails(monkeypatch, capsys, "sft", base, tmp_path / "out", model=tmp_path / "nan")
    assert line.startswith("sft.py: error: step 1: loss") and "not finite (rank 0, rows [" in line


@pytest.mark.parametrize("flags", [(), ("--checkpoint-every", "1"), ("--checkpoint-every", "0")])
def test_weights_that_are_not_finite_are_not_kept(base, tmp_path, monkeypatch, capsys, flags):
    """After the last step no loss would show them."""
    line = fails(monkeypatch, capsys, "sft", base, tmp_path / "out", "--max-steps", "1", "--lr", "1e38", *flags)
    assert "step 1: the weights are not finite after it, at a learning rate of 1e+38: lower --lr; there is no" in line
    assert not (tmp_path / "out" / "config.json").exists() and not [*(tmp_path / "out").glob("checkpoints/*")]


@pytest.mark.parametrize("every", ["1", "0"])
def test_a_signal_behind_the_last_step_of_a_phase_is_heard_before_the_next_draw(base, tmp_path, monkeypatch, every):
    """It comes when the checkpoint has been written, or while nobody looks."""
    out, update = tmp_path / "out", ddp_utils.Run.update
    flags = ("--sft-epochs", "1", "--checkpoint-every", every)

    def last(run, **also):
        step = run._step
        update(run, **also)
        if step.last:
            run._stop()

    monkeypatch.setattr(ddp_utils.Run, "update", last)
    told = "goes on from there" if every == "1" else "trains anew: there is no checkpoint"
    with pytest.raises(SystemExit, match=told):
        run(monkeypatch, "bash", base, out, *flags)
    assert not [*out.glob("D_s*")]
    monkeypatch.setattr(ddp_utils.Run, "update", update)
    folders.open_out.lock.close()
    run(monkeypatch, "bash", base, out, *flags)
    whole = run(monkeypatch, "bash", base, tmp_path / "whole", *flags)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_steps_of_a_fractional_epoch(base, tmp_path, monkeypatch):
    """1.1 epochs of 10 steps are 11, though 1.1 * 10 is 11.000000000000002."""
    (tmp_path / "ten.jsonl").write_text('{"prompt": "3", "response": "4"}\n' * 10)
    flags = ("--batch-size", "1", "--epochs", "1.1")
    out = run(monkeypatch, "sft", base, tmp_path / "out", *flags, data_file=tmp_path / "ten.jsonl")
    assert len(read_log(out)) == 11


def test_a_batch_that_ran_out_of_memory_can_be_tried_with_a_smaller_micro_batch(base, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(ddp_utils.Run, "finish", lambda run: None)  # as if killed after the last step
    run(monkeypatch, "bash", base, out)
    monkeypatch.undo()
    run(monkeypatch, "bash", base, out, "--micro-batch-size", "2", "--generation-batch-size", "3")
    assert (out / "model.safetensors").exists() and len(read_log(out)) == 3


def test_one_example_and_an_epoch_of_zero(base, tmp_path, monkeypatch):
    out = run(monkeypatch, "sft", base, tmp_path / "one", "--limit", "1", "--epochs", "2")
    assert len(read_log(out)) == 2
    out = run(monkeypatch, "sft", base, tmp_path / "none", "--epochs", "0")
    from safetensors.torch import load_file

    before, after = (load_file(folder / "model.safetensors") for folder in (base / "model", out))
    assert all(torch.equal(before[name], after[name]) for name in before)


# ------------------------------------------------------------------------------------------------ generate.py
def test_generate_command(base, tmp_path, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "3 4"}\n{"prompt": "5"}\n')  # no reference is needed
    out = tmp_path / "made" / "z.jsonl"

    def command(*flags):
        words = ["generate.py", "--model", base / "model", "--task", "ultrachat", "--data", tmp_path / "prompts.jsonl"]
        monkeypatch.setattr("sys.argv", [str(word) for word in [*words, "--max-response", "6", "--out", out, *flags]])
        generate.main()

    command("--n", "2")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == [0, 1] and all(len(row["responses"]) == 2 for row in rows)
    made = datasets.load_from_disk(str(out) + ".data")
    model, tokenizer = fsdp.load_model(str(base / "model")), fsdp.load_tokenizer(str(base / "model"))
    z = generate.generate(model, made["x"][:], max_new_tokens=6, eos_token_id=tokenizer.eos_token_id, n=2)
    assert made["z"][:] == z
    with pytest.raises(ValueError, match="exists already"):
        command("--n", "2")
    out.unlink()
    with pytest.raises(ValueError, match="left from a call with other flags"):
        command("--temperature", "0.1")
    command("--n", "2")  # the same call: its rows are there
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows


def test_labels_by_a_template_of_ones_own(base, tmp_path, monkeypatch, capsys):
    """--reference-template: z_bar is what the model says after it. args.json has its text; no other goes on there."""
    (tmp_path / "f.txt").write_text("{y} now : {x}\n")
    flags = ["--max-reference", "200", "--reference-template", tmp_path / "f.txt"]
    out = run(monkeypatch, "rac", base, tmp_path / "out", *flags)
    assert json.loads((out / "args.json").read_text())["reference_template"] == {"system": "", "user": "{y} now : {x}"}
    tokenizer, model = fsdp.load_tokenizer(str(base / "model")), fsdp.load_model(str(base / "model"))
    texts = [json.loads(line) for line in (base / "train.jsonl").read_text().splitlines()]
    d_r = datasets.load_from_disk(str(out / "D_r_1"))
    for row in d_r:
        text = texts[row["id"]]
        f = data.chat(tokenizer, f"{text['response']} now : {text['prompt']}")
        assert [row["z_bar"]] == rac.rac_labels(model, [data.tokenize(tokenizer, f)], [row["z"]])
    (tmp_path / "f.txt").write_text("{y} then : {x}\n")
    assert "--reference-template" in fails(monkeypatch, capsys, "rac", base, out, *flags)
