"""Pairs of answers to one prompt, of which the first is preferred: what dpo.py learns from."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from core.ahead import Ahead
from core.cache import Said, hash_of_functions, hash_of_source, hash_of_tokenizer, tokenised
from core.chat import Remarks, chat, ends
from core.cut import cut
from core.rows import named, numbered, one_row, optional_texts, source_rows
from data import TASKS, encode, qa_f

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
    spec, (hub, split) = TASKS[args.task], PREFERENCES
    rows, source = source_rows(args.data, (hub,), split if args.data in (None, hub) else "train")
    wanted = named(args.columns, prompt="prompt", chosen="chosen", rejected="rejected")
    most = min(args.max_prompt or spec.max_prompt, args.max_length - 1)
    whys = {"long": f"x over {most} tokens (--max-prompt)", "empty": "chosen or rejected is empty"}
    whys["equal"] = "chosen equals rejected"
    whys["cut"] = "chosen and rejected are equal as far as they are read (--max-length, --max-response)"

    def checked(row: dict, i: int) -> dict:
        where = f"{source}, row {i}"
        return row | optional_texts(row, spec.optional, where) | preference(row, wanted, where) | {"row": i}

    def convert(tokenizer: Ahead, some: list[tuple[int, dict]], said: Said) -> list[dict]:
        remarks, columns = Remarks(tokenizer, said.remarks), ("prompt", "chosen", "rejected", *spec.optional)
        some = [(i, remarks.read(checked(row, i), columns)) for i, row in some]
        prompts = tokenizer.each(lambda row: spec.x(row[1], tokenizer, most), some)
        sides = []
        for side in ("chosen", "rejected"):
            texts = [(x, spec.before_response + row[side].strip()) for x, (_, row) in zip(prompts, some)]
            sides.append(tokenizer.each(lambda text: encode(tokenizer, *text), texts))
        kept = []
        for (i, row), (x, y), (_, z) in zip(some, *sides):
            room = min(args.max_response or spec.max_response, args.max_length - len(x))
            if not (row["chosen"] and row["rejected"]):
                said.left_out("empty", i)
            elif len(x) > most:
                said.left_out("long", i)
            elif y[:room] == z[:room]:  # as far as they are read
                said.left_out("equal" if y == z else "cut", i)
            else:
                said.cut += (len(y) > room) + (len(z) > room)
                remarks.tokens(row, x + y + z)
                kept.append({"id": i, "x": x, "y": y[:room], "z": z[:room]})
        return kept

    flags = (args.columns, args.limit, most, args.max_response or spec.max_response, args.max_length)
    code = hash_of_functions(convert, encode, chat, cut, named, spec.x)
    of_task = ("preferences", args.task, spec.before_response, code)
    key = (*of_task, *flags, hash_of_source(rows, source), hash_of_tokenizer(tokenizer), ends(tokenizer))
    found, said = tokenised(key, tokenizer, numbered(rows, source, args.limit), convert)
    notes = [f"{said.kept} pairs, templates of task {args.task}, from {source}", *said.why(whys)]
    if said.cut:
        notes.append(f"{said.cut} responses cut (--max-length, --max-response), without EOS")
    if not said.kept:
        raise ValueError(f"no pair is left: {'; '.join(notes[1:])}")
    return found, notes + Remarks(tokenizer, said.remarks).notes(uses_template=spec.f is qa_f)
