"""Pairs of answers to one prompt, of which the first is preferred: what dpo.py learns from."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import numpy as np

from data import TASKS, encode, qa_f
from lib.chat import Remarks
from lib.rows import named, one_row, optional_texts, source_rows

if TYPE_CHECKING:
    from datasets import Dataset

PREFERENCES = ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs")


def preference(row: dict, wanted: dict[str, str], where: str) -> dict[str, str]:
    """`prompt`, `chosen` and `rejected` of a row, as text; a blank side is "".

    Each may be text or a list of messages. Of a side's list the last turn is the answer, and what stands before it is
    the prompt: one user turn. Example: {"prompt": "Why?", "chosen": [{"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."}], "rejected": "No."} gives Why?, So. and No.
    """
    found: dict[str, str] = {}
    for side in ("chosen", "rejected"):
        columns = {"prompt": row.get(wanted["prompt"]), side: row.get(wanted[side])}
        if isinstance(columns[side], list) and len(columns[side]) > 1:
            columns["prompt"] = []  # the side brings its own
        turns: list[dict] = []
        for (key, value), role in zip(columns.items(), ("user", "assistant")):
            if value is None:
                there = ", ".join(name for name in row if row[name] is not None) or "none"
                raise ValueError(f"{where}: no {key} (column {wanted[key]!r}); there are {there} (--columns)")
            turns += value if isinstance(value, list) else [{"role": role, "content": value}]
        if not all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns):
            raise ValueError(f"{where}: {side} or its prompt holds a turn that is no message (role, content)")
        turns = [turn for turn in turns if turn["role"] != "system" or turn["content"]]
        if [turn["role"] for turn in turns] != ["user", "assistant"]:
            roles = ", ".join(str(turn["role"]) for turn in turns) or "none"
            raise ValueError(f"{where}: {side} must answer one user turn, and no system turn; its turns are {roles}")
        texts = {"prompt": turns[0]["content"], side: turns[1]["content"]}
        texts = one_row(texts, {key: key for key in texts}, where, need_response=False)
        if found.get("prompt", texts["prompt"]) != texts["prompt"]:
            raise ValueError(f"{where}: chosen and rejected answer different prompts")
        found |= texts
    return found


def load_preferences(args: argparse.Namespace, tokenizer) -> tuple[Dataset, list[str]]:
    """Tokenised pairs with the flags of dpo.py: columns id, x, y (the chosen response) and z (the rejected one), both
    cut to what --max-length leaves beside x; and notes on what was cut or left out. Raises ValueError."""
    from datasets import Dataset

    spec, (hub, split) = TASKS[args.task], PREFERENCES
    rows, source = source_rows(args.data, (hub,), split if args.data in (None, hub) else "train")
    wanted = named(args.columns, prompt="prompt", chosen="chosen", rejected="rejected")
    most = min(args.max_prompt or spec.max_prompt, args.max_length - 1)
    kept, cut, long, empty, equal, remarks = [], 0, [], [], [], Remarks(tokenizer)
    for i in range(min(len(rows), args.limit or len(rows))):
        where = f"{source}, row {i}"
        row = rows[i] | optional_texts(rows[i], spec.optional, where) | preference(rows[i], wanted, where) | {"row": i}
        row = remarks.read(row, ("prompt", "chosen", "rejected", *spec.optional))
        y, z = (spec.before_response + row[side].strip() for side in ("chosen", "rejected"))
        prompt = spec.x(row, tokenizer, most)
        (x, y), (_, z) = (encode(tokenizer, prompt, side) for side in (y, z))
        room = min(args.max_response or spec.max_response, args.max_length - len(x))
        if not (row["chosen"] and row["rejected"]):
            empty.append(i)
        elif len(x) > most:
            long.append(i)
        elif y[:room] == z[:room]:  # as far as they are read
            equal.append(i)
        else:
            cut += (len(y) > room) + (len(z) > room)
            tokens = {"x": x, "y": y[:room], "z": z[:room]}
            kept.append({"id": i} | {name: np.asarray(ids, np.int32) for name, ids in tokens.items()})
    notes = [f"{len(kept)} pairs, templates of task {args.task}, from {source}"]
    whys = (f"x over {most} tokens (--max-prompt)", "chosen or rejected is empty", "chosen equals rejected")
    for why, ids in zip(whys, (long, empty, equal)):
        if ids:
            notes.append(f"{len(ids)} rows left out: {why}, first: row {ids[0]}")
    if cut:
        notes.append(f"{cut} responses cut (--max-length, --max-response), without EOS")
    if not kept:
        raise ValueError(f"no pair is left: {'; '.join(notes[1:])}")
    return Dataset.from_list(kept), notes + remarks.notes(uses_template=spec.f is qa_f)
