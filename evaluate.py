"""Every number of the tables: accuracy, ROUGE, exposure (the training-inference gap), recovery; and the table itself.

    torchrun --nproc-per-node 8 evaluate.py run --model runs/bash --task gsm8k --out runs/eval/bash --name bash
    python evaluate.py run --model runs/bash-1 --task toy --data runs/data/test.jsonl --out runs/eval/bash-1 \
        --name bash --seed 1
    torchrun --nproc-per-node 8 evaluate.py alpaca --model runs/bash --data alpaca_eval.json --name bash --out bash.json
    python evaluate.py table runs/eval/*/results.json --baseline sft-more --out results/toy

`run` writes OUT/results.json and, to look at, `datasets` folders with what the model wrote: OUT/generations-t0 (-t0.1,
...), OUT/exposure, OUT/recovery. Interrupted, the same command goes on where it stopped. Its metrics:

    accuracy_t0, accuracy_t0.1   share of right answers (Table 3), at temperature 0 and as the mean of --generations
                                 independent generations at others. toy, gsm8k: strict match; math: the last \\boxed{}
    flexible_t0, ...             gsm8k: the last number in the text counts, as lm-evaluation-harness's flexible-extract
    pass@K_tT, maj@K_tT          for --k K: is one of K right (unbiased); is the most frequent answer of the first K
    rouge1_tT, rouge2_, rougeL_  tldr: F1 by Google's rouge-score, no stemming (Tables 1 and 7)
    win_rate_tT                  tldr: by judge.py, share of the parsed verdicts that prefer the model to the reference
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
- The details in results.json always hold pass@k and maj@k for k = 1, 2, 4, ..., and best-of-N, the answer checker being
  the verifier, which is pass@N. Equal votes: the answer that came first wins. No answer, no vote.
- Exposure and recovery draw the same mask, noise and errors for every model and --seed; generations depend on --seed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from datasets import Dataset

import data
import ddp_utils as ddp
import generate
import toy


def optional(module: str, package: str) -> ModuleType:
    """A module of an optional package. Raises ValueError, with the pip command, where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"this needs {package} ({ddp.first_line(error)}): pip install {package}") from None


# ---------------------------------------------------------------------------------------------- answers
def gsm8k_answer(text: str) -> str | None:
    """The number behind the first `#### `, without commas; None where there is none. Compared as a string."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return found.group(1).replace(",", "") if found else None


def gsm8k_flexible(text: str) -> str | None:
    """The last number in a text, less $, commas and a last point: lm-evaluation-harness's flexible-extract."""
    found = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)
    return found[-1].replace("$", "").replace(",", "").removesuffix(".") if found else None


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


def math_verified(a: str | None, b: str | None) -> bool:
    """The same by Hugging Face's math-verify, which parses both (a = b in value); `--math-verify`."""
    package = optional("math_verify", "math-verify")
    if a is None or b is None:
        return False
    a, b = (package.parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (a, b))
    return bool(package.verify(b, a, timeout_seconds=None))


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


def majority(answers: list[str | None], equal: Callable[[str, str], bool] = same) -> str | None:
    """The most frequent answer, by `equal`; of several the one that came first. None has no vote."""
    votes: list[list] = []  # [answer, how many], in order of first occurrence
    for answer in answers:
        if answer is not None:
            group = next((group for group in votes if equal(group[0], answer)), None)
            if group:
                group[1] += 1
            else:
                votes.append([answer, 1])
    return max(votes, key=lambda group: group[1])[0] if votes else None


def of_several(answers: list[list[str | None]], right: list[list[bool]], equal: Callable, k: int) -> dict[str, float]:
    """pass@k (from all samples, unbiased) and maj@k (of the first k), in the mean over problems."""
    most = [majority(row[:k], equal) for row in answers]
    return {
        "pass": statistics.fmean(pass_at_k(len(goods), sum(goods), k) for goods in right),
        "maj": statistics.fmean(
            best is not None and goods[row.index(best)] for best, row, goods in zip(most, answers, right, strict=True)
        ),
    }


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
    if args.task == "tldr":
        details["empty"] = statistics.fmean(not text.strip() for texts in rows["text"] for text in texts)
        found = rouge(rows["text"], [references[i] for i in rows["id"]])
        return {f"{key}_t{t:g}": value for key, value in found.items()}, details
    if args.task not in CHECKS:
        return {}, details
    find, equal = CHECKS[args.task]
    equal = math_verified if args.math_verify else equal
    true = [find(references[i]) for i in rows["id"]]
    answers = [[find(text) for text in texts] for texts in rows["text"]]
    right = [[equal(a, b) for a in some] for some, b in zip(answers, true, strict=True)]
    shares = [statistics.fmean(column) for column in zip(*right, strict=True)]
    details |= {"accuracy": shares, "sd_over_generations": statistics.pstdev(shares)}
    details["without_answer"] = statistics.fmean(a is None for some in answers for a in some)
    metrics = {f"accuracy_t{t:g}": statistics.fmean(shares)}
    if args.task == "gsm8k":
        loose = [[gsm8k_flexible(text) == b for text in texts] for texts, b in zip(rows["text"], true)]
        metrics[f"flexible_t{t:g}"] = statistics.fmean(good for goods in loose for good in goods)
    if (n := len(shares)) > 1:
        ks = sorted({*(2**i for i in range(n.bit_length())), n, *(args.k or [])})
        several = {k: of_several(answers, right, equal, k) for k in ks}
        details["pass@k"], details["maj@k"] = ({k: several[k][key] for k in ks} for key in ("pass", "maj"))
        details["best_of_n"] = several[n]["pass"]  # the answer checker finds the right one where there is one
        metrics |= {f"{key}@{k}_t{t:g}": several[k][key] for k in args.k or [] for key in ("pass", "maj")}
    return metrics, details


def rouge(texts: list[list[str]], references: list[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L F1 by Google's rouge-score without stemming, in the mean; an empty text has 0."""
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = optional("rouge_score.rouge_scorer", "rouge-score").RougeScorer(kinds, use_stemmer=False)
    found = [scorer.score(true, text) for some, true in zip(texts, references, strict=True) for text in some]
    return {kind: statistics.fmean(one[kind].fmeasure for one in found) for kind in kinds}


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


def run(args: argparse.Namespace) -> None:
    """Measures one model and writes OUT/results.json."""
    ddp.init()
    if not args.name.strip():
        raise ValueError("--name is empty: it is the row of the table")
    spec = data.TASKS[args.task]
    args.max_response = args.max_response or spec.max_response
    if args.temperatures is None:
        args.temperatures = [0.0, 0.1, 1.0] if args.task in CHECKS else [0.01] if args.task == "tldr" else []
    args.generations = args.generations or (1 if args.task == "tldr" else 3)
    if args.k and max(args.k) > args.generations:
        raise ValueError(f"--k {max(args.k)} is more than --generations {args.generations}")
    if args.task == "tldr" and args.temperatures:
        optional("rouge_score.rouge_scorer", "rouge-score")
    if args.math_verify:
        if args.task != "math":
            raise ValueError(f"--math-verify is for --task math, not {args.task}")
        optional("math_verify", "math-verify")
    begun = ("generations*", "exposure*", "recovery*")
    if not ddp.open_out(args, begun, "results.json", free=("batch_size",)):
        return
    tokenizer = ddp.load_tokenizer(args.model)
    examples, notes = data.load(args, tokenizer, args.split)
    for note in notes:
        ddp.print0(note)
    rows = data.load_rows(args.task, args.data, args.split, args.columns, args.limit)
    references = {row["id"]: row["response"] for row in rows}
    if args.task in CHECKS:
        silent = [i for i in examples["id"] if CHECKS[args.task][0](references[i]) is None]
        if len(silent) == len(examples):
            raise ValueError(f"no response of the data holds an answer as --task {args.task} writes it")
        if silent:
            ddp.print0(f"{len(silent)} references without an answer count as never reached, first: row {silent[0]}")

    model = ddp.model_of(args)
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
    results |= {} if args.x is None else {"x": args.x}
    ddp.barrier()
    if ddp.RANK == 0:
        ddp.write_json(Path(args.out) / "results.json", results)
    shown = ", ".join(f"{title(key)} {cell(key, (value, None))}" for key, value in metrics.items())
    ddp.print0(f"{args.name}, seed {args.seed}, {len(examples)} examples: {shown}")


# ---------------------------------------------------------------------------------------------- AlpacaEval
def alpaca(args: argparse.Namespace) -> None:
    """Writes the outputs file of the alpaca_eval package (Tables 2 and 4), which works out the win rates:
    a JSON list of {instruction, output, generator, dataset}, one for each instruction."""
    if not args.name.strip():
        raise ValueError("--name is empty: it is the generator in the leaderboard")
    args.task, args.columns = "ultrachat", f"prompt={args.instruction},response=output"
    ddp.init()
    out, begin = ddp.claim_file(args)
    tokenizer = ddp.load_tokenizer(args.model)
    examples, notes = data.load(args, tokenizer, args.split, need_response=False)
    rows = data.load_rows(args.task, args.data, args.split, args.columns, args.limit, need_response=False)
    if not all(isinstance(row["prompt"], str) for row in rows):
        raise ValueError(f"--data {args.data}: column {args.instruction!r} is list, not text; alpaca_eval has one turn")
    for note in notes:
        ddp.print0(note)
    if len(examples) < len(rows):
        raise ValueError(f"--data {args.data}: alpaca_eval needs an answer to each instruction; raise --max-prompt")
    model = ddp.model_of(args)
    longest = max(len(row["x"]) for row in examples) + args.max_response
    ddp.check_fits(model, longest, max(max(row["x"]) for row in examples), "instruction and answer")
    begin()

    def make(some: list[dict]) -> list[dict]:
        drawn = generate.generate(
            model, [row["x"] for row in some], ids=[row["id"] for row in some], max_new_tokens=args.max_response,
            eos_token_id=tokenizer.eos_token_id, temperature=args.temperature, seed=args.seed,
            batch_size=args.batch_size,
        )  # fmt: skip
        return [{"id": row["id"], "x": row["x"], "z": z} for row, (z,) in zip(some, drawn, strict=True)]

    made = ddp.offline(out.with_name(out.name + ".data"), make, examples, model, tokenizer)
    texts = {row["id"]: tokenizer.decode(row["z"], skip_special_tokens=True).strip() for row in made}
    if ddp.RANK == 0:
        ddp.write_json(out, [
            {"instruction": row["prompt"], "output": texts[row["id"]], "generator": args.name,
             "dataset": str(row.get("dataset", ""))} for row in rows
        ])  # fmt: skip
    ddp.print0(f"{len(rows)} outputs, {sum(not text for text in texts.values())} of them empty: {out}")


# ---------------------------------------------------------------------------------------------- while training
def watch(run: ddp.Run) -> Callable[[], dict[str, float]]:
    """For --eval-every: a function that measures the run's model on held-out rows, for log.jsonl.

    held_nll and held_gap in nats per token of y, as nll_y and exposure_gap; held_accuracy (greedy) or held_rougeL where
    the task has one. The rows are divided over the ranks."""
    args = run.args
    if args.data and not args.eval_data:
        raise ValueError("--eval-every needs --eval-data: held-out rows, as --data has its training rows from a file")
    flags = {name: value for name, value in vars(args).items() if name != "max_reference"}  # no f(x, y) is needed
    of = argparse.Namespace(**flags | {"data": args.eval_data, "limit": args.eval_rows})
    try:
        examples, _ = data.load(of, run.tokenizer, "test")
        rows = data.load_rows(args.task, of.data, "test", args.columns, of.limit)
    except (ValueError, OSError) as error:
        raise ValueError(f"--eval-every: {str(error).replace('--data', '--eval-data')}") from None
    references = {row["id"]: row["response"] for row in rows}
    spec = data.TASKS[args.task]
    new = (args.max_response or spec.max_response) if args.task in (*CHECKS, "tldr") else 0
    tokens = max(len(row["x"]) + max(len(row["y"]), new) for row in examples)
    ddp.check_fits(run.model, tokens, max(max(row["x"] + row["y"]) for row in examples), "--eval-data: x and y")
    name = {"tldr": "rougeL"}.get(args.task, "accuracy") if new else None
    if args.task == "tldr":
        optional("rouge_score.rouge_scorer", "rouge-score")
    mine = examples.to_list()[ddp.RANK :: ddp.WORLD]
    x, y, ids = ([row[key] for row in mine] for key in ("x", "y", "id"))
    size = {"ids": ids, "batch_size": getattr(args, "generation_batch_size", 64)}

    def score(z: list[int], reference: str) -> float:
        text = run.tokenizer.decode(z, skip_special_tokens=True)
        if args.task == "tldr":
            return rouge([[text]], [reference])["rougeL"]
        find, equal = CHECKS[args.task]
        return float(equal(find(text), find(reference)))

    def measure() -> dict[str, float]:
        end, drawn = run.tokenizer.eos_token_id, []
        with ddp.inference(run.model):
            g = generate.mix(run.model, x, y, beta=0.2, **size)  # Eq. 4; one beta for all stages, to compare
            on_y, on_g = (sum(nll(run.model, x, inputs, y, args.micro_batch_size)) for inputs in (y, g))
            if new:
                drawn = generate.generate(run.model, x, temperature=0, max_new_tokens=new, eos_token_id=end, **size)
        good = sum(score(z, references[i]) for i, (z,) in zip(ids, drawn)) if new else 0.0
        sums = torch.tensor([on_y, on_g, sum(map(len, y)), good, len(y)], dtype=torch.float64, device=run.device)
        on_y, on_g, n, good, count = ddp.all_sum(sums).tolist()
        return {"held_nll": on_y / n, "held_gap": (on_g - on_y) / n} | ({f"held_{name}": good / count} if name else {})

    return measure


# ---------------------------------------------------------------------------------------------- table
def percent(metric: str) -> bool:
    return metric.startswith(("accuracy", "recovery", "flexible", "pass@", "maj@", "rouge", "win_rate"))


def title(metric: str) -> str:
    """A column's head, as in the paper's tables where it has one."""
    if metric.startswith("accuracy_t"):
        return "Greedy (%)" if metric == "accuracy_t0" else f"Temperature = {metric[10:]} (%)"
    if found := re.fullmatch(r"(flexible|(?:pass|maj)@\d+|rouge[12L]|win_rate)_t([\d.e+-]+)", metric):
        name = found[1].replace("rouge", "ROUGE-").replace("_", " ").replace("flexible", "flexible match")
        return f"{name}, T = {found[2]} (%)"
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
    judges = {json.dumps(one["judge"], sort_keys=True): one["file"] for one in runs if "judge" in one}
    if len(judges) > 1:
        raise ValueError(f"{' and '.join(judges.values())}: win rates by different judges: not one table")
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


def numbers(text: str) -> list[int]:
    """An argparse type: "1,4" -> [1, 4]."""
    return [ddp.number(1, kind=int)(part) for part in text.split(",")]


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
    p.add_argument("--temperatures", type=temperatures, help="default 0,0.1,1 with answers to check; tldr: 0.01")
    p.add_argument("--generations", type=ddp.number(1, kind=int), help="a problem, above temperature 0 (3; tldr: 1)")
    p.add_argument("--k", type=numbers, help="also pass@k and maj@k in the table, for these k (e.g. 1,4)")
    p.add_argument("--math-verify", action="store_true", default=None, help="math: compare with that package")
    p.add_argument("--x", type=ddp.number(), help="where show.py puts this run in a plot, e.g. training examples")
    p.add_argument("--beta", type=ddp.number(0, 1), default=0.2, help="share of the model's own tokens in g (Eq. 4)")
    p.add_argument("--batch-size", type=ddp.number(1, kind=int), default=64, help="rows decoded at once by one rank")
    p = commands.add_parser("alpaca", help="the outputs file of the alpaca_eval package", allow_abbrev=False)
    ddp.model_flags(p)
    p.add_argument("--data", required=True, help="a .jsonl/.json/.parquet file (or hub set) of instructions")
    p.add_argument("--instruction", default="instruction", help="the column that holds them")
    p.add_argument("--split", choices=["train", "test"], default="test", help="of a hub set")
    p.add_argument("--name", required=True, help="the generator's name")
    p.add_argument("--out", required=True, help="the .json file")
    p.add_argument("--temperature", type=ddp.number(0), default=0.7, help="0 is greedy")
    p.add_argument("--seed", type=ddp.count, default=0, help="another seed is another generation")
    p.add_argument("--limit", type=ddp.count, default=0, help="use only the first N rows (0: all)")
    p.add_argument("--max-prompt", type=ddp.count, default=2048, help="tokens of the instruction in its template")
    p.add_argument("--max-response", type=ddp.number(1, kind=int), default=2048, help="tokens of the answer")
    p.add_argument("--batch-size", type=ddp.number(1, kind=int), default=64, help="rows decoded at once by one rank")
    p = commands.add_parser("table", help="Markdown and JSON from several runs", allow_abbrev=False)
    p.add_argument("results", nargs="+", help="results.json files, or the .json of an earlier table")
    p.add_argument("--baseline", help="the name to take differences to (default: sft-more, if it is there)")
    p.add_argument("--out", help="write OUT.md and OUT.json, too")
    args = parser.parse_args()
    {"run": run, "alpaca": alpaca, "table": table}[args.command](args)


if __name__ == "__main__":
    ddp.cli(main)
