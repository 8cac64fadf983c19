"""Self-play fine-tuning (SPIN; Chen et al. 2024), a baseline of Tables 1 to 3: y is to beat the model's own answer z.

    torchrun --nproc-per-node 8 spin.py --model runs/sft --task ultrachat --limit 50000 --out runs/spin \
        --iterations 2 --epochs-per-iteration 3 --dtype bfloat16 --micro-batch-size 4
    python spin.py --model runs/sft --task gsm8k --data train.jsonl --out runs/spin --beta 1

In each iteration the model of its start is the opponent: it draws z ~ p(.|x), and its log-probabilities of y and z are
computed there and then, and kept, so that no second model is in memory in training. Each iteration writes OUT/D_spin_1,
OUT/D_spin_2, ... (a `datasets` folder: id, x, y, z, y_logp, z_logp). From the second on, the pairs of the iteration
before are used as well; what the new opponent gives them is in OUT/D_spin_1_again, and so on. The log has the mean
reward margin and how often it is above 0, as dpo.py's.

Departures from the paper, and from SPIN's own code, whose settings the paper took for two of its tasks
- The defaults are that code's (lr 5e-7, batch 64, beta 0.1), but for the epochs of an iteration: 3 or 6 there, 1 here
  as in the paper's summarization and math. --lr and --beta hold for all iterations; that code changes them after the
  paper's two.
- AdamW and cosine as everywhere here, where that code has RMSprop and a linear decay; each iteration has its own.
- The paper searches beta in {0.1, 0.5, 1, 5}.
- z has at most --max-response tokens, as y has (that code draws 256); --temperature is 1 (Eq. 2).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

import data
import engine_z
import stage
from core import arrow
from core.flags import count, group, number, positive
from core.ranks import cli, print0
from data import Dataset
from ddp_utils import Run
from dpo import preference_phase, with_log_probs
from rac import draw_z


def spin_loss(
    policy_y: torch.Tensor, policy_z: torch.Tensor, opponent_y: torch.Tensor, opponent_z: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-sum log sigmoid(beta [(log pi(y|x) - log pi(z|x)) - (log opponent(y|x) - log opponent(z|x))]).

    All [B]: log-probabilities summed over a response's tokens. Returns (loss_sum, n_pairs), float32 scalars.
    """
    log_ratio = (policy_y - policy_z) - (opponent_y - opponent_z)  # [B]
    return -F.logsigmoid(beta * log_ratio.float()).sum(), log_ratio.new_tensor(len(log_ratio)).float()


def make_d_spin(run: Run, examples: Dataset, iteration: int) -> Dataset:
    """(x, y, z) and the log-probabilities of y and z, z and both of them by the current model."""

    def make(rows: list[dict]) -> list[dict]:
        return with_log_probs(run.model, rows, run.args.micro_batch_size)

    d_spin = run.offline(f"D_spin_{iteration}", make, examples, z=partial(draw_z, run, iteration))
    y, z = (arrow.Rows(d_spin).columns[name] for name in ("y", "z"))
    equal = (arrow.differing(y, z) == 0).sum() / len(d_spin)  # pairs without a gradient
    print0(f"D_spin_{iteration}: {equal:.2%} of the z are equal to y")
    return d_spin


def main() -> None:
    p = stage.parser(__doc__)
    p.set_defaults(lr=5e-7, batch_size=64)
    paper, machine = group(p, "the paper's"), group(p, "machine")
    paper.add_argument("--iterations", type=count, default=1, help="H")
    paper.add_argument("--epochs-per-iteration", "--epochs", dest="epochs", type=number(0), default=1)
    paper.add_argument("--beta", type=number(0), default=0.1, help="of the loss: how close to the opponent")
    paper.add_argument("--temperature", type=number(0), default=1.0, help="of the draw of z")
    engine_z.add_flag(p)
    machine.add_argument("--share-prompt", action="store_true", help="y and z read x once (4-D attention mask)")
    machine.add_argument("--generation-batch-size", type=positive, default=64, help="rows of one rank")
    args = p.parse_args()
    stage.check_pairs(p, args)
    max_response = args.max_response or data.TASKS[args.task].max_response
    run, examples = stage.start(args, engine_z.loading(args, data.load), max_response)
    last = None
    for iteration in range(1, args.iterations + 1):
        pairs = d_spin = make_d_spin(run, examples, iteration)
        if last is not None:  # the z of the iteration before, against the new opponent
            from datasets import concatenate_datasets

            name, last = f"D_spin_{iteration - 1}_again", last.select_columns(["id", "x", "y", "z"])
            again = run.offline(name, lambda rows: with_log_probs(run.model, rows, args.micro_batch_size), last)
            pairs = concatenate_datasets([again, d_spin])
        preference_phase(run, "spin", spin_loss, pairs, args.epochs)
        last = d_spin
    run.finish()


if __name__ == "__main__":
    cli(main)
