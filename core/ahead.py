"""Many texts to one call of the tokenizer, for functions that are written for one row.

    ahead = Ahead(tokenizer)
    found = ahead.each(lambda row: encode(ahead, *row), rows)       # as [encode(tokenizer, *row) for row in rows]

A function asks for a text, as it would ask the tokenizer. Where the answer is not known yet, the row is put off; when
all rows have been asked, the texts that they wait for are tokenized together, and those rows begin again. So a text
is tokenized once, whoever asks for it how often, and the definition stays the one that a reader sees.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

TOGETHER = 1000  # texts in one call


class NotYet(BaseException):
    """The text asked for is not tokenized yet. (No Exception: a template's own handler is not to take it.)"""


class Ahead:
    """A tokenizer's stand-in: whatever is not a call is the tokenizer's own."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.known: dict[tuple, array] = {}  # by text and options
        self.wanted: dict[tuple, None] = {}

    def __getattr__(self, name: str) -> object:
        return getattr(self.tokenizer, name)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        key = (text, *options.items())
        if key not in self.known:
            self.wanted[key] = None
            raise NotYet
        return {"input_ids": self.known[key].tolist()}

    def each(self, function: Callable[[object], object], rows: Sequence) -> list:
        """[function(row) for row in rows]"""
        found, left = [None] * len(rows), list(range(len(rows)))
        while left:
            waiting = []
            for i in left:
                try:
                    found[i] = function(rows[i])
                except NotYet:
                    waiting.append(i)
            self.answer()
            left = waiting
        return found

    def answer(self) -> None:
        kinds = {key[1:] for key in self.wanted}
        for options in kinds:
            texts = [key[0] for key in self.wanted if key[1:] == options]
            for start in range(0, len(texts), TOGETHER):
                some = texts[start : start + TOGETHER]
                ids = self.tokenizer(some, **dict(options), return_attention_mask=False)["input_ids"]
                self.known |= {(text, *options): array("i", row) for text, row in zip(some, ids, strict=True)}
        self.wanted.clear()

    def forget(self) -> None:
        """All texts; what was asked without options (does it put a BOS?) is of the tokenizer, and stays."""
        self.known = {key: ids for key, ids in self.known.items() if len(key) == 1}
