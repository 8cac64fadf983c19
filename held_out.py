"""While training, with --eval-every: what the model is worth on held-out rows, and what it says to a few of them.

    run.watch = watch(run, *rows)       # held_nll, held_gap and the task's own metric: for log.jsonl and the tracker
    run.samples = sampler(run)          # prompt, reference and answer as text

The rows are those of --eval-data (`data.held_out`). Nothing here changes a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

import data
import generate
from core.answers import optional
from core.chat import ends, response_text
from core.fsdp import check_fits, inference
from core.ranks import RANK, WORLD, all_sum
from data import Dataset
from evaluate import CHECKS, hardly_read, nll, rouge
from tools.corrections import coloured, marked

if TYPE_CHECKING:
    from ddp_utils import Run


def watch(run: Run, examples: Dataset, references: dict[int, str]) -> Callable[[], dict[str, float]]:
    """For --eval-every: a function that measures the run's model on what data.held_out has read, for log.jsonl.

    held_nll and held_gap in nats per token of y, as nll_y and exposure_gap; held_accuracy (greedy) or held_rougeL where
    the task has one. The rows are divided over the ranks."""
    args, spec = run.args, data.TASKS[run.args.task]
    new = (args.max_response or spec.max_response) if args.task in (*CHECKS, "tldr") else 0
    if args.task == "tldr":
        lost = hardly_read("references of --eval-data", [*references.values()], "they count as 0 in held_rougeL")
        new = new if lost < len(references) else 0
    tokens = max(len(row["x"]) + max(len(row["y"]), new) for row in examples)
    check_fits(run.model, tokens, max(max(row["x"] + row["y"]) for row in examples), "--eval-data: x and y")
    name = {"tldr": "rougeL"}.get(args.task, "accuracy") if new else None
    if args.task == "tldr":
        optional("rouge_score.rouge_scorer", "rouge-score")
    mine = examples.to_list()[RANK::WORLD]
    x, y, ids = ([row[key] for row in mine] for key in ("x", "y", "id"))
    size = {"ids": ids, "batch_size": getattr(args, "generation_batch_size", 64)}

    def score(z: list[int], reference: str) -> float:
        text = response_text(run.tokenizer, z)
        if args.task == "tldr":
            return rouge([[text]], [reference]).get("rougeL", 0.0)
        find, equal = CHECKS[args.task]
        return float(equal(find(text), find(reference)))

    def measure() -> dict[str, float]:
        end, drawn = ends(run.tokenizer), []
        with inference(run.model):
            g = generate.mix(run.model, x, y, beta=0.2, **size)  # Eq. 4; one beta for all stages, to compare
            on_y, on_g = (sum(nll(run.model, x, inputs, y, args.micro_batch_size)) for inputs in (y, g))
            if new:
                drawn = generate.generate(run.model, x, temperature=0, max_new_tokens=new, eos_token_id=end, **size)
        good = sum(score(z, references[i]) for i, (z,) in zip(ids, drawn)) if new else 0.0
        sums = torch.tensor([on_y, on_g, sum(map(len, y)), good, len(y)], dtype=torch.float64, device=run.device)
        on_y, on_g, n, good, count = all_sum(sums).tolist()
        return {"held_nll": on_y / n, "held_gap": (on_g - on_y) / n} | ({f"held_{name}": good / count} if name else {})

    return measure


def sampler(run: Run) -> Callable[[], list[dict[str, str]]]:
    """A function for all ranks to call: on rank 0 prompt, reference and greedy answer of the first --eval-samples rows
    and, where the stage labels (run.label), the answer with its corrections, as [z^j→z_bar^j]. Raises ValueError."""
    args, tokenizer = run.args, run.tokenizer
    examples, *_ = data.held_out(args, tokenizer, f=True)
    rows = examples.select(range(min(args.eval_samples, len(examples)))).to_list()
    x, ids = ([row[name] for row in rows] for name in ("x", "id"))
    new = args.max_response or data.TASKS[args.task].max_response
    if limit := getattr(run.model.config, "max_position_embeddings", None):  # where nothing else is drawn from them
        new = max(0, min(new, limit - max(max(len(row["x"]), len(row.get("f", []))) for row in rows)))

    def say() -> list[dict[str, str]]:
        found = []
        with inference(run.model):
            if RANK == 0:
                how = {"max_new_tokens": new, "eos_token_id": ends(tokenizer), "temperature": 0, "ids": ids}
                for row, (z,) in zip(rows, generate.generate(run.model, x, **how), strict=True):
                    texts = {"prompt": tokenizer.decode(row["x"]), "reference": response_text(tokenizer, row["y"])}
                    texts["answer"] = response_text(tokenizer, z)
                    if run.label and z:
                        (z_bar,) = run.label(run.model, [row["f"]], [z])
                        texts["corrections"] = coloured(marked(tokenizer, z, z_bar), colour=False)
                    found.append(texts)
        return found

    return say
