"""Batch-scheduled sampling (BASH): Algorithm 1, Eq. 5. The model's own tokens are mixed into the input, offline.

    torchrun --nproc-per-node 8 bash.py --model runs/sft --task tldr --out runs/bash --lr 3e-6 --warmup 0 --beta 0.2
    python bash.py --model base --task gsm8k --data train.jsonl --out runs/bash --sft-epochs 2     # Algorithm 1 whole

Each iteration writes D_s to OUT/D_s_1, OUT/D_s_2, ... (a `datasets` folder: id, x, y, y_hat); --pairs reads one.

Departures from the paper
- Algorithm 1 steps along -grad J of a log-likelihood; that sign is a slip: we minimise -J. Token means, as in sft.py.
- The paper does not say at what temperature z is drawn; --temperature is 1, the model's own distribution of Eq. 4.
- Each iteration has its own AdamW and schedule, so that --iterations 2 is two runs in a row.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from datasets import Dataset

import data
import ddp_utils as ddp
import generate
from sft import sft_loss, sft_phase


def bash_loss(logits: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 5: -sum_j log p(y^j | x, y_hat^{<j}) and the number of tokens. The input is mixed, the target is y.

    logits: [B, L, V] given y_hat^{<j}, already shifted. y, mask: [B, L]. Returns (loss_sum, n_tokens), float32 scalars.
    """
    nll = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none").view_as(y)  # [B, L]
    return nll[mask.bool()].sum(), mask.sum().float()


def make_d_s(run: ddp.Run, examples: Dataset, args: argparse.Namespace, iteration: int) -> Dataset:
    """D_s = {(x, y, y_hat)} by the current model (Algorithm 1, line 8): y_hat is y mixed with model tokens, Eq. 4."""
    options = {"beta": args.beta, "temperature": args.temperature, "batch_size": args.generation_batch_size}
    options["stats"] = stats = {"forwards": 0}

    def make(rows: list[dict]) -> list[dict]:
        x, y, ids = [row["x"] for row in rows], [row["y"] for row in rows], [row["id"] for row in rows]
        y_hat = generate.mix(run.model, x, y, seed=ddp.fold_in(args.seed, iteration), ids=ids, **options)  # Eq. 4
        return [row | {"y_hat": mixed} for row, mixed in zip(rows, y_hat, strict=True)]

    d_s = run.offline(f"D_s_{iteration}", make, examples)
    if stats["forwards"]:
        ddp.print0(f"D_s_{iteration}: drawn in {stats['forwards']} forwards of one process")
    return d_s


def main() -> None:
    parser = ddp.parser(__doc__, sorted(data.TASKS))
    parser.add_argument("--iterations", type=ddp.count, default=1, help="H")
    parser.add_argument("--epochs-per-iteration", "--epochs", dest="epochs", type=ddp.number(0), default=1)
    parser.add_argument("--sft-epochs", type=ddp.number(0), default=0, help="K1: epochs of Eq. 1 alone first")
    parser.add_argument("--sft-weight", type=ddp.number(0), default=1.0, help="of J_SFT beside J_BASH (0: Table 6)")
    parser.add_argument("--beta", type=ddp.number(0, 1), default=0.2, help="share of the model's own tokens in y_hat")
    parser.add_argument("--temperature", type=ddp.number(0), default=1.0, help="of the draw of y_hat")
    parser.add_argument("--share-prompt", action="store_true", help="both losses read x once (4-D attention mask)")
    parser.add_argument("--pairs", help="a D_s to use in the first iteration instead of making one")
    parser.add_argument("--generation-batch-size", type=ddp.number(1, kind=int), default=64, help="rows of one rank")
    args = parser.parse_args()
    run, examples, pairs = ddp.start_with_pairs(args, data.load, ("y", "y_hat"))
    sft_phase(run, examples, args.sft_epochs)  # lines 2-6

    weight = {"bash": 1.0, "sft": args.sft_weight}
    for iteration in range(1, args.iterations + 1):  # line 7
        d_s = pairs if pairs and iteration == 1 else make_d_s(run, examples, args, iteration)  # line 8
        differ = sum(a != b for row in d_s for a, b in zip(row["y"], row["y_hat"], strict=True))
        ddp.print0(f"D_s_{iteration}: {differ / sum(map(len, d_s['y'])):.2%} of the tokens of y_hat differ from y")
        for batch, micro_batches in run.steps(d_s, args.epochs):  # lines 9-10
            n = sum(len(row["y"]) for row in batch)  # tokens of the global batch
            for rows in micro_batches:
                x, y, y_hat = ([row[name] for row in rows] for name in ("x", "y", "y_hat"))
                terms = {"bash": (bash_loss, y_hat, y)}  # line 12: y_hat is read, y is the target
                if args.sft_weight:
                    terms["sft"] = (sft_loss, y, y)  # line 11
                sums = data.losses(run.model, x, terms, args.share_prompt)
                run.backward(**{name: weight[name] * total / n for name, total in sums.items()})  # line 13
    run.finish()


if __name__ == "__main__":
    ddp.cli(main)
