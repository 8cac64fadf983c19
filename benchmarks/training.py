"""The training step against TRL's SFTTrainer, and the joint step of BASH in three ways: tokens a second, peak memory.

    pip install -r benchmarks/requirements.txt
    OMP_NUM_THREADS=1 python benchmarks/training.py                      # CPU, 70M parameters; results/training.json
    python benchmarks/training.py --width 2048 --layers 16 --batch-size 16          # a GPU: the shape of Pythia-1B
    python benchmarks/training.py --packed --ragged 0.8 --width 256 --layers 4 --vocab 8192 --batch-size 8 --steps 4 \
        --repeat 1                                                        # --packed alone; results/packed.json

Every side gets the same weights (a random GPT-NeoX), rows of random tokens (prompts and responses of --prompt and
--response tokens, give or take --ragged; all rows of a step in one micro-batch), AdamW (fused), clipping, precision:
float32 on a CPU, bfloat16 over float32 weights on a GPU. A step is all between two batches: padding, forward, backward,
clipping, AdamW, logging. Ours is the loop of sft.py and bash.py on ddp_utils.Run. TRL runs as it is installed, which
means with gradient checkpointing, then without it (as ours), then without padding as well; its loss is on the response
only. transformers' own Trainer, with whole logits, stands beside it. Tokens are those of x and y, padding not counted.

Every run is a process of its own, the sides take turns, and a run's first step is not counted. Shown are medians over
all steps; the clock is CPU time where there is one thread (other programs change that little), else time on the wall.
The peak is that of a run from when its model is loaded: resident memory of the whole process, libraries included, on a
CPU, allocated memory on a GPU. All sides must have the same loss at the first step; it is in the table. Padding is the
share of the columns of our passes that hold no token of a row.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import batches
import ddp_utils
import stage
import tiny
from core import fsdp, packed, ranks
from sft import sft_loss

ROOT = Path(__file__).resolve().parents[1]
PEERS = {  # side: settings beyond the defaults
    "TRL, defaults": {},
    "TRL, no checkpointing": {"gradient_checkpointing": False},
    "TRL, no checkpointing, padding-free": {"gradient_checkpointing": False, "padding_free": True},
    "transformers' Trainer": {},
}
JOINT = ("one pass", "two passes", "--share-prompt", "--packed")
CUDA, FLOAT = torch.cuda.is_available(), "bfloat16" if torch.cuda.is_available() else "float32"
VERSIONS = ("torch", "transformers", "trl")
CLOCK = time.process_time if torch.get_num_threads() == 1 and not CUDA else time.perf_counter


class Meter:
    """Stamps of time, and the peak of memory from when this is made."""

    def __init__(self) -> None:
        self.stamps: list[float] = []
        torch.cuda.reset_peak_memory_stats() if CUDA else Path("/proc/self/clear_refs").write_text("5")

    def stamp(self, *_: object, **__: object) -> None:
        if CUDA:
            torch.cuda.synchronize()
        self.stamps.append(CLOCK())

    def result(self, **more: object) -> dict:
        resident = 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
        return {"stamps": self.stamps, "peak": torch.cuda.max_memory_allocated() if CUDA else resident} | more


def make_rows(count: int, vocab: int, prompt: int, response: int, ragged: float = 0.2) -> list[dict]:
    """Random ids; lengths within that share (ragged) of those asked for. A rotated y stands for y_hat."""
    draw, low, high = random.Random(0), 1 - ragged, 1 + ragged
    sizes = [(round(draw.uniform(low, high) * prompt), round(draw.uniform(low, high) * response)) for _ in range(count)]
    rows = [[[draw.randrange(3, vocab) for _ in range(n)] for n in pair] for pair in sizes]
    return [{"id": i, "x": x, "y": y, "y_hat": y[1:] + y[:1]} for i, (x, y) in enumerate(rows)]


def make_model(folder: str, args: argparse.Namespace) -> int:
    """Writes a random GPT-NeoX with a tokenizer -> its number of parameters."""
    size = {"hidden_size": args.width, "intermediate_size": 4 * args.width, "num_hidden_layers": args.layers}
    size |= {"num_attention_heads": args.heads, "max_position_embeddings": 4096, "initializer_range": 0.02}
    model = tiny.model("gpt_neox", args.vocab, **size)
    model.save_pretrained(folder)
    tiny.word_tokenizer().save_pretrained(folder)
    return model.num_parameters()


def start(job: dict, rows: int, out: str) -> ddp_utils.Run:
    """A Run as the stages make it. The job names a model's folder, or how to make a model and its tokenizer."""
    flags = f"--task toy --dtype {job['dtype']} --checkpoint-every 0 --batch-size {rows} --out {out}"
    flags += f" --micro-batch-size {job['micro_batch_size']} --model {job['folder']}"
    args = stage.parser("").parse_args(flags.split())
    if "make" in job:
        return ddp_utils.Run(args, job["make"](), job["tokenizer"])
    return ddp_utils.Run(args, fsdp.load_model(job["folder"], job["dtype"]), fsdp.load_tokenizer(job["folder"]))


def ours(side: str, job: dict, rows: list[dict], out: str) -> dict:
    run, columns, joint = start(job, len(rows), out), [], job.get("joint", side in JOINT)
    if side == "--packed" and (why := packed.prepare(run.model)):
        sys.exit(f"--packed: {why}")
    run.model.register_forward_pre_hook(lambda *a: columns.append(a[2]["input_ids"].numel()), with_kwargs=True)
    meter = Meter()
    for step in run.steps(rows, job["steps"]):
        meter.stamp()
        n = step.tokens("y")
        for part in step.micro_batches:
            x, y, y_hat = ([row[name] for row in part] for name in ("x", "y", "y_hat"))
            terms = ({"bash": (sft_loss, y_hat, y)} if joint else {}) | {"sft": (sft_loss, y, y)}
            if side == "two passes":
                sums, target = {}, batches.batch(x, y, run.device)
                for name, (loss, given, _) in terms.items():
                    logits = batches.response_logits(run.model, batches.batch(x, given, run.device))
                    sums[name] = loss(logits, target.y, target.mask)[0]
            else:
                sums = batches.losses(run.model, x, terms, share_prompt=side == "--share-prompt")
            run.backward(**{name: total / n for name, total in sums.items()})
        run.update()
    meter.stamp()
    x, y = (sum(len(row[name]) for row in rows) for name in ("x", "y"))
    terms = 2 if joint else 1  # a response's last token is not read
    held = (1 if side in ("--share-prompt", "--packed") else terms) * x + terms * (y - len(rows))
    padding = 1 - held * job["steps"] / sum(columns)
    return meter.result(loss=json.loads((Path(out) / "log.jsonl").read_text().splitlines()[0])["loss"], padding=padding)


def theirs(side: str, job: dict, rows: list[dict], out: str) -> dict:
    options = {"output_dir": out, "per_device_train_batch_size": len(rows), "max_steps": job["steps"]}
    options |= {"optim": "adamw_torch_fused", "learning_rate": 5e-6, "logging_steps": 1, "save_strategy": "no"}
    options |= {"report_to": "none", "bf16": FLOAT == "bfloat16", "use_cpu": not CUDA, **PEERS[side]}
    rows = [{"input_ids": r["x"] + r["y"], "labels": [-100] * len(r["x"]) + r["y"]} for r in rows]
    if "make" in job:
        model, tokenizer = job["make"](), job["tokenizer"]
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32)
        tokenizer = fsdp.load_tokenizer(job["folder"])
    common = {"processing_class": tokenizer, "train_dataset": rows}  # a Trainer takes a list
    meter = Meter()
    clock = type("Clock", (transformers.TrainerCallback,), {"on_train_begin": meter.stamp, "on_step_end": meter.stamp})
    common |= {"model": model, "callbacks": [clock()]}
    if side.startswith("TRL"):
        import datasets
        from trl import SFTConfig, SFTTrainer

        common["train_dataset"] = datasets.Dataset.from_list(rows)
        trainer = SFTTrainer(args=SFTConfig(**options, max_length=None), **common)
    else:
        common["data_collator"] = transformers.DataCollatorForSeq2Seq(common["processing_class"])
        trainer = transformers.Trainer(args=transformers.TrainingArguments(**options), **common)
    trainer.train()
    return meter.result(loss=trainer.state.log_history[0]["loss"])


def alternate(script: str, jobs: dict[str, dict], repeat: int) -> dict[str, dict]:
    """Each job `repeat` times, in turns, in a process of its own -> medians, and ratios to the first job."""
    runs: dict[str, list[dict]] = {name: [] for name in jobs}
    for _, (name, job) in itertools.product(range(repeat), jobs.items()):
        done = subprocess.run([sys.executable, script, "--job", json.dumps(job)], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{Path(script).name}: {name!r} failed, see above")
        runs[name].append(json.loads(done.stdout.splitlines()[-1]))
        print(name, runs[name][-1], file=sys.stderr)
    found = {}
    for name, same in runs.items():
        seconds = statistics.median(b - a for r in same for a, b in zip(r["stamps"][1:], r["stamps"][2:]))
        found[name] = {"seconds": seconds, "peak_mb": statistics.median(r["peak"] for r in same) / 1e6}
        found[name] |= {key: value for key, value in same[0].items() if key not in ("stamps", "peak")}
    first = found[next(iter(jobs))]
    return {n: r | {f"{key}_ratio": r[key] / first[key] for key in ("seconds", "peak_mb")} for n, r in found.items()}


def write(path: str, about: dict, **more: object) -> None:
    found = {name: importlib.util.find_spec(name) and importlib.metadata.version(name) for name in VERSIONS}
    found |= {"device": "cuda" if CUDA else "cpu", "threads": torch.get_num_threads(), "clock": CLOCK.__name__}
    about = {key: value for key, value in about.items() if key not in ("results", "job", "out", "model", "data")}
    Path(path).write_text(json.dumps({"about": found | about, **more}, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"width": 512, "layers": 6, "heads": 8, "vocab": 50304, "prompt": 400, "response": 50}
    for name, default in (sizes | {"batch-size": 4, "steps": 3, "repeat": 2}).items():
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--ragged", type=float, default=0.2, help="lengths are within this share of those asked for")
    p.add_argument("--packed", action="store_true", help="our steps alone, with --packed and without")
    p.add_argument("--results", help="default: results/training.json, of --packed results/packed.json")
    p.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = p.parse_args()
    args.results = args.results or str(ROOT / "results" / f"{'packed' if args.packed else 'training'}.json")
    ranks.init()
    if job := args.job:
        with tempfile.TemporaryDirectory() as out:
            run = theirs if job["side"] in PEERS else ours
            return print(json.dumps(run(job["side"], job, make_rows(*job["rows"]), out)))
    tables, given = [], (args.prompt, args.response)
    sides, plan = ["ours", "--packed"], (("Joint", ("one pass", *JOINT[2:]), given),)
    if not args.packed:
        sides += PEERS if importlib.util.find_spec("trl") else ()
        plan = ("Joint", JOINT, given), ("Joint", JOINT, (200, 200))
        if len(sides) == 2:
            print("TRL is not installed (pip install -r benchmarks/requirements.txt): it is left out", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        parameters = make_model(folder, args)
        job = {"folder": folder, "dtype": FLOAT, "steps": args.steps, "micro_batch_size": args.batch_size}
        for title, names, lengths in (("SFT", sides, given), *plan):
            size = (args.batch_size, args.vocab, *lengths, args.ragged)
            of = {**job, "joint": title == "Joint", "rows": size}
            tokens = sum(len(row["x"] + row["y"]) for row in make_rows(*size))
            found = alternate(__file__, {name: {**of, "side": name} for name in names}, args.repeat)
            print(f"\n{title} step, prompt {lengths[0]}, response {lengths[1]}, {args.batch_size} rows\n")
            print(f"| side | s | tokens/s | peak MB | first loss | time / {names[0]} | peak / {names[0]} | padding |")
            print("|---|---:|---:|---:|---:|---:|---:|---:|")
            for name, row in found.items():
                row["tokens_per_second"] = tokens / row["seconds"]
                cells = [f"{row['seconds']:.2f}", f"{row['tokens_per_second']:.0f}", f"{row['peak_mb']:.0f}"]
                cells += [f"{row['loss']:.4f}", f"{row['seconds_ratio']:.2f}", f"{row['peak_mb_ratio']:.2f}"]
                cells += [f"{row['padding']:.0%}" if "padding" in row else ""]
                print(f"| {name} |", " | ".join(cells), "|")
            tables.append({"step": title, "lengths": lengths, "tokens": tokens, "sides": found})
    write(args.results, {**vars(args), "dtype": FLOAT, "parameters": parameters}, tables=tables)


if __name__ == "__main__":
    main()
