"""Reference-answer-based correction (RAC): Algorithm 2, Eq. 6 and 7.

    torchrun --nproc-per-node 8 rac.py --model runs/sft --task tldr --out runs/rac --lr 3e-6 --warmup 0
    python rac.py --model base --task gsm8k --data train.jsonl --out runs/rac --sft-epochs 2       # Algorithm 2 whole

The model writes its own answer z to x. The same model, shown the reference answer in the prompt f(x, y), says what it
would write after each z^{<j}: the label z_bar^j. Where they differ, the model learns z_bar^j after (x, z^{<j}).

    x  = 3 + 4 =        y = 7 . EOS            f(x, y) = "... question: 3 + 4 = ... reference response: 7 . ..."
    z     =  8  .  EOS  the model's own answer
    z_bar =  7  .  EOS  arg max p(. | f(x, y), z^{<j}), all from one forward pass over [f(x, y), z]
    mask  =  1  0  0    1(z_bar != z) of Eq. 7: only the correction is learnt

Each iteration writes D_r to OUT/D_r_1, OUT/D_r_2, ... (a `datasets` folder: id, x, y, z, z_bar); --pairs reads one.

Beyond the paper, and off by default
- --labels topk: where Eq. 7 learns z_bar, learn the distribution that z_bar is the arg max of: its --topk largest
  probabilities, from the same pass, kept in D_r as top_ids and top_logp. With --unmasked that is on-policy
  self-distillation with the reference answer as privileged context. --kl reverse: see `rac_soft_loss`.
- --labels-from start: label with the weights of --model, which this run has not worn yet. z is still the current ones'
  (OUT/D_z_2, ...).
- --first-correction-only: of each z learn the first correction alone.
- --plausible P: keep a correction only where the labelling model, not shown the reference, gives it at least P. What y
  says next is often no answer to a z that has gone elsewhere; the model can only learn from it to doubt its own words.

Departures from the paper
- Algorithm 2 steps along -grad J of a log-likelihood; that sign is a slip: we minimise -J.
- Algorithm 2 divides both sums by |B|; here each is a mean over its own tokens, of y and of z, so that a long z
  does not outweigh y. A masked position adds 0 to the sum of Eq. 7 and still counts: the paper's mask is in the sum.
- The paper does not say how z is drawn: --temperature is 1 (Eq. 2), and z has at most --max-response tokens.
- f(x, y) has a limit of its own, --max-reference. A row over it is left out, of J_SFT too, and counted; y is never cut.
- Each iteration has its own AdamW and schedule, so that --iterations 2 is two runs in a row.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

import data
import ddp_utils as ddp
import generate
import toy
from sft import sft_loss, sft_phase

# Label precision below which RAC warns: Eq. 7 keeps just the labels that differ from z, whether or not they are right
# (STUDY.md: with random wrong labels break-even is near 0.8 for greedy accuracy and near 1 for sampling; with a model's
# own wrong labels greedy accuracy suffered at 0.9, too).
POOR = 0.9
# A correction is implausible where the model itself, not shown the reference, gives it less than this probability.
IMPLAUSIBLE, SAMPLE = 0.01, 200  # measured on so many rows
SOFT = ("top_ids", "top_logp")  # the columns of --labels topk


# ---------------------------------------------------------------------------------------------- Algorithm 2
def rac_loss(
    logits: torch.Tensor, z: torch.Tensor, z_bar: torch.Tensor, mask: torch.Tensor, masked: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 7: -sum_j 1(z_bar^j != z^j) log p(z_bar^j | x, z^{<j}). masked=False is Eq. 6, without the indicator.

    logits: [B, L, V] given (x, z^{<j}), already shifted. z, z_bar: [B, L]. mask: [B, L], 1 on tokens of z.
    Returns (loss_sum, n_tokens), float32 scalars. n_tokens counts every token of z, masked by Eq. 7 or not.
    """
    nll = F.cross_entropy(logits.float().flatten(0, 1), z_bar.flatten(), reduction="none").view_as(z)  # [B, L]
    learn = mask.bool() & (z_bar != z) if masked else mask.bool()
    return nll[learn].sum(), mask.sum().float()


@torch.no_grad()
def z_logits(
    model: torch.nn.Module, prompts: list[list[int]], z: list[list[int]], batch_size: int
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """The logits [B, L, V] of p(. | prompt, z^{<j}), with the rows that they belong to; some rows at a time."""
    order = sorted(range(len(z)), key=lambda i: len(prompts[i]) + len(z[i]))  # little padding in a batch
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        b = data.batch([prompts[i] for i in some], [z[i] for i in some], model.device)
        yield some, data.response_logits(model, b)


def rac_labels(
    model: torch.nn.Module, reference_prompts: list[list[int]], z: list[list[int]], batch_size: int = 8
) -> list[list[int]]:
    """z_bar^j = arg max p(. | f(x, y), z^{<j}) for all j from one teacher-forced pass over [f(x, y), z].

    reference_prompts: f(x, y) and z as token ids. Returns labels, each list as long as its z.
    """
    labels: list[list[int]] = [[] for _ in z]
    for some, logits in z_logits(model, reference_prompts, z, batch_size):
        for i, row in zip(some, logits.argmax(dim=-1).tolist(), strict=True):
            labels[i] = row[: len(z[i])]
    return labels


def to_last_correction(z: list[int], z_bar: list[int]) -> tuple[list[int], list[int]]:
    """z and z_bar up to the last position where they differ; both empty where there is none."""
    n = max((j + 1 for j in range(len(z)) if z[j] != z_bar[j]), default=0)
    return z[:n], z_bar[:n]


def with_z(run: ddp.Run, args: argparse.Namespace, iteration: int, rows: list[dict]) -> list[dict]:
    """The rows, each with an answer z ~ p(.|x) of the current model (Algorithm 2, line 9). Runs under `inference`."""
    drawn = generate.generate(
        run.model,
        [row["x"] for row in rows],
        ids=[row["id"] for row in rows],
        max_new_tokens=args.max_response or data.TASKS[args.task].max_response,
        batch_size=args.generation_batch_size,
        eos_token_id=run.tokenizer.eos_token_id,
        temperature=args.temperature,
        seed=ddp.fold_in(args.seed, iteration),
    )  # Eq. 2
    return [row | {"z": samples[0]} for row, samples in zip(rows, drawn, strict=True)]


def make_d_r(
    run: ddp.Run, examples: Dataset, args: argparse.Namespace, iteration: int, pairs: Dataset | None = None
) -> Dataset:
    """D_r = {(x, y, z, z_bar)} by the current model (Algorithm 2, lines 8 to 13), or labelled by that of --model; or
    `pairs`. Tells how many corrections are implausible, and leaves out what --plausible does."""
    draw = partial(with_z, run, args, iteration)
    every = math.ceil(len(examples if pairs is None else pairs) / SAMPLE)
    seen = torch.zeros(2, device=run.device)  # corrections in some rows, and the plausible ones among them

    def label(model: torch.nn.Module, rows: list[dict]) -> list[dict]:
        f, z = ([row[name] for row in rows] for name in ("f", "z"))
        if args.labels == "topk":
            labels = rac_top_labels(model, f, z, args.topk, args.micro_batch_size)
        else:
            labels = [{"z_bar": z_bar} for z_bar in rac_labels(model, f, z, args.micro_batch_size)]
        return [{k: row[k] for k in ("id", "x", "y", "z")} | found for row, found in zip(rows, labels, strict=True)]

    def keep(model: torch.nn.Module, rows: list[dict]) -> list[dict]:
        x, z, z_bar = ([row[name] for row in rows] for name in ("x", "z", "z_bar"))
        some = [column[::every] for column in (x, z, z_bar)]
        seen.add_(torch.tensor(count_plausible(model, *some, args.micro_batch_size), device=run.device))
        if args.plausible:
            z_bar = plausible_labels(model, x, z, z_bar, args.plausible, args.micro_batch_size)
        return [row | {"z_bar": kept} for row, kept in zip(rows, z_bar, strict=True)]

    name = f"D_r_{iteration}"
    same = args.labels_from == "current" or iteration == 1 and not args.sft_epochs
    if pairs is not None:
        d_r = run.offline(name, partial(keep, run.model), pairs)
    elif same or (run.out / name).exists():
        d_r = run.offline(name, lambda rows: keep(run.model, label(run.model, draw(rows))), examples)
    else:
        drawn = run.offline(f"D_z_{iteration}", draw, examples)
        # a second model while it labels, sharded as the first: to set the first one's weights aside would take as much
        start = ddp.model_of(args)
        d_r = ddp.offline(run.out / name, lambda rows: keep(start, label(start, rows)), drawn, start, run.tokenizer)
    found, plausible = ddp.all_sum(seen).tolist()
    if found:
        share, hint = 1 - plausible / found, ""
        if share > 0.5 and not args.plausible:
            hint = ". WARNING: to learn these costs accuracy in sampling (STUDY.md); --plausible leaves such ones out"
        ddp.print0(
            f"{name}: {share:.0%} of the corrections have a chance under {IMPLAUSIBLE} without the reference{hint}"
        )
    return d_r


# ---------------------------------------------------------------------------------------------- what a D_r holds
def corrections(z: data.Rows, z_bar: data.Rows) -> int:
    """Tokens that differ."""
    return sum(a != b for rows in zip(z, z_bar, strict=True) for a, b in zip(*rows, strict=True))


def describe(d_r: Dataset) -> dict[str, float]:
    """What a D_r holds: the share of tokens corrected, of z equal to y, of rows without any correction."""
    tokens = corrected = equal = untouched = 0
    for row in d_r:
        wrong = corrections([row["z"]], [row["z_bar"]])
        tokens, corrected = tokens + len(row["z"]), corrected + wrong
        equal, untouched = equal + (row["z"] == row["y"]), untouched + (wrong == 0)
    return {
        "tokens_corrected": corrected / tokens,
        "z_equals_y": equal / len(d_r),
        "rows_without_correction": untouched / len(d_r),
    }


def report(d_r: Dataset, tokenizer: PreTrainedTokenizerBase, task: str, path: Path) -> None:
    """Prints and writes what a D_r holds; on the toy task, where the right labels are known, also how good they are."""
    found = describe(d_r)
    if task == "toy" and toy.IDS.items() <= tokenizer.get_vocab().items():
        found |= toy.label_quality(d_r["y"], d_r["z"], d_r["z_bar"])
    ddp.print0(f"{path.stem}:", ", ".join(f"{key} {value:.4g}" for key, value in found.items() if value is not None))
    if found.get("precision") is not None and found["precision"] < POOR:
        ddp.print0(
            f"WARNING: only {found['precision']:.0%} of the labels that Eq. 7 keeps are right; the others teach errors"
        )
    if ddp.RANK == 0:
        ddp.write_json(path, found)


# ---------------------------------------------------------------------------------------------- beyond the paper
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
) -> list[dict[str, list]]:
    """As rac_labels, with the k largest probabilities: for each z its z_bar, top_ids and top_logp ([L][k])."""
    labels: list[dict[str, list]] = [{} for _ in z]
    for some, logits in z_logits(model, reference_prompts, z, batch_size):
        logits = logits.float()
        top, ids = logits.topk(k)  # [B, L, k], the largest first
        logp = top - logits.logsumexp(dim=-1, keepdim=True)
        for i, ids_i, logp_i in zip(some, ids.tolist(), logp.tolist(), strict=True):
            n = len(z[i])
            labels[i] = {"z_bar": [q[0] for q in ids_i[:n]], "top_ids": ids_i[:n], "top_logp": logp_i[:n]}
    return labels


def soft_term(run: ddp.Run, rows: list[dict], z: data.Rows, z_bar: data.Rows) -> tuple:
    """The term of data.losses for rac_soft_loss. Targets there are ids: each token of z brings the number of its q."""
    args, device = run.args, run.device
    ids, logp = ([q for row, own in zip(rows, z) for q in row[name][: len(own)]] for name in SOFT)
    numbers = iter(range(len(ids)))
    ids = torch.tensor(ids, dtype=torch.long, device=device).view(-1, args.topk)  # [tokens, K]
    logp = torch.tensor(logp, dtype=torch.float32, device=device).view_as(ids)

    def loss(logits: torch.Tensor, z: torch.Tensor, z_bar: torch.Tensor, at: torch.Tensor, mask: torch.Tensor) -> tuple:
        return rac_soft_loss(logits, z, z_bar, ids[at], logp[at], mask, not args.unmasked, args.kl == "reverse")

    return loss, z, z, z_bar, [[next(numbers) for _ in own] for own in z]


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
    for some, logits in z_logits(model, x, z, batch_size):
        labels, _ = data.pad_responses([z_bar[i] for i in some], logits.device)  # [B, L]
        logp = -F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        for i, row in zip(some, logp.exp().tolist(), strict=True):
            kept[i] = [label if q >= p else own for label, own, q in zip(z_bar[i], z[i], row)]
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


# ----------------------------------------------------------------------------------------------
def main() -> None:
    parser = ddp.parser(__doc__, sorted(data.TASKS))
    parser.add_argument("--iterations", type=ddp.count, default=1, help="H")
    parser.add_argument("--epochs-per-iteration", "--epochs", dest="epochs", type=ddp.number(0), default=1)
    parser.add_argument("--sft-epochs", type=ddp.number(0), default=0, help="K1: epochs of Eq. 1 alone first")
    parser.add_argument("--sft-weight", type=ddp.number(0), default=1.0, help="of J_SFT beside J_RAC (0: Table 6)")
    parser.add_argument("--temperature", type=ddp.number(0), default=1.0, help="of the draw of z")
    parser.add_argument("--max-reference", type=ddp.count, default=0, help="tokens of f(x, y) (0: x + y + 128)")
    parser.add_argument("--share-prompt", action="store_true", help="both losses read x once (4-D attention mask)")
    parser.add_argument("--unmasked", action="store_true", help="Eq. 6 instead of Eq. 7")
    parser.add_argument("--labels", choices=["hard", "topk"], default="hard", help="z_bar, or the distribution it tops")
    parser.add_argument("--topk", type=ddp.number(1, kind=int), help="K of --labels topk (default: 16)")
    parser.add_argument("--kl", choices=["forward", "reverse"], help="of --labels topk (default: forward)")
    parser.add_argument("--labels-from", choices=["current", "start"], default="current", help="whose labels")
    parser.add_argument("--first-correction-only", action="store_true", help="one correction of each z")
    parser.add_argument("--plausible", type=ddp.number(0, 1), default=0.0, help="least probability of a correction")
    parser.add_argument("--pairs", help="a D_r to use in the first iteration instead of making one")
    parser.add_argument("--generation-batch-size", type=ddp.number(1, kind=int), default=64, help="rows of one rank")
    args = parser.parse_args()
    if args.unmasked and args.first_correction_only:
        raise ValueError("--unmasked learns every token, --first-correction-only one: choose")
    if args.unmasked and args.plausible:
        raise ValueError("--unmasked learns every label, --plausible leaves some out: choose")
    if args.labels == "hard" and (args.topk or args.kl):
        raise ValueError("--topk and --kl are for --labels topk")
    args.topk = args.topk or 16
    max_response = args.max_response or data.TASKS[args.task].max_response
    run, examples, pairs = ddp.start_with_pairs(args, data.load, ("z", "z_bar"), max_response)
    if args.labels == "topk" and args.topk > run.model.config.vocab_size:
        raise ValueError(f"--topk {args.topk}: the model's vocabulary has {run.model.config.vocab_size} tokens")
    if pairs is not None:
        k = [len(q) for q in pairs[0]["top_ids"]] if set(SOFT) <= set(pairs.column_names) else []
        if args.labels == "topk" and k != [args.topk] * len(pairs[0]["z"]):
            raise ValueError(f"--pairs {args.pairs}: was not made with --labels topk --topk {args.topk}")
    sft_phase(run, examples, args.sft_epochs)  # lines 2-6

    cut = to_first_correction if args.first_correction_only else to_last_correction
    weight, loss = {"rac": 1.0, "sft": args.sft_weight}, partial(rac_loss, masked=not args.unmasked)
    for iteration in range(1, args.iterations + 1):  # line 7
        d_r = make_d_r(run, examples, args, iteration, pairs if iteration == 1 else None)  # lines 8-13
        report(d_r, run.tokenizer, args.task, run.out / f"D_r_{iteration}.json")
        for batch, micro_batches in run.steps(d_r, args.epochs):  # lines 14-15
            # tokens of the global batch, of z the masked ones included
            n = {"sft": sum(len(row["y"]) for row in batch), "rac": sum(len(row["z"]) for row in batch)}
            for rows in micro_batches:
                x, y, z, z_bar = ([row[name] for row in rows] for name in ("x", "y", "z", "z_bar"))
                if not args.unmasked:  # by causality, what follows the last correction changes nothing
                    z, z_bar = zip(*map(cut, z, z_bar), strict=True)
                terms = {"rac": (loss, z, z, z_bar)}  # line 17: z is read, z_bar is the target
                if args.labels == "topk":
                    terms = {"rac": soft_term(run, rows, z, z_bar)}
                if args.sft_weight:
                    terms["sft"] = (sft_loss, y, y)  # line 16
                sums = data.losses(run.model, x, terms, args.share_prompt)
                run.backward(**{name: weight[name] * total / n[name] for name, total in sums.items()})  # line 18
    run.finish()


if __name__ == "__main__":
    ddp.cli(main)
