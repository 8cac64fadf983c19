"""Tables 8 and 9 of the paper: what online scheduled sampling costs over BASH. Time of a batch, and peak memory.

    python benchmarks/overhead.py --data gsm8k/train.jsonl       # trains a small model first, some minutes
    python benchmarks/overhead.py --model runs/sft --data train.jsonl --preset tldr --batch-size 16 --dtype bfloat16
    python benchmarks/overhead.py --random --width 2048 --layers 16 --heads 8 --vocab 50304        # Pythia-1B's shape

Each side does what its stage does (scs.py, bash.py, sft.py): a training step is all between two batches, with AdamW;
data generation is the mix for one batch by a model without optimiser. SCS draws g by the current weights and then
trains on it: alone (--sft-weight 0, as Eq. 3 stands) or with the SFT loss beside it, as BASH has. It draws by
generate.mix, or one token after the other with a KV cache, or (--naive) as before caches: the whole batch is read again
for each token. All three draw the same tokens. The paper's SCS switches between training and inference for each token
(its remark 1), so its figures stand beside that; whether with a cache, or with the SFT loss, the paper does not say.

The passes that the parallel draw needs depend on how sure the model is of its text, so random weights say nothing about
its time. By default the model is that of mixing.py (GPT-NeoX, d = 256, 4 layers, a BPE of 2048 tokens), trained
on the rows of --data but the last 200, whose text is measured: cut into prompts and responses of just these lengths.
Runs are processes of their own and take turns, see training.py; shown are medians. Writes results/overhead.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import mixing
import torch
import training

import batches
import generate
from bash import bash_loss
from core import fsdp, ranks
from scs import scs_loss
from sft import sft_loss

PRESETS = {"small": (400, 50), "tldr": (512, 53), "ultrachat": (1024, 1024)}  # prompt, response
SIDES = {  # side: how g is drawn, losses of the training step; ratios are to the first
    "BASH training": (None, ("bash", "sft")),
    "BASH data generation": ("auto", ()),
    "SFT training": (None, ("sft",)),
    "SCS": ("auto", ("scs",)),
    "SCS + SFT loss": ("auto", ("scs", "sft")),
    "SCS, token by token": ("token", ("scs",)),
    "SCS + SFT loss, token by token": ("token", ("scs", "sft")),
    "SCS, token by token, no cache": ("naive", ("scs",)),
}
PAPER = {  # s for a global batch and GB of each GPU on 8 A6000: Table 8 (1B, TL;DR), Table 9 (7B, UltraChat)
    "BASH training": ((4.4, 28), (75, 36)),
    "BASH data generation": ((0.9, 17), (370, 22)),
    "SCS, token by token": ((20.8, 35), (3600, 46)),  # the 3600 are "more than"
}


def naive(model: torch.nn.Module, x: generate.Rows, y: generate.Rows, ids: list[int], seed: int, beta: float) -> list:
    """Eq. 4 with a forward over all that came before for each token that any row draws."""
    drawn = [generate.coins(seed, i, len(row), beta) for i, row in zip(ids, y)]
    keys = generate.noise_keys(seed, ids, [0] * len(ids), max(map(len, y))).to(model.device)
    g = [list(row) for row in y]
    for j in sorted(set().union(*drawn)):
        tokens, mask = generate.pad([a + b[:j] for a, b in zip(x, g)], model.device, left=True)
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": position}
        logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        for row, token in enumerate(generate.draw(logits, keys[:, j], 1.0).tolist()):
            if j in drawn[row]:
                g[row][j] = token
    return g


def measure(job: dict, out: str) -> dict:
    how, names = SIDES[job["side"]]
    rows = job["made"] if "made" in job else json.loads((Path(job["folder"]) / "rows.json").read_text())
    run = training.start(job, job["batch_size"], out)
    meter, stats = training.Meter(), {}

    def mixed(part: list[dict]) -> list[list[int]]:
        x, y, ids = ([row[name] for row in part] for name in ("x", "y", "id"))
        seed, beta = ranks.fold_in(0, len(meter.stamps)), job["beta"]
        if how == "naive":
            return naive(run.model, x, y, ids, seed, beta)
        return generate.mix(run.model, x, y, beta=beta, seed=seed, ids=ids, method=how, stats=stats)

    for start in range(0, 0 if names else len(rows), job["batch_size"]):
        meter.stamp()
        with fsdp.inference(run.model):
            mixed(rows[start : start + job["batch_size"]])
    for step in run.steps(rows, 1 if names else 0):
        meter.stamp()
        n = step.tokens("y")
        gs = [[row["y"] for row in part] for part in step.micro_batches]  # of BASH: its values do not matter here
        if how:
            with fsdp.inference(run.model):  # of the whole step at once, as scs.py does
                g = iter(mixed([row for part in step.micro_batches for row in part]))
            gs = [[next(g) for _ in part] for part in step.micro_batches]
        for part, g in zip(step.micro_batches, gs):
            x, y = ([row[name] for row in part] for name in ("x", "y"))
            terms = {"bash": (bash_loss, g, y), "scs": (scs_loss, g, y), "sft": (sft_loss, y, y)}
            sums = batches.losses(run.model, x, {name: terms[name] for name in names}, job["share_prompt"])
            run.backward(**{name: total / n for name, total in sums.items()})
        run.update()
    meter.stamp()
    return meter.result(**{key: value / (len(meter.stamps) - 1) for key, value in stats.items() if key == "forwards"})


def prepare(folder: Path, args: argparse.Namespace, prompt: int, response: int) -> dict:
    """Writes the model and rows.json -> what is worth knowing about the model."""
    count = args.batch_size * args.steps
    if args.random:
        parameters = training.make_model(str(folder), args)
        rows, known = training.make_rows(count, args.vocab, prompt, response), {"weights": "random"}
    else:
        pairs = mixing.read(args.data)
        options = {"model": args.model, "data": args.data, "out": args.out, "steps": args.training_steps}
        tokenizer, model, log = mixing.load(argparse.Namespace(**options), pairs[: -mixing.HELD_OUT])
        model.config.max_position_embeddings = max(model.config.max_position_embeddings, prompt + response)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        text = itertools.cycle(mixing.stream(tokenizer, pairs[-mixing.HELD_OUT :]))
        take = lambda n: list(itertools.islice(text, n))  # noqa: E731
        rows = [{"id": i, "x": take(prompt), "y": take(response)} for i in range(count)]
        parameters, known = model.num_parameters(), {"weights": "given" if args.model else "trained", "training": log}
    (folder / "rows.json").write_text(json.dumps(rows))
    return known | {"parameters": parameters}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, default="small", help=f"prompt and response: {PRESETS}")
    p.add_argument("--data", help="a .jsonl file: prompt and response are the first two strings of a row")
    p.add_argument("--model", help="a model folder (default: a small one is trained)")
    p.add_argument("--out", default="out/mixing", help="keeps the model that was trained")
    p.add_argument("--random", action="store_true", help="random weights and tokens: for all but the parallel draw")
    sizes = {"width": 512, "layers": 6, "heads": 8, "vocab": 50304, "training-steps": 400}
    sizes |= {"batch-size": 16, "micro-batch-size": 16, "steps": 3, "repeat": 2}
    for name, default in sizes.items():
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--beta", type=float, default=0.2)
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default=training.FLOAT)
    p.add_argument("--share-prompt", action="store_true", help="where there are two losses")
    p.add_argument("--naive", action="store_true", help="also without a cache: slow")
    p.add_argument("--results", default=str(training.ROOT / "results" / "overhead.json"))
    p.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = p.parse_args()
    ranks.init()
    if args.job:
        with tempfile.TemporaryDirectory() as out:
            return print(json.dumps(measure(args.job, out)))
    prompt, response = PRESETS[args.preset]
    names = ("batch_size", "micro_batch_size", "beta", "share_prompt", "steps", "dtype")
    with tempfile.TemporaryDirectory() as folder:
        known = prepare(Path(folder), args, prompt, response)
        job = {name: getattr(args, name) for name in names} | {"folder": folder}
        jobs = {side: {**job, "side": side} for side in SIDES if args.naive or "cache" not in side}
        found = training.alternate(__file__, jobs, args.repeat)
    print(
        f"\nPrompt {prompt}, response {response}, batch {args.batch_size}, β = {args.beta}; ratios to BASH training\n"
    )
    print("| | s | peak MB | forwards for g | time | memory | paper, 1B: time, memory | 7B |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for side, row in found.items():
        cells = [f"{row['seconds']:.2f}", f"{row['peak_mb']:.0f}", f"{row.get('forwards', 0):.1f}"]
        cells += [f"{row['seconds_ratio']:.2f}", f"{row['peak_mb_ratio']:.2f}"]
        for table in range(2):
            pair = zip(PAPER[side][table], PAPER["BASH training"][table]) if side in PAPER else ()
            cells.append(", ".join(f"{a / b:.2f}" for a, b in pair))
        print(f"| {side} |", " | ".join(cells), "|")
    training.write(args.results, vars(args) | known | {"lengths": (prompt, response)}, sides=found, paper=PAPER)


if __name__ == "__main__":
    main()
