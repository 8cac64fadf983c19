"""Supervised fine-tuning: Eq. 1, the first loop of Algorithms 1 and 2, and the baseline of every table.

    torchrun --nproc-per-node 8 sft.py --model EleutherAI/pythia-1b-deduped --task tldr --out runs/sft \
        --epochs 2 --lr 3e-6 --warmup 0 --dtype bfloat16
    python sft.py --model runs/base --task toy --data runs/data/train.jsonl --out runs/sft ...     # one process

Departures from the paper
- Algorithms 1 and 2 step along -grad J of a log-likelihood J; that sign is a slip: we minimise -J.
- Eq. 1 divides by the number of examples; we divide by the number of response tokens in the global batch, which is what
  the code the paper builds on does. The prompt is never a target.
- Weights and AdamW moments are float32 (Table 5 says bfloat16 without saying of what); --dtype sets the computation's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from datasets import Dataset

import data
import ddp_utils as ddp


def sft_loss(logits: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 1: -sum_j log p(y^j | x, y^{<j}) and the number of tokens summed over. The caller divides.

    logits: [B, L, V] given y^{<j}, already shifted (logits[:, j] predicts y[:, j]). y: [B, L]. mask: [B, L],
    1 on tokens of the response. Returns (loss_sum, n_tokens), float32 scalars.
    """
    nll = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none").view_as(y)  # [B, L]
    return nll[mask.bool()].sum(), mask.sum().float()


def sft_phase(run: ddp.Run, examples: Dataset, epochs: float) -> None:
    """Algorithm 1 and 2, lines 2 to 6: Eq. 1 alone."""
    if not epochs:
        return
    for batch, micro_batches in run.steps(examples, epochs):
        n = sum(len(row["y"]) for row in batch)  # tokens of the global batch
        for rows in micro_batches:
            x, y = ([row[name] for row in rows] for name in ("x", "y"))
            sums = data.losses(run.model, x, {"sft": (sft_loss, y, y)})  # Eq. 1
            run.backward(sft=sums["sft"] / n)


def main() -> None:
    parser = ddp.parser(__doc__, sorted(data.TASKS))
    parser.add_argument("--epochs", type=ddp.number(0), default=2)
    args = parser.parse_args()
    run, examples = ddp.start(args, data.load)
    sft_phase(run, examples, args.epochs)
    run.finish()


if __name__ == "__main__":
    ddp.cli(main)
