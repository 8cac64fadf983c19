"""Rows in Arrow files: read as they were written, kept as they are finished, the same after any kill."""

import json
import os
import random
import signal
import time
import traceback
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

import folders
import tiny
from core import arrow

rng = random.Random(0)


def made(n: int = 2500) -> list[dict]:
    """Rows of token ids, of which some are empty, with lists of lists and [L, K] arrays among them."""
    rows = []
    for i in range(n):
        x, y = ([rng.randrange(50_000) for _ in range(rng.randint(0, 9))] for _ in range(2))
        top = np.array([[t, t + 1, t + 2] for t in y], np.int32).reshape(-1, 3)
        logp = -top.astype(np.float32) / 7
        rows.append({"id": i, "x": x, "y": y, "z": [x, y], "text": str(x), "top": top, "logp": logp})
    return rows


def plain(row: dict) -> dict:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()}


def test_rows_are_those_that_were_written(tmp_path):
    rows = made()
    arrow.write(tmp_path / "a.arrow", [arrow.table(rows[:1000]), arrow.table(rows[1000:1700])])
    arrow.write(tmp_path / "b.arrow", [arrow.table(rows[1700:])])
    arrow.save(tmp_path / "set", [tmp_path / "a.arrow", tmp_path / "b.arrow"])
    data = datasets.load_from_disk(tmp_path / "set")
    assert data.to_list() == [plain(row) for row in rows]
    for source in (data, data.select(range(5, 2400)), data.select([7, 2000, 3]), rows):
        found, expected = arrow.Rows(source), list(source)
        assert len(found) == len(expected)
        assert [plain(row) for row in found] == [plain(row) for row in expected]
        for name in ("x", "y", "z", "top"):
            assert found.lengths[name].tolist() == [len(row[name]) for row in expected]
        assert found.tokens().tolist() == [sum(len(row[c]) for c in ("x", "y", "z", "top", "logp")) for row in expected]
    assert isinstance(arrow.Rows(data)[0]["top"], np.ndarray) and arrow.Rows(data)[0]["logp"].dtype == np.float32
    types = {field.name: field.type for field in data.data.schema}
    assert types["x"] == pa.list_(pa.int32()) and types["top"] == pa.list_(pa.list_(pa.int32(), 3))
    assert not list(tmp_path.rglob("*.partial"))


def test_other_kinds_of_lists():
    """What another program may have written: wide, large, of fixed size, with holes, of text."""
    kinds = {
        "wide": [[1, 2], [3], []], "floats": [[1.5], [], [2.0, 3.0]], "words": [["a"], ["b", "c"], []],
        "holes": [[1, None], None, [2]], "nested": [[[1], [2, 3]], [], [[4]]], "empty": [[], [], []],
    }  # fmt: skip
    for name, rows in kinds.items():
        table = pa.table({name: rows})
        for kind in (table.schema.field(0).type, pa.large_list(table.schema.field(0).type.value_type)):
            found = arrow.Rows(table.cast(pa.schema({name: kind})))
            assert [row[name] for row in found] == [row or [] for row in rows], (name, kind)
    fixed = pa.table({"x": pa.array([[1, 2], [3, 4]], pa.list_(pa.int64(), 2))})
    assert [row["x"] for row in arrow.Rows(fixed)] == [[1, 2], [3, 4]]


def test_differing_tokens():
    a = [[rng.randrange(3) for _ in range(rng.randint(0, 6))] for _ in range(3000)]
    b = [[rng.randrange(3) for _ in row] if rng.random() < 0.7 else row[:-1] for row in a]
    rows = arrow.Rows(pa.concat_tables([pa.table({"a": a[:10], "b": b[:10]}), pa.table({"a": a[10:], "b": b[10:]})]))
    expected = [sum(s != t for s, t in zip(p, q)) if len(p) == len(q) else -1 for p, q in zip(a, b)]
    assert arrow.differing(rows.columns["a"], rows.columns["b"]).tolist() == expected


def test_a_file_that_does_not_fit_is_one_line_and_leaves_nothing(tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="a.arrow cannot be written .*File too large") as error:
            arrow.write(tmp_path / "a.arrow", [arrow.table(made())])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ offline data sets
N, MODEL, TOKENIZER = 300, tiny.model("llama"), tiny.word_tokenizer()


def given() -> datasets.Dataset:
    rows = [{"id": i, "x": [i % 50] * (1 + i * 7 % 13)} for i in range(N)]
    return datasets.Dataset.from_list(rows)


def queue(done: Path, crash_after: int = -1, wait: float = 0.0):
    """A decoder that finishes rows in an order of its own, and notes each."""

    def draw(rows, each):
        order = sorted(range(len(rows["id"])), key=lambda i: rows["id"][i] * 7919 % 311)
        for k, i in enumerate(order):
            if k == crash_after:
                raise KeyboardInterrupt
            time.sleep(wait)
            with open(done, "a") as file:
                file.write(f"{rows['id'][i]}\n")
            each(i, [*rows["x"][i], rows["id"][i]])
        return []

    return draw


def label(rows):
    """Depends on the chunk, as a batch's rounding does."""
    return [row | {"z_bar": [sum(len(other["z"]) for other in rows)] * len(row["z"])} for row in rows]


def expected() -> list[dict]:
    rows = [row | {"z": [*row["x"], row["id"]]} for row in given()]
    return [row for start in range(0, N, 40) for row in label(rows[start : start + 40])]


def run_offline(folder: Path, **kw) -> datasets.Dataset:
    kw = {"make": label, "rows": given(), "model": MODEL, "tokenizer": TOKENIZER} | kw
    return folders.offline(folder, chunk=40, **kw)


def test_draw_then_make(tmp_path):
    """In order whatever the order of finishing; what was finished before an interruption is not drawn again."""
    done = tmp_path / "done"
    with pytest.raises(KeyboardInterrupt):
        run_offline(tmp_path / "D", z=queue(done, crash_after=100))
    found = run_offline(tmp_path / "D", z=queue(done))
    assert found.to_list() == expected() and found.column_names == ["id", "x", "z", "z_bar"]
    ids = [int(line) for line in done.read_text().split()]
    assert sorted(ids) == list(range(N))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["D", "done"]
    assert run_offline(tmp_path / "D", make=None).to_list() == found.to_list()  # it is read
    alone = run_offline(tmp_path / "alone", make=None, z=queue(done))
    assert alone.to_list() == [{key: row[key] for key in ("id", "x", "z")} for row in expected()]

    def at_once(rows, each):
        return [[*x, i] for x, i in zip(rows["x"], rows["id"], strict=True)]

    listed = run_offline(tmp_path / "listed", make=None, z=at_once)
    assert listed.to_list() == alone.to_list()
    assert json.loads((tmp_path / "alone" / "source.json").read_text())["seconds"] > 0


@pytest.mark.parametrize("keep", [0.0, 0.05])
def test_kills_while_drawing_and_making(tmp_path, monkeypatch, keep):
    """SIGKILL at many moments: the same set, no row that was on disk drawn twice, nothing left behind."""
    monkeypatch.setattr(folders, "KEEP", keep)

    def slow(rows):
        time.sleep(0.05)
        return label(rows)

    done, kills, rank = tmp_path / "done", 0, random.Random(keep)
    done.touch()
    while True:
        child = os.fork()
        if not child:
            code = 1
            try:
                run_offline(tmp_path / "D", z=queue(done, wait=0.003), make=slow)
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        end = time.time() + rank.uniform(0.05, 0.6)
        status = None
        while status is None and time.time() < end:
            pid, found = os.waitpid(child, os.WNOHANG)
            status = found if pid else None
            time.sleep(0.002)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
            continue
        assert status == 0, "see what is printed"
        break
    assert kills >= 3
    assert datasets.load_from_disk(tmp_path / "D").to_list() == expected()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["D", "done"]
    again = len(done.read_text().split()) - N  # those that were drawn and not yet written when the kill came
    assert again <= kills * (1 if keep == 0 else 40)


# ------------------------------------------------------------------------------------------------ checks
@pytest.mark.parametrize("wrong", "nothing negative large empty missing hole uneven floats text".split())
def test_pairs_are_checked_as_row_by_row(tmp_path, wrong):
    """The fast check is taken at its word only where it finds nothing."""
    rows = [{"x": [3, 4], "y": [5], "z": [6, 7, i % 9], "z_bar": [6, 8, i % 9]} for i in range(2500)]
    change = {"negative": {"y": [-1]}, "large": {"x": [3, 99999]}, "empty": {"z": [], "z_bar": []}}
    change |= {"missing": {"y": None}, "hole": {"x": [None, 3]}, "uneven": {"z": [3]}}
    rows[1700] |= change.get(wrong, {})
    data = datasets.Dataset.from_list(rows)
    if wrong in ("floats", "text"):
        data = data.remove_columns("y").add_column("y", [[0.5]] * 2500 if wrong == "floats" else ["a"] * 2500)
    data.save_to_disk(tmp_path / "D")
    columns, pair = {"x", "y", "z", "z_bar"}, ("z", "z_bar")
    assert folders.fits(arrow.Rows(data), columns, pair, len(TOKENIZER)) == (wrong == "nothing")
    if wrong == "nothing":
        assert folders.name_misfit("D", data, columns, pair, len(TOKENIZER)) is None
        assert folders.read_pairs(str(tmp_path / "D"), pair, TOKENIZER)["id"][:] == list(range(2500))
        return
    row = 0 if wrong in ("floats", "text") else 1700
    with pytest.raises(ValueError, match=f"--pairs .*D, row {row}: "):
        folders.read_pairs(str(tmp_path / "D"), pair, TOKENIZER)


def test_rows_are_checked_against_the_model_as_row_by_row():
    from core import fsdp

    model = tiny.model("llama", vocab=60, max_position_embeddings=20)
    rows = [{"id": i, "x": [5] * (1 + i % 5), "f": [6] * (2 + i % 7), "y": [7] * (1 + i % 9)} for i in range(300)]
    fsdp.check_rows(model, datasets.Dataset.from_list(rows), max_new_tokens=12)
    with pytest.raises(ValueError, match=r"row 6: f\(x, y\) and z take up to 21 tokens"):
        fsdp.check_rows(model, datasets.Dataset.from_list(rows), max_new_tokens=13)
    for change, message in (({"x": [3] * 18}, "row 40: x and y take up to 23"), ({"f": [60] * 3}, None),
                            ({"y": [60]}, "row 40: x and y hold token id 60")):  # fmt: skip
        changed = [row | (change if row["id"] == 40 else {}) for row in rows]
        if message is None:
            fsdp.check_rows(model, datasets.Dataset.from_list(changed))  # ids of f are the tokenizer's own
            continue
        with pytest.raises(ValueError, match=message):
            fsdp.check_rows(model, datasets.Dataset.from_list(changed))
