"""What the three exact ways to draw Eq. 4 cost on a trained model: forwards and time, by β, T, length and batch.

    python benchmarks/mixing.py --data gsm8k/train.jsonl --out out/mixing     # trains a small model first, some minutes
    python benchmarks/mixing.py --data gsm8k/train.jsonl --model runs/sft     # a model of yours
    python benchmarks/mixing.py                                               # no files: the toy task's text

A row of --data is an object whose first two strings are prompt and response. The number of passes depends on how sure
the model is of its text, hence a trained one: by default a GPT-NeoX of 4 layers and d = 256 with a byte-level BPE of
2048 tokens, trained on the text of all rows but the last 200. Those are measured: either the pairs as they are
(responses cut at 164 tokens), or their text in one string, cut into prompts of 64 tokens and responses of one length.
At batch 1 the numbers are sums over four rows, one after the other.

All methods must draw the same tokens (in float32), and the share of rows for which they did is written. The methods
take turns in each repetition; what is shown is the median. With one CPU thread the clock is the CPU time of the
process, which other programs on the machine do not change much, else the time on the wall. Writes results/mixing.json
and prints a table.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import generate  # noqa: E402
import sums  # noqa: E402
import toy  # noqa: E402

METHODS = ("token", "parallel", "segment", "auto")
HELD_OUT, PROMPT, CUT = 200, 64, 164  # rows; tokens; tokens


def read(path: str | None) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()] if path else sums.problems(4000, "mixing")
    return [tuple(value for value in row.values() if isinstance(value, str))[:2] for row in rows]


def stream(tokenizer, pairs: list[tuple[str, str]]) -> list[int]:
    """All pairs as one string of tokens."""
    eos = [tokenizer.eos_token_id]
    return [token for x, y in pairs for token in tokenizer(f"{x} {y}", add_special_tokens=False).input_ids + eos]


def train(tokenizer, pairs: list[tuple[str, str]], steps: int):
    """Next-token loss on blocks of 576 tokens, four a step: Muon for the matrices, AdamW for the rest."""
    torch.manual_seed(0)
    tokens = torch.tensor(stream(tokenizer, pairs))
    model = toy.new_model(len(tokenizer), 4, 256, 1024, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    matrices = [w for name, w in model.named_parameters() if w.dim() == 2 and "embed" not in name]
    others = [w for name, w in model.named_parameters() if w.dim() != 2 or "embed" in name]
    optimisers = {torch.optim.Muon(matrices, weight_decay=0.0): 0.02, torch.optim.AdamW(others, weight_decay=0.0): 3e-3}
    losses = []
    for step in range(steps):
        ids = torch.stack([tokens[i : i + 576] for i in torch.randint(len(tokens) - 576, (4,)).tolist()])  # [4, 576]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, lr in optimisers.items():
            optimiser.param_groups[0]["lr"] = lr * min((step + 1) / 30, 2 * (1 - step / steps), 1)
            optimiser.step()
            optimiser.zero_grad()
        losses.append(loss.item())
        if step % 50 == 49:
            print(f"step {step + 1}: {statistics.mean(losses[-50:]):.2f} nats a token", file=sys.stderr)
    return model.eval(), {"steps": steps, "tokens": steps * 4 * 576, "last_loss": statistics.mean(losses[-50:])}


def load(args: argparse.Namespace, pairs: list[tuple[str, str]]):
    """The model of --model, or that of an earlier run in --out, or a new one."""
    folder = Path(args.model or Path(args.out) / f"model-{Path(args.data).parent.name if args.data else 'toy'}")
    if args.model and not folder.exists():
        raise SystemExit(f"mixing.py: --model {folder}: no such folder")
    if not folder.exists():
        tok = toy.byte_tokenizer([args.data], 2048) if args.data else toy.tokenizer()
        model, log = train(tok, pairs, args.steps)
        model.save_pretrained(folder)
        tok.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(log))
    log = folder / "training.json"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return AutoTokenizer.from_pretrained(folder), model, json.loads(log.read_text()) if log.exists() else None


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", help="a .jsonl file: prompt and response are the first two strings of a row")
    p.add_argument("--model", help="a model folder (default: a small one is trained)")
    p.add_argument("--out", default="out/mixing", help="keeps the model that was trained")
    p.add_argument("--steps", type=int, default=400, help="of training")
    p.add_argument("--device", default="auto")
    p.add_argument("--betas", type=float, nargs="+", default=[0.05, 0.2, 0.5])
    p.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 1.0])
    p.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512, 0], help="0: pairs as they are")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--results", default=str(ROOT / "results" / "mixing.json"))
    args = p.parse_args()
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    pairs = read(args.data)
    tokenizer, model, training = load(args, pairs[:-HELD_OUT])
    model.to(device)
    held_out = [[tokenizer(text, add_special_tokens=False).input_ids for text in pair] for pair in pairs[-HELD_OUT:]]
    text, rows = stream(tokenizer, pairs[-HELD_OUT:]), []
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "device": device}
    about |= {"threads": torch.get_num_threads(), "clock": clock.__name__, "repeat": args.repeat}
    about |= {"data": Path(args.data).name if args.data else "toy task", "training": training}
    about |= {"parameters": model.num_parameters()}
    print("| response | batch | β | T | forwards: " + " | ".join(METHODS) + " | ms: " + " | ".join(METHODS), end="")
    print(" | token / auto |\n|" + "---|" * 13)
    for length, batch in itertools.product(args.lengths, args.batches):
        count = max(4, batch)
        if length:
            starts = range(0, count * (PROMPT + length), PROMPT + length)
            x, y = ([text[i + a : i + b] for i in starts] for a, b in ((0, PROMPT), (PROMPT, PROMPT + length)))
        else:
            x, y = [x for x, _ in held_out[:count]], [y[:CUT] for _, y in held_out[:count]]
        for beta, temperature in itertools.product(args.betas, args.temperatures):
            times, stats, drawn = {m: [] for m in METHODS}, {}, {}
            for _, m in itertools.product(range(args.repeat), METHODS):
                stats[m], start = {}, clock()
                options = {"beta": beta, "temperature": temperature, "batch_size": batch, "method": m}
                drawn[m] = generate.mix(model, x, y, **options, stats=stats[m])  # ends on the CPU: nothing is pending
                times[m].append(clock() - start)
            ms = {m: 1000 * statistics.median(times[m]) for m in METHODS}
            ratio = statistics.median(a / b for a, b in zip(times["token"], times["auto"]))
            same = statistics.mean(all(drawn[m][i] == drawn["token"][i] for m in METHODS) for i in range(len(x)))
            forwards = {m: stats[m]["forwards"] for m in METHODS}
            name = length or f"pairs, at most {CUT}"
            row = {"length": name, "batch": batch, "beta": beta, "temperature": temperature, "forwards": forwards}
            rows.append(row | {"ms": ms, "token_over_auto": ratio, "rows_drawn_alike": same})
            cells = [name, batch, beta, temperature, *forwards.values(), *(f"{t:.0f}" for t in ms.values())]
            print("|", " | ".join(map(str, cells)), f"| {ratio:.2f} |", flush=True)
            report = json.dumps({"about": about, "rows": rows}, indent=1, ensure_ascii=False)
            Path(args.results).write_text(report + "\n")  # after every row: what is measured is kept


if __name__ == "__main__":
    main()
