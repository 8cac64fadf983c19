"""Copy a loss into your own project: BASH and RAC in a plain Hugging Face Trainer. Imports nothing from here.

    python examples/trainer.py --model runs/sft --pairs runs/bash/D_s_1 --out my-bash     # D_s: x, y, y_hat
    python examples/trainer.py --model runs/sft --pairs runs/rac/D_r_1 --out my-rac       # D_r: x, y, z, z_bar

Pasted are the two losses, as they stand in bash.py and rac.py. What is yours to write is which tokens are read
(`collate`) and which losses are added (`joint_loss`); SelfGenerated is all that a Trainer needs. The rows may come from
anywhere; bash.py and rac.py leave theirs in D_s_1 and D_r_1. A loop of your own needs `joint_loss` alone. The Trainer
itself needs the package accelerate, which nothing else here does: pip install "transformers[torch]" datasets.

What goes wrong without notice
- The shift: logits[:, j] predicts response token j, so they begin one position before the response.
- The divisor: both losses return a sum and a count. Under gradient accumulation divide by the tokens of the whole
  optimiser step, which the Trainer hands over as num_items_in_batch. (Those of z it does not count: with RAC and
  accumulation the weight of a micro-batch here is that of its y, where rac.py is exact.)
- The mask: positions that Eq. 7 masks still count in its mean; n_tokens is not the number of corrections.
"""

from __future__ import annotations

import argparse

import datasets
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments


# ---- pasted ----
def bash_loss(logits: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 5: -sum_j log p(y^j | x, y_hat^{<j}) and the number of tokens. The input is mixed, the target is y.

    logits: [B, L, V] given y_hat^{<j}, already shifted. y, mask: [B, L]. Returns (loss_sum, n_tokens), float32 scalars.
    """
    nll = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none").view_as(y)  # [B, L]
    return nll[mask.bool()].sum(), mask.sum().float()


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


# ---- yours ----
def collate(rows: list[dict], pad: int = 0) -> dict[str, torch.Tensor]:
    """[ left-padded prompt | right-padded response ]: y, and own, the model's own tokens, are read; -100: no label."""
    own, learnt = ("z", "z_bar") if "z_bar" in rows[0] else ("y_hat", "y")
    width = max(len(row["x"]) for row in rows)

    def right(name: str, fill: int) -> torch.Tensor:
        most = max(len(row[name]) for row in rows)
        return torch.tensor([row[name] + [fill] * (most - len(row[name])) for row in rows])

    batch = {
        "x": torch.tensor([[pad] * (width - len(row["x"])) + row["x"] for row in rows]),
        "x_mask": torch.tensor([[0] * (width - len(row["x"])) + [1] * len(row["x"]) for row in rows]),
        "y": right("y", pad), "own": right(own, pad), "labels": right("y", -100), "own_labels": right(learnt, -100),
    }  # fmt: skip
    return batch | {"shift_labels": batch["labels"]}  # num_items_in_batch counts these: ours are shifted already


def joint_loss(model, batch: dict[str, torch.Tensor], rac: bool, n_tokens=None) -> torch.Tensor:
    """J_SFT + J_BASH, or J_SFT + J_RAC: means over the tokens of the batch (n_tokens: those of y in the whole step)."""

    def logits(response: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # [B, L, V], given response^{<j}
        mask = torch.cat([batch["x_mask"], (labels != -100).long()], dim=1)
        out = model(
            input_ids=torch.cat([batch["x"], response], dim=1), attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=False,
        )  # fmt: skip
        return out.logits[:, batch["x"].shape[1] - 1 : -1]

    y, own, labels = batch["labels"], batch["own"], batch["own_labels"]
    sft, n = bash_loss(logits(batch["y"], y), y.clamp(min=0), y != -100)  # with y as its own prefix Eq. 5 is Eq. 1
    if rac:
        other, m = rac_loss(logits(own, labels), own, labels.clamp(min=0), labels != -100)
    else:
        other, m = bash_loss(logits(own, labels), labels.clamp(min=0), labels != -100)
    share = 1 if n_tokens is None else n / n_tokens  # of this micro-batch in the step
    return share * (sft / n + other / m)


class SelfGenerated(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = joint_loss(model, inputs, "z_bar" in self.train_dataset.column_names, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the gradients are averaged, the tokens were summed
        return (loss, {}) if return_outputs else loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "pairs", "out"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    rows = datasets.load_from_disk(args.pairs)
    settings = TrainingArguments(args.out, learning_rate=5e-6, num_train_epochs=1, remove_unused_columns=False)
    trainer = SelfGenerated(model, settings, train_dataset=rows, data_collator=collate)
    trainer.train()
    trainer.save_model(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
