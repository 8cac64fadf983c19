"""Reference-answer-based correction (RAC): Algorithm 2, Eq. 6 and 7.

    torchrun --nproc-per-node 8 rac.py --model runs/sft --task tldr --out runs/rac --lr 3e-6 --warmup 0
    python rac.py --model base --task gsm8k --data train.jsonl --out runs/rac --sft-epochs 2       # Algorithm 2 whole

The model writes its own answer z to x. The same model, shown the reference answer in the prompt f(x, y), says what it
would write after each z^{<j}: the label z_bar^j. Where they differ, the model learns z_bar^j after (x, z^{<j}).

    x  = 3 + 4 =        y = 7 . EOS            f(x, y) = "... question: 3 + 4 = ... reference response: 7 . ..."
    z     =  8  .  EOS  the model's own answer
    z_bar =  7  .  EOS  arg max p(. | f(x, y), z^{<j}), all from one forward pass over [f(x, y), z]
    mask  =  1  0  0    1(z_bar != z) of Eq. 7: only the correction is learnt

Each iteration writes D_r to OUT/D_r_1, OUT/D_r_2, ... (a `datasets` folder: id, x, y, z, z_bar); --pairs reads one.

What goes beyond the paper, and is off by default, is in rac_options.py: soft labels, labels of the start, plausible
corrections alone, first corrections alone.

Departures from the paper
- Algorithm 2 steps along -grad J of a log-likelihood; that sign is a slip: we minimise -J.
- Algorithm 2 divides both sums by |B|; here each is a mean over its own tokens, of y and of z, so that a long z
  does not outweigh y. A masked position adds 0 to the sum of Eq. 7 and still counts: the paper's mask is in the sum.
- The paper does not say how z is drawn: --temperature is 1 (Eq. 2), and z has at most --max-response tokens.
- f(x, y) has a limit of its own, --max-reference. A row over it is left out, of J_SFT too, and counted; y is never cut.
- Each iteration has its own AdamW and schedule, so that --iterations 2 is two runs in a row. With --refresh-every
  STEPS, in place of iterations, there is one of each, and the current model makes a new D_r every so many steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

import data
import engine_z
import generate
import rac_options
import stage
from batches import by_token, losses
from core.chat import ends
from core.decode_step import known
from core.flags import count, group, number, positive
from core.ranks import cli, fold_in
from data import Dataset
from ddp_utils import Refresh, Run
from sft import sft_loss, sft_phase


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


def rac_labels(
    model: torch.nn.Module, reference_prompts: list[list[int]], z: list[list[int]], batch_size: int = 8
) -> list[list[int]]:
    """z_bar^j = arg max p(. | f(x, y), z^{<j}) for all j from one teacher-forced pass over [f(x, y), z].

    reference_prompts: f(x, y) and z as token ids. Returns labels, each list as long as its z.
    """
    labels: list[list[int]] = [[] for _ in z]
    best = by_token(model, reference_prompts, z, lambda p: [known(model, p).argmax(dim=-1)], batch_size=batch_size)
    for i, (row,) in best:
        labels[i] = row.tolist()
    return labels


def to_last_correction(z: list[int], z_bar: list[int]) -> tuple[list[int], list[int]]:
    """z and z_bar up to the last position where they differ; both empty where there is none."""
    n = max((j + 1 for j in range(len(z)) if z[j] != z_bar[j]), default=0)
    return z[:n], z_bar[:n]


def draw_z(run: Run, iteration: int, rows: dict[str, Sequence], each: Callable[[int, list], None]) -> list:
    """Answers z ~ p(.|x) of the current model (Algorithm 2, line 10), for `run.offline`: each(i, z) of the i-th row."""
    args = run.args
    if args.z and iteration == 1:
        return engine_z.draw(args, run.tokenizer, rows, each)
    drawn = generate.generate(
        run.model,
        rows["x"],
        ids=rows["id"],
        each=lambda i, samples: each(i, samples[0]),
        max_new_tokens=args.max_response or data.TASKS[args.task].max_response,
        batch_size=args.generation_batch_size,
        eos_token_id=ends(run.tokenizer),
        temperature=args.temperature,
        seed=fold_in(args.seed, iteration),
    )  # Eq. 2
    return [samples[0] for samples in drawn]


def make_d_r(run: Run, examples: Dataset, iteration: int, pairs: Dataset | None = None) -> Dataset:
    """D_r = {(x, y, z, z_bar)} by the current model (Algorithm 2, lines 8 to 13); or `pairs`, already there."""
    args, name = run.args, f"D_r_{iteration}"
    draw = partial(draw_z, run, iteration)  # line 10

    def label(model: torch.nn.Module, rows: list[dict]) -> list[dict]:  # lines 11-12
        f, z = ([row[column] for row in rows] for column in ("f", "z"))
        if args.labels == "topk":
            found = rac_options.rac_top_labels(model, f, z, args.topk, args.micro_batch_size)
        else:
            found = [{"z_bar": z_bar} for z_bar in rac_labels(model, f, z, args.micro_batch_size)]
        kept = [{column: row[column] for column in ("id", "x", "y", "z")} for row in rows]
        return rac_options.leave_out(args, model, [row | labels for row, labels in zip(kept, found, strict=True)])

    if pairs is not None:
        d_r = run.offline(name, partial(rac_options.leave_out, args, run.model), pairs)
    elif args.labels_from == "start" and (iteration > 1 or args.sft_epochs):
        d_r = rac_options.labelled_by_start(run, iteration, examples, draw, label)
    else:
        d_r = run.offline(name, partial(label, run.model), examples, z=draw)
    share = rac_options.implausible(run, d_r, name)
    rac_options.report(d_r, run.tokenizer, args.task, run.out / f"{name}.json", share)
    return d_r


def main() -> None:
    p = stage.parser(__doc__)
    paper, machine = group(p, "the paper's"), group(p, "machine")
    paper.add_argument("--iterations", type=count, default=1, help="H")
    paper.add_argument("--epochs-per-iteration", "--epochs", dest="epochs", type=number(0), default=1)
    paper.add_argument("--sft-epochs", type=number(0), default=0, help="K1: epochs of Eq. 1 alone first")
    paper.add_argument("--sft-weight", type=number(0), default=1.0, help="of J_SFT beside J_RAC (0: Table 6)")
    paper.add_argument("--temperature", type=number(0), default=1.0, help="of the draw of z")
    paper.add_argument("--unmasked", action="store_true", help="Eq. 6 instead of Eq. 7")
    group(p, "data").add_argument("--max-reference", type=count, default=0, help="tokens of f(x, y) (0: x + y + 128)")
    engine_z.add_flag(p)
    group(p, "data").add_argument("--pairs", help="a D_r to use in the first iteration instead of making one")
    stage.refresh_flag(p)
    machine.add_argument("--share-prompt", action="store_true", help="both losses read x once (4-D attention mask)")
    machine.add_argument("--generation-batch-size", type=positive, default=64, help="rows of one rank")
    rac_options.add_flags(p)
    args = p.parse_args()
    rac_options.check_flags(args)
    stage.check_refresh(args)
    stage.check_pairs(p, args, "temperature", "labels_from", "max_reference")
    max_response = args.max_response or data.TASKS[args.task].max_response
    run, examples, pairs = stage.start_with_pairs(args, engine_z.loading(args, data.load), ("z", "z_bar"), max_response)
    rac_options.check_labels(run, pairs)
    run.label = rac_labels  # of the samples in the log
    sft_phase(run, examples, args.sft_epochs)  # lines 2-6

    cut = rac_options.to_first_correction if args.first_correction_only else to_last_correction
    weight, loss = {"rac": 1.0, "sft": args.sft_weight}, partial(rac_loss, masked=not args.unmasked)
    for iteration in range(1, args.iterations + 1):  # line 7
        if args.refresh_every:
            d_r = Refresh(examples, args.refresh_every, partial(make_d_r, run))  # lines 8-13 again and again
        else:
            d_r = make_d_r(run, examples, iteration, pairs if iteration == 1 else None)  # lines 8-13
        for step in run.steps(d_r, args.epochs):  # lines 14-15
            n = {"sft": step.tokens("y"), "rac": step.tokens("z")}  # of the global batch, the masked ones included
            for rows in step.micro_batches:  # this rank's share
                x, y, z, z_bar = ([row[name] for row in rows] for name in ("x", "y", "z", "z_bar"))
                if not args.unmasked:  # by causality, what follows the last correction changes nothing
                    z, z_bar = zip(*map(cut, z, z_bar), strict=True)
                terms = {"rac": (loss, z, z, z_bar)}  # line 17: z is read, z_bar is the target
                if args.labels == "topk":
                    terms = {"rac": rac_options.soft_term(run, rows, z, z_bar)}
                if args.sft_weight:
                    terms["sft"] = (sft_loss, y, y)  # line 16
                sums = losses(run.model, x, terms, args.share_prompt)
                run.backward(**{name: weight[name] * total / n[name] for name, total in sums.items()})
            run.update()  # line 18
    run.finish()


if __name__ == "__main__":
    cli(main)
