"""Direct preference optimisation (DPO), the paper's alignment stage (Table 4), on top of any model made here.

    torchrun --nproc-per-node 8 dpo.py --model runs/rac --out runs/rac-dpo --dtype bfloat16 --micro-batch-size 4
    python dpo.py --model runs/bash --task gsm8k --data pairs.jsonl --out runs/bash-dpo

The data are pairs of answers to one prompt: columns prompt, chosen and rejected, as text or as messages (a hub set, by
default UltraFeedback binarized, or a local file). The reference is --model itself. Its log-probabilities are computed
once, before any training, and kept in OUT/D_ref (a `datasets` folder: id, x, y = chosen, z = rejected, y_logp, z_logp),
so that no second model is in memory. A step makes one forward pass for both sides. The log has the mean reward margin,
beta [(log pi(y|x) - log ref(y|x)) - (log pi(z|x) - log ref(z|x))], and how often it is above 0.

Departures from the paper
- It follows zephyr-7b-beta without listing its settings. The defaults are those of that model's later recipe (beta
  0.01, lr 5e-7, one epoch, batch 128, at most 1024 tokens of which 512 of the prompt), on train_prefs alone. (Its first
  recipe had beta 0.1 and three epochs.)
- A prompt that is too long is not cut: its row is left out and counted, like one whose sides are equal, or one empty.
- Log-probabilities are summed over the response's tokens, as published, its EOS included; dropout is off.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

import stage
from batches import Rows, length, losses
from core.flags import group, number
from core.ranks import all_sum, cli
from data import Dataset
from ddp_utils import Run
from preferences import load_preferences


def dpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-sum log sigmoid(beta [(log pi(y|x) - log pi(z|x)) - (log ref(y|x) - log ref(z|x))]), y chosen and z rejected.

    All [B]: log-probabilities summed over a response's tokens. Returns (loss_sum, n_pairs), float32 scalars.
    """
    log_ratio = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)  # [B]
    return -F.logsigmoid(beta * log_ratio.float()).sum(), log_ratio.new_tensor(len(log_ratio)).float()


def log_probs(
    model: torch.nn.Module, x: Rows, given: dict[str, Rows], share_prompt: bool = False
) -> dict[str, torch.Tensor]:
    """log p(y|x) of each row y of `given`, from one forward pass: {name: float32 [B]}. 0 where y is empty.

    As `losses`, which adds up whatever its terms return: here a vector with one entry a row."""

    def by_row(logits: torch.Tensor, y: torch.Tensor, row: torch.Tensor, mask: torch.Tensor) -> tuple:
        log_p = -F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none")  # [N]
        mine = row.flatten() == torch.arange(len(x), device=row.device)[:, None]  # [B, N]
        return torch.where(mine, log_p, 0).sum(dim=1), mask.sum()  # not index_add: on GPUs it varies from run to run

    rows = {name: [[i] * len(y) for i, y in enumerate(ys)] for name, ys in given.items()}
    return losses(model, x, {name: (by_row, ys, ys, rows[name]) for name, ys in given.items()}, share_prompt)


def with_log_probs(model: torch.nn.Module, rows: list[dict], batch_size: int) -> list[dict]:
    """The pairs (x, y, z) with y_logp and z_logp, the model's log-probabilities of y and z. Runs under `inference`."""
    order = sorted(range(len(rows)), key=lambda i: length(rows[i]))  # little padding in a batch
    made = list(rows)
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        x, y, z = ([rows[i][name] for i in some] for name in ("x", "y", "z"))
        sums = log_probs(model, x, {"y": y, "z": z})
        for i, *found in zip(some, sums["y"].tolist(), sums["z"].tolist(), strict=True):
            made[i] = rows[i] | dict(zip(("y_logp", "z_logp"), found, strict=True))
    return made


def preference_phase(run: Run, name: str, loss: Callable, pairs: Dataset, epochs: float) -> None:
    """Trains on pairs (x, y, z, y_logp, z_logp) by dpo_loss or spin_loss: a mean over the pairs of the global batch."""
    beta = run.args.beta
    for step in run.steps(pairs, epochs):
        n = len(step.ids)  # pairs of the global batch
        rewards = torch.zeros(2, device=run.device)  # sums of the margins, and of 1(margin > 0)
        for rows in step.micro_batches:
            x, y, z = ([row[column] for row in rows] for column in ("x", "y", "z"))
            policy = log_probs(run.model, x, {"y": y, "z": z}, run.args.share_prompt)
            real = [i for i, row in enumerate(rows) if row["y"]]  # the others only keep an idle rank in step
            columns = ([rows[i][column] for i in real] for column in ("y_logp", "z_logp"))
            reference = [torch.tensor(column, dtype=torch.float32, device=run.device) for column in columns]
            sums = (policy["y"][real], policy["z"][real], *reference)  # [pairs] each
            run.backward(**{name: loss(*sums, beta)[0] / n})
            policy_y, policy_z, reference_y, reference_z = (logp.detach() for logp in sums)
            margin = beta * ((policy_y - reference_y) - (policy_z - reference_z))
            rewards += torch.stack([margin.sum(), (margin > 0).sum()])
        margin, accuracy = (all_sum(rewards) / n).tolist()
        run.update(reward_margin=margin, reward_accuracy=accuracy)


def main() -> None:
    p = stage.parser(__doc__, task="ultrachat")
    p.set_defaults(lr=5e-7, batch_size=128, max_prompt=512)
    paper = group(p, "the paper's")
    paper.add_argument("--epochs", type=number(0), default=1)
    paper.add_argument("--beta", type=number(0), default=0.01, help="of the loss: how close to the reference")
    group(p, "data").add_argument("--max-length", type=number(2, kind=int), default=1024, help="tokens of x and y or z")
    group(p, "machine").add_argument("--share-prompt", action="store_true", help="y and z read x once (4-D mask)")
    args = p.parse_args()
    run, examples = stage.start(args, load_preferences)
    pairs = run.offline("D_ref", lambda rows: with_log_probs(run.model, rows, args.micro_batch_size), examples)
    preference_phase(run, "dpo", dpo_loss, pairs, args.epochs)
    run.finish()


if __name__ == "__main__":
    cli(main)
