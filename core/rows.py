"""Rows of text from a file or a hub set, and what each says: a prompt and its response.

    rows, source = source_rows("train.jsonl", hub=(), split="train")        # nothing is read yet
    columns = named("", prompt="question", response="answer")               # which --columns may change
    for i, row in numbered(rows, source, limit=1000):
        found = pairs("gsm8k", row, columns, f"{source}, row {i}", True)    # [{"prompt": ..., "response": ...}]

Whatever is not as it should be is a ValueError (or OSError) of one line that names the file, the row and the column.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

Turns = list[dict[str, str]]  # of a dialogue: {"role": …, "content": …}


# ---------------------------------------------------------------------------------------------- files
def write_json(path: Path, value: object) -> None:
    """Writes under a temporary name and renames, so that a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(value, indent=2) + "\n")
        partial.rename(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror})") from None


def read(path: str) -> list[dict]:
    """All rows of `each_row`."""
    return list(each_row(path))


def each_row(path: str) -> Iterator[dict]:
    """The rows of a local .jsonl, .json (a list) or .parquet file, read as they are asked for (a .json whole). Raises
    ValueError naming file and line."""
    if path.endswith(".parquet"):
        yield from each_parquet_row(path)
        return
    try:
        with open(path, encoding="utf-8-sig") as file:
            if path.endswith(".json"):
                try:
                    rows = json.load(file)
                except ValueError as error:
                    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
                        raise
                    raise ValueError(f"{path}: not valid JSON ({error})") from None  # a number of 5,000 digits
                if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
                    raise ValueError(f"{path}: a .json file must hold a list of objects")
                yield from rows
                return
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    reason = getattr(error, "msg", error)
                    raise ValueError(f"{path}, line {number}: not valid JSON ({reason})") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number}: must be an object with the columns of the task")
                yield row
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON (nested too deeply)") from None


def each_parquet_row(path: str) -> Iterator[dict]:
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if not file.metadata.num_rows:
                raise ValueError("0 rows")
            for some in file.iter_batches(1000):
                yield from some.to_pylist()
    except Exception as error:
        raise ValueError(f"{path}: not a readable parquet file, or without rows ({error})") from None


def source_rows(path: str | None, hub: tuple[str, ...], split: str) -> tuple[Iterable[dict], str]:
    """The rows of a local file, of another hub set, or (path None) of the hub set `hub`, and the source's name. A file
    is read as its rows are asked for."""
    if path == "":
        raise ValueError("--data is empty: give a file or a hub set, or leave the flag out")
    if path and os.path.splitext(path)[1] in (".jsonl", ".json", ".parquet"):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"--data {path}: no such file")
        rows, source = each_row(path), path
    else:
        if path and os.path.exists(path):
            raise ValueError(f"--data {path}: must be a .jsonl, .json or .parquet file, or the name of a hub set")
        import datasets

        name, *configs = (path,) if path else hub
        source = name
        try:
            parts = [datasets.load_dataset(name, config, split=split) for config in configs or [None]]
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            what = f"--data {path}: no such file, and as a hub set it" if path else f"hub set {name} ({split})"
            raise ValueError(f"{what} could not be loaded: {reason}{'' if path else '; --data takes a file'}") from None
        rows = datasets.concatenate_datasets(parts)
        if len(parts) > 1:  # by turns, in proportion: the first N are of all of them
            place = [(j + 0.5) / len(part) for part in parts for j in range(len(part))]
            rows = rows.select(sorted(range(len(rows)), key=place.__getitem__))
    return rows, source


def numbered(rows: Iterable[dict], source: str, limit: int) -> Iterator[tuple[int, dict]]:
    """The rows with their numbers, up to `limit` of them (0: all). Raises ValueError where there are none."""
    i = -1
    for i, row in enumerate(itertools.islice(rows, limit or None)):
        yield i, row
    if i < 0:
        raise ValueError(f"{source}: no rows")


def ids_of(rows: list[dict], path: object) -> list[int]:
    """The id of each row, by default its index. Raises ValueError where one is no whole number, or there twice."""
    ids = [row.get("id", i) for i, row in enumerate(rows)]
    if not all(isinstance(own, int) for own in ids) or len({*ids}) < len(ids):
        raise ValueError(f"{path}: id must be a whole number, and another one in each row")
    return ids


def read_scores(what: str, path: str, samples: dict[int, int]) -> dict[int, list[float]]:
    """A verifier's scores from a file of {"id", "sample", "score"}, one for each of the samples: {id: how many} ->
    {id: their scores}. Raises ValueError where they are for other rows, or are not finite numbers."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{what}: no such file")
    found: dict[tuple[int, int], float] = {}
    for i, row in enumerate(read(path)):
        if missing := [name for name in ("id", "sample", "score") if name not in row]:
            raise ValueError(f"{what}, row {i}: no {missing[0]}; each row has id, sample (from 0) and score")
        key, score = (row["id"], row["sample"]), row["score"]
        if not all(isinstance(part, int) for part in key):
            raise ValueError(f"{what}, row {i}: id and sample must be whole numbers, not {key[0]!r} and {key[1]!r}")
        if key in found:
            raise ValueError(f"{what}, row {i}: a second score for id {key[0]}, sample {key[1]}")
        if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) < math.inf:
            raise ValueError(f"{what}, row {i}: the score {score!r} is not a finite number")
        found[key] = score
    wanted = {(i, sample) for i, n in samples.items() for sample in range(n)}
    if differ := sorted(wanted ^ found.keys()):
        (one, sample), many = differ[0], f" ({len(differ)} such)" if len(differ) > 1 else ""
        why = "no score for" if differ[0] in wanted else "scores for other rows:"
        raise ValueError(f"{what}: {why} id {one}, sample {sample}{many}")
    return {i: [found[i, sample] for sample in range(n)] for i, n in samples.items()}


# ---------------------------------------------------------------------------------------------- columns
def named(columns: str, **wanted: str) -> dict[str, str]:
    """The column of each key, as --columns says, or by default."""
    for pair in filter(None, columns.split(",")):
        key, _, value = pair.partition("=")
        if key not in wanted or not value:
            raise ValueError(f"--columns {columns}: give it as {','.join(f'{name}=NAME' for name in wanted)}")
        wanted[key] = value
    return wanted


def pairs(task: str, row: dict, wanted: dict[str, str], where: str, need_response: bool) -> list[dict]:
    """`prompt` and `response` of a row: once, unless both are the same column and hold a dialogue.

    Then each assistant turn answers the turns before it: [user Why?, assistant So., user And?, assistant No.] gives So.
    to [Why?], and No. to [Why?, So., And?]. (Where none is needed, and a user turn is last, that is what to answer.)
    """
    name, other = wanted["prompt"], wanted["response"]
    if not isinstance(row.get(name), list):
        return [one_row(row, wanted, where, need_response)]
    if task != "ultrachat":
        raise ValueError(f"{where}: column {name!r} is list, not text; --task ultrachat takes a list of messages")
    turns = dialogue(row[name], f"{where}, {name}")
    asks = bool(turns) and turns[-1]["role"] == "user"
    if name == other and (need_response or not asks):
        answers = [k for k, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not answers:
            raise ValueError(f"{where}: column {name!r} has no assistant turn; remove the row (rows count from 0)")
        return [{"prompt": turns[:k], "response": turns[k]["content"]} for k in answers]
    if not asks:
        raise ValueError(f"{where}: column {name!r} must end with a user turn, as it is the prompt")
    if name == other:
        return [{"prompt": turns, "response": ""}]
    if len(turns) > 2 and isinstance(row.get(other), list):  # its first answer is to another question
        raise ValueError(f"{where}: column {other!r} is list, not text, and the prompt has several turns (--columns)")
    return [{"prompt": turns} | one_row(row, {"response": other}, where, need_response)]


def dialogue(messages: list, where: str) -> Turns:
    """A list of messages, checked: a system turn (an empty one is none), then user and assistant by turns."""
    turns: Turns = []
    for k, message in enumerate(messages):
        at = f"{where}[{k}]"
        if not (isinstance(message, dict) and {"role", "content"} <= message.keys()):
            raise ValueError(f"{at}: must be a message (role, content)")
        role, due = message["role"], "assistant" if turns and turns[-1]["role"] == "user" else "user"
        if role != due and (role != "system" or turns):
            raise ValueError(f"{at}: the role is {role!r}, but it is the {due}'s turn")
        if role != "system" or message["content"]:
            turns.append({"role": role, **one_row(message, {"content": "content"}, at)})
    return turns


def one_row(row: dict, wanted: dict[str, str], where: str, need_response: bool = True) -> dict[str, str]:
    """`prompt` and `response` of a row, checked. `where` names the row in errors. Of columns that are joined, one
    without a value is passed over."""
    texts = {}
    for key, names in wanted.items():
        several, parts = names.split("+"), []
        for name in several:
            if missing(row.get(name)) and key == "response" and not need_response:
                continue
            if name not in row:
                there = ", ".join(row) or "none"
                raise ValueError(f"{where}: no column {name!r} for the {key}; there are {there} (--columns)")
            value = row[name]
            if (key, name) == ("response", "messages") and isinstance(value, list):  # a dialogue: the first answer
                turns = [turn for turn in value if isinstance(turn, dict) and turn.get("role") == "assistant"]
                value = turns[0].get("content") if turns else ""
            if missing(value) and several[1:]:
                continue
            if checked(value, name, where, dialogue=key == "content").strip():
                parts.append(value)
        texts[key] = "\n\n".join(parts)
        if not texts[key] and (key == "prompt" or need_response):
            raise ValueError(f"{where}: empty {key} (column {names!r}); remove the row (rows count from 0)")
    return texts


def optional_texts(row: dict, names: tuple[str, ...], where: str) -> dict[str, str]:
    """The texts of columns that a row need not have, checked; "" where there is none."""
    found = {name: "" if missing(row[name]) else checked(row[name], name, where) for name in names if name in row}
    return {name: text if text.strip() else "" for name, text in found.items()}


def missing(value: object) -> bool:
    """None, and NaN, as which tables write a missing text."""
    return value is None or value != value


def checked(value: object, name: str, where: str, dialogue: bool = False) -> str:
    """The value of a column, where it is a text that can be learnt. dialogue: also one of a dialogue in JSON. Raises
    ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: column {name!r} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        bad = f"column {name!r} is not text at character {error.start} (a lone surrogate)"
        raise ValueError(f"{where}: {bad}; remove the row (rows count from 0)") from None
    if found := re.search("[\ufdd0-\ufdd2]", value):
        bad = f"column {name!r} has U+{ord(found[0]):04X} at character {found.start()}, which is no character"
        raise ValueError(f"{where}: {bad}; remove it")
    if not dialogue and AS_TEXT.fullmatch(value) and all(re.search(key, value) for key in MESSAGE):
        raise ValueError(f"{where}: column {name!r} is a dialogue as text, not a list of messages; parse it first")
    return value


# A list of messages, as JSON or as Python shows it.
AS_TEXT = re.compile(r"""["'\s]*\[\s*\{.*\}\s*\]["'\s]*""", re.DOTALL)
MESSAGE = (r"""["'](role|from)\\*["']\s*:""", r"""["'](content|value)\\*["']\s*:""")
