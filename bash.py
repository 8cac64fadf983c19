"""Batch-scheduled sampling (BASH): Algorithm 1, Eq. 5. The model's own tokens are mixed into the input, offline.

    torchrun --nproc-per-node 8 bash.py --model runs/sft --task tldr --out runs/bash --lr 3e-6 --warmup 0 --beta 0.2
    python bash.py --model base --task gsm8k --data train.jsonl --out runs/bash --sft-epochs 2     # Algorithm 1 whole

Each iteration writes D_s to OUT/D_s_1, OUT/D_s_2, ... (a `datasets` folder: id, x, y, y_hat); --pairs reads one.

Departures from the paper
- Algorithm 1 steps along -grad J of a log-likelihood; that sign is a slip: we minimise -J. Token means, as in sft.py.
- The paper does not say at what temperature z is drawn; --temperature is 1, the model's own distribution of Eq. 4.
- Each iteration has its own AdamW and schedule, so that --iterations 2 is two runs in a row. With --refresh-every
  STEPS, in place of iterations, there is one of each, and the current model makes a new D_s every so many steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

import data
import generate
import stage
from batches import losses
from core import arrow
from core.flags import count, group, number, positive
from core.ranks import cli, fold_in, print0
from data import Dataset
from ddp_utils import Refresh, Run
from sft import sft_loss, sft_phase


# The body is that of sft_loss and scs_loss: these methods change what the model reads, and nothing else.
def bash_loss(logits: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 5: -sum_j log p(y^j | x, y_hat^{<j}) and the number of tokens. The input is mixed, the target is y.

    logits: [B, L, V] given y_hat^{<j}, already shifted. y, mask: [B, L]. Returns (loss_sum, n_tokens), float32 scalars.
    """
    nll = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none").view_as(y)  # [B, L]
    return nll[mask.bool()].sum(), mask.sum().float()


def make_d_s(run: Run, examples: Dataset, iteration: int) -> Dataset:
    """D_s = {(x, y, y_hat)} by the current model (Algorithm 1, line 8): y_hat is y mixed with model tokens, Eq. 4."""
    args, stats = run.args, {"forwards": 0}
    options = {"beta": args.beta, "temperature": args.temperature, "batch_size": args.generation_batch_size}
    options |= {"seed": fold_in(args.seed, iteration), "stats": stats}

    def draw(rows: dict[str, Sequence], each: Callable[[int, list], None]) -> list:
        return generate.mix(run.model, rows["x"], rows["y"], ids=rows["id"], each=each, **options)  # Eq. 4

    d_s = run.offline(f"D_s_{iteration}", None, examples, y_hat=draw)
    if stats["forwards"]:
        print0(f"D_s_{iteration}: drawn in {stats['forwards']} forwards of one process")
    return report(d_s, iteration)


def report(d_s: Dataset, iteration: int) -> Dataset:
    """The D_s itself. Says how much of y_hat is not y."""
    y, y_hat = (arrow.Rows(d_s).columns[name] for name in ("y", "y_hat"))
    differ = arrow.differing(y, y_hat).sum() / y.lengths.sum()
    print0(f"D_s_{iteration}: {differ:.2%} of the tokens of y_hat differ from y")
    return d_s


def main() -> None:
    p = stage.parser(__doc__)
    paper, machine = group(p, "the paper's"), group(p, "machine")
    paper.add_argument("--iterations", type=count, default=1, help="H")
    paper.add_argument("--epochs-per-iteration", "--epochs", dest="epochs", type=number(0), default=1)
    paper.add_argument("--sft-epochs", type=number(0), default=0, help="K1: epochs of Eq. 1 alone first")
    paper.add_argument("--sft-weight", type=number(0), default=1.0, help="of J_SFT beside J_BASH (0: Table 6)")
    paper.add_argument("--beta", type=number(0, 1), default=0.2, help="share of the model's own tokens in y_hat")
    paper.add_argument("--temperature", type=number(0), default=1.0, help="of the draw of y_hat")
    group(p, "data").add_argument("--pairs", help="a D_s to use in the first iteration instead of making one")
    stage.refresh_flag(p)
    machine.add_argument("--share-prompt", action="store_true", help="both losses read x once (4-D attention mask)")
    machine.add_argument("--generation-batch-size", type=positive, default=64, help="rows of one rank")
    args = p.parse_args()
    stage.check_refresh(args)
    stage.check_pairs(p, args, "temperature", "beta")
    run, examples, pairs = stage.start_with_pairs(args, data.load, ("y", "y_hat"))
    sft_phase(run, examples, args.sft_epochs)  # lines 2-6

    weight = {"bash": 1.0, "sft": args.sft_weight}
    for iteration in range(1, args.iterations + 1):  # line 7
        if args.refresh_every:
            d_s = Refresh(examples, args.refresh_every, partial(make_d_s, run))  # line 8 again and again
        else:
            d_s = report(pairs, 1) if pairs and iteration == 1 else make_d_s(run, examples, iteration)  # line 8
        for step in run.steps(d_s, args.epochs):  # lines 9-10
            n = step.tokens("y")  # of the global batch
            for rows in step.micro_batches:  # this rank's share
                x, y, y_hat = ([row[name] for row in rows] for name in ("x", "y", "y_hat"))
                terms = {"bash": (bash_loss, y_hat, y)}  # line 12: y_hat is read, y is the target
                if args.sft_weight:
                    terms["sft"] = (sft_loss, y, y)  # line 11
                sums = losses(run.model, x, terms, args.share_prompt)
                run.backward(**{name: weight[name] * total / n for name, total in sums.items()})
            run.update()  # line 13
    run.finish()


if __name__ == "__main__":
    cli(main)
