"""How a stage begins: its flags, --out, tokenizer, examples and model, in the order in which mistakes are cheapest.

    p = stage.parser(__doc__)                                 # the flags that every stage takes
    run, examples = stage.start(args, data.load)              # what a loop needs
    run, examples, pairs = stage.start_with_pairs(args, data.load, ("y", "y_hat"))     # ... or a D_s that is there
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import data
import sums
from batches import check_share_prompt
from core import arrow, lora, packed, track
from core.chat import ends
from core.flags import above_zero, below_one, count, data_flags, group, new_parser, number, positive
from core.fsdp import check_rows, load_tokenizer, model_of
from core.ranks import WORLD, init, print0
from data import Dataset
from ddp_utils import Run
from folders import check_saves, open_out, read_pairs
from held_out import sampler, watch


def parser(doc: str, task: str | None = None) -> argparse.ArgumentParser:
    """The flags that every stage takes. doc: the stage's docstring. task: the default of --task, if any."""
    p = new_parser(doc)
    for title in ("model", "the paper's", "data", "machine", "while training"):  # in this order in --help
        group(p, title)
    data_flags(p, sorted(data.TASKS), task)
    g = group(p, "model")
    g.add_argument("--out", required=True, help="folder for the model, log.jsonl and args.json")
    g.add_argument("--save-dtype", choices=["float32", "bfloat16"], default="float32", help="of the saved weights")
    g = group(p, "the paper's")
    g.add_argument("--batch-size", type=positive, default=512, help="rows in the global batch (Table 5)")
    g.add_argument("--lr", type=number(0), default=5e-6, help="peak learning rate (Table 5)")
    g.add_argument("--warmup", type=number(0, 1), default=0.1, help="share of the steps that warm up (Table 5)")
    g.add_argument("--clip", type=number(0), default=1.0, help="largest gradient norm (0: any)")
    g.add_argument("--max-steps", type=count, default=0, help="at most so many steps in each phase (0: no limit)")
    g.add_argument("--seed", type=count, default=0)
    g = group(p, "beyond the paper")
    g.add_argument("--lr-schedule", choices=["cosine", "linear", "constant"], default="cosine", help="after warm-up")
    g.add_argument("--weight-decay", type=number(0), default=0.0, help="AdamW's, of matrices (not of norms and biases)")
    g.add_argument("--adam-betas", type=below_one, nargs=2, default=[0.9, 0.999], metavar="BETA", help="AdamW's")
    g.add_argument("--adam-eps", type=above_zero, default=1e-8, help="AdamW's")
    g = group(p, "machine")
    g.add_argument("--micro-batch-size", type=positive, default=8, help="rows in one pass of one rank")
    g.add_argument("--activation-checkpointing", action="store_true", help="recompute each block in the backward")
    g.add_argument("--compile", action="store_true", help="torch.compile each block's training pass")
    g.add_argument("--packed", action="store_true", help="a pass reads its rows as one sequence, x once, no padding")
    lora.add_flags(p)
    g = group(p, "while training")
    g.add_argument("--checkpoint-every", type=count, default=500, help="steps between checkpoints (0: none)")
    g.add_argument("--eval-every", type=count, default=0, help="steps between looks at held-out rows (0: none)")
    g.add_argument("--eval-data", help="those rows: a file as for --data (default: the hub set's test split)")
    g.add_argument("--eval-rows", type=positive, default=64, help="how many of them")
    g.add_argument("--eval-samples", type=count, default=2, help="of so many of them the log has the answer as text")
    g.add_argument("--track", choices=["wandb", "tensorboard", "trackio"], help="also send there what log.jsonl has")
    return p


def refresh_flag(p: argparse.ArgumentParser) -> None:
    """--refresh-every, of the stages whose data the model makes: see ddp_utils.Refresh."""
    g = group(p, "beyond the paper")
    g.add_argument("--refresh-every", type=count, default=0, help="steps between one D and a new one (0: never)")


def check_refresh(args: argparse.Namespace) -> None:
    """Raises ValueError where --refresh-every is given beside what it takes the place of."""
    if args.refresh_every and args.iterations != 1:
        raise ValueError("--refresh-every makes new data in one schedule, --iterations begins it again: choose")
    if args.refresh_every and args.pairs is not None:
        raise ValueError("--refresh-every makes its data itself, --pairs brings them: choose")


def check_pairs(p: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """Raises ValueError where --pairs or --z brings data for no iteration; and where one of them brings all, but there
    are flags (names; of z, --temperature) of how they are made."""
    given = next((name for name in ("pairs", "z") if getattr(args, name, None) is not None), None)
    if given and not args.iterations:
        raise ValueError(f"--{given} is for an iteration, and there is none (--iterations 0)")
    idle = [name for name in names if getattr(args, name) != p.get_default(name)]
    if given == "pairs" and args.iterations == 1 and idle:
        raise ValueError(f"--pairs brings data that are made: it takes no --{idle[0].replace('_', '-')}")
    again = args.iterations != 1 or getattr(args, "refresh_every", 0)
    if given == "z" and not again and args.temperature != p.get_default("temperature"):
        raise ValueError("--z brings z that are drawn: it takes no --temperature")


def start(
    args: argparse.Namespace,
    load_examples: Callable[[argparse.Namespace, object], tuple[Dataset, list[str]]],
    max_new_tokens: int = 0,
    where: str = "",
) -> tuple[Run, Dataset]:
    """Opens --out, then reads tokenizer, examples and model: a mistake in the data shows before the weights are read.

    max_new_tokens: of what the stage will generate after x, and read after f(x, y); where: how the message on a row
    that does not fit the model begins. Ends the program where the same command has finished before."""
    init()
    if args.eval_data and not args.eval_every:
        raise ValueError("--eval-data is measured every so many steps, and --eval-every does not say how many")
    lora.settle(args)
    track.check(args.track)
    if not open_out(args):
        raise SystemExit(0)
    tokenizer = load_tokenizer(args.model)
    if args.task == "sums":
        sums.check_tokenizer(tokenizer)
    examples, notes = load_examples(args, tokenizer)
    for note in notes:
        print0(note)
    if len(examples) < WORLD:
        raise ValueError(f"{len(examples)} examples for {WORLD} processes: use fewer processes")
    held = []
    if args.eval_every:
        *held, notes = data.held_out(args, tokenizer)
        for note in notes:
            print0(f"--eval-data: {note}")
    model = model_of(args, tokenizer)
    if args.packed and (why := packed.prepare(model)):
        print0(f"--packed: not with this model ({why}); its rows are padded, as without the flag")
    if getattr(args, "share_prompt", False) and not getattr(model, "packed", False):
        check_share_prompt(model)  # before anything is drawn
        if getattr(args, "sft_weight", 1) == 0:
            print0("--share-prompt: there is one loss alone (--sft-weight 0); the flag changes nothing")
    check_saves(model, tokenizer, args)
    check_rows(model, examples, where, max_new_tokens)
    size = min(args.batch_size, len(examples))
    accumulation = math.ceil(math.ceil(size / WORLD) / args.micro_batch_size)
    print0(f"batch {size} = {WORLD} processes x {accumulation} micro-batches of up to {args.micro_batch_size} rows")
    run = Run(args, model, tokenizer)
    if args.eval_every:
        run.watch = watch(run, *held)
        run.samples = sampler(run) if args.eval_samples else None
    return run, examples


def start_with_pairs(
    args: argparse.Namespace, load_examples: Callable, pair: tuple[str, str], max_new_tokens: int = 0,
    read: Callable[..., Dataset] = read_pairs,
) -> tuple[Run, Dataset, Dataset | None]:  # fmt: skip
    """As `start`; and the rows of --pairs. Where no phase learns from other rows, they are the examples: --data is not
    read then. read: in place of read_pairs."""
    if args.pairs is None:
        return *start(args, load_examples, max_new_tokens), None
    where = f"--pairs {args.pairs}, "
    if args.iterations == 1 and not args.sft_epochs:

        def load_pairs(args: argparse.Namespace, tokenizer: object) -> tuple[Dataset, list[str]]:
            rows = read(args.pairs, pair, tokenizer)
            told = f"{len(rows)} rows of --pairs {args.pairs}; --data, its limit and its lengths are not used"
            return rows, [told, *without_end(rows, tokenizer)]

        run, pairs = start(args, load_pairs, where=where)
        return run, pairs, pairs
    run, examples = start(args, load_examples, max_new_tokens)
    pairs = read(args.pairs, pair, run.tokenizer)
    check_rows(run.model, pairs, where)
    for note in without_end(pairs, run.tokenizer):
        print0(note)
    return run, examples, pairs


def without_end(pairs: Dataset, tokenizer: object) -> list[str]:
    """A warning where no y has a token that ends a response (chat.ends): who forgets it teaches never to stop."""
    y, end = arrow.Rows(pairs).columns["y"], {*ends(tokenizer)}
    if any(int(y.at(i)[-1]) in end for i in range(len(y))):
        return []
    name = tokenizer.convert_ids_to_tokens(min(end))
    return [f"WARNING: no y of --pairs ends with what ends a response ({name}): the model will learn not to stop"]
