"""f(x, y) in one's own words: the file of rac.py --reference-template.

    {x}
    Answer this question based on the following reference response: {y}             a text file: the user's turn
    {"system": "You answer anew.", "user": "{x}\n\nReference: {y}"}                a .json file: with a system turn

{x} stands for the question (of a dialogue, its last user turn; of tldr, the query up to "TL;DR:") and {y} for the
response. Nothing else in braces is replaced, and what x and y hold is not looked at again.
"""

from __future__ import annotations

import json
import os
import re

PARTS = ("system", "user")


def read_template(path: str, chat: bool) -> dict[str, str]:
    """The parts of a template, "" where there is none. chat: does the task have turns? Raises ValueError."""
    where = f"--reference-template {path}"
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{where}: no such file")
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        found = json.loads(text) if path.endswith(".json") else {"user": text.removesuffix("\n")}
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text (byte {error.start})") from None
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({getattr(error, 'msg', error)})") from None
    if not isinstance(found, dict) or not all(isinstance(part, str) for part in found.values()):
        raise ValueError(f"{where}: a .json file must hold an object of texts, system and user")
    if other := sorted(found.keys() - {*PARTS}):
        raise ValueError(f"{where}: {other[0]!r} is no part of a template; there are system and user")
    found = {part: found.get(part, "") for part in PARTS}
    for name, what in {"{y}": "the labels would not know the reference", "{x}": "f(x, y) would not ask it"}.items():
        if not any(name in part for part in found.values()):
            raise ValueError(f"{where}: there is no {name} in it: {what}")
    if not found["user"].strip():
        raise ValueError(f"{where}: the user's turn is empty")
    if found["system"] and not chat:
        raise ValueError(f"{where}: this --task has no turns, and no system text: give the user part alone")
    return found


def fill(part: str, x: str, y: str) -> str:
    """The part with x and y in it, in one pass: a {y} inside of x is x's own."""
    return re.sub(r"\{[xy]\}", lambda found: {"{x}": x, "{y}": y}[found[0]], part)
