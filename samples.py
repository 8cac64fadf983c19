"""What the model says to a few held-out rows, as text: with --eval-every in log.jsonl and the tracker."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import data
import generate
from core.chat import ends, response_text
from core.fsdp import inference
from core.ranks import RANK
from tools.corrections import coloured, marked

if TYPE_CHECKING:
    from ddp_utils import Run


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
