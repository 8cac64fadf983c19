"""The task `sums` with a byte-level tokenizer and a chat template: data, D_r, controls, and `run.sh real`."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

import data
import rac
import rac_options
import sft
import sums
import tiny
from core import ranks
from test_sums import ids_of, tokenizer
from tools import controls

ROOT = Path(__file__).parent.parent
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random model with the tokenizer of test_sums that cuts digits one by one, and problems."""
    folder = tmp_path_factory.mktemp("real")
    tok = tokenizer("digits")
    tok.chat_template = TEMPLATE
    tiny.model("llama", vocab=len(tok), max_position_embeddings=1024, eos_token_id=tok.eos_token_id).save_pretrained(
        folder / "model"
    )
    tok.save_pretrained(folder / "model")
    rows = sums.problems(8, "real")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def call(monkeypatch, main, *words):
    monkeypatch.setattr("sys.argv", [f"{main.__module__}.py", *map(str, words)])
    main()


def fails(monkeypatch, capsys, main, *words) -> str:
    with pytest.raises(SystemExit) as stop:
        monkeypatch.setattr("sys.argv", [f"{main.__module__}.py", *map(str, words)])
        ranks.cli(main)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_prompts_are_the_papers(base):
    tok = tokenizer("digits")
    examples, _ = data.examples("sums", tok, data=str(base / "train.jsonl"), max_reference=900)
    (problem, *_), (row, *_) = sums.problems(8, "real"), examples
    assert f"<user>{problem['prompt']} Let's think step by step.<eos><assistant>" in tok.decode(row["x"])
    assert tok.decode(row["y"]) == problem["response"] + "<eos>"
    assert f"reference response: {problem['response']}<eos><assistant>" in tok.decode(row["f"])


def test_rac_says_how_good_its_labels_are(base, tmp_path, monkeypatch):
    flags = f"--model {base}/model --task sums --data {base}/train.jsonl --out {tmp_path}/rac --epochs 0"
    call(monkeypatch, rac.main, *flags.split(), "--max-response", 200)
    found = json.loads((tmp_path / "rac" / "D_r_1.json").read_text())
    d_r = datasets.load_from_disk(str(tmp_path / "rac" / "D_r_1"))
    assert found.keys() >= {"precision", "recall", "wrong_early"} and found["n"] == sum(map(len, d_r["z"]))
    assert found["unmasked"] == pytest.approx(rac_options.describe(d_r)["tokens_corrected"])
    words = ("--model", base / "model", "--out", tmp_path / "o")
    call(monkeypatch, controls.main, "oracle", tmp_path / "rac" / "D_r_1", *words)
    right = datasets.load_from_disk(str(tmp_path / "o"))
    assert [*tmp_path.glob("rac/D_r_1/*.arrow")] == [tmp_path / "rac" / "D_r_1" / "data-00000-of-00001.arrow"]
    soft = d_r.map(lambda row: {"top_ids": [[i] for i in row["z"]], "top_logp": [[0.0] for _ in row["z"]]})
    assert controls.oracle(soft, tokenizer("digits")).column_names == d_r.column_names
    for row in right:
        assert row["z_bar"] == sums.right_labels(tokenizer("digits"), row["y"], row["z"])
    assert sums.label_quality(tokenizer("digits"), right["y"], right["z"], right["z_bar"])["precision"] == 1


@pytest.fixture
def d_s():
    rng, rows = random.Random(1), []
    for i, row in enumerate(sums.problems(20, "controls")):
        y = ids_of("digits", row["response"])
        y_hat = [rng.randrange(300) if rng.random() < 0.2 else token for token in y]
        rows.append({"id": 3 * i, "x": ids_of("digits", row["prompt"], eos=False), "y": y, "y_hat": y_hat})
    return datasets.Dataset.from_list(rows)


def test_noise_keeps_the_places_and_takes_tokens_of_the_responses(d_s):
    made, vocabulary = controls.noise(d_s, seed=0), {token for y in d_s["y"] for token in y}
    differ = lambda row: [j for j, (a, b) in enumerate(zip(row["y"], row["y_hat"])) if a != b]  # noqa: E731
    changed = 0
    for before, after in zip(d_s, made):
        assert differ(before) == differ(after) and after["y"] == before["y"]
        assert {after["y_hat"][j] for j in differ(after)} <= vocabulary
        changed += sum(a != b for a, b in zip(before["y_hat"], after["y_hat"]))
    assert changed > 100
    assert controls.noise(d_s, seed=0)["y_hat"][:] == made["y_hat"][:] != controls.noise(d_s, seed=1)["y_hat"][:]
    # a row's noise belongs to its id
    twice = controls.noise(datasets.Dataset.from_list([d_s[0], d_s[0] | {"id": 1}, d_s[0]]), seed=0)["y_hat"][:]
    assert twice[0] == twice[2] != twice[1]
    anywhere = controls.noise(d_s, seed=0, anywhere=True)
    assert [len(differ(row)) for row in anywhere] == [len(differ(row)) for row in d_s]
    assert sum(differ(a) == differ(b) for a, b in zip(anywhere, d_s)) < 3


def test_wrong_masks_the_rows_whose_answer_is_right():
    y = ids_of("digits", "amy has 3 . #### 3")
    other = ids_of("digits", "amy has 3 . #### 4")
    rows = [{"id": i, "x": y, "y": y, "z": z, "z_bar": [7] * len(z)} for i, z in enumerate((y, other, y[:-4]))]
    made = controls.wrong(datasets.Dataset.from_list(rows), tokenizer("digits"), "sums")
    assert [row["z_bar"] == row["z"] for row in made] == [True, False, False]
    assert [row["z_bar"] for row in made][1:] == [row["z_bar"] for row in rows][1:]


def test_mistakes_are_one_line(base, tmp_path, monkeypatch, capsys):
    stage = f"--task sums --data {base}/train.jsonl --out {tmp_path}/sft".split()
    tiny.model("llama", vocab=len(tiny.word_tokenizer())).save_pretrained(tmp_path / "words")
    tiny.word_tokenizer().save_pretrained(tmp_path / "words")
    said = fails(monkeypatch, capsys, sft.main, "--model", tmp_path / "words", *stage)
    assert "cannot spell" in said and "of the sums task" in said
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    command = ["--model", base / "model", "--task", "sums", "--data", tmp_path / "bad.jsonl"]
    import evaluate

    said = fails(monkeypatch, capsys, evaluate.main, "run", *command, "--name", "x", "--out", tmp_path / "eval")
    assert "no response of the data holds an answer" in said
    rows = [{"id": 0, "x": [1], "y": [9, 9], "z": [9], "z_bar": [8]}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "D_r")
    out = ["--model", base / "model", "--out", tmp_path / "out"]
    assert "row 0: y is no response" in fails(monkeypatch, capsys, controls.main, "oracle", tmp_path / "D_r", *out)
    assert "no column y_hat" in fails(monkeypatch, capsys, controls.main, "noise", tmp_path / "D_r", *out)
    assert not (tmp_path / "out").exists()


def real(base, tmp_path, **env):
    flags = {"QUICK": "1", "OUT": str(tmp_path / "out"), "PYTHON": sys.executable, "MODEL": str(base / "model"), **env}
    flags |= {"DTYPE": "float32", "TRAIN": "16", "TEST": "4"}
    return subprocess.run(
        ["bash", "run.sh", "real"], cwd=ROOT, env={**os.environ, **flags}, capture_output=True, text=True
    )


def test_run_sh_real(base, tmp_path):
    methods = "bash rac bash-anywhere"
    done = real(base, tmp_path, METHODS=methods)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in f"sft {methods}".split():
        assert f"\n| {name} |" in done.stdout
    assert (tmp_path / "out" / "corrections.html").exists()
    assert "Error restated right" in done.stdout


def test_run_sh_real_says_what_is_missing(base, tmp_path):
    for env, words in (
        ({"MODEL": str(tmp_path / "none")}, "no such folder"),
        ({"METHODS": "bash-noise"}, "bash-noise needs bash in METHODS"),
        ({"MODEL": str(base)}, "not a model's folder"),
    ):
        done = real(base, tmp_path, **env)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
