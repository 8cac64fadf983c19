"""RAC beyond the paper: other labels than those of Algorithm 2, and how good labels are. All of it is off by default.

Each option is kept for a reader who would miss it, or for a result that rests on it (docs/toy.md, docs/study.md):
- --labels topk: where Eq. 7 learns z_bar, learn the distribution that z_bar is the arg max of: its --topk largest
  probabilities, from the same pass, kept in D_r as top_ids and top_logp. With --unmasked that is on-policy
  self-distillation with the reference answer as privileged context, which those who come from distillation look for.
- --kl reverse: theirs, too; see `rac_soft_loss`. On the toy task it halves what RAC loses in sampling.
- --labels-from start: label with the weights of --model, which this run has not worn yet. z is still the current ones'
  (OUT/D_z_2, ...). It answers whether training spoils the labels; on the toy task it does not matter. It takes a second
  model while it labels, but not with --lora-rank: there the adapter is switched off.
- --first-correction-only: of each z learn the first correction alone: the study's test of what later ones teach.
- --plausible P: keep a correction only where the labelling model, not shown the reference, gives it at least P. What y
  says next is often no answer to a z that has gone elsewhere; the model can only learn from it to doubt its own words.
- --reference-template FILE: f(x, y) in one's own words; see core/reference.py.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

import folders
import sums
from batches import Rows, by_token, nll_by_token
from core import arrow, lora
from core.decode_step import known
from core.flags import group, number, positive
from core.fsdp import inference, model_of
from core.ranks import RANK, WORLD, all_sum, print0
from core.reference import read_template
from core.rows import write_json
from data import TASKS, Dataset, qa_f
from ddp_utils import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Label precision below which RAC warns: Eq. 7 keeps just the labels that differ from z, whether or not they are right
# (docs/study.md: with random wrong labels break-even is near 0.8 for greedy accuracy and near 1 for sampling; with a
# model's own wrong labels greedy accuracy suffered at 0.9, too).
POOR = 0.9
# A correction is implausible where the model itself, not shown the reference, gives it less than this probability.
IMPLAUSIBLE, SAMPLE = 0.01, 200  # measured on so many rows
SOFT = ("top_ids", "top_logp")  # the columns of --labels topk


# ---------------------------------------------------------------------------------------------- flags
def add_flags(p: argparse.ArgumentParser) -> None:
    g = group(p, "beyond the paper")
    g.add_argument("--labels", choices=["hard", "topk"], default="hard", help="z_bar, or the distribution it tops")
    g.add_argument("--topk", type=positive, help="K of --labels topk (default: 16)")
    g.add_argument("--kl", choices=["forward", "reverse"], help="of --labels topk (default: forward)")
    g.add_argument("--labels-from", choices=["current", "start"], default="current", help="whose labels")
    g.add_argument("--first-correction-only", action="store_true", help="one correction of each z")
    g.add_argument("--plausible", type=number(0, 1), default=0.0, help="least probability of a correction")
    g.add_argument("--reference-template", help="a file: f(x, y) in other words than the paper's, with {x} and {y}")


def check_flags(args: argparse.Namespace) -> None:
    """Raises ValueError where flags contradict each other. Of --reference-template the text takes the file's place: it
    is kept in args.json, and a run goes on with the same one only."""
    if args.unmasked and args.first_correction_only:
        raise ValueError("--unmasked learns every token, --first-correction-only one: choose")
    if args.unmasked and args.plausible:
        raise ValueError("--unmasked learns every label, --plausible leaves some out: choose")
    if args.labels == "hard" and (args.topk or args.kl):
        raise ValueError("--topk and --kl are for --labels topk")
    args.topk = args.topk or 16
    if args.reference_template is not None:
        if args.pairs is not None and args.iterations == 1:
            raise ValueError("--pairs brings labels, --reference-template is for labels made here: choose")
        args.reference_template = read_template(args.reference_template, TASKS[args.task].f is qa_f)


def check_labels(run: Run, pairs: Dataset | None) -> None:
    """Raises ValueError where --labels topk does not fit the model, or the rows of --pairs."""
    args = run.args
    if args.labels != "topk":
        return
    size, absent = run.model.config.vocab_size, run.model.absent
    named = size - (0 if absent is None else len(absent))  # a vocabulary may be padded
    if args.topk > named:
        raise ValueError(f"--topk {args.topk}: the model's vocabulary has {named} tokens")
    if pairs is None:
        return
    if not set(SOFT) <= set(pairs.column_names):
        raise ValueError(f"--pairs {args.pairs}: was not made with --labels topk")
    for i, row in enumerate(arrow.Rows(pairs)):
        if not fits(row, args.topk, size):
            told = f"top_ids and top_logp must be {args.topk} token ids and log-probabilities for each token of z"
            raise ValueError(f"--pairs {args.pairs}, row {i}: {told} (--labels topk --topk {args.topk})")


def fits(row: dict, k: int, size: int) -> bool:
    """Are a row's top_ids and top_logp [L, K] each, for its L tokens of z, and of a vocabulary of that size?"""
    try:
        ids, logp = (np.asarray(row[name]) for name in SOFT)
    except ValueError:  # lists of several lengths
        return False
    if not row["z"]:
        return ids.size == logp.size == 0
    if not (ids.shape == logp.shape == (len(row["z"]), k) and ids.dtype.kind == "i" and logp.dtype.kind == "f"):
        return False
    return bool(((ids >= 0) & (ids < size)).all() and np.isfinite(logp).all() and (logp < 1e-3).all())


# ---------------------------------------------------------------------------------------------- what a D_r holds
def corrections(z: Rows, z_bar: Rows) -> int:
    """Tokens that differ."""
    return sum(a != b for rows in zip(z, z_bar, strict=True) for a, b in zip(*rows, strict=True))


def describe(d_r: Dataset) -> dict[str, float]:
    """What a D_r holds: the share of tokens corrected, of z equal to y, of rows without any correction."""
    y, z, z_bar = (arrow.Rows(d_r).columns[name] for name in ("y", "z", "z_bar"))
    wrong = arrow.differing(z, z_bar)  # [rows]
    return {
        "tokens_corrected": int(wrong.sum()) / int(z.lengths.sum()),
        "z_equals_y": int((arrow.differing(z, y) == 0).sum()) / len(d_r),
        "rows_without_correction": int((wrong == 0).sum()) / len(d_r),
    }


def report(
    d_r: Dataset, tokenizer: PreTrainedTokenizerBase, task: str, path: Path, implausible: float | None = None
) -> None:
    """Prints and writes what a D_r holds; on toy and sums, where the right labels are known, also how good they are.
    implausible: as that function finds it; where it is None, as of a run that goes on, the file's stays."""
    found = describe(d_r)
    if implausible is None and path.exists():
        implausible = json.loads(path.read_text()).get("implausible")
    if implausible is not None:
        found["implausible"] = implausible
    rows = [row for row in d_r if sums.has_sum(sums.text_of(tokenizer, row["y"]))] if task in sums.TASKS else []
    if rows:
        found |= sums.label_quality(tokenizer, *([row[name] for row in rows] for name in ("y", "z", "z_bar")))
    print0(f"{path.stem}:", ", ".join(f"{key} {value:.4g}" for key, value in found.items() if value is not None))
    if not found["tokens_corrected"]:
        print0("WARNING: no token of z is corrected: Eq. 7 has nothing to learn")
    if found.get("precision") is not None and found["precision"] < POOR:
        print0(
            f"WARNING: only {found['precision']:.0%} of the labels that Eq. 7 keeps are right; the others teach errors"
        )
    if RANK == 0:
        write_json(path, found)


# ---------------------------------------------------------------------------------------------- which corrections
def leave_out(args: argparse.Namespace, model: torch.nn.Module, rows: list[dict]) -> list[dict]:
    """The rows, with --plausible without the labels that the model, not shown the reference, thinks less likely."""
    if not args.plausible:
        return rows
    x, z, z_bar = ([row[name] for row in rows] for name in ("x", "z", "z_bar"))
    z_bar = plausible_labels(model, x, z, z_bar, args.plausible, args.micro_batch_size)
    return [row | {"z_bar": kept} for row, kept in zip(rows, z_bar, strict=True)]


def implausible(run: Run, d_r: Dataset, name: str) -> float | None:
    """Says and returns which share of the corrections, in SAMPLE rows, is implausible. None where there is no
    correction, or the weights that D_r is for have moved on. Called by all ranks."""
    if run.moved_on:
        return None
    some = d_r.select(range(0, len(d_r), math.ceil(len(d_r) / SAMPLE))[RANK::WORLD])
    with inference(run.model):
        counted = count_plausible(run.model, *(some[c][:] for c in ("x", "z", "z_bar")), run.args.micro_batch_size)
    found, plausible = all_sum(torch.tensor(counted, dtype=torch.float64, device=run.device)).tolist()
    if not found:
        return None
    share, hint = 1 - plausible / found, ""
    if share > 0.5 and not run.args.plausible:
        costs = "to learn these costs accuracy in sampling (docs/study.md)"
        hint = f". WARNING: {costs}; --plausible leaves such ones out"
    said = f"{share:.0%} of the corrections have a chance under {IMPLAUSIBLE} without the reference"
    print0(f"{name}: {said}{hint}")
    return share


def plausible_labels(
    model: torch.nn.Module,
    x: list[list[int]],
    z: list[list[int]],
    z_bar: list[list[int]],
    p: float,
    batch_size: int = 8,
) -> list[list[int]]:
    """z_bar^j where p(z_bar^j | x, z^{<j}) >= p; elsewhere z^j, which Eq. 7 masks. One pass over [x, z]."""
    kept: list[list[int]] = [[] for _ in z]
    for i, (nll,) in by_token(model, x, z, nll_by_token, z_bar, batch_size=batch_size):
        q = (-nll).exp().tolist()
        kept[i] = [label if q_j >= p else own for label, own, q_j in zip(z_bar[i], z[i], q, strict=True)]
    return kept


def count_plausible(
    model: torch.nn.Module, x: list[list[int]], z: list[list[int]], z_bar: list[list[int]], batch_size: int = 8
) -> tuple[int, int]:
    """How many corrections there are, and to how many the model, not shown the reference, gives IMPLAUSIBLE or more."""
    kept = plausible_labels(model, x, z, z_bar, IMPLAUSIBLE, batch_size)
    return corrections(z, z_bar), corrections(z, kept)


def to_first_correction(z: list[int], z_bar: list[int]) -> tuple[list[int], list[int]]:
    """`to_last_correction` for the first one: the mask of Eq. 7 leaves that one alone."""
    n = min((j + 1 for j in range(len(z)) if z[j] != z_bar[j]), default=0)
    return z[:n], z_bar[:n]


# ---------------------------------------------------------------------------------------------- labels of the start
def labelled_by_start(run: Run, iteration: int, examples: Dataset, draw: Callable, label: Callable) -> Dataset:
    """D_r with the current model's z, OUT/D_z_k, and the labels of --model."""
    name = f"D_r_{iteration}"
    if (run.out / name).exists():
        return run.offline(name, None, examples)
    drawn = run.offline(f"D_z_{iteration}", None, examples, z=draw)
    if lora.layers(run.model):  # the model of the start is this one without its adapter

        def by_start(rows: list[dict]) -> list[dict]:
            with lora.switched_off(run.model) as start:
                return label(start, rows)

        return folders.offline(run.out / name, by_start, drawn, run.model, run.tokenizer)
    # a second model while it labels, sharded as the first: to set the first one's weights aside would take as much
    start = model_of(run.args, run.tokenizer)
    return folders.offline(run.out / name, lambda rows: label(start, rows), drawn, start, run.tokenizer)


# ---------------------------------------------------------------------------------------------- soft labels
def rac_soft_loss(
    logits: torch.Tensor, z: torch.Tensor, z_bar: torch.Tensor, top_ids: torch.Tensor, top_logp: torch.Tensor,
    mask: torch.Tensor, masked: bool = True, reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Eq. 7 (or 6) with a distribution q as target: the K largest probabilities of p(. | f(x, y), z^{<j}).

    Forward: -sum_j 1(z_bar^j != z^j) sum_k q_k log p_k with q renormalised over its K tokens; but for a constant,
    KL(q || p). Reverse: KL(p || q) over K + 1 outcomes, the K tokens and all others as one (whose probability is taken
    as 1e-6 where it is less); nothing is renormalised.
    logits: [B, L, V], p given (x, z^{<j}). z, z_bar, mask: [B, L]. top_ids, top_logp: [B, L, K], log q as stored.
    Returns (loss_sum, n_tokens), float32 scalars, as rac_loss.
    """
    logits, log_q = logits.float(), top_logp.float()
    log_p = logits.gather(-1, top_ids) - logits.logsumexp(-1, keepdim=True)  # [B, L, K]
    if reverse:
        others = [torch.log1p(-t.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6)) for t in (log_p, log_q)]
        log_p, log_q = torch.cat([log_p, others[0]], -1), torch.cat([log_q, others[1]], -1)  # [B, L, K + 1]
        each = (log_p.exp() * (log_p - log_q)).sum(-1)
    else:
        each = -(log_q.softmax(-1) * log_p).sum(-1)  # [B, L]
    learn = mask.bool() & (z_bar != z) if masked else mask.bool()
    return each[learn].sum(), mask.sum().float()


def rac_top_labels(
    model: torch.nn.Module, reference_prompts: list[list[int]], z: list[list[int]], k: int, batch_size: int = 8
) -> list[dict[str, list | np.ndarray]]:
    """As rac_labels, with the k largest probabilities: for each z its z_bar, top_ids and top_logp (arrays [L, k])."""

    def top(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # [N, V] -> [N, k] each, the largest first
        logits = known(model, logits.float())
        values, ids = logits.topk(k)
        return ids.int(), values - logits.logsumexp(dim=-1, keepdim=True)

    labels: list[dict[str, list | np.ndarray]] = [{} for _ in z]
    for i, (ids, logp) in by_token(model, reference_prompts, z, top, batch_size=batch_size):
        # copies, since views would keep the whole batch in memory
        labels[i] = {"z_bar": ids[:, 0].tolist(), "top_ids": ids.numpy().copy(), "top_logp": logp.numpy().copy()}
    return labels


def soft_term(run: Run, rows: list[dict], z: Rows, z_bar: Rows) -> tuple:
    """The term of losses for rac_soft_loss. Targets there are ids: each token of z brings the number of its q."""
    args, device = run.args, run.device
    of = ([np.reshape(row[name][: len(own)], (-1, args.topk)) for row, own in zip(rows, z)] for name in SOFT)
    ids, logp = (torch.from_numpy(np.concatenate(arrays)).to(device) for arrays in of)  # [tokens, K] each
    ids, logp, numbers = ids.long(), logp.float(), iter(range(len(ids)))

    def loss(logits: torch.Tensor, z: torch.Tensor, z_bar: torch.Tensor, at: torch.Tensor, mask: torch.Tensor) -> tuple:
        return rac_soft_loss(logits, z, z_bar, ids[at], logp[at], mask, not args.unmasked, args.kl == "reverse")

    return loss, z, z, z_bar, [[next(numbers) for _ in own] for own in z]
