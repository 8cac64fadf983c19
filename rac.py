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

# Label precision below which RAC warns: Eq. 7 keeps just the labels that differ from z, whether or not they are right.
POOR = 0.9


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
def rac_labels(
    model: torch.nn.Module, reference_prompts: list[list[int]], z: list[list[int]], batch_size: int = 8
) -> list[list[int]]:
    """z_bar^j = arg max p(. | f(x, y), z^{<j}) for all j from one teacher-forced pass over [f(x, y), z].

    reference_prompts: f(x, y) and z as token ids. Returns labels, each list as long as its z.
    """
    order = sorted(range(len(z)), key=lambda i: len(reference_prompts[i]) + len(z[i]))  # little padding in a batch
    labels: list[list[int]] = [[] for _ in z]
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        b = data.batch([reference_prompts[i] for i in some], [z[i] for i in some], model.device)
        best = data.response_logits(model, b).argmax(dim=-1).tolist()  # [B, L]
        for i, row in zip(some, best, strict=True):
            labels[i] = row[: len(z[i])]
    return labels


def to_last_correction(z: list[int], z_bar: list[int]) -> tuple[list[int], list[int]]:
    """z and z_bar up to the last position where they differ; both empty where there is none."""
    n = max((j + 1 for j in range(len(z)) if z[j] != z_bar[j]), default=0)
    return z[:n], z_bar[:n]


def make_d_r(run: ddp.Run, examples: Dataset, args: argparse.Namespace, iteration: int) -> Dataset:
    """D_r = {(x, y, z, z_bar)} by the current model (Algorithm 2, lines 8 to 13)."""
    options = {
        "max_new_tokens": args.max_response or data.TASKS[args.task].max_response,
        "batch_size": args.generation_batch_size,
        "eos_token_id": run.tokenizer.eos_token_id,
        "temperature": args.temperature,
        "seed": ddp.fold_in(args.seed, iteration),
    }

    def make(rows: list[dict]) -> list[dict]:
        drawn = generate.generate(run.model, [r["x"] for r in rows], ids=[r["id"] for r in rows], **options)  # Eq. 2
        z = [samples[0] for samples in drawn]
        z_bar = rac_labels(run.model, [r["f"] for r in rows], z, args.micro_batch_size)
        return [
            {"id": r["id"], "x": r["x"], "y": r["y"], "z": z_i, "z_bar": z_bar_i}
            for r, z_i, z_bar_i in zip(rows, z, z_bar, strict=True)
        ]

    return run.offline(f"D_r_{iteration}", make, examples)


def describe(d_r: Dataset) -> dict[str, float]:
    """What a D_r holds: the share of tokens corrected, of z equal to y, of rows without any correction."""
    tokens = corrected = equal = untouched = 0
    for row in d_r:
        wrong = sum(a != b for a, b in zip(row["z"], row["z_bar"], strict=True))
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
    parser.add_argument("--pairs", help="a D_r to use in the first iteration instead of making one")
    parser.add_argument("--generation-batch-size", type=ddp.number(1, kind=int), default=64, help="rows of one rank")
    args = parser.parse_args()
    run, examples = ddp.start(args, data.load, args.max_response or data.TASKS[args.task].max_response)
    pairs = None
    if args.pairs is not None:  # read first: what is wrong with them shows before any training
        pairs = ddp.read_pairs(args.pairs, ("z", "z_bar"), run.tokenizer, run.model)
    sft_phase(run, examples, args.sft_epochs)  # lines 2-6

    weight, loss = {"rac": 1.0, "sft": args.sft_weight}, partial(rac_loss, masked=not args.unmasked)
    for iteration in range(1, args.iterations + 1):  # line 7
        d_r = pairs if pairs and iteration == 1 else make_d_r(run, examples, args, iteration)  # lines 8-13
        report(d_r, run.tokenizer, args.task, run.out / f"D_r_{iteration}.json")
        for batch, micro_batches in run.steps(d_r, args.epochs):  # lines 14-15
            # tokens of the global batch, of z the masked ones included
            n = {"sft": sum(len(row["y"]) for row in batch), "rac": sum(len(row["z"]) for row in batch)}
            for rows in micro_batches:
                x, y, z, z_bar = ([row[name] for row in rows] for name in ("x", "y", "z", "z_bar"))
                if not args.unmasked:  # by causality, what follows the last correction changes nothing
                    z, z_bar = zip(*map(to_last_correction, z, z_bar), strict=True)
                terms = {"rac": (loss, z, z, z_bar)}  # line 17: z is read, z_bar is the target
                if args.sft_weight:
                    terms["sft"] = (sft_loss, y, y)  # line 16
                sums = data.losses(run.model, x, terms, args.share_prompt)
                run.backward(**{name: weight[name] * total / n[name] for name, total in sums.items()})  # line 18
    run.finish()


if __name__ == "__main__":
    ddp.cli(main)
