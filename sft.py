"""Supervised fine-tuning: Eq. 1, the first loop of Algorithms 1 and 2, and the baseline of every table; and NEFTune.

    torchrun --nproc-per-node 8 sft.py --model EleutherAI/pythia-1b-deduped --task tldr --out runs/sft \
        --epochs 2 --lr 3e-6 --warmup 0 --dtype bfloat16
    python sft.py --model runs/base --task toy --data runs/data/train.jsonl --out runs/sft ...     # one process
    python sft.py ... --neftune-alpha 5                                                            # NEFTune

Departures from the paper
- Algorithms 1 and 2 step along -grad J of a log-likelihood J; that sign is a slip: we minimise -J.
- Eq. 1 divides by the number of examples; we divide by the number of response tokens in the global batch. (The code
  that the paper builds on takes the mean over a micro-batch, its prompts included.) The prompt is never a target.
- NEFTune is its authors' (L is the example's own length, padding gets no noise), not that of libraries, which count the
  padding. The noise is drawn per (seed, step, example): micro-batches, ranks and an interruption do not change it.
- Weights and AdamW moments are float32 (Table 5 says bfloat16 without saying of what); --dtype sets the computation's.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import data
import stage
from batches import losses
from core.flags import group, number
from core.ranks import cli, fold_in
from data import Dataset
from ddp_utils import Run


def sft_loss(logits: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 1: -sum_j log p(y^j | x, y^{<j}) and the number of tokens summed over. The caller divides.

    logits: [B, L, V] given y^{<j}, already shifted (logits[:, j] predicts y[:, j]). y: [B, L]. mask: [B, L],
    1 on tokens of the response. Returns (loss_sum, n_tokens), float32 scalars.
    """
    nll = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none").view_as(y)  # [B, L]
    return nll[mask.bool()].sum(), mask.sum().float()


@contextlib.contextmanager
def neftune(model: torch.nn.Module, rows: list[dict], alpha: float, seed: int) -> Iterator[None]:
    """Inside, a training pass over rows (id, x, y) has noise on its input embeddings (Jain et al. 2023):
    uniform(-1, 1) * alpha / sqrt(L d) on each of the L tokens of an example, d wide; none on padding."""
    rows = [row for row in rows if row["y"]] or rows[:1]  # what losses passes, in its order
    width = max(len(row["x"]) for row in rows)  # its layout: [ left-padded x | right-padded y without the last token ]
    packed = getattr(model, "packed", False)  # ... or, with --packed, one row after the other

    def add(module: torch.nn.Module, inputs: tuple, embeddings: torch.Tensor) -> torch.Tensor:  # [B, S, d]
        noise, end = torch.zeros_like(embeddings), 0
        for b, row in enumerate(rows):
            generator = torch.Generator(embeddings.device).manual_seed(fold_in(seed, row["id"]))
            x, y, d = len(row["x"]), len(row["y"]), embeddings.shape[-1]
            drawn = torch.empty(max(x + y - 1, x), d, device=embeddings.device).uniform_(-1, 1, generator=generator)
            b, start = (0, end) if packed else (b, width - x)
            end = start + len(drawn)
            noise[b, start:end] = drawn * alpha / math.sqrt((x + y) * d)
        return embeddings + noise

    hook = model.get_input_embeddings().register_forward_hook(add) if alpha else None
    try:
        yield
    finally:
        if hook:
            hook.remove()


def sft_phase(run: Run, examples: Dataset, epochs: float, neftune_alpha: float = 0.0) -> None:
    """Algorithm 1 and 2, lines 2 to 6: Eq. 1 alone."""
    if not epochs:
        return
    for step in run.steps(examples, epochs):
        n = step.tokens("y")  # of the global batch
        for rows in step.micro_batches:
            x, y = ([row[name] for row in rows] for name in ("x", "y"))
            with neftune(run.model, rows, neftune_alpha, fold_in(run.args.seed, run.total)):
                sums = losses(run.model, x, {"sft": (sft_loss, y, y)})  # Eq. 1
            run.backward(sft=sums["sft"] / n)
        run.update()


def main() -> None:
    p = stage.parser(__doc__)
    paper = group(p, "the paper's")
    paper.add_argument("--epochs", type=number(0), default=2)
    paper.add_argument("--neftune-alpha", type=number(0), default=0.0, help="scale of its noise (the paper: 5)")
    args = p.parse_args()
    run, examples = stage.start(args, data.load)
    sft_phase(run, examples, args.epochs, args.neftune_alpha)
    run.finish()


if __name__ == "__main__":
    cli(main)
