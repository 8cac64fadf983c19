"""Command-line flags that several commands share, and the types of their values.

Flags stand in named groups, so that --help reads: the paper's, the model, the data, the machine, one GPU, while
training, beyond the paper.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def number(low: float = -math.inf, high: float = math.inf, kind: type = float) -> Callable[[str], float]:
    """An argparse type: a finite number within [low, high]."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
            good = math.isfinite(value) and low <= value <= high
        except (ValueError, OverflowError):  # no number, or a whole one beyond any float
            good = False
        if not good:
            bounds = f" in [{low:g}, {high:g}]" if math.isfinite(high) else f" of at least {low:g}"
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name}{bounds}")
        return value

    return parse


def below_one(text: str) -> float:
    """An argparse type: a number in [0, 1)."""
    value = number(0, 1)(text)
    if value == 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not below 1")
    return value


def above_zero(text: str) -> float:
    """An argparse type: a number over 0."""
    value = number(0)(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return value


count = number(0, kind=int)  # a whole number, 0 included
positive = number(1, kind=int)  # at least one


def new_parser(doc: str) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring as it is written, and takes no abbreviated flags."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=raw, allow_abbrev=False)


def group(p: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """The parser's group of flags of that title, made where there is none."""
    return next((g for g in p._action_groups if g.title == title), None) or p.add_argument_group(title)


def model_flags(p: argparse.ArgumentParser) -> None:
    """What `fsdp.model_of` reads: the flags of every command that runs a model."""
    group(p, "model").add_argument("--model", required=True, help="Hugging Face folder or hub name")
    p = group(p, "machine")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation")
    p.add_argument("--attn-implementation", help="as transformers names it: sdpa, eager, flash_attention_2, ...")
    p.add_argument("--shard", type=count, default=0, help="hybrid sharding: replicas of N-way shards (0: one shard)")
    p.add_argument("--lock-step", action="store_true", help="generate sharded: slow, where no device holds the model")


def data_flags(p: argparse.ArgumentParser, tasks: list[str], task: str | None = None) -> None:
    """Which model reads which examples: the flags of the stages, of evaluate.py and of generate.py."""
    model_flags(p)
    p = group(p, "data")
    p.add_argument("--task", required=not task, default=task, choices=tasks, help="columns, templates, lengths, hub")
    p.add_argument("--data", help="a local .jsonl/.json/.parquet file, or another hub set")
    p.add_argument("--columns", default="", help="prompt=NAME,response=NAME where the file's columns differ")
    p.add_argument("--limit", type=count, default=0, help="use only the first N rows (0: all)")
    p.add_argument("--max-prompt", type=count, default=0, help="tokens of x (0: the task's own)")
    p.add_argument("--max-response", type=count, default=0, help="tokens of y and z (0: the task's own)")
