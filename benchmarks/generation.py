"""Tokens a second of generate.generate and of transformers' own decoders, on the same prompts and lengths.

    python benchmarks/generation.py                                  # two GPT-NeoX shapes with random weights
    python benchmarks/generation.py --model runs/sft --dtype bfloat16 --device cuda

    generate       generate.generate: finished rows leave, waiting prompts take their places
    dynamic        model.generate, batch after batch; each runs until its last row has ended
    static         the same with cache_implementation="static" (on a GPU transformers compiles it)
    continuous     model.generate_batch: transformers' continuous batching, all prompts at once
    floor          the forwards of generate.generate alone (on a CPU): its time without everything around the model

Random weights must not decide the lengths, so the prompt does: its last token is the number of tokens to come, and a
hook adds 10000 to the logit of "one less than the last token" in every forward, on all sides alike. So each row counts
down and ends with token 0, the EOS. Every side samples at T = 1 from the whole vocabulary, knows nothing of the lengths
but their maximum, and gets the prompts sorted by length, so that batches have little padding. All lengths are checked.

The sides take turns in each repetition (on a GPU after one that does not count, for what is compiled); medians, and the
median of the ratios within a repetition. With one CPU thread the clock is the CPU time of the process, which other
programs on the machine do not change much, else the time on the wall. Writes results/generation.json, prints a table.
"""

import argparse
import itertools
import json
import logging
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, GPTNeoXConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import generate  # noqa: E402

SHAPES = {  # layers, width, heads, vocabulary
    "4 layers, d = 256, V = 2k": (4, 256, 4, 2048),
    "70M: 6 layers, d = 512, V = 50k": (6, 512, 8, 50304),
}


def new_model(layers: int, width: int, heads: int, vocab: int):
    torch.manual_seed(0)
    size = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "vocab_size": vocab}
    config = GPTNeoXConfig(**size, num_attention_heads=heads, max_position_embeddings=2048, eos_token_id=0)
    return AutoModelForCausalLM.from_config(config)


def count_down(module, args, kwargs, output) -> None:
    """The forward hook that forces the lengths: after token t comes t - 1."""
    keep, ids = kwargs.get("logits_to_keep", 0), kwargs["input_ids"]  # [B, Q]
    tokens = ids[:, keep] if isinstance(keep, torch.Tensor) else ids[:, -output.logits.shape[1] :]
    output.logits.scatter_(-1, (tokens - 1).clamp(min=0)[..., None], 1e4)  # [B, 1 or more, V]


def clock(device: str) -> str:
    return "process_time" if device == "cpu" and torch.get_num_threads() == 1 else "perf_counter"


def sides(model, prompts: list[list[int]], batch: int, longest: int) -> dict[str, Callable]:
    """Each side: () -> the lengths of its responses."""
    options = {"max_new_tokens": longest, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    options |= {"eos_token_id": 0, "pad_token_id": 0}

    def ours() -> list[int]:
        rows = generate.generate(model, prompts, max_new_tokens=longest, eos_token_id=0, batch_size=batch)
        return [len(row) for (row,) in rows]

    def theirs(**more) -> list[int]:
        lengths = []
        for rows in (prompts[b : b + batch] for b in range(0, len(prompts), batch)):
            ids, mask = generate.pad(rows, model.device, left=True)
            out = model.generate(ids, attention_mask=mask, **options, **more)[:, ids.shape[1] :].tolist()
            lengths += [row.index(0) + 1 for row in out]
        return lengths

    def continuous() -> list[int]:
        # as many blocks as the longest rows of one batch fill; the default takes nine tenths of the free memory
        blocks = batch * (-(-(max(map(len, prompts)) + longest) // 256) + 1)
        limits = ContinuousBatchingConfig(num_blocks=blocks, max_requests_per_batch=batch, max_batch_tokens=2048)
        attention = model.config._attn_implementation  # generate_batch sets its own
        try:
            config = GenerationConfig(**options)
            out = model.generate_batch(prompts, generation_config=config, continuous_batching_config=limits)
            return [len(row.generated_tokens) for row in out.values()]
        finally:
            model.set_attn_implementation(attention)

    static = {"cache_implementation": "static"}
    return {"generate": ours, "dynamic": theirs, "static": lambda: theirs(**static), "continuous": continuous}


def measure(model, args: argparse.Namespace, keep: Callable[[dict], None] = lambda found: None) -> dict:
    """keep: gets what is measured so far, after each side of each repetition."""
    rng, longest, seconds = random.Random(0), args.response[1], []
    words = range(longest + 1, model.config.vocab_size)  # none of them is a number of tokens to come
    expected = [rng.randint(*args.response) for _ in range(args.prompts)]
    prompts = [rng.choices(words, k=rng.randint(*args.prompt) - 1) + [length] for length in expected]
    prompts.sort(key=lambda prompt: -len(prompt))
    expected = [prompt[-1] for prompt in prompts]
    run, times, failed = sides(model, prompts, args.batch, longest), {}, {}
    hook, plain = model.register_forward_hook(count_down, with_kwargs=True), model.forward

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return getattr(time, clock(model.device.type))()

    def timed(*a, **kw):
        start, out = now(), plain(*a, **kw)
        seconds.append(now() - start)
        return out

    for repetition, name in itertools.product(range(model.device.type == "cpu", args.repeat + 1), run):
        if name in failed:
            continue
        try:
            if name == "generate" and model.device.type == "cpu":  # on a GPU a step is a graph, which has no forward
                seconds.clear()
                model.forward = timed
            start = now()
            assert run[name]() == expected, "wrong lengths"
            if repetition:
                times.setdefault(name, []).append(now() - start)
        except Exception as error:  # a peer that does not run here is a result
            if name == "generate":
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        model.forward = plain
        if name == "generate" and repetition and seconds:
            times.setdefault("floor", []).append(sum(seconds))
        keep(summary(times, expected, failed))
    hook.remove()
    return summary(times, expected, failed)


def summary(times: dict[str, list[float]], expected: list[int], failed: dict[str, str]) -> dict:
    median = {name: statistics.median(t) for name, t in times.items()}
    ratio = {name: statistics.median(a / b for a, b in zip(t, times["generate"])) for name, t in times.items()}
    speed = {name: sum(expected) / t for name, t in median.items()}
    return {"seconds": median, "tokens_per_second": speed, "time_over_generate": ratio, "not_run": failed}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="a model folder, instead of the two shapes with random weights")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--prompts", type=int, default=64, help="how many")
    p.add_argument("--prompt", type=int, nargs=2, default=[20, 400], metavar=("LOW", "HIGH"), help="tokens")
    p.add_argument("--response", type=int, nargs=2, default=[8, 120], metavar=("LOW", "HIGH"), help="tokens")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--results", default=str(ROOT / "results" / "generation.json"))
    args = p.parse_args()
    logging.disable(logging.WARNING)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "device": device}
    about |= {"threads": torch.get_num_threads(), "clock": clock(device)}
    about |= {name: getattr(args, name) for name in ("dtype", "prompts", "prompt", "response", "batch", "repeat")}
    result = {"about": about, "models": {}}
    print("| model | side | tokens/s | time over generate |\n|---|---|---|---|")
    for name in [Path(args.model).name] if args.model else SHAPES:
        model = AutoModelForCausalLM.from_pretrained(args.model) if args.model else new_model(*SHAPES[name])
        row = measure(model.to(device, getattr(torch, args.dtype)).eval(), args)
        result["models"][name] = row
        for side, speed in row["tokens_per_second"].items():
            print(f"| {name} | {side} | {speed:.0f} | {row['time_over_generate'][side]:.2f} |", flush=True)
        for side, why in row["not_run"].items():
            print(f"| {name} | {side} | — | did not run: {why} |", flush=True)
        Path(args.results).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
