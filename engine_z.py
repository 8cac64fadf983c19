"""z from any engine: --z FILE of rac.py, spin.py and bon.py, in place of what the model would draw in iteration 1.

    {"id": 0, "response": "7 .", "finish_reason": "stop"}                   # a line; or with token ids, or several:
    {"id": 0, "responses": [[7, 4, 1], [8, 4]], "finish_reasons": ["stop", "length"]}

A line of generate.py has texts as responses, to be read, and token_ids, which are what is learnt from.

id is the row's, from 0 (`data.load_rows`). finish_reason is "stop" where the response ended by itself, "length" where
it was cut: a text does not show that, token ids do by the token they end with. May be there: prompt (the question, its
text as the model reads it, its token ids, or messages), which must be the row's; drawn_by, {"model", "weights",
"tokenizer"} as generate.py writes it (`drawn_by`), which is compared with --model. Other keys are not read.

The file is read twice, and never held: rank 0 checks all of it before the weights are loaded; then each rank takes what
is its own. Whatever is not as it should be is a ValueError of one line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import data
from core import arrow
from core.chat import ends, response_text, specials
from core.flags import group
from core.ranks import from_first
from core.rows import each_row, numbered
from folders import fingerprint

if TYPE_CHECKING:
    from data import Dataset

DRAWN_BY = ("model", "weights", "tokenizer")
LOOKED_AT, FEW = 200, 8  # responses of token ids whose own text is tokenised again; with fewer nothing is concluded


def add_flag(p: argparse.ArgumentParser) -> None:
    group(p, "data").add_argument("--z", help="a .jsonl file of responses that another engine drew (docs/data.md)")


# ---------------------------------------------------------------------------------------------- writing
def drawn_by(flags: dict, tokenizer) -> dict[str, str]:
    """Who draws, for the file: of a command's flags as folders.given has them."""
    found = {"model": flags["model"], "weights": weights_of(flags), "tokenizer": fingerprint(tokenizer)}
    return {key: value for key, value in found.items() if value}


def weights_of(flags: dict) -> str | None:
    """Size and checksum of a folder's weights, or the commit of a hub model."""
    return flags.get("what --model holds") or flags.get("the revision of --model")


def line(row: dict, reference: str, tokenizer, by: dict[str, str]) -> dict:
    """What generate.py writes for a row (id, x, z: its samples). A text may be read back as other tokens."""
    found = {"id": row["id"], "prompt": tokenizer.decode(row["x"]), "reference": reference}
    found["responses"] = [response_text(tokenizer, z) for z in row["z"]]
    found["finish_reasons"] = ["stop" if z and z[-1] in ends(tokenizer) else "length" for z in row["z"]]
    return found | {"token_ids": row["z"], "drawn_by": by}


# ---------------------------------------------------------------------------------------------- reading
def squeezed(text: str) -> str:
    """Without white space, which tokenizers tidy up as they decode, and in one of Unicode's forms, as some read it."""
    return "".join(unicodedata.normalize("NFKC", text).split())


@dataclasses.dataclass
class File:
    """A --z file and what its rows are read with. n: responses of a row; limit: tokens of one, the end included."""

    path: str
    tokenizer: object
    n: int
    limit: int
    said: Counter = dataclasses.field(default_factory=Counter)  # what there is to say, and how often
    first: dict[str, int] = dataclasses.field(default_factory=dict)  # ... and of which id first
    by: dict[tuple, dict] = dataclasses.field(default_factory=dict)  # who drew
    own: bool = False  # is the row at hand said to be of this very tokenizer?
    prompt: tuple[list[int], str, list[int]] = ([], "", [])  # x of the row at hand, its text, and that read again

    def say(self, what: str, row: int) -> None:
        self.said[what] += 1
        self.first.setdefault(what, row)

    def each(self, wanted: Callable[[int], list[int] | None]) -> Iterator[tuple[int, list[list[int]] | None]]:
        """The id of each row and its responses as token ids, None where wanted(id), which is x, is None."""
        if not os.path.isfile(self.path):
            raise FileNotFoundError(f"--z {self.path}: no such file")
        for i, row in numbered(each_row(self.path), f"--z {self.path}", 0):
            where = f"--z {self.path}, row {i}"
            own = row.get("id")
            if not isinstance(own, int) or isinstance(own, bool):
                raise ValueError(f"{where}: id must be a whole number, that of the row in the data, not {own!r}")
            where, x = f"{where} (id {own})", wanted(own)
            yield own, None if x is None else self.responses(row, x, own, where)

    def responses(self, row: dict, x: list[int], own: int, where: str) -> list[list[int]]:
        """Those of a row, checked, as token ids. x: of the data's row of that id."""
        several = row.get("responses") is not None
        if several == (row.get("response") is not None):
            raise ValueError(f"{where}: must have response, or a list of responses; there are {', '.join(row)}")
        found = row["responses"] if several else [row["response"]]
        if several and row.get("token_ids") is not None:
            found = row["token_ids"]
            if not isinstance(found, list) or not all(isinstance(z, list) for z in found):
                raise ValueError(f"{where}: token_ids must be a list with a list of ids for each response")
        marks = row.get("finish_reasons") if several else [row.get("finish_reason")]
        marks = [None] * len(found) if marks is None and isinstance(found, list) else marks
        if not isinstance(found, list) or not isinstance(marks, list) or len(found) != len(marks):
            raise ValueError(f"{where}: responses and finish_reasons must be lists, with an entry for each response")
        if len(found) != self.n:
            of = f"--n {self.n} needs as many" if self.n > 1 else "one is learnt from"
            raise ValueError(f"{where}: {len(found)} responses; {of}")
        self.check_prompt(row.get("prompt"), x, where)
        by = row.get("drawn_by") or {}
        if not isinstance(by, dict) or not all(isinstance(by.get(key, ""), str) for key in DRAWN_BY):
            raise ValueError(f"{where}: drawn_by must be an object of texts ({', '.join(DRAWN_BY)})")
        self.by[tuple(map(by.get, DRAWN_BY))] = by
        self.own = by.get("tokenizer") == self.vocabulary[1]
        if any(isinstance(z, list) for z in found) and by.get("tokenizer", self.vocabulary[1]) != self.vocabulary[1]:
            raise ValueError(f"{where}: its token ids are of another tokenizer than this model's; give text")
        return [self.ids_of(z, mark, x, own, where) for z, mark in zip(found, marks, strict=True)]

    def __post_init__(self) -> None:
        self.vocabulary = {*self.tokenizer.get_vocab().values()}, fingerprint(self.tokenizer)

    def check_prompt(self, prompt: object, x: list[int], where: str) -> None:
        """Raises ValueError where a row brings another prompt than x."""
        if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
            prompt = prompt[-1].get("content")  # of messages, the last turn
        if isinstance(prompt, list):
            same = prompt == x
        else:
            same = prompt is None or squeezed(str(prompt)) in squeezed(self.tokenizer.decode(x))
        if not same:
            raise ValueError(f"{where}: its prompt is not that of the data's row {where.rpartition('(id ')[2][:-1]}")

    def ids_of(self, z: object, mark: str | None, x: list[int], own: int, where: str) -> list[int]:
        """A response as the model would have drawn it: it ends with a token of chat.ends unless it was cut."""
        end = ends(self.tokenizer)
        if mark not in (None, "stop", "length"):
            raise ValueError(f'{where}: finish_reason {mark!r} is neither "stop" (it ended) nor "length" (it was cut)')
        if isinstance(z, str):
            if mark is None:
                raise ValueError(f'{where}: a text needs finish_reason, "stop" (it ended) or "length" (it was cut)')
            ids = self.from_text(z, x, where)
            if mark == "stop":
                self.say("empty" if not ids else "ended", own)
                ids = [*ids, end[0]]
        else:
            ids = self.from_ids(z, x, where)
            if ids[-1] not in end and mark == "stop":
                self.say("ended", own)
                ids = [*ids, end[0]]
            elif ids[-1] not in end and mark is None and len(ids) < self.limit:
                name = self.tokenizer.convert_ids_to_tokens(end[0])
                raise ValueError(f'{where}: does not end with {name}, and no finish_reason says "length": was it cut?')
        if not ids:
            raise ValueError(f"{where}: a response without any token")
        if len(ids) > self.limit:
            self.say("cut", own)
        self.said["responses"] += 1
        return ids[: self.limit]

    def from_ids(self, z: object, x: list[int], where: str) -> list[int]:
        if not isinstance(z, list) or not z or not all(isinstance(t, int) and not isinstance(t, bool) for t in z):
            raise ValueError(f"{where}: a response must be a text, or a list of token ids that is not empty")
        if wrong := [t for t in z if t not in self.vocabulary[0]]:
            raise ValueError(f"{where}: token id {wrong[0]} is not in this model's vocabulary: another tokenizer's?")
        if early := [t for t in z[:-1] if t in ends(self.tokenizer)]:
            name = self.tokenizer.convert_ids_to_tokens(early[0])
            raise ValueError(f"{where}: goes on after {name}, which ends a response; leave out what follows it")
        if self.said["looked at"] < LOOKED_AT and not self.own:
            self.said["looked at"] += 1
            text = self.tokenizer.decode(z, clean_up_tokenization_spaces=False)
            self.said["same again"] += self.behind(x, text) == z
        return list(z)

    def behind(self, x: list[int], text: str) -> list[int]:
        """data.behind of x as it reads back: SentencePiece may put a space behind a special token there."""
        if self.prompt[0] != x:
            before = self.tokenizer.decode(x, clean_up_tokenization_spaces=False)
            self.prompt = x, before, data.tokenize(self.tokenizer, before)
        return data.behind(self.tokenizer, *self.prompt[1:], text)

    def from_text(self, text: str, x: list[int], where: str) -> list[int]:
        """Token ids of a text behind x, as data.encode has them of a y. Raises ValueError where they are not."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: not text at character {error.start} (a lone surrogate)") from None
        names, pattern = specials(self.tokenizer)
        if special := pattern.search(text):
            told = "let the engine leave special tokens out (skip_special_tokens), or give token ids"
            raise ValueError(f"{where}: holds the special token {special[0]} as text; {told}")
        for name in names:
            if any(text.endswith(name[:k]) for k in range(max(2, (len(name) + 1) // 2), len(name))):
                raise ValueError(f"{where}: breaks off inside of the special token {name}; give token ids")
        ids = self.behind(x, text)
        again = self.tokenizer.decode(ids, skip_special_tokens=True)
        if squeezed(again) != squeezed(text):
            told = f"this model's tokenizer makes {again[:40]!r} of {text[:40]!r}"
            raise ValueError(f"{where}: {told}: its text cannot be read with it")
        return ids


def opened(args: argparse.Namespace, tokenizer) -> File:
    limit = args.max_response or data.TASKS[args.task].max_response
    return File(args.z, tokenizer, getattr(args, "n", 1), limit)


# ---------------------------------------------------------------------------------------------- for a stage
def loading(args: argparse.Namespace, load: Callable) -> Callable:
    """In place of data.load: with --z, the file is checked as the examples are known."""
    if args.z is None:
        return load
    if getattr(args, "pairs", None) is not None:
        raise ValueError("--z brings responses, --pairs whole rows: choose")

    def load_and_check(args: argparse.Namespace, tokenizer) -> tuple[Dataset, list[str]]:
        examples, notes = load(args, tokenizer)
        return examples, [*notes, *from_first(lambda: check(args, tokenizer, examples))]

    return load_and_check


def check(args: argparse.Namespace, tokenizer, examples: Dataset) -> list[str]:
    """Reads the whole file -> notes. Raises ValueError where it is not of these examples, each of them once."""
    file, x, seen, others = opened(args, tokenizer), arrow.Rows(examples).columns["x"], set(), []
    place = {own: i for i, own in enumerate(examples["id"])}
    for own, found in file.each(lambda own: x[place[own]] if own in place else None):
        if own in seen:
            raise ValueError(f"--z {args.z}: a second row of id {own}")
        seen.add(own)
        if found is None:
            others.append(own)
    if others:
        known = {row["id"] for row in data.load_rows(args.task, args.data, "train", args.columns, args.limit)}
        if foreign := [own for own in others if own not in known]:
            raise ValueError(f"--z {args.z}: id {foreign[0]} is no row of the data ({len(foreign)} such)")
    if missing := [own for own in place if own not in seen]:
        raise ValueError(f"--z {args.z}: no response to the row of id {missing[0]} ({len(missing)} such)")
    if file.said["looked at"] >= FEW and 4 * file.said["same again"] < file.said["looked at"]:
        share = f"{file.said['same again']} of {file.said['looked at']}"
        raise ValueError(f"--z {args.z}: only {share} are what this tokenizer makes of their text: another's token ids")
    if file.said["empty"] == file.said["responses"]:
        raise ValueError(f"--z {args.z}: every response is empty")
    return [*notes(file, len(others)), *of_whom(args, file)]


def notes(file: File, others: int) -> list[str]:
    """What was read, and what was done to it."""
    end = file.tokenizer.convert_ids_to_tokens(ends(file.tokenizer)[0])
    texts = {
        "ended": f"ended by themselves without their end: {end} was put behind them",
        "empty": f"are empty: {end} alone",
        "cut": f"cut at {file.limit} tokens (--max-response), without {end}",
    }
    found = [f"{file.said['responses']} responses z from {file.path}"]
    found += [f"{file.said[w]} of them {text}, first: id {file.first[w]}" for w, text in texts.items() if file.said[w]]
    return found + ([f"{others} rows of --z are for rows of the data that were left out"] if others else [])


def of_whom(args: argparse.Namespace, file: File) -> list[str]:
    """Which model drew z, and a warning where it is not this one, or will not be by then."""
    flags = json.loads((Path(args.out) / "args.json").read_text())
    own, told = {"model": flags["model"], "weights": weights_of(flags)}, []
    for by in file.by.values():
        key = "weights" if by.get("weights") and own["weights"] else "model"
        if not by.get(key):
            told.append(f"--z {args.z} does not say which model drew it (drawn_by)")
        elif by[key] != own[key]:
            who = by.get("model") or by[key]
            told.append(f"WARNING: z was drawn by {who}, which is not --model {args.model} as it is: z is off-policy")
    if getattr(args, "refresh_every", 0):
        told.append("--z is for the first D of --refresh-every: those rows alone; the current model draws the later z")
    if getattr(args, "sft_epochs", 0):
        told.append("WARNING: z was drawn before --sft-epochs: it is not of the model that will read it")
    return told


def draw(args: argparse.Namespace, tokenizer, rows: dict[str, Sequence], each: Callable[[int, list], None]) -> list:
    """For `run.offline`: each(i, z) of the i-th row; where a row has --n responses, z is a list of them."""
    place = {own: i for i, own in enumerate(rows["id"])}
    for own, found in opened(args, tokenizer).each(lambda own: rows["x"][place[own]] if own in place else None):
        if found is not None:
            each(place[own], found if hasattr(args, "n") else found[0])
    return []
