"""Controls: a D_s or D_r with one thing changed, for --pairs, to learn what it is that a method gains from.

    python tools/controls.py noise  runs/bash/D_s_1 --model runs/sft --out D_s_noise        # whose tokens?
    python tools/controls.py noise  runs/bash/D_s_1 --model runs/sft --out D_s_any --anywhere   # which places?
    python tools/controls.py oracle runs/rac/D_r_1 --model runs/sft --out D_r_oracle        # were labels right?
    python tools/controls.py wrong  runs/rac/D_r_1 --model runs/sft --out D_r_wrong --task sums

noise   y_hat has tokens of the responses where it had the model's own: in the very places where it differs from y, or
        with --anywhere in as many places of the row drawn at random. What is left of BASH's gain is not due to the
        tokens being the model's own.
oracle  z_bar are the right labels (tasks toy and sums, where they are known).
wrong   z_bar is z, which Eq. 7 masks, in rows whose z has the right answer: RAC learns from wrong ones alone.
"""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, from whatever folder this is called
import evaluate
import sums
from core.chat import response_text
from core.flags import count, new_parser
from core.fsdp import load_tokenizer
from core.ranks import cli, print0
from core.rows import write_json
from data import Dataset
from folders import fingerprint, read_pairs


def noise(d_s: Dataset, seed: int, anywhere: bool = False) -> Dataset:
    """y_hat with as many tokens that differ from y as before, each drawn from the tokens of all responses."""
    tokens = [token for y in d_s["y"] for token in y]

    def change(row: dict) -> dict:
        rng, y = random.Random(f"noise {seed} {row['id']}"), row["y"]
        places = [j for j, (a, b) in enumerate(zip(y, row["y_hat"], strict=True)) if a != b]
        if anywhere:
            places = rng.sample(range(len(y)), len(places))
        y_hat = list(y)
        for j in places:
            while y_hat[j] == y[j]:
                y_hat[j] = rng.choice(tokens)
        return {"y_hat": y_hat}

    if len(set(tokens)) < 2:
        raise ValueError("all responses are one and the same token: there is no other to draw")
    return d_s.map(change, keep_in_memory=True)  # no files in its folder


def oracle(d_r: Dataset, tokenizer: object) -> Dataset:
    """The right labels in place of z_bar."""
    for row in d_r:
        if not sums.has_sum(sums.text_of(tokenizer, row["y"])):
            raise ValueError(f"row {row['id']}: y is no response of toy or sums, whose right labels are known")
    right = lambda row: {"z_bar": sums.right_labels(tokenizer, row["y"], row["z"])}  # noqa: E731
    soft = [name for name in ("top_ids", "top_logp") if name in d_r.column_names]  # of the labels that were there
    return d_r.map(right, keep_in_memory=True, remove_columns=soft)


def wrong(d_r: Dataset, tokenizer: object, task: str) -> Dataset:
    """z in place of z_bar where z has the right answer."""
    find, equal = evaluate.CHECKS[task]

    def mask(row: dict) -> dict:
        y, z = (find(response_text(tokenizer, row[name])) for name in ("y", "z"))
        return {"z_bar": row["z"] if equal(z, y) else row["z_bar"]}

    return d_r.map(mask, keep_in_memory=True)


def main() -> None:
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("noise", "a D_s"), ("oracle", "a D_r"), ("wrong", "a D_r")):
        p = commands.add_parser(name, allow_abbrev=False)
        p.add_argument("pairs", help=f"{what} folder")
        p.add_argument("--model", "--tokenizer", required=True, help="the folder whose tokenizer wrote it")
        p.add_argument("--out", required=True, type=Path)
        if name == "noise":
            p.add_argument("--anywhere", action="store_true", help="in random places of the row")
            p.add_argument("--seed", type=count, default=0)
        if name == "wrong":
            p.add_argument("--task", required=True, choices=sorted(evaluate.CHECKS), help="whose answers are checked")
    args = parser.parse_args()
    if args.out.exists():
        raise ValueError(f"--out {args.out} exists already; choose another folder or delete it")
    tokenizer = load_tokenizer(args.model)
    try:
        pairs = read_pairs(args.pairs, ("y", "y_hat") if args.command == "noise" else ("z", "z_bar"), tokenizer)
    except ValueError as error:
        raise ValueError(str(error).replace("--pairs ", "", 1)) from None
    if args.command == "noise":
        made, before, after = noise(pairs, args.seed, args.anywhere), "y", "y_hat"
    else:
        made = oracle(pairs, tokenizer) if args.command == "oracle" else wrong(pairs, tokenizer, args.task)
        before, after = "z", "z_bar"
    differ = sum(a != b for row in made for a, b in zip(row[before], row[after], strict=True))
    partial = args.out.with_name(args.out.name + ".partial")  # renamed at the end: what is there is whole
    shutil.rmtree(partial, ignore_errors=True)
    made.save_to_disk(partial)
    write_json(partial / "source.json", {"tokenizer": fingerprint(tokenizer), "seconds": 0.0})
    partial.rename(args.out)
    print0(f"{args.out}: {differ / sum(map(len, made[before])):.2%} of the tokens of {after} differ from {before}")


if __name__ == "__main__":
    cli(main)
