"""benchmarks/study.py: its grid, its labels on a small D_r, the forked processes, the report."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from datasets import Dataset, load_from_disk

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import study  # noqa: E402

import sums  # noqa: E402
import toy  # noqa: E402
from sums import add  # noqa: E402

CELLS = {cell for cells in study.FACTORS.values() for cell in cells}


def test_no_two_cells_share_a_folder():
    assert len({(cell.start, cell.name) for cell in CELLS}) == len(CELLS)


def test_each_cell_has_its_control():
    """sft-more from the same start; at the same learning rate and number of steps wherever it is run at those."""
    rows = dict.fromkeys((cell.key for cell in CELLS), {})
    for cell in CELLS:
        control = json.loads(study.control(cell, rows))
        assert study.control(cell, rows) in rows
        assert control["method"] == "sft-more" and control["start"] == json.loads(cell.key)["start"]
    assert json.loads(study.control(study.cells(methods="rac", steps=32)[0], rows))["steps"] == 32


@pytest.fixture
def drawn(tmp_path):
    """z of 40 problems, every fifth number of it wrong."""
    rows = []
    for i, row in enumerate(sums.problems(40, "study")):
        x, y = study.ids_of(row["prompt"]), study.ids_of(row["response"] + " <eos>")
        z, numbers = list(y), [j for j, word in enumerate(toy.to_words(y)) if word in toy.NUMBERS]
        for j in numbers[i % 5 :: 5]:
            z[j] = toy.IDS[str((int(toy.WORDS[z[j]]) + 1) % 41)]
        logp = [[-0.01 if j % 2 else -1.0] for j in range(len(z))]
        rows.append({"id": i, "x": x, "y": y, "z": z, "z_bar": y, "top_logp": logp})
    Dataset.from_list(rows).save_to_disk(tmp_path / "drawn" / "D_r_1")
    return tmp_path / "drawn"


def pairs(drawn, labels, problems="twice"):
    folder = drawn.parent / f"{labels}-{problems}"
    study.make_pairs(folder, drawn, labels, drawn, 0, problems)
    made = load_from_disk(str(folder))
    return made, sums.label_quality(toy.tokenizer(), made["y"], made["z"], made["z_bar"])


def test_labels_are_as_good_as_they_are_said_to_be(drawn):
    oracle, quality = pairs(drawn, "oracle")
    assert quality["precision"] == quality["recall"] == 1
    assert oracle["z_bar"][:] == [sums.right_labels(toy.tokenizer(), row["y"], row["z"]) for row in oracle]
    for p in (0.95, 0.6):
        worse, quality = pairs(drawn, f"added-{p}")
        assert quality["precision"] == pytest.approx(p, abs=0.01) and quality["recall"] == 1
        assert worse["z"][:] == oracle["z"][:]
    assert pairs(drawn, "added-0.6-results")[1]["precision"] == pytest.approx(0.6, abs=0.01)


def test_labels_that_are_kept(drawn):
    oracle, current = pairs(drawn, "oracle")[0], pairs(drawn, "current")[0]
    for row, right in zip(pairs(drawn, "results")[0], oracle, strict=True):
        for j, (z, label) in enumerate(zip(row["z"], row["z_bar"], strict=True)):
            after = j > 0 and row["z"][j - 1] == toy.IDS["="]
            assert label == (right["z_bar"][j] if after else z)
    for row, all_of_them in zip(pairs(drawn, "sure-0.9")[0], current, strict=True):
        kept = [label if j % 2 else z for j, (label, z) in enumerate(zip(all_of_them["z_bar"], row["z"], strict=True))]
        assert row["z_bar"] == kept
    for row, right in zip(pairs(drawn, "current-results-sure-0.9")[0], current, strict=True):  # both filters
        for j, (z, label) in enumerate(zip(row["z"], row["z_bar"], strict=True)):
            after = j > 0 and row["z"][j - 1] == toy.IDS["="]
            assert label == (right["z_bar"][j] if after and j % 2 else z)
    arbitrary, _ = pairs(drawn, "oracle", "arbitrary")
    assert arbitrary["z_bar"][:] == arbitrary["y"][:]


@pytest.mark.parametrize("problems", ["twice", "once", "easy", "arbitrary", "apart"])
def test_the_training_sets(tmp_path, problems):
    study.make_data(tmp_path / "data", study.Start(problems, n=30), seed=1)
    sets = {
        s: [json.loads(line) for line in open(tmp_path / "data" / f"{s}.jsonl")] for s in ("train", "valid", "test")
    }
    assert [len(rows) for rows in sets.values()] == [30, study.VALID, study.TEST]
    prompts = [row["prompt"] for rows in sets.values() for row in rows]
    assert len(set(prompts)) == len(prompts)
    responses = [row["response"] for row in sets["train"]]
    assert all(("again" in text) == (problems != "once") for text in responses)
    words = [text.split() for text in responses]
    sums = [w[j - 3 : j + 2] for w in words for j in range(len(w)) if w[j] == "="]
    right = [add(*s[:3]) == int(s[4]) for s in sums]
    assert all(right) == (problems != "arbitrary")
    assert all(int(s[2]) <= 9 for s in sums) == (problems == "easy")
    if problems != "once":
        assert all(study.copied(w) == 1 for w in words)
    assert not (tmp_path / "data" / "second.jsonl").exists()
    for row, w in zip(sets["train"], words, strict=True):  # where the number before a sum comes from
        firsts = [w[j + 1] for j in range(len(w)) if w[j] == ":"]
        before = [w[w.index(".") - 1], *(w[j - 1] for j in range(len(w)) if w[j] == "." and w[j - 2] == "=")]
        if problems == "apart":
            assert re.findall(r"has (\d+) ,", row["prompt"]) == firsts
        else:
            assert firsts == before[: len(firsts)]
        assert row["response"].endswith(f"#### {before[-1]}")


def test_distance():
    """0 for y itself, 1 for nothing, and for one word of n changed 1 / n: both have n words, n - 1 in common."""
    (row,) = sums.problems(1, 0)
    words = row["response"].split()
    other = " ".join(["leo", *words[1:]])
    n = sum(word.isalnum() for word in words)  # ROUGE reads no punctuation

    def of(*texts: str) -> float:
        drawn = Dataset.from_dict({"id": [0] * len(texts), "text": [[text] for text in texts]})
        return study.distance(drawn, [row])

    assert of(row["response"]) == 0 and of("") == 1
    assert of(other) == pytest.approx(1 / n) and of(row["response"], "") == 0.5


def test_the_second_stage_may_have_problems_of_its_own(tmp_path):
    for name, fresh in (("plain", False), ("fresh", True)):
        study.make_data(tmp_path / name, study.Start(n=30, fresh=fresh), seed=1)
    train, second = ((tmp_path / "fresh" / f"{s}.jsonl").read_text().splitlines() for s in ("train", "second"))
    assert train == (tmp_path / "plain" / "train.jsonl").read_text().splitlines()
    assert len(second) == 30 and not set(second) & set(train)


def test_replay_keeps_the_problems_and_adds_documents(tmp_path):
    study.make_data(tmp_path / "data", study.Start(n=20), seed=1)
    study.make_replay(tmp_path / "replay", tmp_path / "data" / "train.jsonl", 1)
    rows = load_from_disk(str(tmp_path / "replay"))
    assert len(rows) == 30
    for i, row in enumerate(rows):
        words = toy.to_words(row["x"])
        assert len(row["y"]) == len(row["y_hat"]) and (words[0] == "reference") == (i >= 20)
        assert i >= 20 or row["y"] == row["y_hat"]
        assert words[-1] == ("?") and row["y"][-1] == toy.IDS["<eos>"]
        if i >= 20:
            y = study.ids_of(" ".join(words[2 : words.index("question")]) + " <eos>")
            assert row["y"] == sums.right_labels(toy.tokenizer(), y, row["y_hat"])


def test_jobs_go_through_their_steps_and_a_failure_ends_its_own_job_alone(tmp_path, capfd):
    def step(path, code=0):
        def call():
            path.write_text(str(os.getpid()))
            sys.exit(code)

        return call

    finished = []
    jobs = [
        ("good", iter([step(tmp_path / "a"), step(tmp_path / "b")]), lambda: finished.append("good")),
        ("bad", iter([step(tmp_path / "c", 2), step(tmp_path / "d")]), lambda: finished.append("bad")),
        ("last", iter([step(tmp_path / "e")]), lambda: finished.append("last")),
    ]
    assert study.schedule(jobs, 2, "test") == 1
    assert sorted(finished) == ["good", "last"] and "bad failed" in capfd.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c", "e"}
    assert len({path.read_text() for path in tmp_path.iterdir()} | {str(os.getpid())}) == 5


def test_older_rows_have_the_defaults_of_later_fields(tmp_path):
    cell = study.cells(study.Start(n=125), "bash")[0]
    row = {"cell": json.loads(cell.key), "seed": 3}
    del row["cell"]["start"]["base"]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert study.read_rows(tmp_path / "rows.jsonl").keys() == {(cell.key, 3)}


def test_the_labels_of_a_teacher_are_from_the_longer_base(tmp_path):
    own, teacher = study.Cell("base", "rac", labels="base"), study.Cell("t", "rac", labels="teacher-plausible-0.1")
    folders = [study.base_of(tmp_path, study.teacher_of(cell), 2).name for cell in (own, teacher)]
    assert folders == ["base-96-B", "base-96-3600-B"]


def test_equal_compute_is_paired_with_the_longer_sft_of_the_same_start():
    def rows(cell, accuracy):
        metrics = ("accuracy_t0", "accuracy_t1", "recovery_restated", "recovery_final")
        return {cell.key: {seed: dict.fromkeys(metrics, accuracy + seed / 10) for seed in (1, 2)}}

    [compute, bash], other = study.cells(methods="sft-compute bash"), study.cells(study.Start("easy"), "bash")[0]
    text = study.compute_table(rows(compute, 0.5) | rows(bash, 0.4) | rows(other, 0.3))
    assert len(text.splitlines()) == 3 and text.count("-10.0 ± 0.0") == 4  # `easy` has no sft-compute here


def test_once_more_says_how_many_rows_came_out_the_same(tmp_path, monkeypatch):
    def run(cells, seeds, out, at_once, path):
        keys = {cell.key for cell in cells}
        mine = [row for (key, seed), row in study.read_rows().items() if key in keys and seed in seeds]
        mine[0] = mine[0] | {"accuracy_t0": 0.123}
        path.write_text("".join(json.dumps(row) + "\n" for row in mine))

    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(study, "ROWS", tmp_path / "rows.jsonl")
    study.again(tmp_path, 1)
    assert "3 of 4 rows" in (tmp_path / "again.md").read_text()


def test_shares_of_nothing_overwrite_nothing(tmp_path):
    before = (study.ROWS.parent / "implausible.json").read_bytes()
    with pytest.raises(ValueError, match="no starts in it"):
        study.shares(tmp_path)
    assert (study.ROWS.parent / "implausible.json").read_bytes() == before


def test_the_tables_follow_from_the_rows():
    assert (study.ROWS.parent / "tables.md").read_text() == study.tables(study.by_cell())
