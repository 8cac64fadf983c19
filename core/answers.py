"""Answers and how good they are: what a text answers, whether two answers are the same, pass@k and majority votes.

    gsm8k_answer("... #### 1,234")      "1234"            math_equal("0.5", r"\\frac12")      True
    pass_at_k(n=16, c=4, k=8)           is one of 8 right, estimated from 16 of which 4 are

Pure functions of text and numbers: they can be copied out.
"""

from __future__ import annotations

import importlib
import math
import re
import statistics
from collections.abc import Callable
from types import ModuleType

from core import latex, verify
from core.ranks import first_line


def optional(module: str, package: str) -> ModuleType:
    """A module of an optional package. Raises ValueError, with the pip command, where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"this needs {package} ({first_line(error)}): pip install {package}") from None


# ---------------------------------------------------------------------------------------------- what a text answers
def gsm8k_answer(text: str) -> str | None:
    """The number behind the first `#### `, without commas; None where there is none. Compared as a string."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return found.group(1).replace(",", "") if found else None


def gsm8k_flexible(text: str) -> str | None:
    """The last number in a text, less $, commas and a last point: lm-evaluation-harness's flexible-extract."""
    found = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)
    return found[-1].replace("$", "").replace(",", "").removesuffix(".") if found else None


def math_answer(text: str) -> str | None:
    """What stands in the last \\boxed{} or \\fbox{} that is not empty; without one, behind the last `\\boxed `.

    None if there is none, or the last never closes. A \\boxed of which prose only speaks has no braces, and a word
    behind it: "So \\boxed{5}. (Marked with \\boxed as asked.)" answers 5."""
    boxes = list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))
    for box in reversed(boxes):
        depth, inside = 1, text[box.end() :]
        braces = re.finditer(r"\\[\\{}]|[{}]", inside)  # an escaped brace is a symbol
        while depth and (brace := next(braces, None)):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        answer = None if depth else inside[: brace.start()].strip()
        if answer != "":
            return answer
    bare = [] if boxes else re.findall(r"\\(?:boxed|fbox)\s+(?![a-zA-Z]{2})([^$\n]*)", text)
    return next((answer.strip() for answer in reversed(bare) if answer.strip()), None)


def math_normal(answer: str) -> str:
    """One spelling for the ways to write an answer of MATH, by the rules of core/latex.py: "" where nothing is said."""
    return latex.normal(answer)[0]


def math_equal(a: str | None, b: str | None) -> bool:
    """Are two answers of MATH the same: in one spelling, and not of two names (x = 5 is 5, but not y = 5)?

    No answer equals nothing, not even another."""
    (a, x), (b, y) = (latex.normal(answer or "") for answer in (a, b))
    return bool(a) and a == b and (not x or not y or x == y)


def math_verified(a: str | None, b: str | None) -> bool:
    """The same by Hugging Face's math-verify, which parses both (a = b in value); `--math-verify`.

    What takes it more than some seconds, as 9^{9^{9}} does, is wrong. See core/verify.py."""
    optional("math_verify", "math-verify")
    return bool(a and b) and (a == b or verify.equal(a, b))


def same(a: str | None, b: str | None) -> bool:
    """To the letter. No answer equals nothing, not even another."""
    return bool(a) and a == b


# ---------------------------------------------------------------------------------------------- of several samples
def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): is one of k right, estimated without bias from n samples of which c are right."""
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, not n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def by_score(scores: list[float]) -> list[int]:
    """The samples from the lowest to the highest score; of equal ones the first is the higher, as it wins."""
    return sorted(range(len(scores)), key=lambda i: (scores[i], -i))


def best_of_k(right: list[bool], scores: list[float], k: int) -> float:
    """Is the one of k samples with the highest score right? Estimated without bias from all: where the r-th from below
    is right, C(r, k - 1) of the C(n, k) choices of k have it as their best. pass@k where the scores are `right`."""
    if not 1 <= k <= len(right) == len(scores):
        raise ValueError(f"best-of-k needs 1 <= k <= n, and n scores, not n={len(right)}, k={k}, {len(scores)} scores")
    wins = sum(right[i] * math.comb(r, k - 1) for r, i in enumerate(by_score(scores)))
    return wins / math.comb(len(right), k)


def majority(answers: list[str | None], equal: Callable[[str, str], bool] = same) -> str | None:
    """The most frequent answer, by `equal`; of several the one that came first. None has no vote.

    Equal answers have the same key, so that each is compared with few others: time is linear in their number."""
    key = {same: str, math_equal: math_normal}.get(equal, lambda _: "")
    votes: list[list] = []  # [answer, how many], in order of first occurrence
    groups: dict[str, list[list]] = {}  # key -> those of it
    for answer in answers:
        if answer is not None:
            some = groups.setdefault(key(answer), [])
            group = next((group for group in some if equal(group[0], answer)), None)
            if group:
                group[1] += 1
            else:
                votes.append([answer, 1])
                some.append(votes[-1])
    return max(votes, key=lambda group: group[1])[0] if votes else None


def of_several(answers: list[list[str | None]], right: list[list[bool]], equal: Callable, k: int) -> dict[str, float]:
    """pass@k (from all samples, unbiased) and maj@k (of the first k), in the mean over problems."""
    most = [majority(row[:k], equal) for row in answers]
    return {
        "pass": statistics.fmean(pass_at_k(len(goods), sum(goods), k) for goods in right),
        "maj": statistics.fmean(
            best is not None and goods[row.index(best)] for best, row, goods in zip(most, answers, right, strict=True)
        ),
    }
