"""BoN beyond bon.py's own weights: those of the paper, those for a verifier's score, and what a D_bon holds.

--weights rlb and sft are the two of Chow et al. (arXiv 2412.15287) that have a closed form where the verifier is right
about right and wrong. With p the chance that a sample is wrong, J = 1 - p^N and s = grad log pi,

    g = d log J / d log(1 - p) = N p^(N-1) (1 - p) / (1 - p^N)
    grad log J               = g E[s | right]                          BoN-RLB(P), the positive form
    grad log pi_bon(y)       = s(y) - (1 - g) E[s | right]             BoN-SFT of a right y: SFT less what is known

pi_bon is the distribution of the best of N. RLB(P) drawn from pi_bon instead of pi is grad J. Here p is 1 - c / n, of
the very samples that are learnt, which is biased; bon.py's own weights are not. The weights of `sft` are negative, so
it unlearns right samples that are common: on-policy that is bounded, over many offline steps it is not.

--score FILE is for a verifier that is not the reward: it selects by its score, and what it selects is right or not.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import data
import folders
import sums
from core.answers import by_score, pass_at_k
from core.flags import group
from core.ranks import RANK, print0
from core.rows import read_scores, write_json
from data import Dataset
from evaluate import CHECKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES = 16  # of each prompt, unless --n says so
FEW = 0.1  # share of prompts with a weight below which bon.py warns


# ---------------------------------------------------------------------------------------------- flags
def add_flags(p: argparse.ArgumentParser) -> None:
    g = group(p, "beyond the paper")
    g.add_argument("--weights", choices=["unbiased", "rlb", "sft"], default="unbiased", help="rlb, sft: Chow et al.'s")
    g.add_argument("--score", help="a .jsonl file of id, sample, score for the samples of --pairs: select by it")


def check_flags(args: argparse.Namespace, best_of: int) -> None:
    """Raises ValueError where flags contradict each other."""
    if args.dco:
        if args.pairs or args.z or args.score or args.iterations != 1 or args.weights != "unbiased":
            raise ValueError("--dco draws nothing: it takes no --pairs, --z, --score, --weights or --iterations")
        if args.temperature != 1 or args.n != SAMPLES or args.sft_weight != 1 or args.share_prompt:
            told = "it takes no --temperature, --n, --sft-weight or --share-prompt"
            raise ValueError(f"--dco is one loss, of y alone: {told}")
        return
    if args.score and args.iterations > 1:
        raise ValueError("--score is of the samples of --pairs, and --iterations 2 draws others: give --iterations 1")
    if args.weights == "sft" and args.sft_weight != 1:
        raise ValueError("--weights sft is half of a gradient, y's the other half: it takes no --sft-weight")
    if args.score and not args.pairs:
        raise ValueError("--score is for samples that are there: draw them with --epochs 0, then give --pairs")
    if args.score and args.weights != "unbiased":
        raise ValueError("--score has weights of its own, --weights others: choose")
    if draws(args):
        if args.task not in CHECKS:
            raise ValueError(f"--task {args.task} has no checker of answers; there are {', '.join(sorted(CHECKS))}")
        if args.pairs and not args.best_of:
            raise ValueError("--pairs has weights for an N of its own, and --iterations draws anew: give --best-of N")
        if args.n > 1 and not args.temperature:
            raise ValueError(f"--temperature 0 draws the same {args.n} times: the weights are for samples at 1")
        if args.temperature != 1:
            print0(f"--temperature {args.temperature:g}: the weights are unbiased for samples at temperature 1 alone")
        if best_of > args.n:
            raise ValueError(f"--best-of {best_of} is more than --n {args.n}: N cannot be estimated from fewer samples")


def draws(args: argparse.Namespace) -> bool:
    """Is there an iteration whose samples are not those of --pairs?"""
    return args.iterations > bool(args.pairs)


def references(args: argparse.Namespace) -> dict[int, str]:
    """The text of each row's reference, {} where nothing will be drawn. Raises ValueError where none has an answer."""
    if not draws(args):
        return {}
    rows = data.load_rows(args.task, args.data, "train", args.columns, args.limit)
    found = {row["id"]: row["response"] for row in rows}
    silent = [i for i, text in found.items() if CHECKS[args.task][0](text) is None]
    if len(silent) == len(found):
        raise ValueError(f"no response of the data holds an answer as --task {args.task} writes it")
    if silent:
        print0(f"{len(silent)} references without an answer count as never reached, first: row {silent[0]}")
    return found


# ---------------------------------------------------------------------------------------------- other weights
def g(p: float, best_of: int) -> float:
    """N p^(N-1) (1 - p) / (1 - p^N) = N p^(N-1) / (1 + p + ... + p^(N-1)), which has no 0 / 0 at p = 1."""
    return best_of * p ** (best_of - 1) / sum(p**k for k in range(best_of))


def by_count(right: torch.Tensor, weight: Callable[[int], float]) -> torch.Tensor:
    """weight(c) for the right samples, 0 for the others, c of which are right. right: bool [B, n] -> float32 [B, n]."""
    table = torch.tensor([0.0, *map(weight, range(1, right.shape[1] + 1))], device=right.device)
    return right * table[right.sum(dim=1)][:, None]


def rlb_weights(right: torch.Tensor, best_of: int) -> torch.Tensor:
    """BoN-RLB(P): mean_i w_i s(z_i) = g E[s | right], with p = 1 - c / n."""
    n = right.shape[1]
    return by_count(right, lambda c: g(1 - c / n, best_of) * n / c)


def bon_sft_weights(right: torch.Tensor, best_of: int) -> torch.Tensor:
    """BoN-SFT, beside s(y): mean_i w_i s(z_i) = -(1 - g) E[s | right], with p = 1 - c / n."""
    n = right.shape[1]
    return by_count(right, lambda c: -(1 - g(1 - c / n, best_of)) * n / c)


def rank_weights(right: list[bool], score: list[float], best_of: int) -> list[float]:
    """For J = P(the one of N samples with the highest score is right): mean_i w_i s(z_i) has the mean grad J.

    w_i = N / C(n - 1, N - 1) [R_i C(r_i, N - 1) - sum_{j below i} R_j C(r_j, N - 2)], R_i: is z_i right; r_i: how many
    samples are below it. That is n times the mean, over all N of the n, of R(the best) - R(the best without i): where i
    is the best, is it right, less is the next one right. Scores that are R give bon_weights. Of equals the first wins.
    Below 0 for a wrong sample that wins over a right one.
    """
    n, weight, before = len(right), [0.0] * len(right), 0
    for r, i in enumerate(by_score(score)):
        weight[i] = best_of * (right[i] * math.comb(r, best_of - 1) - before) / math.comb(n - 1, best_of - 1)
        before += right[i] * math.comb(r, best_of - 2) if best_of > 1 else 0
    return weight


# ---------------------------------------------------------------------------------------------- D_bon
def reader(args: argparse.Namespace, weights: Callable[[list[bool]], list[float]], best_of: int) -> Callable:
    """In place of folders.read_pairs: reads and checks a D_bon, and weighs its samples anew where --best-of, --weights
    or --score asks for it."""
    anew = args.best_of or args.weights != "unbiased"
    return partial(read_d_bon, score=args.score, weights=weights if anew else None, best_of=best_of)


def read_d_bon(
    folder: str,
    pair: tuple[str, str],
    tokenizer: PreTrainedTokenizerBase,
    score: str | None,
    weights: Callable[[list[bool]], list[float]] | None,
    best_of: int,
) -> Dataset:
    """A D_bon made before, here or by another program (c and answer may be missing there; right may be 0 and 1). Raises
    ValueError, with the folder and the column or row, where it does not fit."""
    pairs = folders.read_pairs(folder, pair, tokenizer)
    if missing := [name for name in ("z", "right", "weight") if name not in pairs.column_names]:
        there = ", ".join(pairs.column_names)
        raise ValueError(f"--pairs {folder}: no column {', '.join(missing)}; there are {there}")
    first: dict[int, int] = {}
    for i, row in enumerate(pairs):
        where, (z, right, weight) = f"--pairs {folder}, row {i}", (row[name] for name in ("z", "right", "weight"))
        if not all(isinstance(column, list) for column in (z, right, weight)):
            raise ValueError(f"{where}: z, right and weight must be lists, with an entry for each sample")
        if not z or not all(isinstance(own, list) and own for own in z):
            raise ValueError(f"{where}: z must be a list of samples, each a list of token ids, and not empty")
        if not len(z) == len(right) == len(weight):
            raise ValueError(f"{where}: {len(z)} samples z, {len(right)} of right, {len(weight)} of weight")
        if not all(isinstance(token, int) and token >= 0 for own in z for token in own):
            raise ValueError(f"{where}: z holds what is not a token id")
        if not all(r in (0, 1) for r in right):
            raise ValueError(f"{where}: right must say of each sample true or false")
        if not all(isinstance(w, int | float) and math.isfinite(w) for w in weight):
            raise ValueError(f"{where}: the weights are not all finite numbers")
        if (weights or score) and best_of > len(z):
            raise ValueError(f"{where}: {len(z)} samples; --best-of {best_of} needs as many")
        if score and first.setdefault(row["id"], i) != i:
            raise ValueError(f"{where}: of id {row['id']}, as row {first[row['id']]}: whose scores would be whose?")
    right = [[bool(r) for r in row] for row in pairs["right"]]
    pairs = pairs.remove_columns("right").add_column("right", right)
    if "answer" in pairs.column_names and not all(map(one_each, pairs["answer"], right)):
        print0(f"--pairs {folder}: its column answer does not have a text for each sample, and is not read")
        pairs = pairs.remove_columns("answer")
    if score:
        scores = read_scores(f"--score {score}", score, {row["id"]: len(row["z"]) for row in pairs})
        # the positive form: a wrong sample that wins over a right one is not unlearnt
        ranked = (rank_weights(row["right"], scores[row["id"]], best_of) for row in pairs)
        fresh = [[max(w, 0.0) for w in row] for row in ranked]
    elif weights:
        fresh = [weights(row) for row in right]
    else:
        return pairs
    return pairs.remove_columns("weight").add_column("weight", fresh)


def one_each(answers: object, right: list[bool]) -> bool:
    """Is there one answer, a text, for each sample?"""
    return isinstance(answers, list) and len(answers) == len(right) and all(isinstance(a, str) for a in answers)


def describe(
    d_bon: Dataset, best_of: int | None, errs: Callable[[list[int], list[int]], bool] | None = None
) -> dict[str, float]:
    """What a D_bon holds; see `report`. errs(y, z): is anything in z wrong?"""
    n, c = [len(z) for z in d_bon["z"]], [sum(right) for right in d_bon["right"]]
    k = min(best_of or max(n), *n)
    of = [(w, y, z) for y, zs, ws in zip(d_bon["y"], d_bon["z"], d_bon["weight"]) for z, w in zip(zs, ws) if w]
    # what a step reads: equal samples once, and y beside the first
    rows = [len({tuple(z) for z, w in zip(zs, ws) if w}) or 1 for zs, ws in zip(d_bon["z"], d_bon["weight"])]
    total = sum(w for w, *_ in of) or 1.0
    found = {
        "pass@1": statistics.fmean(pass_at_k(n_i, c_i, 1) for n_i, c_i in zip(n, c)),
        f"pass@{k}": statistics.fmean(pass_at_k(n_i, c_i, k) for n_i, c_i in zip(n, c)),
        "none_right": statistics.fmean(c_i == 0 for c_i in c),
        "all_right": statistics.fmean(c_i == n_i for n_i, c_i in zip(n, c)),
        "with_a_weight": statistics.fmean(any(weight) for weight in d_bon["weight"]),
        "mean_weight": statistics.fmean(w for weight in d_bon["weight"] for w in weight),
        "weight_not_y": sum(w for w, y, z in of if z != y) / total,
        "rows_a_prompt": statistics.fmean(rows),
    }
    if errs:
        found["weight_on_errors"] = sum(w for w, y, z in of if z != y and errs(y, z)) / total
    if "answer" in d_bon.column_names:  # in nats: of how the n answers of a prompt are spread over different ones
        counts = [Counter(answers).values() for answers in d_bon["answer"]]
        found["entropy"] = statistics.fmean(-sum(m / sum(ms) * math.log(m / sum(ms)) for m in ms) for ms in counts)
    return found


def report(
    d_bon: Dataset, tokenizer: PreTrainedTokenizerBase, task: str, weights: str, best_of: int | None, path: Path
) -> None:
    """Prints and writes what a D_bon holds: pass@1 and pass@N (best_of None: N is that of the weights; pass@n), shares
    of prompts with no, with only right samples, and with any weight, the mean weight of a sample, how much of the
    weight is on samples other than y, how many rows a step reads of a prompt, the entropy of the answers; on toy and
    sums how much is on samples with an error in them, whose answer is right all the same. Warns where N gives no
    signal."""

    def errs(y: list[int], z: list[int]) -> bool:
        return sums.right_labels(tokenizer, y, z) != z

    known = task in sums.TASKS and all(sums.has_sum(sums.text_of(tokenizer, y)) for y in d_bon["y"])
    found = describe(d_bon, best_of, errs if known else None)
    print0(f"{path.stem}:", ", ".join(f"{key} {value:.4g}" for key, value in found.items()))
    if not any(any(weight) for weight in d_bon["weight"]):
        what = "is right" if found["none_right"] == 1 else "has a weight"
        print0(f"WARNING: no sample of any prompt {what}: there is nothing to learn but y")
    elif found["with_a_weight"] < FEW:
        why = f"none is right in {found['none_right']:.1%} (a larger --n may find one)"
        if weights == "unbiased" and best_of and best_of > 1:
            others = max(0.0, 1 - found["with_a_weight"] - found["none_right"])
            why += f", and too few wrong in {others:.1%} (a smaller --best-of learns from them)"
        print0(f"WARNING: only {found['with_a_weight']:.1%} of the prompts have a sample to learn from; {why}")
    if RANK == 0:
        write_json(path, found)
