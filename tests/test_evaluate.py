"""evaluate.py: every metric against cases worked by hand, the table against numpy, and the two commands end to end."""

import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

import bash
import data
import evaluate
import folders
import held_out
import sft
import sums
import tiny
import toy
from core import answers, fsdp, tables
from test_training import launch

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)


# ---------------------------------------------------------------------------------------------- arithmetic
def test_rouge_by_hand():
    """F1 of unigrams, bigrams and the longest common subsequence; no stemming; an empty text has 0."""
    pytest.importorskip("rouge_score", reason="pip install rouge-score")
    found = evaluate.rouge([["the cat sat down"]], ["The cat, he sat."])
    assert found["rouge1"] == pytest.approx(2 * (3 / 4) * (3 / 4) / (3 / 4 + 3 / 4))
    assert found["rouge2"] == pytest.approx(1 / 3)
    assert found["rougeL"] == pytest.approx(3 / 4)
    assert evaluate.rouge([["cats sit"]], ["cat sits"]) == {"rouge1": 0, "rouge2": 0, "rougeL": 0}
    halves = evaluate.rouge([["a b", ""], ["x", "a b"]], ["a b", "a b"])
    assert halves["rouge1"] == 0.5


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("他喜欢猫。", True),
        ("2019年北京举办了会议", True),  # 2019 alone would be compared
        ("قطة على السجادة", True),
        ("Кошка сидит", True),
        ("😀😀", True),
        ("The cat sat", False),
        ("Él comió el último pastel, señor", False),
        ("the 猫 sat", False),
        ("12", False),
        ("", False),
        (" ", False),
    ],
)
def test_unread(text, lost):
    assert evaluate.unread(text) == lost


def test_rouge_of_other_scripts_is_said(toy_set, tmp_path, monkeypatch, capsys):
    """References that the tokeniser empties are left out, and counted; without any other there is no ROUGE."""
    pytest.importorskip("rouge_score", reason="pip install rouge-score")
    assert evaluate.rouge([["a b"], ["猫"]], ["a b", "猫"])["rouge1"] == 1
    assert evaluate.rouge([["猫"]], ["猫坐着"]) == {}
    assert evaluate.rouge([["猫"]], ["a cat"])["rouge1"] == 0
    tokenizer, rows, _ = toy_set
    scripted(monkeypatch, lambda prompt, kw: [tokenizer("amy has 25")["input_ids"] + [1]])
    lm, args = tiny.model("gpt_neox"), arguments(tmp_path, task="tldr", generations=1)
    references = {0: "amy has 25", 1: "猫坐着", 2: "القطة", 3: "amy"}
    found, details = evaluate.accuracy(args, lm, tokenizer, rows, references, 0.0)
    assert found["rouge1_t0"] == pytest.approx((1 + 1 / 2) / 2)
    assert (details["unread_references"], details["unread_texts"]) == (2, 0)
    assert "hardly reads 2 of 4 references: they are left out" in capsys.readouterr().err
    found, details = evaluate.accuracy(args, lm, tokenizer, rows, {i: "猫坐着" for i in range(4)}, 0.0)
    assert found == {} and details["unread_references"] == 4
    assert evaluate.hardly_read("texts at T = 1", ["喵", "cat", "Кот"], "they score 0, or nearly") == 2
    assert "hardly reads 2 of 3 texts at T = 1: they score 0, or nearly" in capsys.readouterr().err


def test_a_missing_package_is_one_line():
    with pytest.raises(ValueError, match=r"this needs no-such-thing \(.*\): pip install no-such-thing"):
        answers.optional("no_such_thing", "no-such-thing")


def test_mean_se_and_paired_difference():
    values = [0.4, 0.7, 0.1, 0.2]
    mean, se = tables.mean_se(values)
    assert mean == pytest.approx(np.mean(values))
    assert se == pytest.approx(np.std(values, ddof=1) / 2)
    assert tables.mean_se([3.0]) == (3.0, None)
    a, b = {1: 0.5, 2: 0.75, 3: 1.0}, {2: 0.25, 3: 0.0, 9: 5.0}
    assert tables.paired_difference(a, b) == (0.75, pytest.approx(np.std([0.5, 1.0], ddof=1) / np.sqrt(2)), 2)
    with pytest.raises(ValueError, match="no values"):
        tables.mean_se([])
    with pytest.raises(ValueError, match="no seed in common"):
        tables.paired_difference({1: 0.0}, {2: 0.0})


def test_nll_against_a_float64_loop():
    lm = tiny.model("gpt_neox").double()
    x, y, g = [[3, 4, 5], [6], [7, 8]], [[9, 1], [10, 11, 12, 13, 1], [1]], [[20, 21], [10, 22, 12, 23, 1], [24]]
    expected = []
    for x_i, y_i, g_i in zip(x, y, g, strict=True):
        total = 0.0
        for j, token in enumerate(y_i):
            with torch.no_grad():
                logits = lm(torch.tensor([x_i + g_i[:j]])).logits[0, -1]
            total -= float(logits.log_softmax(0)[token])
        expected.append(total)
    lm = lm.float()
    for batch_size in (1, 2, 8):
        assert evaluate.nll(lm, x, g, y, batch_size) == pytest.approx(expected, rel=2e-5)
    assert evaluate.nll(lm, [[3]], [[]], [[]]) == [0.0]
    with pytest.raises(ValueError, match="same length"):
        evaluate.nll(lm, [[3]], [[4]], [[4, 5]])


# ---------------------------------------------------------------------------------------------- metrics of a model
Y = "amy has 25 . first buys 15 : 25 + 15 = 40 , again 25 + 15 = 40 . #### 40"


@pytest.fixture
def toy_set():
    tokenizer = toy.tokenizer()
    rows = [{"prompt": f"amy has {i} eggs .", "response": Y} for i in range(4)]
    encode = [
        {"id": i, "x": tokenizer(r["prompt"])["input_ids"], "y": tokenizer(Y)["input_ids"] + [1]}
        for i, r in enumerate(rows)
    ]
    return tokenizer, datasets.Dataset.from_list(encode), {i: Y for i in range(4)}


def arguments(out, **kw) -> Namespace:
    flags = {"task": "toy", "out": str(out), "max_response": 64, "generations": 2, "seed": 1, "batch_size": 8}
    return Namespace(**flags | {"beta": 0.2, "k": None, "math_verify": None} | kw)


def test_exposure(toy_set, tmp_path):
    tokenizer, rows, _ = toy_set
    lm = tiny.model("gpt_neox", vocab=len(tokenizer))
    none = evaluate.exposure(arguments(tmp_path / "a", beta=0), lm, tokenizer, rows)
    assert none["exposure_gap"] == 0
    assert none["nll_y"] == none["nll_g"] > 0
    half = evaluate.exposure(arguments(tmp_path / "b", beta=0.5), lm, tokenizer, rows)
    assert half["nll_y"] == none["nll_y"]
    assert half["exposure_gap"] == half["nll_g"] - half["nll_y"] != 0
    made = datasets.load_from_disk(str(tmp_path / "b" / "exposure"))
    assert half["nll_g"] == pytest.approx(
        sum(evaluate.nll(lm, made["x"][:], made["g"][:], made["y"][:])) / sum(map(len, made["y"]))
    )


def scripted(monkeypatch, write):
    """generate.generate replaced: `write(prompt)` gives the samples of a prompt."""
    monkeypatch.setattr(evaluate.generate, "generate", lambda model, prompts, **kw: [write(p, kw) for p in prompts])


def test_recovery_by_hand(toy_set, tmp_path, monkeypatch):
    """Row 0 recovers, row 1 restates right but ends wrong, row 2 the other way round, row 3 says nothing of use."""
    tokenizer, rows, references = toy_set

    def write(prompt, kw):
        row = tokenizer.convert_ids_to_tokens(prompt)[2]
        prefix = sums.inject_error(tokenizer, tokenizer(Y)["input_ids"], int(row))
        assert prompt[-len(prefix) :] == prefix
        text = {
            "0": ", again 25 + 15 = 40 . #### 40",
            "1": ", again 25 + 15 = 40 . #### 7",
            "2": ", again 25 + 15 = 1 . #### 40",
            "3": "eggs",
        }
        return [tokenizer(text[row])["input_ids"] + [1]]

    scripted(monkeypatch, write)
    found = evaluate.recovery(arguments(tmp_path), tiny.model("gpt_neox"), tokenizer, rows)
    assert found == {"recovery_restated": 0.5, "recovery_final": 0.5}


def test_recovery_counts_only_whole_toy_responses(toy_set, tmp_path, monkeypatch):
    """Not those that --max-response cut, not those without a result, and nothing of another tokenizer's."""
    tokenizer, rows, _ = toy_set
    lm = tiny.model("gpt_neox")
    scripted(monkeypatch, lambda prompt, kw: [[1]])
    assert evaluate.recovery(arguments(tmp_path / "a"), lm, tiny.word_tokenizer(), rows) == {}
    cut = rows.map(lambda row: {"y": row["y"][:12]})  # ends with `=`
    assert evaluate.recovery(arguments(tmp_path / "b"), lm, tokenizer, cut) == {}
    mixed = rows.map(lambda row: {"y": row["y"] if row["id"] else row["y"][:5]})
    evaluate.recovery(arguments(tmp_path / "c"), lm, tokenizer, mixed)
    assert datasets.load_from_disk(str(tmp_path / "c" / "recovery"))["id"][:] == [1, 2, 3]


def test_accuracy_by_hand(toy_set, tmp_path, monkeypatch):
    """Four problems, three generations with 4, 2 and 0 right; the ± is the population's, as in the paper's Table 2."""
    tokenizer, rows, references = toy_set

    def write(prompt, kw):
        row = int(tokenizer.convert_ids_to_tokens(prompt)[2])
        right, wrong, silent = ([*tokenizer(text)["input_ids"], 1] for text in ("#### 40", "#### 30", "40"))
        return [right, right if row < 2 else wrong, silent[:-1]][: kw["n"]]

    scripted(monkeypatch, write)
    args = arguments(tmp_path, generations=3)
    lm = tiny.model("gpt_neox")
    metrics, details = evaluate.accuracy(args, lm, tokenizer, rows, references, 0.1)
    assert metrics == {"accuracy_t0.1": 0.5}
    assert details["accuracy"] == [1.0, 0.5, 0.0]
    assert details["sd_over_generations"] == pytest.approx(np.std([1, 0.5, 0]))
    assert details["without_answer"] == details["without_eos"] == pytest.approx(1 / 3)
    assert details["tokens"] == pytest.approx((3 + 3 + 1) / 3)
    assert evaluate.accuracy(args, lm, tokenizer, rows, references, 0.0)[0] == {"accuracy_t0": 1.0}  # one generation
    args = arguments(tmp_path / "tldr", task="ultrachat")
    assert evaluate.accuracy(args, lm, tokenizer, rows, references, 0.0)[0] == {}
    assert np.std([7.90, 8.45, 7.74]).round(2) == 0.30  # SFT's row of Table 2


def test_several_generations_by_hand(toy_set, tmp_path, monkeypatch):
    """The same four problems: right of three are 2, 2, 1, 1; the majority is right in two of them."""
    tokenizer, rows, references = toy_set

    def write(prompt, kw):
        row = int(tokenizer.convert_ids_to_tokens(prompt)[2])
        right, wrong = ([*tokenizer(text)["input_ids"], 1] for text in ("#### 40", "#### 30"))
        return [right, right if row < 2 else wrong, wrong][: kw["n"]]

    scripted(monkeypatch, write)
    args = arguments(tmp_path, generations=3, k=[2])
    metrics, details = evaluate.accuracy(args, tiny.model("gpt_neox"), tokenizer, rows, references, 1.0)
    assert metrics == {"accuracy_t1": 0.5, "pass@2_t1": pytest.approx((1 + 1 + 2 / 3 + 2 / 3) / 4), "maj@2_t1": 1.0}
    assert details["pass@k"] == {1: 0.5, 2: metrics["pass@2_t1"], 3: 1.0}
    assert details["maj@k"] == {1: 1.0, 2: 1.0, 3: 0.5}
    assert details["best_of_n"] == 1.0
    assert tables.title("pass@2_t1") == "pass@2, T = 1 (%)"


def test_flexible_match_of_gsm8k(toy_set, tmp_path, monkeypatch):
    tokenizer, rows, references = toy_set
    scripted(monkeypatch, lambda prompt, kw: [tokenizer("now 40")["input_ids"] + [1]])
    args = arguments(tmp_path, task="gsm8k")
    found = evaluate.accuracy(args, tiny.model("gpt_neox"), tokenizer, rows, references, 0.0)[0]
    assert found == {"accuracy_t0": 0.0, "flexible_t0": 1.0}
    scripted(monkeypatch, lambda prompt, kw: [tokenizer("amy has eggs")["input_ids"] + [1]])
    args, silent = arguments(tmp_path / "b", task="gsm8k"), dict.fromkeys(references, "amy has eggs")
    found = evaluate.accuracy(args, tiny.model("gpt_neox"), tokenizer, rows, silent, 0.0)[0]
    assert found == {"accuracy_t0": 0.0, "flexible_t0": 0.0}  # two sides without an answer


def test_train_seconds(tmp_path):
    assert evaluate.train_seconds(str(tmp_path)) is None
    (tmp_path / "log.jsonl").write_text('{"step": 1, "seconds": 1.5}\n{"step": 2, "seconds": 2}\n')
    assert evaluate.train_seconds(str(tmp_path)) == 3.5
    for i in (1, 2):
        (tmp_path / f"D_r_{i}").mkdir()
        (tmp_path / f"D_r_{i}" / "source.json").write_text('{"tokenizer": "x", "seconds": 10}')
    assert evaluate.train_seconds(str(tmp_path)) == 23.5


# ---------------------------------------------------------------------------------------------- table
def result(name, seed, **metrics) -> dict:
    same = {"task": "toy", "test_set": "abc", "beta": 0.2, "generations": 3, "max_response": 96, "n": 8}
    return {"name": name, "seed": seed, "metrics": metrics, **same}


def written(tmp_path, *results) -> list[str]:
    for i, one in enumerate(results):
        (tmp_path / f"{i}.json").write_text(json.dumps(one))
    return [str(tmp_path / f"{i}.json") for i in range(len(results))]


def test_table_arithmetic(tmp_path):
    rng = np.random.default_rng(0)
    a, b, c = rng.random(3), rng.random(4), rng.random(1)
    runs = [result("sft-more", s, accuracy_t0=v, nll_y=v + 1) for s, v in enumerate(a, 1)]
    runs += [result("rac", s, accuracy_t0=v, nll_y=v + 2, train_seconds=9.0) for s, v in enumerate(b, 1)]
    runs += [result("bash", 2, accuracy_t0=c[0], nll_y=1.0)]
    table = tables.summarise(tables.read_results(written(tmp_path, *runs)), "sft-more")
    assert [row["name"] for row in table["rows"]] == ["sft-more", "rac", "bash"]
    assert table["rows"][1]["seeds"] == [1, 2, 3, 4]
    expected = b.mean(), b.std(ddof=1) / 2
    assert table["rows"][1]["metrics"]["accuracy_t0"] == pytest.approx(expected)
    d = b[:3] - a
    assert table["differences"][0]["metrics"]["accuracy_t0"] == pytest.approx((d.mean(), d.std(ddof=1) / math.sqrt(3)))
    assert table["differences"][0]["metrics"].keys() == {"accuracy_t0", "nll_y"}  # the baseline has no train_seconds
    assert table["differences"][0]["seeds"] == [1, 2, 3]
    assert table["differences"][1]["metrics"]["accuracy_t0"] == (pytest.approx(c[0] - a[1]), None)
    lines = tables.markdown(table).splitlines()
    assert lines[2].startswith("| Method | Greedy (%) | NLL given y | Training (s) | Seeds |")
    assert "Accuracies in percent (above temperature 0: of " in lines[0]
    silent = tables.summarise(tables.read_results(written(tmp_path, result("sft", 1, nll_y=1.0))))
    assert "Accuracies in" not in tables.markdown(silent).splitlines()[0]  # where nothing was generated
    assert lines[4] == (
        f"| sft-more | {100 * a.mean():.1f} ± {100 * a.std(ddof=1) / math.sqrt(3):.1f} "
        f"| {1 + a.mean():.4f} ± {a.std(ddof=1) / math.sqrt(3):.4f} | – | 3 |"
    )
    assert lines[6].startswith(f"| bash | {100 * c[0]:.1f} | 1.0000 | – | 1 |")
    assert lines[-1].startswith(f"| bash | {100 * (c[0] - a[1]):+.1f} |")


def test_table_command_writes_what_it_can_read_again(tmp_path, capsys):
    files = written(tmp_path, result("sft-more", 1, accuracy_t0=0.5), result("rac", 1, accuracy_t0=0.75))
    evaluate.table(Namespace(results=files, baseline=None, out=str(tmp_path / "results" / "toy")))
    first = capsys.readouterr().out
    assert "| rac | +25.0 | 1 |" in first  # sft-more is the default baseline
    assert (tmp_path / "results" / "toy.md").read_text() == first
    evaluate.table(Namespace(results=[str(tmp_path / "results" / "toy.json")], baseline=None, out=None))
    assert capsys.readouterr().out == first
    evaluate.table(Namespace(results=files[1:], baseline=None, out=None))  # no baseline, no second table
    assert "Less" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "gsm8k"}, "task gsm8k"),
        ({"test_set": "other"}, "test_set other"),
        ({"beta": 0.5}, "beta 0.5"),
        ({"name": "sft", "seed": 1}, "both are sft, seed 1"),
        ({"name": "sft", "metrics": {"nll_y": 1}}, "only some runs of sft have accuracy_t0, nll_y"),
    ],
)
def test_table_refuses(tmp_path, change, message):
    files = written(tmp_path, result("sft", 1, accuracy_t0=0.5), result("rac", 2, accuracy_t0=0.5) | change)
    with pytest.raises(ValueError, match=message) as error:
        tables.summarise(tables.read_results(files))
    assert "1.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_table_refuses_unknown_baseline_and_other_files(tmp_path):
    runs = tables.read_results(written(tmp_path, result("sft", 1, accuracy_t0=0.5)))
    with pytest.raises(ValueError, match="--baseline rac: no such name; there are sft"):
        tables.summarise(runs, "rac")
    for text in ("[1", '{"name": "x"}', "[]", "3", '{"runs": [7]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad.json: not a results.json"):
            tables.read_results([str(tmp_path / "bad.json")])
    with pytest.raises(OSError):
        tables.read_results([str(tmp_path / "none.json")])


# ---------------------------------------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random toy model and eight problems."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny.model("gpt_neox", vocab=len(toy.WORDS), max_position_embeddings=512, pad_token_id=0).save_pretrained(
        folder / "model"
    )
    toy.tokenizer().save_pretrained(folder / "model")
    rows = sums.problems(8, seed="evaluate test")
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def call(folder, monkeypatch, *more) -> None:
    flags = f"run --model {folder}/model --task toy --data {folder}/test.jsonl --name bash --seed 1".split()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags, *more])
    evaluate.main()


def test_command(folder, monkeypatch, capsys):
    flags = f"run --model {folder}/model --task toy --data {folder}/test.jsonl --name bash --seed 1 --out {folder}/out"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "evaluate.py"), *flags.split()]
    first = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert "bash, seed 1, 8 examples: Greedy (%) " in first.stderr
    results = json.loads((folder / "out" / "results.json").read_text())
    assert list(results["metrics"]) == [
        *("accuracy_t0", "accuracy_t0.1", "accuracy_t1", "recovery_restated", "recovery_final"),
        *("nll_y", "nll_g", "exposure_gap"),
    ]
    assert results["n"] == 8
    assert results["left_out"] == 0
    made = datasets.load_from_disk(str(folder / "out" / "generations-t0.1"))
    assert {"id", "x", "y", "z", "text"} == set(made.column_names)
    assert [len(z) for z in made["z"]] == [3] * 8
    call(folder, monkeypatch, "--out", f"{folder}/out")
    assert capsys.readouterr().err.strip() == f"{folder}/out: already done"
    assert json.loads((folder / "out" / "results.json").read_text()) == results
    with pytest.raises(ValueError, match=r"another run \(--beta 0.2 -> 0.5\)"):
        call(folder, monkeypatch, "--out", f"{folder}/out", "--beta", "0.5")


def test_resumes(folder, tmp_path, monkeypatch):
    """Stopped in the exposure: the finished generations stay, and the results are those of an undisturbed run."""
    out = ("--out", str(tmp_path / "a"), "--temperatures", "0,1", "--generations", "2")

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "nll", killed)
        call(folder, patch, *out)
    before = (tmp_path / "a" / "generations-t1" / "source.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"another run \(--limit 0 -> 4\)"):
        call(folder, monkeypatch, *out, "--limit", "4")
    folders.open_out.lock.close()
    call(folder, monkeypatch, *out)
    assert (tmp_path / "a" / "generations-t1" / "source.json").stat().st_mtime_ns == before
    call(folder, monkeypatch, "--out", str(tmp_path / "b"), *out[2:])
    a, b = (json.loads((tmp_path / x / "results.json").read_text()) for x in "ab")
    assert a == b


def test_bad_input(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"take up to \d+ tokens, the model has 512 positions"):
        call(folder, monkeypatch, "--out", str(tmp_path / "a"), "--max-response", "500")
    with pytest.raises(ValueError, match="belongs to another run|did not make"):
        call(folder, monkeypatch, "--out", str(folder / "model"))
    (tmp_path / "silent.jsonl").write_text('{"prompt": "amy has 3 eggs .", "response": "3"}\n')
    with pytest.raises(ValueError, match="no response of the data holds an answer"):
        call(folder, monkeypatch, "--out", str(tmp_path / "b"), "--data", str(tmp_path / "silent.jsonl"))
    for flags, message in (
        (("--k", "1,4"), "--k 4 is more than --generations 3"),
        (("--math-verify",), "--math-verify is for --task math, not toy"),
        (("--k", "1,2", "--temperatures", "0"), "--k: pass@k is of several --generations above temperature 0"),
        (("--k", "1", "--generations", "1"), "--k: pass@k is of several --generations above temperature 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call(folder, monkeypatch, "--out", str(tmp_path / "c"), *flags)
    for flag, value in (
        ("--temperatures", "0,-1"),
        ("--temperatures", "hot"),
        ("--beta", "1.5"),
        ("--generations", "0"),
        ("--k", "0"),
        ("--x", "many"),
    ):
        with pytest.raises(SystemExit):
            call(folder, monkeypatch, "--out", str(tmp_path / "c"), flag, value)


def test_exposure_of_a_task_without_answers(folder, tmp_path, monkeypatch):
    """Exposure alone, on any data: nothing is generated unless asked for; ROUGE of summaries."""
    rows = sums.problems(3, seed=1)
    (tmp_path / "posts.jsonl").write_text(
        "".join(json.dumps({"post": r["prompt"], "summary": r["response"]}) + "\n" for r in rows)
    )
    columns = ("--columns", "prompt=post,response=summary")
    flags = ("--task", "ultrachat", "--data", str(tmp_path / "posts.jsonl"), *columns)
    call(folder, monkeypatch, "--out", str(tmp_path / "a"), *flags)
    assert json.loads((tmp_path / "a" / "results.json").read_text())["metrics"].keys() == {
        "nll_y",
        "nll_g",
        "exposure_gap",
    }
    assert not list((tmp_path / "a").glob("generations*"))
    flags = ("--task", "tldr", *flags[2:4], "--x", "500")
    call(folder, monkeypatch, "--out", str(tmp_path / "b"), *flags)
    assert (tmp_path / "b" / "generations-t0.01" / "dataset_info.json").exists()
    found = json.loads((tmp_path / "b" / "results.json").read_text())
    assert [*found["metrics"]][:3] == ["rouge1_t0.01", "rouge2_t0.01", "rougeL_t0.01"]
    assert found["x"] == 500 and found["generations"] == 1
    assert tables.title("rougeL_t0.01") == "ROUGE-L, T = 0.01 (%)"


# ---------------------------------------------------------------------------------------------- AlpacaEval
def test_alpaca_outputs(folder, tmp_path, monkeypatch, capsys):
    """The list of objects that alpaca_eval reads: an output for each instruction, in order; the same each time."""
    rows = [{"instruction": f"amy has {i} eggs .", "dataset": "helpful_base", "output": "x"} for i in range(3)]
    (tmp_path / "set.json").write_text(json.dumps(rows))

    def alpaca(name, *more) -> None:
        flags = f"alpaca --model {folder}/model --data {tmp_path}/set.json --name bash --out {tmp_path}/{name}.json"
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags.split(), "--max-response", "9", *more])
        evaluate.main()

    alpaca("a")
    made = json.loads((tmp_path / "a.json").read_text())
    assert [list(row) for row in made] == [["instruction", "output", "generator", "dataset"]] * 3
    assert [row["instruction"] for row in made] == [row["instruction"] for row in rows]
    assert {(row["generator"], row["dataset"]) for row in made} == {("bash", "helpful_base")}
    assert all(isinstance(row["output"], str) for row in made) and len({row["output"] for row in made}) > 1
    alpaca("b", "--batch-size", "1")
    assert json.loads((tmp_path / "b.json").read_text()) == made
    alpaca("c", "--seed", "1", "--limit", "2")
    other = json.loads((tmp_path / "c.json").read_text())
    assert len(other) == 2 and other[0]["output"] != made[0]["output"]
    for flags, message in (
        (("a",), "a.json exists already"),
        (("d", "--instruction", "question"), "row 0: no column 'question' for the prompt"),
        (("e", "--max-prompt", "3"), "no example is left"),
        (("f", "--max-response", "600"), "the model has 512 positions"),
        (("g", "--name", " "), "--name is empty"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            alpaca(*flags)
        assert "\n" not in str(error.value)
    (tmp_path / "h.json.data").mkdir()
    with pytest.raises(ValueError, match="left from a call with other flags"):
        alpaca("h")
    rows.append({"instruction": "amy " * 90, "dataset": "x", "output": ""})
    (tmp_path / "set.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="an answer to each instruction; raise --max-prompt"):
        alpaca("i", "--max-prompt", "60")


# ---------------------------------------------------------------------------------------------- while training
TRAIN = "--task toy --epochs 1 --batch-size 2 --lr 1e-3 --max-response 40 --checkpoint-every 0 --limit 8"


def train(stage, folder, out, monkeypatch, *more) -> list[dict]:
    """The log of a short run on the eight problems."""
    flags = f"--model {folder}/model --data {folder}/test.jsonl --out {out} {TRAIN}".split()
    monkeypatch.setattr(sys, "argv", [f"{stage.__name__}.py", *flags, *more])
    stage.main()
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def test_eval_every(folder, tmp_path, monkeypatch):
    """Held-out numbers in the log of every second step and the last, and the same training as without them."""
    watched = ("--eval-every", "3", "--eval-data", f"{folder}/test.jsonl", "--eval-rows", "5")
    rows = train(sft, folder, tmp_path / "a", monkeypatch, *watched)
    plain = train(sft, folder, tmp_path / "b", monkeypatch)
    held = {"held_nll", "held_gap", "held_accuracy"}
    assert [row["step"] for row in rows if held <= row.keys()] == [3, 4]
    assert not held & rows[0].keys()
    assert [row["loss"] for row in rows] == [row["loss"] for row in plain]

    args = arguments(tmp_path / "c", model=str(tmp_path / "a"), max_response=40)
    tokenizer = fsdp.load_tokenizer(args.model)
    lm = fsdp.load_model(args.model)
    examples, _ = evaluate.data.examples("toy", tokenizer, data=f"{folder}/test.jsonl", limit=5, max_response=40)
    found = evaluate.exposure(args, lm, tokenizer, examples)
    assert rows[-1]["held_nll"] == pytest.approx(found["nll_y"], rel=1e-5)
    assert rows[-1]["held_gap"] == pytest.approx(found["exposure_gap"], abs=1e-5)


def test_eval_every_in_a_stage_that_generates(folder, tmp_path, monkeypatch):
    watched = ("--eval-every", "2", "--eval-data", f"{folder}/test.jsonl", "--beta", "0.5")
    rows = train(bash, folder, tmp_path / "a", monkeypatch, *watched)
    assert ["held_gap" in row for row in rows] == [False, True, False, True]
    assert {"bash", "sft"} <= rows[-1].keys()


def test_watch_knows_a_right_answer(folder, monkeypatch):
    """Three of the eight problems are answered right."""
    problems = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    tokenizer = fsdp.load_tokenizer(str(folder / "model"))
    run = Namespace(model=fsdp.load_model(str(folder / "model")), tokenizer=tokenizer, device="cpu")
    run.args = Namespace(task="toy", data=None, columns="", max_prompt=0, max_response=0, micro_batch_size=4)
    run.args.eval_data, run.args.eval_rows = f"{folder}/test.jsonl", 8
    *held, _ = data.held_out(run.args, tokenizer)
    by_prompt = {problem["prompt"]: i for i, problem in enumerate(problems)}

    def write(prompt, kw):
        i = by_prompt[tokenizer.decode(prompt)]
        return [tokenizer(problems[i]["response"] if i < 3 else "#### 0")["input_ids"] + [1]]

    scripted(monkeypatch, write)
    found = held_out.watch(run, *held)()
    assert found["held_accuracy"] == 3 / 8
    assert found.keys() == {"held_nll", "held_gap", "held_accuracy"}


@pytest.mark.parametrize("summaries", [["猫坐着", "القطة"], ["猫坐着", "amy"]])
def test_watch_says_what_rouge_cannot_read(folder, tmp_path, monkeypatch, capsys, summaries):
    pytest.importorskip("rouge_score", reason="pip install rouge-score")
    rows = [{"post": "amy has 2 eggs", "summary": summary} for summary in summaries]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = fsdp.load_tokenizer(str(folder / "model"))
    run = Namespace(model=fsdp.load_model(str(folder / "model")), tokenizer=tokenizer, device="cpu")
    run.args = Namespace(task="tldr", data=None, columns="", max_prompt=0, max_response=8, micro_batch_size=4)
    run.args.eval_data, run.args.eval_rows = str(tmp_path / "held.jsonl"), 2
    scripted(monkeypatch, lambda prompt, kw: [tokenizer("amy")["input_ids"] + [1]])
    *held, _ = data.held_out(run.args, tokenizer)
    found = held_out.watch(run, *held)()
    lost = sum(summary != "amy" for summary in summaries)
    assert f"hardly reads {lost} of 2 references of --eval-data: they count as 0" in capsys.readouterr().err
    assert found.get("held_rougeL") == (0.5 if lost == 1 else None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--eval-every needs --eval-data"),
        (("--eval-data", "missing.jsonl"), "--eval-every: --eval-data missing.jsonl: no such file"),
        (("--eval-data", "LONG"), "--eval-data: x and y take up to 540 tokens, the model has 512 positions"),
    ],
)
def test_eval_every_bad_input(folder, tmp_path, monkeypatch, flags, message):
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "amy " * 500, "response": "#### 3"}) + "\n")
    flags = [str(long) if flag == "LONG" else flag for flag in flags]
    with pytest.raises(ValueError, match=message):
        train(sft, folder, tmp_path / "a", monkeypatch, "--eval-every", "1", "--max-prompt", "600", *flags)


def test_held_out_rows_are_read_before_the_weights_and_what_was_cut_is_said(folder, tmp_path, monkeypatch, capsys):
    watched = ("--eval-every", "1", "--max-prompt", "600", "--max-response", "4", "--max-steps", "1", "--eval-data")
    rows = [{"prompt": "amy " * n, "response": "amy has 7 eggs . #### 3"} for n in (3, 700)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(sft, folder, tmp_path / "a", monkeypatch, *watched, f"{tmp_path}/held.jsonl")
    said = capsys.readouterr().err
    assert "--eval-data: 1 rows left out: x over 600 tokens (--max-prompt), first: row 1" in said
    assert "--eval-data: 1 responses cut at 4 tokens (--max-response), without EOS" in said
    monkeypatch.setattr(fsdp, "load_model", None)
    with pytest.raises(ValueError, match="--eval-every: --eval-data missing.jsonl: no such file"):
        train(sft, folder, tmp_path / "b", monkeypatch, *watched, "missing.jsonl")


def test_eval_every_on_two_ranks(folder, tmp_path, monkeypatch):
    """The rows are divided over the ranks, even where there are fewer rows than ranks: the numbers are those of one."""
    watched = ["--eval-every", "4", "--eval-data", f"{folder}/test.jsonl", "--eval-rows", "1"]
    (one,) = (row for row in train(sft, folder, tmp_path / "one", monkeypatch, *watched) if "held_nll" in row)
    flags = f"--model {folder}/model --data {folder}/test.jsonl --out {tmp_path}/two {TRAIN}".split()
    launch("sft.py", *flags, *watched, ranks=2, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    two = json.loads((tmp_path / "two" / "log.jsonl").read_text().splitlines()[-1])
    for name in ("held_nll", "held_gap", "held_accuracy"):
        assert two[name] == pytest.approx(one[name], abs=1e-4)
