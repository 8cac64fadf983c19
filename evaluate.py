"""Every number of the tables: accuracy, exposure (the training-inference gap), recovery; and the table over seeds.

    torchrun --nproc-per-node 8 evaluate.py run --model runs/bash --task gsm8k --out runs/eval/bash --name bash
    python evaluate.py run --model runs/bash-1 --task toy --data runs/data/test.jsonl --out runs/eval/bash-1 \
        --name bash --seed 1
    python evaluate.py table runs/eval/*/results.json --baseline sft-more --out results/toy

`run` writes OUT/results.json and, to look at, `datasets` folders with what the model wrote: OUT/generations-t0 (-t0.1,
...), OUT/exposure, OUT/recovery. Interrupted, the same command goes on where it stopped. Its metrics:

    accuracy_t0, accuracy_t0.1   share of right answers (Table 3), at temperature 0 and as the mean of --generations
                                 independent generations at others. toy, gsm8k: strict match; math: the last \\boxed{}
    nll_y, nll_g, exposure_gap   nats per token of y given (x, y^{<j}); given (x, g^{<j}), g the model's mixed prefix of
                                 Eq. 4; the second less the first
    recovery_restated, _final    toy: a wrong result is forced on the model; does it restate the right one, and is its
                                 final answer right (greedy)
    train_seconds                from the model's log.jsonl and D_s or D_r: the stage that made it, not those before

`table` has one row a --name, mean ± standard error over --seed, and the differences to a baseline seed by seed.

Decisions
- A missing or malformed answer is wrong. The right one is read from the reference's text, even where y is cut.
- The ± over generations (in results.json) is the population's, ddof 0, as in the paper's tables: 7.90, 8.45, 7.74 give
  its 8.03 ± 0.30. The one over seeds is sd(ddof=1) / sqrt(n).
- Exposure and recovery draw the same mask, noise and errors for every model and --seed; generations depend on --seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset

import data
import ddp_utils as ddp
import generate
import toy


# ---------------------------------------------------------------------------------------------- answers
def gsm8k_answer(text: str) -> str | None:
    """The number behind the first `#### `, without commas; None where there is none. Compared as a string."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return found.group(1).replace(",", "") if found else None


def math_answer(text: str) -> str | None:
    """What stands in the last \\boxed{} or \\fbox{}, or behind `\\boxed `; None if there is none or it never closes."""
    boxes = list(re.finditer(r"\\(?:boxed|fbox)(?:\s*(\{)|\s+)", text))
    if not boxes:
        return None
    inside = text[boxes[-1].end() :]
    if not boxes[-1].group(1):
        return re.match(r"[^$\n]*", inside).group().strip() or None
    depth = 1
    for brace in re.finditer(r"\\[\\{}]|[{}]", inside):  # an escaped brace is a symbol
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if not depth:
            return inside[: brace.start()].strip()
    return None


def math_normal(answer: str) -> str:
    """One spelling for the ways to write an answer of MATH, after hendrycks/math: no spaces, units, degrees, dollar or
    percent signs, \\left or \\right; \\frac{1}{2} for \\dfrac12, \\tfrac{1}2, 1/2 and 0.5; \\sqrt{3} for \\sqrt3."""
    s = re.sub(r"(?<!\\)\\[!,;: ]", "", answer)  # spacing
    s = re.sub(r"\\[dt]frac", r"\\frac", s)
    s = re.sub(r"\\(?:left|right)(?![a-zA-Z])|\^\{?\\circ\}?|\\?[$%]", "", s).strip().rstrip(".")
    s = re.sub(r"(?<=.)\\(?:text|mbox)\{\s[^{}]*\}(?:\^\{?\d\}?)?$", "", s)  # 5 \text{ cm}^2
    s = re.sub(r"^\\text\{([^{}]*)\}$", r"\1", s)  # \text{Evelyn}
    s = re.sub(r"^[a-zA-Z]{1,2}\s*=", "", s)  # x = 5
    s = re.sub(r"(?<![0-9])\.(?=[0-9])", "0.", s)  # .5
    s = re.sub(r"\\sqrt\s*(\\[a-zA-Z]+|[^\s{\[\\])", r"\\sqrt{\1}", s)
    argument = r"\s*(?:\{((?:[^{}]|\{[^{}]*\})*)\}|(\\[a-zA-Z]+|[^\s{}\\]))"  # {...}, \pi or one character
    s = re.sub(rf"\\frac{argument}{argument}", r"\\frac{\1\2}{\3\4}", s)
    s = re.sub(r"^(-?)([0-9]+)\s*/\s*([0-9]+)$", r"\1\\frac{\2}{\3}", s)
    s = "".join(s.split())
    s = s.replace(",", "") if re.fullmatch(r"-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", s) else s  # 1,234
    return "\\frac{1}{2}" if s == "0.5" else s


def math_equal(a: str | None, b: str | None) -> bool:
    """Are two answers of MATH the same once normalised? No answer equals nothing."""
    return bool(a and b and math_normal(a)) and math_normal(a) == math_normal(b)


def same(a: str | None, b: str | None) -> bool:
    return a is not None and a == b


CHECKS = {  # task: (the answer in a text, are two answers the same)
    "toy": (toy.answer, same),
    "gsm8k": (gsm8k_answer, same),
    "math": (math_answer, math_equal),
}


# ---------------------------------------------------------------------------------------------- arithmetic
def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): is one of k right, estimated without bias from n samples of which c are right."""
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, not n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def mean_se(values: list[float]) -> tuple[float, float | None]:
    """The mean and its standard error, sd(ddof=1) / sqrt(n); None from a single value."""
    if not values:
        raise ValueError("no values to take a mean of")
    se = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), se


def paired_difference(a: dict[int, float], b: dict[int, float]) -> tuple[float, float | None, int]:
    """(mean, standard error, number) of a - b over the seeds that both have. Raises ValueError where there are none."""
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        raise ValueError(f"no seed in common: {sorted(a)} and {sorted(b)}")
    return *mean_se([a[seed] - b[seed] for seed in seeds]), len(seeds)


@torch.no_grad()
def nll(
    model: torch.nn.Module, x: list[list[int]], inputs: list[list[int]], targets: list[list[int]], batch_size: int = 8
) -> list[float]:
    """-sum_j log p(target^j | x, input^{<j}) of each row, in nats. Lists of token ids, an input as long as its target.

    inputs = targets = y is the teacher-forced NLL; inputs = g, targets = y scores y behind the model's own tokens.
    """
    if any(len(a) != len(b) for a, b in zip(inputs, targets, strict=True)):
        raise ValueError("inputs and targets must be of the same length, row by row")
    order = sorted(range(len(x)), key=lambda i: len(x[i]) + len(targets[i]))  # little padding in a batch
    sums = [0.0] * len(x)
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        b = data.batch([x[i] for i in some], [inputs[i] for i in some], model.device)
        y, mask = data.pad_responses([targets[i] for i in some], model.device)  # [B, L]
        logits = data.response_logits(model, b).float()  # [B, L, V]
        losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)  # [B, L]
        for i, loss in zip(some, (losses.double() * mask).sum(dim=1).tolist(), strict=True):
            sums[i] = loss
    return sums


# ---------------------------------------------------------------------------------------------- run
def accuracy(args, model, tokenizer, examples: Dataset, references: dict[int, str], t: float) -> tuple[dict, dict]:
    """({accuracy_tT: ...}, details) at temperature t; no metric for tasks whose responses have no answer to check."""

    def make(rows: list[dict]) -> list[dict]:
        drawn = generate.generate(
            model, [row["x"] for row in rows], ids=[row["id"] for row in rows], max_new_tokens=args.max_response,
            eos_token_id=tokenizer.eos_token_id, temperature=t, n=args.generations if t else 1,
            seed=ddp.fold_in(args.seed, t), batch_size=args.batch_size,
        )  # fmt: skip
        texts = [[tokenizer.decode(z, skip_special_tokens=True) for z in samples] for samples in drawn]
        return [{**row, "z": z, "text": text} for row, z, text in zip(rows, drawn, texts, strict=True)]

    rows = ddp.offline(Path(args.out) / f"generations-t{t:g}", make, examples, model, tokenizer)
    every = [z for samples in rows["z"] for z in samples]
    details = {
        "tokens": statistics.fmean(map(len, every)),
        "without_eos": statistics.fmean(z[-1:] != [tokenizer.eos_token_id] for z in every),
    }
    if args.task not in CHECKS:
        return {}, details
    find, equal = CHECKS[args.task]
    right = [[equal(find(text), find(references[row["id"]])) for text in row["text"]] for row in rows]
    shares = [statistics.fmean(column) for column in zip(*right, strict=True)]
    details |= {"accuracy": shares, "sd_over_generations": statistics.pstdev(shares)}
    details["without_answer"] = statistics.fmean(find(text) is None for texts in rows["text"] for text in texts)
    return {f"accuracy_t{t:g}": statistics.fmean(shares)}, details


def exposure(args, model, tokenizer, examples: Dataset) -> dict[str, float]:
    """nll_y, nll_g and exposure_gap, in nats per token of y."""

    def make(rows: list[dict]) -> list[dict]:
        x, y, ids = [row["x"] for row in rows], [row["y"] for row in rows], [row["id"] for row in rows]
        g = generate.mix(model, x, y, beta=args.beta, ids=ids, batch_size=args.batch_size)  # Eq. 4
        on_y, on_g = (nll(model, x, inputs, y, min(8, args.batch_size)) for inputs in (y, g))
        if not math.isfinite(sum(on_y + on_g)):
            raise ValueError(f"--model {args.model}: the loss of rows {ids[0]} to {ids[-1]} is not finite")
        new = zip(rows, g, on_y, on_g, strict=True)
        return [{**row, "g": g_i, "nll_y": a, "nll_g": b} for row, g_i, a, b in new]

    rows = ddp.offline(Path(args.out) / "exposure", make, examples, model, tokenizer)
    n = sum(map(len, rows["y"]))
    on_y, on_g = math.fsum(rows["nll_y"]) / n, math.fsum(rows["nll_g"]) / n
    return {"nll_y": on_y, "nll_g": on_g, "exposure_gap": on_g - on_y}


def recovery(args, model, tokenizer, examples: Dataset) -> dict[str, float]:
    """toy: after a wrong result, the share of sums put right when repeated, and of right final answers."""
    if not toy.IDS.keys() <= tokenizer.get_vocab().keys():  # one token a word is what this counts in
        return {}
    words = {row["id"]: tokenizer.convert_ids_to_tokens(row["y"]) for row in examples}
    examples = [row for row in examples if "=" in words[row["id"]] and toy.answer(" ".join(words[row["id"]]))]
    if not examples:
        return {}

    def make(rows: list[dict]) -> list[dict]:
        prefixes = [toy.inject_error(words[row["id"]], row["id"]) for row in rows]
        ids = [tokenizer.convert_tokens_to_ids(prefix) for prefix in prefixes]
        drawn = generate.generate(
            model, [row["x"] + prefix for row, prefix in zip(rows, ids, strict=True)], temperature=0,
            max_new_tokens=args.max_response, eos_token_id=tokenizer.eos_token_id, batch_size=args.batch_size,
        )  # fmt: skip
        made = []
        for row, ids_i, prefix, (z,) in zip(rows, ids, prefixes, drawn, strict=True):
            written = [word or "<unk>" for word in tokenizer.convert_ids_to_tokens(z)]
            made.append({**row, "prefix": ids_i, "z": z, **toy.recovery(words[row["id"]], prefix, written)})
        return made

    rows = ddp.offline(Path(args.out) / "recovery", make, examples, model, tokenizer)
    return {f"recovery_{key}": statistics.fmean(rows[key]) for key in ("restated", "final")}


def train_seconds(folder: str) -> float | None:
    """Seconds of the stage that wrote a model folder: its steps, and the making of its D_s or D_r."""
    log = Path(folder) / "log.jsonl"
    if not log.exists():
        return None
    made = [json.loads(path.read_text()) for path in Path(folder).glob("D_*/source.json")]
    return sum(row.get("seconds", 0) for row in data.read(str(log)) + made)


def claim(args: argparse.Namespace) -> bool:
    """Claims --out for these flags. False where they are done; ValueError where --out holds what other flags made."""
    out = Path(args.out)
    if any(made for name in ("results.json", "generations*", "exposure*", "recovery*") for made in out.glob(name)):
        try:
            old = dict(json.loads((out / "args.json").read_text()))
        except (OSError, ValueError, TypeError):  # gone or broken
            old = {}
        flags = {key: value for key, value in vars(args).items() if key not in (*ddp.FREE, "batch_size")}
        differ = [key for key in flags if old.get(key) != flags[key]]
        if differ:
            named = ", ".join(f"--{key.replace('_', '-')} {old.get(key)} -> {flags[key]}" for key in differ)
            raise ValueError(f"--out {out} holds another evaluation ({named}); choose another folder or delete it")
        if (out / "results.json").exists():
            ddp.print0(f"{out / 'results.json'}: already done")
            return False
    return ddp.open_out(args)


def run(args: argparse.Namespace) -> None:
    """Measures one model and writes OUT/results.json."""
    ddp.init()
    if not args.name.strip():
        raise ValueError("--name is empty: it is the row of the table")
    spec = data.TASKS[args.task]
    args.max_response = args.max_response or spec.max_response
    if args.temperatures is None:
        args.temperatures = [0.0, 0.1, 1.0] if args.task in CHECKS else []
    if not claim(args):
        return
    tokenizer = ddp.load_tokenizer(args.model)
    examples, notes = data.load(args, tokenizer, args.split)
    for note in notes:
        ddp.print0(note)
    rows = data.load_rows(args.task, args.data, args.split, args.columns)
    rows = rows[: args.limit] if args.limit else rows
    references = {row["id"]: row["response"] for row in rows}
    if args.task in CHECKS:
        silent = [i for i in examples["id"] if CHECKS[args.task][0](references[i]) is None]
        if len(silent) == len(examples):
            raise ValueError(f"no response of the data holds an answer as --task {args.task} writes it")
        if silent:
            ddp.print0(f"{len(silent)} references without an answer count as never reached, first: row {silent[0]}")

    model = ddp.load_model(args.model, args.dtype, shard_size=args.shard, lock_step=args.lock_step)
    tokens = max(len(row["x"]) + max(len(row["y"]), args.max_response * bool(args.temperatures)) for row in examples)
    if args.task == "toy":
        tokens = max(len(row["x"] + row["y"]) for row in examples) + args.max_response  # recovery begins inside of y
    ddp.check_fits(model, tokens, max(max(row["x"] + row["y"]) for row in examples), "prompt and response")
    test_set = hashlib.sha256(json.dumps([[row["id"], row["x"], row["y"]] for row in examples]).encode()).hexdigest()
    metrics, details = {}, {}
    for t in args.temperatures:
        found, details[f"t{t:g}"] = accuracy(args, model, tokenizer, examples, references, t)
        metrics |= found
    if args.task == "toy":
        metrics |= recovery(args, model, tokenizer, examples)
    metrics |= exposure(args, model, tokenizer, examples)
    seconds = train_seconds(args.model)
    metrics |= {} if seconds is None else {"train_seconds": seconds}
    results = {
        "name": args.name, "seed": args.seed, "model": args.model, "task": args.task,
        "data": args.data or spec.hub[0], "split": args.split, "test_set": test_set[:16],
        "n": len(examples), "left_out": len(rows) - len(examples), "beta": args.beta, "generations": args.generations,
        "max_response": args.max_response, "dtype": args.dtype, "metrics": metrics, "details": details,
    }  # fmt: skip
    ddp.barrier()
    if ddp.RANK == 0:
        ddp.write_json(Path(args.out) / "results.json", results)
    shown = ", ".join(f"{title(key)} {cell(key, (value, None))}" for key, value in metrics.items())
    ddp.print0(f"{args.name}, seed {args.seed}, {len(examples)} examples: {shown}")


# ---------------------------------------------------------------------------------------------- table
def percent(metric: str) -> bool:
    return metric.startswith(("accuracy", "recovery"))


def title(metric: str) -> str:
    """A column's head, as in the paper's tables where it has one."""
    if metric.startswith("accuracy_t"):
        return "Greedy (%)" if metric == "accuracy_t0" else f"Temperature = {metric[10:]} (%)"
    return {
        "recovery_restated": "Error restated right (%)", "recovery_final": "Final right after error (%)",
        "nll_y": "NLL given y", "nll_g": "NLL given g", "exposure_gap": "Gap", "train_seconds": "Training (s)",
    }.get(metric, metric)  # fmt: skip


def cell(metric: str, value: tuple | None, sign: str = "") -> str:
    """`48.8 ± 1.2`; no error from a single seed, a dash where nothing was measured."""
    if value is None:
        return "–"
    scale, digits = (100, 1) if percent(metric) else (1, 1 if metric == "train_seconds" else 4)
    mean, se = value[:2]
    return f"{mean * scale:{sign}.{digits}f}" + (f" ± {se * scale:.{digits}f}" if se is not None else "")


SAME = ("task", "test_set", "beta", "generations", "max_response")  # what the runs of one table must share


def read_results(paths: list[str]) -> list[dict]:
    """The runs of results.json files, or of the .json that `table --out` wrote. Raises ValueError naming the file."""
    runs = []
    for path in paths:
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            found = found.get("runs", [found])
            good = found and all({"name", "seed", "n", "metrics", *SAME} <= one.keys() for one in found)
            for one in found if good else []:
                good &= isinstance(one["name"], str) and isinstance(one["seed"], int)
                good &= all(isinstance(value, int | float) for value in [one["beta"], *one["metrics"].values()])
        except (ValueError, TypeError, AttributeError):
            good = False
        if not good:
            raise ValueError(f"{path}: not a results.json of `evaluate.py run`")
        runs += [{"file": path, **one} for one in found]
    return runs


def summarise(runs: list[dict], baseline: str | None = None) -> dict:
    """One row a name, in order of first appearance: (mean, s.e.) over seeds of each metric, and of its difference to
    the baseline's run of the same seed. Raises ValueError where the runs do not belong in one table."""
    first, rows = runs[0], {}
    for one in runs:
        for key in SAME:
            if one[key] != first[key]:
                raise ValueError(f"{one['file']} has {key} {one[key]}, {first['file']} has {first[key]}: not one table")
        seeds = rows.setdefault(one["name"], {})
        if one["seed"] in seeds:
            other = seeds[one["seed"]]["file"]
            raise ValueError(f"{one['file']} and {other}: both are {one['name']}, seed {one['seed']}")
        if seeds and (differ := next(iter(seeds.values()))["metrics"].keys() ^ one["metrics"].keys()):
            raise ValueError(f"{one['file']}: only some runs of {one['name']} have {', '.join(sorted(differ))}")
        seeds[one["seed"]] = one
    if baseline and baseline not in rows:
        raise ValueError(f"--baseline {baseline}: no such name; there are {', '.join(rows)}")
    columns = list(dict.fromkeys(key for one in runs for key in one["metrics"]))

    def by_seed(name: str, metric: str) -> dict[int, float]:
        return {seed: one["metrics"][metric] for seed, one in rows[name].items() if metric in one["metrics"]}

    table = {"columns": columns, "baseline": baseline, "rows": [], "differences": [], "runs": runs}
    for name, seeds in rows.items():
        values = {key: by_seed(name, key) for key in columns}
        means = {key: mean_se(list(found.values())) for key, found in values.items() if found}
        table["rows"].append({"name": name, "seeds": sorted(seeds), "metrics": means})
        if baseline and name != baseline:
            pairs = {key: (values[key], by_seed(baseline, key)) for key in columns}
            less = {key: paired_difference(a, b)[:2] for key, (a, b) in pairs.items() if a.keys() & b.keys()}
            common = sorted(seeds.keys() & rows[baseline].keys())
            table["differences"].append({"name": name, "seeds": common, "metrics": less})
    return table


def markdown(table: dict) -> str:
    """The caption, the table, and the table of differences where there is a baseline."""
    run, columns = table["runs"][0], table["columns"]

    def lines(head: str, rows: list[dict], sign: str = "") -> list[str]:
        cells = [[head, *map(title, columns), "Seeds"], ["---"] + ["---:"] * (len(columns) + 1)]
        for row in rows:
            values = (cell(key, row["metrics"].get(key), sign) for key in columns)
            cells.append([row["name"].replace("|", "\\|"), *values, str(len(row["seeds"]))])
        return ["| " + " | ".join(line) + " |" for line in cells]

    caption = (
        f"Task {run['task']}, {run['n']} test examples (set {run['test_set']}); mean ± standard error over seeds. "
        f"Accuracies in percent (above temperature 0: of {run['generations']} generations), NLL in nats per token "
        f"of y; g: the model's own mixed prefix of Eq. 4, β = {run['beta']:g}; Gap: the NLL given g less that given y."
    )
    parts = [caption, "", *lines("Method", table["rows"])]
    if table["differences"]:
        head = f"Less {table['baseline']}"
        parts += ["", f"{head} of the same seed (accuracies in percentage points):", ""]
        parts += lines(head, table["differences"], "+")
    return "\n".join(parts) + "\n"


def table(args: argparse.Namespace) -> None:
    """Prints the table; with --out, writes OUT.md and OUT.json (which holds all runs, and can be read in again)."""
    runs = read_results(args.results)
    baseline = args.baseline or ("sft-more" if any(one["name"] == "sft-more" for one in runs) else None)
    made = summarise(runs, baseline)
    text = markdown(made)
    print(text, end="")
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{args.out}.md").write_text(text, encoding="utf-8")
        ddp.write_json(Path(f"{args.out}.json"), made)


def temperatures(text: str) -> list[float]:
    """An argparse type: "0,0.1,1" -> [0.0, 0.1, 1.0]; "" is none."""
    return list(dict.fromkeys(ddp.number(0)(part) for part in filter(None, text.split(","))))


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("run", help="measure one model", allow_abbrev=False)
    ddp.data_flags(p, sorted(data.TASKS))
    p.add_argument("--split", choices=["train", "test"], default="test", help="of a hub set")
    p.add_argument("--out", required=True, help="folder for results.json and what the model wrote")
    p.add_argument("--name", required=True, help="the method: the row of the table")
    p.add_argument("--seed", type=ddp.count, default=0, help="of the training run, and of the draws")
    p.add_argument("--temperatures", type=temperatures, help="default 0,0.1,1 where answers can be checked, else none")
    p.add_argument("--generations", type=ddp.number(1, kind=int), default=3, help="a problem, above temperature 0")
    p.add_argument("--beta", type=ddp.number(0, 1), default=0.2, help="share of the model's own tokens in g (Eq. 4)")
    p.add_argument("--batch-size", type=ddp.number(1, kind=int), default=64, help="rows decoded at once by one rank")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation")
    p = commands.add_parser("table", help="Markdown and JSON from several runs", allow_abbrev=False)
    p.add_argument("results", nargs="+", help="results.json files, or the .json of an earlier table")
    p.add_argument("--baseline", help="the name to take differences to (default: sft-more, if it is there)")
    p.add_argument("--out", help="write OUT.md and OUT.json, too")
    args = parser.parse_args()
    run(args) if args.command == "run" else table(args)


if __name__ == "__main__":
    ddp.cli(main)
