"""What the data cost around the model: seconds and memory of each step, beside the plain way to do it.

    OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false python benchmarks/data.py        # 5,000, 20,000 and 50,000 rows
    ... python benchmarks/data.py --sizes 200000            # what is done now alone: "before" ends at 50,000

    load            UltraChat-like rows with f(x, y), from .jsonl to token ids; "again" is a second rank, stage or call
    gather          D_r of hard labels from what the decoder and the labelling pass hand over, kept as it is made
    gather topk     the same with --labels topk --topk 16
    check           read_pairs, check_rows, describe, and the share of tokens that differ
    step topk       host time of a global batch of 512 rows with top-k labels: rows, micro-batches, the labels' tensors
    forwards        of folders.offline (before: of chunks of 128 rows) over those of one call for all rows; their
                    lengths are skewed

"before" is the slow, obvious version, written out below: row by row, all rows as Python objects, parts as JSON. Each
job is a process of its own. Seconds are CPU time. Memory is the peak over what the imports took: of the process's own
pages (RssAnon, looked at every 20 ms), and with those of mapped files, which are shared and can be given back at any
time (VmHWM). Writes results/data.json; rows of other sizes that are there stay.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
TOPK, CHUNK = 16, 128
SLOW = {"gather": 50_000, "gather topk": 2_000, "load": 50_000, "check": 50_000}  # the most rows for "before"


# ---------------------------------------------------------------------------------------------- synthetic sets
def texts(count: int, seed: int = 0):
    """Dialogues of two turns, about 150 and 300 tokens, in words whose frequencies fall as in a language."""
    rng = random.Random(seed)
    syllables = [a + b for a in "b d f g k l m n p r s t v".split() for b in "a e i o u".split()]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(20_000)]
    weights = [1 / (i + 10) for i in range(len(words))]
    stock = rng.choices(words, weights, k=2_000_000)
    for i in range(count):
        a, b = (min(int(rng.expovariate(1 / mean)) + 5, 600) for mean in (110, 220))
        start = rng.randrange(len(stock) - a - b)
        prompt, answer = " ".join(stock[start : start + a]), " ".join(stock[start + a : start + a + b])
        turns = [{"role": "user", "content": prompt + "?"}, {"role": "assistant", "content": answer + "."}]
        yield {"prompt": prompt + "?", "messages": turns, "id": str(i)}


def write_rows(path: Path, count: int) -> None:
    with open(path, "w") as file:
        for row in texts(count):
            file.write(json.dumps(row) + "\n")


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=16_000, special_tokens=["</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator((turn["content"] for row in texts(3000) for turn in row["messages"]), trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)


def some_rows(count: int, seed: int = 0):
    """Rows of token ids as the stages have them: x, y and f, z by the model and its labels z_bar."""
    import numpy as np

    rng = np.random.default_rng(seed)
    for i in range(count):
        sizes = np.minimum(rng.exponential((150, 300, 300)).astype(int) + 3, 1000)
        x, y, z = (rng.integers(1, 16_000, size, dtype=np.int32) for size in sizes)
        z_bar = np.where(rng.random(len(z)) < 0.2, rng.integers(1, 16_000, len(z), dtype=np.int32), z)
        yield {"id": i, "x": x, "y": y, "f": np.concatenate([x, y]), "z": z, "z_bar": z_bar}


def as_lists(row: dict) -> dict:
    return {name: value if name == "id" else value.tolist() for name, value in row.items()}


def write_examples(path: Path, count: int) -> None:
    from core import arrow

    keys = ("id", "x", "y", "f")
    rows = ({key: row[key] for key in keys} for row in some_rows(count))
    arrow.write(path, (arrow.table(some) for some in blocks(rows, 1000)))


def blocks(rows, size: int):
    some = []
    for row in rows:
        some.append(row)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some


# ---------------------------------------------------------------------------------------------- the jobs
def load(side: str, folder: Path, count: int) -> None:
    import data
    from core.fsdp import load_tokenizer

    tokenizer, path = load_tokenizer(str(folder / "tokenizer")), str(folder / f"{count}.jsonl")
    if side != "before":
        rows, _ = data.examples("ultrachat", tokenizer, data=path, max_reference=2176)
        assert len(rows) > 0.9 * count
        return
    import numpy as np
    from datasets import Dataset

    spec, kept = data.TASKS["ultrachat"], []
    for row in data.load_rows("ultrachat", path):
        x, y = data.encode(tokenizer, spec.x(row, tokenizer, 1024), row["response"].strip())
        f = data.tokenize(tokenizer, spec.f(row, tokenizer, 1024))
        if len(x) <= 1024 and len(f) <= 2176:
            ids = {"x": x, "y": y[:1024], "f": f}
            kept.append({"id": row["id"]} | {name: np.asarray(some, np.int32) for name, some in ids.items()})
    Dataset.from_list(kept)


def soft(row: dict) -> dict:
    import numpy as np

    ids = (row["z_bar"][:, None] + np.arange(TOPK, dtype=np.int32)) % 16_000
    return {"top_ids": ids.astype(np.int32), "top_logp": -np.sqrt(ids).astype(np.float32)}


def gather(side: str, folder: Path, count: int, topk: bool = False) -> None:
    """What a model would draw and say, handed over."""
    import datasets
    import numpy as np

    import folders
    from core.fsdp import load_tokenizer
    from core.rows import write_json

    tokenizer, out = load_tokenizer(str(folder / "tokenizer")), folder / f"out-{os.getpid()}"
    source = some_rows(count)
    if side == "before":
        out.mkdir()
        for start, some in enumerate(blocks(source, CHUNK)):
            rows = [as_lists({k: row[k] for k in ("id", "x", "y", "z", "z_bar")} | (soft(row) if topk else {}))
                    for row in some]  # fmt: skip
            write_json(out / f"{start:09d}.json", {"seconds": 0, "rows": rows})
        done = [json.loads(path.read_text()) for path in sorted(out.iterdir())]
        datasets.Dataset.from_list([row for part in done for row in part["rows"]]).save_to_disk(out / "D")
        return
    import torch

    examples = datasets.Dataset.from_file(str(folder / f"{count}.arrow"))

    def draw(rows: dict, each) -> list:
        for i, row in enumerate(some_rows(count)):  # as many as there are, in any order
            each(i, row["z"].tolist())
        return []

    def make(rows: list[dict]) -> list[dict]:
        made = []
        for row in rows:
            z_bar = np.array(row["z"], np.int32)[::-1]
            made.append({key: row[key] for key in ("id", "x", "y", "z")} | {"z_bar": z_bar.tolist()}
                        | (soft({"z_bar": z_bar}) if topk else {}))  # fmt: skip
        return made

    folders.offline(out / "D", make, examples, torch.nn.Linear(1, 1), tokenizer, z=draw)


def write_pairs(folder: Path, count: int, topk: bool = False) -> None:
    from core import arrow

    rows = (dict(list(row.items())[:3]) | {"z": row["z"], "z_bar": row["z_bar"]} | (soft(row) if topk else {})
            for row in some_rows(count))  # fmt: skip
    part = folder / "pairs.arrow"
    arrow.write(part, (arrow.table(some) for some in blocks(rows, 1000)))
    arrow.save(folder / f"{'topk' if topk else 'pairs'}-{count}", [part])


def check(side: str, folder: Path, count: int) -> None:
    import folders
    import rac_options
    from core import arrow
    from core.fsdp import check_fits, check_rows, load_tokenizer

    tokenizer, pair = load_tokenizer(str(folder / "tokenizer")), ("z", "z_bar")
    model = Namespace(config=Namespace(max_position_embeddings=4096, vocab_size=16_000))
    started = time.process_time()
    if side == "after":
        d_r = folders.read_pairs(str(folder / f"pairs-{count}"), pair, tokenizer)
        check_rows(model, d_r)
        rac_options.describe(d_r)
        z, z_bar = (arrow.Rows(d_r).columns[name] for name in pair)
        _ = arrow.differing(z, z_bar).sum() / z.lengths.sum()
    else:
        from datasets import load_from_disk

        d_r = load_from_disk(folder / f"pairs-{count}")
        folders.name_misfit("", d_r, {"x", "y", *pair}, pair, len(tokenizer))
        for row in d_r:
            tokens = len(row["x"]) + max(len(row[name]) for name in ("y", "z", "z_bar"))
            check_fits(model, tokens, max(max(row[name]) for name in ("x", "y", "z", "z_bar")), "")
        wrong = 0
        for row in d_r:
            wrong += sum(a != b for a, b in zip(row["z"], row["z_bar"]))
            _ = row["z"] == row["y"]
        _ = sum(a != b for row in d_r for a, b in zip(row["z"], row["z_bar"])) / sum(map(len, d_r["z"]))
    check.seconds = time.process_time() - started


def step(side: str, folder: Path, count: int) -> None:
    import numpy as np
    import torch
    from datasets import load_from_disk

    import batches
    import ddp_utils
    import rac_options
    from core import arrow

    d_r = load_from_disk(folder / f"topk-{count}")
    run = Namespace(args=Namespace(micro_batch_size=8, topk=TOPK, unmasked=False, kl=None), device="cpu")
    rows, times = arrow.Rows(d_r), []
    for k in range(5):
        started, picked = time.process_time(), ddp_utils.batch_rows(count, k, 512, 0)
        if side == "after":
            batch, *_ = ddp_utils.Run._batch(rows, rows.tokens(), np.array(picked), None)
            micro = ddp_utils.Run._micro_batches(run, batch)
            for some in micro:
                rac_options.soft_term(run, some, [row["z"] for row in some], [row["z_bar"] for row in some])
        else:
            batch = sorted((d_r[i] for i in picked), key=batches.length)
            for some in (batch[i : i + 8] for i in range(0, 512, 8)):
                for name, kind in (("top_ids", torch.long), ("top_logp", torch.float32)):
                    torch.tensor([q for row in some for q in row[name]], dtype=kind).view(-1, TOPK)
        times.append(time.process_time() - started)
    check.seconds = sorted(times)[2]


def forwards(side: str, folder: Path, count: int) -> dict:
    """Lengths are exponential; the last token of a prompt says how many are to come (see benchmarks/generation.py)."""
    import datasets
    import generation
    import torch

    import folders
    import generate
    import tiny

    torch.set_num_threads(1)
    rng, tokenizer = random.Random(0), tiny.word_tokenizer()
    model = tiny.model("gpt_neox", vocab=512, max_position_embeddings=1024)
    model.register_forward_hook(generation.count_down, with_kwargs=True)
    lengths = [min(int(rng.expovariate(1 / 60)) + 1, 500) for _ in range(count)]
    rows = datasets.Dataset.from_list([{"id": i, "x": [1] * rng.randint(1, 9) + [n]} for i, n in enumerate(lengths)])
    x, found = rows["x"][:], {}
    for size in (64, 128):
        how = {"max_new_tokens": 512, "eos_token_id": 0, "batch_size": size}
        one, chunks, ours = {}, {}, {}
        generate.generate(model, x, stats=one, **how)
        if side == "before":
            for start in range(0, count, CHUNK):
                generate.generate(model, x[start : start + CHUNK], stats=chunks, **how)
            found[f"batch {size}"] = chunks["forwards"] / one["forwards"]
            continue

        def draw(rows: dict, each, ours: dict = ours, how: dict = how) -> list:
            return generate.generate(model, rows["x"], ids=rows["id"], each=each, stats=ours, **how)

        made = folders.offline(folder / f"queue-{size}-{os.getpid()}", None, rows, model, tokenizer, z=draw)
        assert [len(z[0]) for z in made["z"]] == lengths
        found[f"batch {size}"] = ours["forwards"] / one["forwards"]
    return found


JOBS = {"load": load, "gather": gather, "gather topk": lambda *a: gather(*a, topk=True), "check": check,
        "step topk": step, "forwards": forwards}  # fmt: skip


def job(name: str, side: str, folder: Path, count: int) -> None:
    """Runs one job and prints a JSON line."""
    import datasets
    import memory
    import torch.distributed.checkpoint  # noqa: F401
    import transformers  # noqa: F401

    import evaluate  # noqa: F401, all that the project imports, before memory is measured

    datasets.disable_progress_bars()
    start, own = memory.resident("VmRSS"), memory.resident("RssAnon")
    memory.new_peak()
    threading.Thread(target=watch, args=(highest := [own],), daemon=True).start()
    check.seconds, began = None, time.process_time()
    found = JOBS[name](side, folder, count) or {}
    seconds = check.seconds or time.process_time() - began
    own = (max(*highest, memory.resident("RssAnon")) - own) / 1e9
    print(json.dumps({"seconds": seconds, "gb": own, "with_files": (memory.resident("VmHWM") - start) / 1e9, **found}))


def watch(highest: list[float]) -> None:
    import memory

    while True:
        highest[0] = max(highest[0], memory.resident("RssAnon"))
        time.sleep(0.02)


def measure(name: str, side: str, folder: Path, count: int) -> dict:
    words = [sys.executable, __file__, "--job", name, side, str(folder), str(count)]
    env = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    row = {"what": name, "side": side, "rows": count, **json.loads(done.stdout.splitlines()[-1])}
    more = ", ".join(f"{key} {value:.2f}" for key, value in row.items() if key.startswith("batch"))
    memory = f"{row['gb']:.2f} | {row['with_files']:.2f}"
    print(f"| {name} | {side} | {count} | {row['seconds']:.2f} | {memory} | {more} |", flush=True)
    return row


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sizes", type=int, nargs="+", default=[5_000, 20_000, 50_000])
    p.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.job:
        return job(*args.job[:2], Path(args.job[2]), int(args.job[3]))
    found = []
    print("| what | side | rows | CPU seconds | memory (GB) | with mapped files | forwards over those of one call |")
    print("|---|---|---:|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer(folder / "tokenizer")
        for count in [2_000, *args.sizes]:
            for what in ["gather topk"] if count == 2_000 else ["load", "gather", "gather topk", "check"]:
                if what == "load":
                    write_rows(folder / f"{count}.jsonl", count)
                if what.startswith("gather"):
                    write_examples(folder / f"{count}.arrow", count)
                if what == "check":
                    write_pairs(folder, count)
                sides = ["before"] * (count <= SLOW[what]) + ["after"] + ["again"] * (what == "load")
                found += [measure(what, side, folder, count) for side in sides]
                for left in (*folder.glob("out-*"), *folder.glob("*.jsonl"), *folder.glob("*.arrow")):
                    subprocess.run(["rm", "-rf", str(left)], check=True)
        write_pairs(folder, 2_000, topk=True)
        found += [measure("step topk", side, folder, 2_000) for side in ("before", "after")]
        found += [measure("forwards", side, folder, 1_280) for side in ("before", "after")]
    path, command = ROOT / "results" / "data.json", " ".join(["python", "benchmarks/data.py", *sys.argv[1:]])
    found = [{**row, "threads": 1, "command": command} for row in found]
    new = {(row["what"], row["side"], row["rows"]) for row in found}
    kept = json.loads(path.read_text()) if path.exists() else []
    found = [row for row in kept if (row["what"], row["side"], row["rows"]) not in new] + found
    path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
