"""The parts of benchmarks/gpu.sh, each in a process of its own, and the table of what they found.

    python benchmarks/gpu.py equality --out results/gpu/equality.json       # also: joint, decoding, sft, profile
    python benchmarks/gpu.py report results/gpu/*.json                      # a table; also into docs/speed.md

    equality   fast paths against plain ones on this device: tokens, labels, losses, gradients, bits after a resume
    joint      Tables 8 and 9: the steps of BASH and SCS, their memory, and the share of the peak that they use
    decoding   generate.generate against transformers' decoders and the bandwidth; what its constants cost; mixing
    sft        a training step against TRL's SFTTrainer
    profile    what takes the time in a step of each kind

A part writes its file again after every measurement: what is measured is kept. A measurement that fails is a row that
says why. --size small rehearses all on a CPU, tiny is for the tests; their numbers mean nothing.

Weights are random, made on the device, in the shapes of Pythia-1B and Mistral-7B (as many layers as fit). How long the
parallel draw takes depends on how sure a model is of its text. So the output matrix is set such that after token t
comes t + 1 with probability --sure, and responses count up: at 0.4, a gold token has 0.9 nats. Times are on the wall,
medians over steps, and the first step is not counted. One model is used for all measurements of a shape.

Model FLOPs are those that the layout has to do: 6 for each weight of the blocks and each token read, 6 d V for each
logit, and causal attention; none for padding and none for what is computed twice.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib.util
import json
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import generation  # noqa: E402
import overhead  # noqa: E402
import training  # noqa: E402

import batches  # noqa: E402
import generate  # noqa: E402
import rac  # noqa: E402
import stage  # noqa: E402
import tiny  # noqa: E402
from bash import bash_loss  # noqa: E402
from core import decode_step, fsdp, ranks  # noqa: E402
from sft import sft_loss  # noqa: E402

training.PEERS["TRL, no checkpointing, torch_compile"] = {"gradient_checkpointing": False, "torch_compile": True}
CUDA = torch.cuda.is_available()
PEAK = {  # dense bf16 FLOP/s and bytes/s by the makers' sheets
    "H200": (989e12, 4.8e12), "H100 PCIe": (756e12, 2.0e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.0e12),
}  # fmt: skip
SIZES = {
    "full": {
        "neox": {"width": 2048, "layers": 16, "heads": 8, "vocab": 50304},
        "mistral": {"width": 4096, "layers": 0, "heads": 32, "vocab": 32000},  # 0: as many as fit
        "tldr": (512, 53), "even": (400, 400), "short": (400, 50), "ultrachat": (1024, 1024),
        "batch": 16, "micro": 16, "long_batch": 4, "long_micro": 2, "steps": 4,
        "decode": {"prompts": 192, "prompt": (500, 500), "response": (8, 128), "batch": 64, "repeat": 1},
        "checks": (1, 4, 16), "windows": (128, 512, 1024, 2048, 4096), "archs": 5,
    },
    "small": {
        "neox": {"width": 64, "layers": 2, "heads": 4, "vocab": 512},
        "mistral": {"width": 64, "layers": 2, "heads": 4, "vocab": 512},
        "tldr": (24, 8), "even": (16, 16), "short": (24, 6), "ultrachat": (24, 24),
        "batch": 4, "micro": 2, "long_batch": 4, "long_micro": 2, "steps": 3,
        "decode": {"prompts": 8, "prompt": (10, 10), "response": (4, 16), "batch": 4, "repeat": 1},
        "checks": (1, 4), "windows": (16, 64), "archs": 5,
    },
}  # fmt: skip
SIZES["tiny"] = SIZES["small"] | {"archs": 1, "steps": 2, "checks": (4,), "windows": (16,)}


class Found:
    """What a part has measured so far, in its file."""

    def __init__(self, part: str, args: argparse.Namespace) -> None:
        self.path, self.only = Path(args.out), args.only
        self.path.parent.mkdir(parents=True, exist_ok=True)
        about = {"part": part, "size": args.size, "torch": torch.__version__, "transformers": transformers.__version__}
        about |= {"device": torch.cuda.get_device_name() if CUDA else "cpu", "only": args.only or ""}
        about |= {"seconds": 0.0, "whole": False}
        self.data, self.began = {"about": about, "rows": []}, time.perf_counter()
        self.save()

    def save(self) -> None:
        self.data["about"]["seconds"] = round(time.perf_counter() - self.began, 1)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.data, indent=1, ensure_ascii=False) + "\n")
        partial.rename(self.path)

    def row(self, name: str, work: Callable[[], dict]) -> dict:
        """A measurement, or why there is none."""
        if self.only and not any(words in name for words in self.only.split("|")):
            return {}
        try:
            row = work()
        except (Exception, SystemExit) as error:  # one that fails must not take the others along
            lines = str(error).strip().splitlines() or [""]
            row = {"failed": f"{type(error).__name__}: {lines[0]}"[:300]}
        for sig in (signal.SIGTERM, signal.SIGINT):  # a Run took them, and would be kept for them
            signal.signal(sig, signal.SIG_DFL)
        gc.collect()
        torch.cuda.empty_cache() if CUDA else None
        self.data["rows"].append({"name": name, **row})
        self.save()
        shown = {key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}
        print(f"{self.data['about']['part']}: {name}: {shown}", flush=True)
        return row


# ---------------------------------------------------------------------------------------------- models and rows
def new_config(kind: str, size: dict, layers: int = 0) -> object:
    common = {"hidden_size": size["width"], "num_hidden_layers": layers or size["layers"], "vocab_size": size["vocab"]}
    common |= {"num_attention_heads": size["heads"], "max_position_embeddings": 4096, "tie_word_embeddings": False}
    common |= {"initializer_range": 0.004, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if kind == "mistral":
        inner = size["width"] * 7 // 2
        common |= {"intermediate_size": inner, "num_key_value_heads": size["heads"] // 4, "sliding_window": None}
    else:
        common |= {"intermediate_size": 4 * size["width"]}
    return AutoConfig.for_model("mistral" if kind == "mistral" else "gpt_neox", **common)


def new_model(config: object, sure: float, how: str = "") -> torch.nn.Module:
    """A model of random weights, by which t + 1 follows t with probability `sure`. how: "" for float32 or, on a GPU, as
    a stage has it, bfloat16 over float32 weights; the same with "compile"; "plain": float32; "bfloat16"."""
    torch.manual_seed(0)
    with torch.device("cuda" if CUDA else "cpu"):
        config = copy.deepcopy(config)  # --packed changes it
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        d, vocab = config.hidden_size, config.vocab_size
        scale = math.log(sure / (1 - sure) * vocab)  # the logit of t + 1; after the last norm, |hidden|^2 is about d
        with torch.no_grad():
            embedding = model.get_input_embeddings().weight.normal_()
            model.get_output_embeddings().weight.copy_(embedding.roll(1, 0) * (scale / d))
    if "compile" in how:
        fsdp.in_training(model, functools.partial(torch.compile, dynamic=True))
    if how == "bfloat16":
        return model.to(torch.bfloat16 if CUDA else torch.float32)
    return fsdp.shard(model, "bfloat16") if CUDA and how != "plain" else model


def fitting_layers(size: dict, tokens: int) -> int:
    """How many layers of Mistral's shape a training step with so many tokens in a micro-batch leaves room for."""
    if size["layers"] or not CUDA:
        return size["layers"]
    d = size["width"]
    weights = 2 * d * d + 2 * d * d // 4 + 3 * d * (d * 7 // 2)
    layer = 18 * weights + tokens * (34 * d + 12 * d * 7 // 2)  # bytes: weights, moments; activations, roughly
    rest = 18 * 2 * size["vocab"] * d + 6e9
    return int((0.9 * torch.cuda.get_device_properties(0).total_memory - rest) // layer)


def text_rows(count: int, vocab: int, prompt: int, response: int) -> list[dict]:
    """Random prompts; y counts up from the prompt's last token. One token in five of y_hat is another."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        x = torch.randint(vocab, (prompt,), generator=draw).tolist()
        y = [(x[-1] + j) % vocab for j in range(1, response + 1)]
        rows.append({"id": i, "x": x, "y": y, "y_hat": [t if j % 5 else (t + 7) % vocab for j, t in enumerate(y)]})
    return rows


def model_flops(config: object, rows: list[dict], terms: tuple[str, ...], shared: bool) -> float:
    """Of a training step over these rows: forward and backward."""
    d, layers = config.hidden_size, config.num_hidden_layers
    kv = d * getattr(config, "num_key_value_heads", config.num_attention_heads) // config.num_attention_heads
    mlp = (3 if config.model_type == "mistral" else 2) * d * config.intermediate_size
    weights = layers * (2 * d * d + 2 * d * kv + mlp)
    total = 0.0
    for row in rows:
        x, ys = len(row["x"]), [len(row[name]) for name in terms]
        tokens = sum(ys) + x * (1 if shared else len(ys))
        pairs = sum(y * (x + y / 2) for y in ys) + x * x / 2 * (1 if shared else len(ys))  # (query, key) seen
        total += 6 * weights * tokens + 6 * d * config.vocab_size * sum(ys) + 12 * layers * d * pairs
    return total


def sheet(which: int) -> float | None:
    """The device's peak: FLOP/s (0) or bytes/s (1)."""
    name = torch.cuda.get_device_name() if CUDA else ""
    return next((values[which] for key, values in PEAK.items() if key in name), None)


def wait() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], object]) -> float:
    start = wait()
    work()
    return wait() - start


# ---------------------------------------------------------------------------------------------- 1. equality
def equality(found: Found, size: dict, args: argparse.Namespace) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = "cuda" if CUDA else "cpu"
    draw = torch.Generator().manual_seed(1)
    ids = lambda n: torch.randint(64, (n,), generator=draw).tolist()  # noqa: E731
    prompts = [ids(n) for n in (1, 24, 7, 15, 3, 20, 11, 9)]
    ys = [ids(n) for n in (12, 1, 30, 5, 17, 2, 9, 21)]
    archs = ("gpt_neox", "llama", "mistral", "qwen2", "gpt2")[: size["archs"]]
    options = {"max_new_tokens": 16, "eos_token_id": [3, 5, 8]}

    def same(arch: str) -> dict:
        lm = tiny.model(arch).to(device)
        greedy = {"temperature": 0, **options}
        fixed = generate.generate(lm, prompts, fixed=True, batch_size=3, **greedy)
        tokens, mask = generate.pad(prompts, lm.device, left=True)
        theirs = lm.generate(tokens, attention_mask=mask, do_sample=False, pad_token_id=0, **options)
        theirs = [row[: len(ours)] for row, (ours,) in zip(theirs[:, tokens.shape[1] :].tolist(), fixed)]
        result = {"model.generate": theirs == [row for (row,) in fixed]}
        result["rows that leave"] = generate.generate(lm, prompts, fixed=False, **greedy) == fixed
        sampled = [generate.generate(lm, prompts, fixed=how, n=2, batch_size=5, **options) for how in (True, False)]
        result["sampled"] = sampled[0] == sampled[1]
        mixed = [generate.mix(lm, prompts, ys, beta=0.4, method=how) for how in generate.METHODS]
        result["three ways to mix"] = mixed[0] == mixed[1] == mixed[2]
        with torch.no_grad():
            alone = [lm(input_ids=torch.tensor([x + y], device=device), use_cache=False).logits[0].argmax(-1).tolist()
                     for x, y in zip(prompts, ys)]  # fmt: skip
        labels = rac.rac_labels(lm, prompts, ys)
        result["labels"] = labels == [row[len(x) - 1 : -1] for x, row in zip(prompts, alone)]
        if CUDA:
            cpu = tiny.model(arch)
            result["tokens of a CPU"] = sampled[0] == generate.generate(cpu, prompts, n=2, batch_size=5, **options)
        return {"ok": all(result.values()), **result}

    for arch in archs:
        found.row(f"tokens, {arch}", lambda arch=arch: same(arch))

    def step(lm: torch.nn.Module, plain: bool, shared: bool = False) -> tuple[float, torch.Tensor]:
        y_hat = [y[1:] + y[:1] for y in ys]
        terms = {"bash": (bash_loss, y_hat, ys), "sft": (sft_loss, ys, ys)}
        run = batches.losses_by_definition if plain else functools.partial(batches.losses, share_prompt=shared)
        total = sum(run(lm, prompts, terms).values()) / sum(map(len, ys))
        lm.zero_grad()
        total.backward()
        grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in lm.parameters()]
        return float(total), torch.cat([g.flatten().float() for g in grads])

    def compare(arch: str, how: str) -> dict:
        wide = {"hidden_size": 128} if how == "packed" else {}  # flex_attention wants heads of 16 or more
        loss, gradient = step(tiny.model(arch, **wide).to(device), plain=True)
        lm = tiny.model(arch, **wide).to(device)
        if how == "packed":
            from core import packed

            if why := packed.prepare(lm):
                raise ValueError(why)
        if how == "compile":
            fsdp.in_training(lm, functools.partial(torch.compile, dynamic=True))
        if how.startswith("one rank"):
            lm = fsdp.shard(lm, "bfloat16" if "bfloat16" in how else "float32")
        if how == "bfloat16":
            lm = lm.to(torch.bfloat16)
        loss_2, gradient_2 = step(lm, plain=False, shared=how == "share-prompt")
        off = {"loss": abs(loss_2 - loss) / abs(loss)}
        off["gradient"] = float((gradient_2 - gradient).norm() / gradient.norm())
        bound = 5e-2 if "bfloat16" in how else 1e-4
        return {"ok": max(off.values()) < bound, "bound": bound, **off}

    hows = ["losses", "share-prompt", "one rank, float32", "one rank, bfloat16", "bfloat16"]
    slow = ["packed"] if importlib.util.find_spec("core.packed") else []
    slow += ["compile"] if CUDA else []
    for arch in archs:
        for how in hows if arch == archs[0] else hows[:2]:
            found.row(f"losses and gradients, {arch}, {how}", lambda arch=arch, how=how: compare(arch, how))

    def resume(dtype: str) -> dict:
        rows = [{"id": i, "x": x, "y": y} for i, (x, y) in enumerate(zip(prompts, ys))]

        def train(out: Path, stop: int = 0) -> list[torch.Tensor]:
            lm = tiny.model("llama").to(device)
            lm = lm if dtype == "float32" else fsdp.shard(lm, dtype)
            job = {"dtype": dtype, "micro_batch_size": 2, "make": lambda: lm, "tokenizer": tiny.word_tokenizer()}
            job["folder"] = "."
            run = training.start(job, 4, str(out))
            run.args.checkpoint_every, run.args.lr = 2, 1e-3
            try:
                for step in run.steps(rows, 2):
                    for part in step.micro_batches:
                        x, y = ([row[name] for row in part] for name in ("x", "y"))
                        sums = batches.losses(run.model, x, {"sft": (sft_loss, y, y)})
                        run.backward(sft=sums["sft"] / step.tokens("y"))
                    run._signal = step.number == stop
                    run.update()
            except SystemExit:
                pass
            return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in run.model.parameters()]

        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "a").mkdir(), (Path(folder) / "b").mkdir()
            whole = train(Path(folder) / "a")
            half = train(Path(folder) / "b", stop=2)
            again = train(Path(folder) / "b")
        moved = not all(torch.equal(a, b) for a, b in zip(whole, half))
        return {"ok": moved and all(torch.equal(a, b) for a, b in zip(whole, again)), "stopped one differs": moved}

    for dtype in ("float32", "bfloat16") if CUDA else ("float32",):
        found.row(f"save and resume, bitwise, {dtype}", lambda dtype=dtype: resume(dtype))
    for how in slow:
        found.row(f"losses and gradients, {archs[0]}, {how}", lambda how=how: compare(archs[0], how))
    flags = stage.parser("")._option_string_actions
    absent = [flag for flag in ("--lora-rank", "--packed", "--attn-implementation") if flag not in flags]
    found.row("flags", lambda: {"absent": absent})
    if "--lora-rank" not in absent:
        found.row("LoRA", functools.partial(adapter, prompts, ys))


def adapter(prompts: list, ys: list) -> dict:
    """--lora-rank: before a step the adapter changes nothing; steps move the loss, and no other weight."""
    from core import lora

    dtype = training.FLOAT
    with tempfile.TemporaryDirectory() as folder:
        tiny.model("llama").save_pretrained(folder)
        flags = f"--model {folder} --task toy --out {folder} --lora-rank 4 --dtype {dtype}"
        args = stage.parser("").parse_args(flags.split())
        lora.settle(args)
        lm, plain = fsdp.load_model(folder, dtype, adapter=lora.of(args)), fsdp.load_model(folder, dtype)
    frozen = {name: p.detach().clone() for name, p in lm.named_parameters() if not p.requires_grad}
    trained = [p for p in lm.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []

    def loss(model: torch.nn.Module) -> torch.Tensor:
        return batches.losses(model, prompts, {"sft": (sft_loss, ys, ys)})["sft"] / sum(map(len, ys))

    for _ in range(3):
        value = loss(lm)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
    local = lambda p: p.to_local() if hasattr(p, "to_local") else p  # noqa: E731
    still = all(
        torch.equal(local(frozen[name]), local(p.detach())) for name, p in lm.named_parameters() if name in frozen
    )
    off = abs(losses[0] - float(loss(plain).detach())) / losses[0]
    ok = off < (1e-5 if dtype == "float32" else 1e-2) and still and losses[-1] < losses[0]
    return {"ok": ok, "off": off, "others stay": still, "losses": losses, "parameters": sum(p.numel() for p in trained)}


# ---------------------------------------------------------------------------------------------- 2. joint
def joint(found: Found, size: dict, args: argparse.Namespace) -> None:
    sides = list(overhead.SIDES)[:6]  # all but "token by token" with the SFT loss, and the one without a cache
    layers = fitting_layers(size["mistral"], size["long_micro"] * 2 * sum(size["ultrachat"]))
    long = [side for side in sides[:5] if "token by token" not in side]  # a thousand steps would take what is left
    both = ("tldr", "even")
    compiled = ["one pass, compile"] if CUDA else []
    slow = ["packed", *(f"{layout}, compile" for layout in ("--share-prompt", "packed") if CUDA)]
    plans = [("1B", "tldr", sides, ["one pass"]), ("1B", "even", [], ["one pass"])]
    plans += [("1B", lengths, [], compiled) for lengths in both]  # compiled once for both
    plans += [("7B", "ultrachat", long, [])]
    plans += [("1B", lengths, [], ["--share-prompt"]) for lengths in both]
    plans += [("1B", lengths, [], [layout]) for layout in slow for lengths in both]
    models: dict[tuple[str, str], torch.nn.Module] = {}  # one at a time
    for plan in plans:
        steps(found, size, args.sure, layers, models, *plan)


def steps(
    found: Found, size: dict, sure: float, most: int, models: dict, name: str, lengths: str, some: list[str],
    layouts: list[str],
) -> None:  # fmt: skip
    """Steps of one shape: the sides `some` of overhead.py, and the joint step in some layouts."""
    long = "long_" if name == "7B" else ""
    kind = "mistral" if long else "neox"
    config = new_config(kind, size[kind], most if long else 0)
    batch, micro, (prompt, response) = size[long + "batch"], size[long + "micro"], size[lengths]
    rows = text_rows(batch * size["steps"], config.vocab_size, prompt, response)
    about = {"layers": config.num_hidden_layers, "lengths": [prompt, response], "batch": batch}
    job = {"tokenizer": tiny.word_tokenizer(), "dtype": training.FLOAT, "micro_batch_size": micro, "folder": "."}
    job |= {"made": rows, "batch_size": batch, "beta": 0.2, "share_prompt": False, "steps": size["steps"]}

    def measure(run: Callable[[str], dict], terms: tuple[str, ...], shared: bool) -> dict:
        with tempfile.TemporaryDirectory() as out:
            result = run(out)
        stamps = result.pop("stamps")
        times = [b - a for a, b in zip(stamps, stamps[1:])]
        seconds = statistics.median(times[1:] or times)
        row = {**about, "seconds": seconds, "peak_gb": result.pop("peak") / 1e9, **result}
        if terms:
            row["tflops"] = model_flops(config, rows[:batch], terms, shared) / seconds / 1e12
            row["mfu"] = row["tflops"] * 1e12 / sheet(0) if sheet(0) else None
        return row

    def make(how: str) -> torch.nn.Module:
        if (name, how) not in models:
            models.clear()
            models[name, how] = new_model(config, sure, how)
            if CUDA and not how:  # the draw finds out what its passes cost there
                with tempfile.TemporaryDirectory() as out:
                    overhead.measure({**job, "make": lambda: models[name, how], "side": "BASH data generation"}, out)
        return models[name, how]

    for side in some:
        terms = ("y",) * len(overhead.SIDES[side][1]) if overhead.SIDES[side][0] is None else ()
        run = functools.partial(overhead.measure, job | {"make": lambda: make(""), "side": side})
        found.row(f"{name} {lengths}: {side}", functools.partial(measure, run, terms, False))
    for layout in layouts:
        how = " ".join(word for word in ("packed", "compile") if word in layout)
        side = "--" * ("-" in layout or "packed" in layout) + layout.removeprefix("--").partition(",")[0]
        some = job | {"joint": True, "make": functools.partial(make, how)}
        run = functools.partial(training.ours, side, some, rows[:batch])
        shared = "one pass" not in layout
        found.row(f"{name} {lengths}: joint, {layout}", functools.partial(measure, run, ("y", "y_hat"), shared))


# ---------------------------------------------------------------------------------------------- 3. decoding
def decoding(found: Found, size: dict, args: argparse.Namespace) -> None:
    config, plan = new_config("neox", size["neox"]), size["decode"]
    model, batch = new_model(config, args.sure, "bfloat16"), plan["batch"]
    prompt, longest = plan["prompt"][1], plan["response"][1]
    rows = text_rows(2 * batch, config.vocab_size, prompt, longest)
    some = [row["x"] for row in rows[:batch]]

    def steady(fixed: bool) -> dict:
        """All rows for the same number of tokens, less the time of the prompts, against the bytes to be read."""
        run = lambda n: generate.generate(  # noqa: E731
            model, some, max_new_tokens=n, eos_token_id=None, batch_size=batch, fixed=fixed
        )
        run(longest)
        seconds = (timed(lambda: run(longest)) - timed(lambda: run(1))) / (longest - 1)
        weights = sum(p.numel() for p in model.parameters()) - config.vocab_size * config.hidden_size
        width = 2 * config.hidden_size * config.num_hidden_layers  # keys and values
        read = next(model.parameters()).element_size() * (weights + batch * width * (prompt + longest / 2))
        share = read / seconds / sheet(1) if sheet(1) else None
        row = {"ms_a_token": 1000 * seconds, "tokens_per_second": batch / seconds}
        return row | {"gb_a_step": read / 1e9, "of_bandwidth": share}

    for fixed in (True, False):
        found.row(f"all rows alike, {'fixed shapes' if fixed else 'rows leave'}", functools.partial(steady, fixed))
    if CUDA:
        copy = torch.empty(2**30, device="cuda", dtype=torch.uint8)
        seconds = min(timed(lambda: copy.clone()) for _ in range(5))
        found.row("a copy on the device", lambda: {"gb_per_second": 2 * 2**30 / seconds / 1e9})
        del copy

    # against transformers
    index = len(found.data["rows"])

    def keep(part: dict) -> None:
        found.data["rows"][index:] = [{"name": "varied lengths", "partial": True, **part}]
        found.save()

    plan = argparse.Namespace(**plan)
    row = (
        functools.partial(generation.measure, model, plan, keep) if args.size != "tiny" else lambda: {"left out": True}
    )

    def kept() -> dict:
        result = row()
        del found.data["rows"][index:]
        return result

    # what the constants cost
    rng = random.Random(0)
    expected = [rng.randint(*plan.response) for _ in range(plan.prompts)]
    counting = [rng.choices(range(longest + 1, config.vocab_size), k=prompt - 1) + [n] for n in expected]

    def constant(name: str, value: float, module: object) -> dict:
        before = getattr(module, name)
        setattr(module, name, value)
        try:
            hook = model.register_forward_hook(generation.count_down, with_kwargs=True)
            options = {"max_new_tokens": longest, "eos_token_id": 0, "batch_size": batch, "fixed": True}
            seconds = [timed(lambda: generate.generate(model, counting, **options)) for _ in range(2)][1]
            hook.remove()
        finally:
            setattr(module, name, before)
        return {"value": value, "tokens_per_second": sum(expected) / seconds}

    for value in size["checks"]:
        found.row(f"CHECK = {value}", functools.partial(constant, "CHECK", value, decode_step))
    for value in (0.5, 0.9) if args.size == "full" else ():
        found.row(f"REFILL = {value}", functools.partial(constant, "REFILL", value, generate))

    # mixing
    x, y = [row["x"] for row in rows[:batch]], [row["y"] for row in rows[:batch]]
    mixed = functools.partial(generate.mix, model, x, y, beta=0.2, batch_size=batch)

    def mixing(method: str, window: int = 0) -> dict:
        kind, stats = model.device.type, {}
        before = dict(generate.REDRAW)
        try:
            if window:
                generate.REDRAW[kind] = window
            mixed(method=method)
            seconds = timed(lambda: mixed(method=method, stats=stats))
        finally:
            generate.REDRAW.clear()
            generate.REDRAW.update(before)
        return {"seconds": seconds, "forwards": stats["forwards"], "lengths": [prompt, longest]}

    for method in generate.METHODS:
        found.row(f"mixing, {method}", functools.partial(mixing, method))
    for window in size["windows"]:
        found.row(f"mixing, parallel, windows of {window} in all", functools.partial(mixing, "parallel", window))
    index = len(found.data["rows"])
    found.row("varied lengths", kept)  # last: transformers compiles its static cache for a minute


# ---------------------------------------------------------------------------------------------- 4. sft
def sft(found: Found, size: dict, args: argparse.Namespace) -> None:
    config = new_config("neox", size["neox"])
    rows = training.make_rows(size["batch"], config.vocab_size, *size["short"])  # of unlike lengths
    tokens = sum(len(row["x"] + row["y"]) for row in rows)
    has_trl = importlib.util.find_spec("trl") and importlib.util.find_spec("datasets")
    if not has_trl:
        found.row("TRL", lambda: {"failed": "trl and datasets are not installed (see WHEELS in benchmarks/gpu.sh)"})
    peers = [side for side in training.PEERS if has_trl or "TRL" not in side]
    slow = [side for side in peers if "compile" in side] if CUDA else []
    sides = [("ours", "ours"), *([("ours, compile", "ours")] if CUDA else [])]
    sides += [(side, side) for side in peers if "compile" not in side]
    sides += [(f"joint, {side}", side) for side in ("one pass", "--share-prompt", "two passes")]
    sides += [("ours, --packed", "--packed"), ("joint, --packed", "--packed"), *zip(slow, slow)]
    if args.size == "tiny":
        sides = [("ours", "ours"), ("joint, --share-prompt", "--share-prompt")]
    for name, side in sides:
        peer = side in training.PEERS
        how = "plain" if peer else "compile" if "compile" in name else ""
        make = functools.partial(new_model, config, args.sure, how)
        job = {"make": make, "tokenizer": tiny.word_tokenizer(), "dtype": training.FLOAT, "folder": "."}
        job |= {"micro_batch_size": size["batch"], "steps": size["steps"], "joint": "joint" in name}

        def measure(side: str = side, peer: bool = peer, job: dict = job) -> dict:
            torch.backends.cuda.enable_cudnn_sdp(peer)  # theirs is torch's choice
            with tempfile.TemporaryDirectory() as out:
                result = (training.theirs if peer else training.ours)(side, job, rows, out)
            times = [b - a for a, b in zip(result["stamps"], result["stamps"][1:])]
            seconds = statistics.median(times[1:] or times)
            row = {"seconds": seconds, "tokens_per_second": tokens / seconds, "peak_gb": result["peak"] / 1e9}
            return row | {"loss": result["loss"], "lengths": size["short"], "batch": size["batch"]}

        found.row(name, measure)

    def ragged(cudnn: bool) -> dict:
        """Steps each of which has other lengths than those before."""
        job = {"made": training.make_rows(8 * size["batch"], config.vocab_size, *size["short"], ragged=0.5)}
        job |= {"tokenizer": tiny.word_tokenizer(), "dtype": training.FLOAT, "folder": ".", "share_prompt": False}
        job |= {"batch_size": size["batch"], "micro_batch_size": size["batch"], "beta": 0.0, "side": "SFT training"}
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        try:
            with tempfile.TemporaryDirectory() as out:
                stamps = overhead.measure(job | {"make": lambda: new_model(config, args.sure)}, out)["stamps"]
        finally:
            torch.backends.cuda.enable_cudnn_sdp(False)
        times = [b - a for a, b in zip(stamps, stamps[1:])][1:]
        return {"seconds": statistics.median(times), "mean": statistics.mean(times), "most": max(times)}

    for name, cudnn in (("ours, new lengths", False), ("ours, new lengths, cuDNN's attention", True)):
        found.row(name, functools.partial(ragged, cudnn))


# ---------------------------------------------------------------------------------------------- 6. profile
def profile(found: Found, size: dict, args: argparse.Namespace) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    config, plan = new_config("neox", size["neox"]), size["decode"]
    prompt, response = size["tldr"]
    rows = text_rows(max(size["batch"], plan["batch"]), config.vocab_size, prompt, response)
    x, y, y_hat = ([row[name] for row in rows[: size["micro"]]] for name in ("x", "y", "y_hat"))
    model = new_model(config, args.sure)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def train(shared: bool) -> None:
        terms = {"bash": (bash_loss, y_hat, y), "sft": (sft_loss, y, y)}
        (sum(batches.losses(model, x, terms, share_prompt=shared).values()) / sum(map(len, y))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def online() -> None:
        with fsdp.inference(model):
            generate.mix(model, x, y, beta=0.2)

    def decode() -> None:
        with fsdp.inference(model):
            some = [row["x"] for row in rows[: plan["batch"]]]
            generate.generate(model, some, max_new_tokens=32, eos_token_id=None, batch_size=plan["batch"])

    kinds = {"joint step": functools.partial(train, False), "joint step, shared prompt": functools.partial(train, True)}
    kinds |= {"the draw of an SCS step": online, f"32 tokens of {plan['batch']} rows": decode}
    for name, work in kinds.items():

        def measure(work: Callable[[], None] = work) -> dict:
            work()
            work()
            seconds = timed(work)
            with profiler(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]) as p:
                work()
                wait()
            key = "self_device_time_total" if CUDA else "self_cpu_time_total"
            events = [e for e in p.key_averages() if not CUDA or e.device_type == torch.autograd.DeviceType.CUDA]
            events.sort(key=lambda event: -getattr(event, key))
            total = sum(getattr(event, key) for event in events)
            lines = [[e.key[:90], round(getattr(e, key) / 1000, 3), e.count] for e in events[:10]]
            return {"seconds": seconds, "device_ms": total / 1000, "top: what, ms, calls": lines}

        found.row(name, measure)


# ---------------------------------------------------------------------------------------------- the report
def load(paths: list[str]) -> dict[str, dict]:
    """Rows by part and name."""
    parts: dict[str, dict] = {}
    for path in paths:
        data = json.loads(Path(path).read_text())
        part = data.get("about", {}).get("part")
        if part:
            parts.setdefault(part, {})["about"] = data["about"]  # of a part in two files, rows of both
            for row in data["rows"]:
                # what one that failed in the end had measured stays, and so does what was not equal
                before = parts[part].get(row["name"])
                if before is None or "failed" not in row and before.get("ok", True):
                    parts[part][row["name"]] = row
    return parts


def targets(parts: dict[str, dict]) -> list[tuple[str, str, float | None]]:
    """The table: what, target, measured."""

    def get(part: str, name: str, key: str) -> float | None:
        return parts.get(part, {}).get(name, {}).get(key)

    def over(a: float | None, b: float | None) -> float | None:
        return a / b if a is not None and b else None

    def best(part: str, names: list[str], key: str, choose: Callable = min) -> float | None:
        values = [value for name in names if (value := get(part, name, key)) is not None]
        return choose(values) if values else None

    joint = ("one pass", "--share-prompt", "packed")
    joint += tuple(f"{how}, compile" for how in joint)
    names = {lengths: [f"1B {lengths}: joint, {how}" for how in joint] for lengths in ("tldr", "even")}
    mfu = {lengths: best("joint", some, "mfu", max) for lengths, some in names.items()}
    varied = parts.get("decoding", {}).get("varied lengths", {}).get("time_over_generate", {})
    peers = [value for name, value in varied.items() if name in ("dynamic", "static")]
    ours, shared = ["ours", "ours, --packed", "ours, compile"], ["joint, --share-prompt", "joint, --packed"]
    trl = [name for name in training.PEERS if "TRL" in name]
    step = lambda shape, side, key: get("joint", f"{shape}: {side}", key)  # noqa: E731
    scs = {s: over(step(s, "SCS", "seconds"), step(s, "BASH training", "seconds")) for s in ("1B tldr", "7B ultrachat")}
    memory = over(step("1B tldr", "SCS + SFT loss", "peak_gb"), step("1B tldr", "BASH training", "peak_gb"))
    return [
        ("model FLOPs utilisation of the joint step, 1B, 512/53", "≥ 0.40", mfu["tldr"]),
        ("the same, 400/400", "≥ 0.40", mfu["even"]),
        ("decoding 1B, batch 64, prompts 500, varied lengths: speed over `model.generate`", "≥ 3",
         min(peers, default=None)),
        ("the same, all rows alike: share of the memory bandwidth", "≥ 0.50",
         get("decoding", "all rows alike, fixed shapes", "of_bandwidth")),
        ("SCS step over BASH step, 1B, TL;DR lengths (paper 4.7)", "≤ 1.3", scs["1B tldr"]),
        ("SCS step over BASH step, 7B shape, UltraChat lengths (paper > 48)", "≤ 3", scs["7B ultrachat"]),
        ("SFT tokens a second over TRL's best", "≥ 1.2",
         over(best("sft", ours, "tokens_per_second", max), best("sft", trl, "tokens_per_second", max))),
        ("joint step with a shared prompt over without, 400/50", "≤ 0.65",
         over(best("sft", shared, "seconds"), get("sft", "joint, one pass", "seconds"))),
        ("peak memory of SCS with the SFT loss over BASH", "≤ 1.1", memory),
    ]  # fmt: skip


def table(parts: dict[str, dict], rehearsal: bool) -> str:
    lines = ["| on one GPU | target | measured | |", "|---|---|---:|---|"]
    for what, target, value in targets(parts):
        sign, bound = target.split()
        if value is None:
            lines.append(f"| {what} | {target} | not measured |  |")
            continue
        reached = "reached" if (value >= float(bound)) == (sign == "≥") else "not reached"
        lines.append(f"| {what} | {target} | {value:.2f} | {'a rehearsal' if rehearsal else reached} |")
    return "\n".join(lines)


BEGIN, END = "<!-- benchmarks/gpu.py report writes from here -->", "<!-- to here -->"


def report(paths: list[str], page: Path) -> None:
    parts = load(paths)
    sizes = {part["about"]["size"] for part in parts.values()}
    if sizes - {"full"}:
        print("a rehearsal: nothing is written into docs/speed.md", file=sys.stderr)
    text = table(parts, bool(sizes - {"full"}))
    devices = sorted({part["about"]["device"] for part in parts.values()})
    checks = [row for name, row in parts.get("equality", {}).items() if "ok" in row]
    wrong = [row["name"] for row in parts.get("equality", {}).values() if row.get("ok") is False or "failed" in row]
    text += f"\n\nMeasured on: {', '.join(devices) or 'nothing yet'}. "
    text += f"{len(checks)} comparisons with the plain versions there, {len(wrong)} not equal{': ' * bool(wrong)}"
    text += ", ".join(wrong) + "."
    print(text)
    for part, rows in parts.items():
        failed = [f"{name} ({row['failed']})" for name, row in rows.items() if "failed" in row]
        if failed:
            print(f"\n{part}, not measured: " + "; ".join(failed))
    if not sizes - {"full"} and sizes:
        old = page.read_text()
        before, rest = old.split(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


PARTS = {"equality": equality, "joint": joint, "decoding": decoding, "sft": sft, "profile": profile}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("part", choices=[*PARTS, "report"])
    p.add_argument("files", nargs="*", help="of report: what the parts wrote")
    p.add_argument("--out", help="the file of a part")
    p.add_argument("--size", choices=SIZES, default="full")
    p.add_argument("--only", default=os.environ.get("ONLY"), help="rows whose names have one of A|B|... in them")
    p.add_argument("--sure", type=float, default=0.4, help="the chance of the token that follows in the text")
    args = p.parse_args()
    if args.part == "report":
        return report(args.files, ROOT / "docs" / "speed.md")
    if args.size == "full" and not CUDA:
        sys.exit("gpu.py: error: no GPU is here; --size small rehearses the parts on a CPU")
    ranks.init()
    found = Found(args.part, args)
    PARTS[args.part](found, SIZES[args.size], args)
    found.data["about"]["whole"] = True
    found.save()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
