"""Scheduled sampling, online: Eq. 3 with the mixed prefix of Eq. 4 drawn from the current weights at every step.

    torchrun --nproc-per-node 8 scs.py --model runs/sft --task tldr --out runs/scs --lr 3e-6 --warmup 0 --beta 0.2

This is what BASH approximates offline (Table 7) and the costly side of Tables 8 and 9.

Departures from the paper
- g is drawn for the whole optimiser step at once, before any gradient: the weights are the same for all its
  micro-batches, and sharded ones are gathered once. It takes a few teacher-forced passes (generate.py). None of them
  can serve as the loss's forward: each reads only what the passes before have not settled, and keeps no gradient.
- No gradient flows through g (section 3.1). An EOS that is drawn in the middle of g does not end it: Eq. 4 goes on.
- Eq. 3 stands alone in the paper, so --sft-weight is 0 here; 1 gives the joint loss that BASH and RAC use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import data
import generate
import stage
from batches import losses
from core.flags import group, number, positive
from core.fsdp import inference
from core.ranks import cli, fold_in
from ddp_utils import Run, Step
from sft import sft_loss, sft_phase


# The body is that of sft_loss and bash_loss: these methods change what the model reads, and nothing else.
def scs_loss(logits: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 3: -sum_j log p(y^j | x, g^{<j}) and the number of tokens. The target is always y.

    logits: [B, L, V] given the mixed prefix g^{<j}, already shifted. y, mask: [B, L]. Returns (loss_sum, n_tokens).
    """
    nll = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none").view_as(y)  # [B, L]
    return nll[mask.bool()].sum(), mask.sum().float()


def mixed(run: Run, step: Step, stats: dict[str, int]) -> list[list[list[int]]]:
    """g of Eq. 4 for each row of each of the step's micro-batches, by the current weights."""
    args, rows = run.args, [row for some in step.micro_batches for row in some]
    x, y, ids = ([row[name] for row in rows] for name in ("x", "y", "id"))
    options = {"beta": args.beta, "temperature": args.temperature, "batch_size": args.generation_batch_size}
    with inference(run.model):
        g = iter(generate.mix(run.model, x, y, seed=fold_in(args.seed, run.total), ids=ids, stats=stats, **options))
    return [[next(g) for _ in some] for some in step.micro_batches]


def main() -> None:
    p = stage.parser(__doc__)
    paper, machine = group(p, "the paper's"), group(p, "machine")
    paper.add_argument("--epochs", type=number(0), default=1)
    paper.add_argument("--sft-epochs", type=number(0), default=0, help="K1: epochs of Eq. 1 alone first")
    paper.add_argument("--sft-weight", type=number(0), default=0.0, help="of J_SFT beside J_SCS")
    paper.add_argument("--beta", type=number(0, 1), default=0.2, help="share of the model's own tokens in g")
    paper.add_argument("--temperature", type=number(0), default=1.0, help="of the draw of g")
    machine.add_argument("--share-prompt", action="store_true", help="both losses read x once (4-D attention mask)")
    machine.add_argument("--generation-batch-size", type=positive, default=64, help="rows of one rank")
    args = p.parse_args()
    run, examples = stage.start(args, data.load)
    sft_phase(run, examples, args.sft_epochs)

    weight = {"scs": 1.0, "sft": args.sft_weight}
    for step in run.steps(examples, args.epochs):
        n, stats = step.tokens("y"), {"forwards": 0}  # tokens of the global batch
        for rows, g in zip(step.micro_batches, mixed(run, step, stats), strict=True):  # Eq. 4
            x, y = ([row[name] for row in rows] for name in ("x", "y"))
            terms = {"scs": (scs_loss, g, y)}  # Eq. 3: g is read, y is the target
            if args.sft_weight:
                terms["sft"] = (sft_loss, y, y)
            sums = losses(run.model, x, terms, args.share_prompt)
            run.backward(**{name: weight[name] * total / n for name, total in sums.items()})
        run.update(mix_forwards=stats["forwards"])  # of rank 0
    run.finish()


if __name__ == "__main__":
    cli(main)
