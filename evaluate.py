"""Every number of the tables: accuracy, ROUGE, exposure (the training-inference gap), recovery; and the table itself.

    torchrun --nproc-per-node 8 evaluate.py run --model runs/bash --task gsm8k --out runs/eval/bash --name bash
    python evaluate.py run --model runs/bash-1 --task toy --data runs/data/test.jsonl --out runs/eval/bash-1 \
        --name bash --seed 1
    torchrun --nproc-per-node 8 evaluate.py alpaca --model runs/bash --data alpaca_eval.json --name bash --out bash.json
    python evaluate.py best-of runs/eval/bash --scores scores.jsonl --temperature 1
    python evaluate.py table runs/eval/*/results.json --baseline sft-more --out results/toy

`run` writes OUT/results.json and, to look at, `datasets` folders with what the model wrote: OUT/generations-t0 (-t0.1,
...), OUT/exposure, OUT/recovery. Interrupted, the same command goes on where it stopped. Its metrics:

    accuracy_t0, accuracy_t0.1   share of right answers (Table 3), at temperature 0 and as the mean of --generations
                                 independent generations at others. toy, sums, gsm8k: strict; math: the last \\boxed{}
    flexible_t0, ...             gsm8k: the last number in the text counts, as lm-evaluation-harness's flexible-extract
    pass@K_tT, maj@K_tT          for --k K: is one of K right (unbiased); is the most frequent answer of the first K
    rouge1_tT, rouge2_, rougeL_  tldr: F1 by Google's rouge-score, no stemming (Tables 1 and 7). Its tokeniser knows a-z
                                 and 0-9 alone: references of other letters are counted, said and left out
    win_rate_tT                  tldr: by tools/judge.py, share of its verdicts that prefer the model to the reference
    nll_y, nll_g, exposure_gap   nats per token of y given (x, y^{<j}); given (x, g^{<j}), g the model's mixed prefix of
                                 Eq. 4; the second less the first
    recovery_restated, _final    toy, sums: a wrong result is forced on the model; does it restate the right one, and
                                 is its final answer right (greedy)
    train_seconds                from the model's log.jsonl and D_s or D_r: the stage that made it, not those before

`best-of` adds bon@K_tT: of K generations, is the one with a verifier's highest score right (unbiased)? The file has
{"id", "sample", "score"} for each of OUT/generations-tT, whose samples count from 0.

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
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

import data
import folders
import generate
import sums
from batches import by_token, nll_by_token
from core.answers import (
    best_of_k,
    gsm8k_answer,
    gsm8k_flexible,
    math_answer,
    math_equal,
    math_verified,
    of_several,
    optional,
    same,
)
from core.answers import pass_at_k as pass_at_k  # for those who look for it here
from core.chat import ends, response_text
from core.flags import count, data_flags, group, model_flags, new_parser, number, positive
from core.fsdp import check_fits, load_tokenizer, model_of
from core.ranks import RANK, barrier, cli, fold_in, init, print0
from core.rows import read, read_scores, write_json
from core.tables import cell, table, title
from data import Dataset
from folders import claim_file, open_out

CHECKS = {  # task: (the answer in a text, are two answers the same)
    "toy": (sums.answer, same),
    "sums": (sums.answer, same),
    "gsm8k": (gsm8k_answer, same),
    "math": (math_answer, math_equal),
}


# ---------------------------------------------------------------------------------------------- what a model does
def nll(
    model: torch.nn.Module, x: list[list[int]], inputs: list[list[int]], targets: list[list[int]], batch_size: int = 8
) -> list[float]:
    """-sum_j log p(target^j | x, input^{<j}) of each row, in nats. Lists of token ids, an input as long as its target.

    inputs = targets = y is the teacher-forced NLL; inputs = g, targets = y scores y behind the model's own tokens.
    """
    if any(len(a) != len(b) for a, b in zip(inputs, targets, strict=True)):
        raise ValueError("inputs and targets must be of the same length, row by row")
    sums = [0.0] * len(x)
    for i, (row,) in by_token(model, x, inputs, nll_by_token, targets, batch_size=batch_size):
        sums[i] = row.double().sum().item()
    return sums


def accuracy(args, model, tokenizer, examples: Dataset, references: dict[int, str], t: float) -> tuple[dict, dict]:
    """({accuracy_tT: ...}, details) at temperature t; no metric for tasks whose responses have no answer to check."""

    def draw(rows: dict, each: Callable[[int, list], None]) -> list:
        return generate.generate(
            model, rows["x"], ids=rows["id"], each=each,
            max_new_tokens=args.max_response, eos_token_id=ends(tokenizer), temperature=t,
            n=args.generations if t else 1, seed=fold_in(args.seed, t), batch_size=args.batch_size,
        )  # fmt: skip

    def make(rows: list[dict]) -> list[dict]:
        return [row | {"text": [response_text(tokenizer, z) for z in row["z"]]} for row in rows]

    rows = folders.offline(Path(args.out) / f"generations-t{t:g}", make, examples, model, tokenizer, z=draw)
    every = [z for samples in rows["z"] for z in samples]
    details = {
        "tokens": statistics.fmean(map(len, every)),
        "without_eos": statistics.fmean(not z or z[-1] not in ends(tokenizer) for z in every),
    }
    if args.task == "tldr":
        details["empty"] = statistics.fmean(not text.strip() for texts in rows["text"] for text in texts)
        true, every = [references[i] for i in rows["id"]], [text for texts in rows["text"] for text in texts]
        details["unread_references"] = hardly_read("references", true, "they are left out")
        details["unread_texts"] = hardly_read(f"texts at T = {t:g}", every, "they score 0, or nearly")
        found = rouge(rows["text"], true)
        return {f"{key}_t{t:g}": value for key, value in found.items()}, details
    if args.task not in CHECKS:
        return {}, details
    equal, true, answers, right = checked(args, rows, references)
    shares = [statistics.fmean(column) for column in zip(*right, strict=True)]
    details |= {"accuracy": shares, "sd_over_generations": statistics.pstdev(shares)}
    details["without_answer"] = statistics.fmean(a is None for some in answers for a in some)
    metrics = {f"accuracy_t{t:g}": statistics.fmean(shares)}
    if args.task == "gsm8k":
        loose = [[same(gsm8k_flexible(text), b) for text in texts] for texts, b in zip(rows["text"], true)]
        metrics[f"flexible_t{t:g}"] = statistics.fmean(good for goods in loose for good in goods)
    if (n := len(shares)) > 1:
        ks = sorted({*(2**i for i in range(n.bit_length())), n, *(args.k or [])})
        several = {k: of_several(answers, right, equal, k) for k in ks}
        details["pass@k"], details["maj@k"] = ({k: several[k][key] for k in ks} for key in ("pass", "maj"))
        details["best_of_n"] = several[n]["pass"]  # the answer checker finds the right one where there is one
        metrics |= {f"{key}@{k}_t{t:g}": several[k][key] for k in args.k or [] for key in ("pass", "maj")}
    return metrics, details


def checked(args: argparse.Namespace, rows: Dataset, references: dict[int, str]) -> tuple:
    """When two answers are the same, the right ones, those of each row's texts, and whether these are right."""
    find, equal = CHECKS[args.task]
    equal = math_verified if args.math_verify else equal
    true = [find(references[i]) for i in rows["id"]]
    answers = [[find(text) for text in texts] for texts in rows["text"]]
    return equal, true, answers, [[equal(a, b) for a in some] for some, b in zip(answers, true, strict=True)]


def unread(text: str) -> bool:
    """Does ROUGE's tokeniser, which keeps a-z and 0-9 alone, lose all of a text or most letters, as of Chinese?"""
    letters, kept = sum(map(str.isalpha, text)), len(re.findall("[a-zA-Z]", text))
    return letters > 2 * kept or bool(text.strip() and not re.search("[a-zA-Z0-9]", text))


def hardly_read(what: str, texts: list[str], then: str) -> int:
    """How many of them are unread, said in one line."""
    if lost := sum(map(unread, texts)):
        print0(f"ROUGE's tokeniser knows a-z and 0-9 alone, and hardly reads {lost} of {len(texts)} {what}: {then}")
    return lost


def rouge(texts: list[list[str]], references: list[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L F1 by Google's rouge-score without stemming, in the mean; an empty text has 0.

    An unread reference is left out, for with it ROUGE is 0 whatever the text; {} where there is no other."""
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = optional("rouge_score.rouge_scorer", "rouge-score").RougeScorer(kinds, use_stemmer=False)
    pairs = [(some, true) for some, true in zip(texts, references, strict=True) if not unread(true)]
    found = [scorer.score(true, text) for some, true in pairs for text in some]
    return {kind: statistics.fmean(one[kind].fmeasure for one in found) for kind in kinds} if found else {}


def exposure(args, model, tokenizer, examples: Dataset) -> dict[str, float]:
    """nll_y, nll_g and exposure_gap, in nats per token of y."""

    def draw(rows: dict, each: Callable[[int, list], None]) -> list:
        size = {"ids": rows["id"], "batch_size": args.batch_size}
        return generate.mix(model, rows["x"], rows["y"], beta=args.beta, each=each, **size)  # Eq. 4

    def make(rows: list[dict]) -> list[dict]:
        ids, x, y, g = ([row[name] for row in rows] for name in ("id", "x", "y", "g"))
        on_y, on_g = (nll(model, x, inputs, y, min(8, args.batch_size)) for inputs in (y, g))
        if not math.isfinite(sum(on_y + on_g)):
            raise ValueError(f"--model {args.model}: the loss of rows {ids[0]} to {ids[-1]} is not finite")
        return [row | {"nll_y": a, "nll_g": b} for row, a, b in zip(rows, on_y, on_g, strict=True)]

    rows = folders.offline(Path(args.out) / "exposure", make, examples, model, tokenizer, g=draw)
    n = sum(map(len, rows["y"]))
    on_y, on_g = math.fsum(rows["nll_y"]) / n, math.fsum(rows["nll_g"]) / n
    return {"nll_y": on_y, "nll_g": on_g, "exposure_gap": on_g - on_y}


def recovery(args, model, tokenizer, examples: Dataset) -> dict[str, float]:
    """toy, sums: after a wrong result, the share of sums put right when repeated, and of right final answers."""
    end, n = ends(tokenizer), len(examples)
    examples = [row for row in examples if row["y"][-1] in end and sums.has_sum(sums.text_of(tokenizer, row["y"]))]
    if not examples:
        return {}
    if len(examples) < n:
        print0(f"recovery: of {len(examples)} of {n} rows; the others have no sum, or their y is cut")
    examples = [row | {"prefix": sums.inject_error(tokenizer, row["y"], row["id"])} for row in examples]

    def draw(rows: dict, each: Callable[[int, list], None]) -> list:
        drawn = generate.generate(
            model, [x + prefix for x, prefix in zip(rows["x"], rows["prefix"], strict=True)], temperature=0,
            max_new_tokens=args.max_response, eos_token_id=end, batch_size=args.batch_size,
            each=lambda i, samples: each(i, samples[0]),
        )  # fmt: skip
        return [samples[0] for samples in drawn]

    def make(rows: list[dict]) -> list[dict]:
        return [row | sums.recovery(tokenizer, row["y"], row["prefix"], row["z"]) for row in rows]

    rows = folders.offline(Path(args.out) / "recovery", make, examples, model, tokenizer, z=draw)
    return {f"recovery_{key}": statistics.fmean(rows[key]) for key in ("restated", "final")}


def hash_of(examples: Dataset) -> str:
    """SHA-256 of json.dumps([[id, x, y], ...]), row by row."""
    found = hashlib.sha256()
    for i, row in enumerate(examples):
        found.update((", " if i else "[").encode() + json.dumps([row["id"], row["x"], row["y"]]).encode())
    found.update(b"]")
    return found.hexdigest()


def train_seconds(folder: str) -> float | None:
    """Seconds of the stage that wrote a model folder: its steps, and the making of its D_s, D_r or D_bon, which may be
    that of --pairs."""
    log, flags = Path(folder) / "log.jsonl", Path(folder) / "args.json"
    if not log.exists():
        return None
    pairs = json.loads(flags.read_text()).get("pairs") if flags.exists() else None
    sources = [*Path(folder).glob("D_*/source.json"), *([Path(pairs, "source.json")] if pairs else [])]
    made = [json.loads(path.read_text()) for path in sources if path.exists()]
    return sum(row.get("seconds", 0) for row in read(str(log)) + made)


def run(args: argparse.Namespace) -> None:
    """Measures one model and writes OUT/results.json."""
    init()
    if not args.name.strip():
        raise ValueError("--name is empty: it is the row of the table")
    spec = data.TASKS[args.task]
    args.max_response = args.max_response or spec.max_response
    if args.temperatures is None:
        args.temperatures = [0.0, 0.1, 1.0] if args.task in CHECKS else [0.01] if args.task == "tldr" else []
    args.generations = args.generations or (1 if args.task == "tldr" else 3)
    if args.k and max(args.k) > args.generations:
        raise ValueError(f"--k {max(args.k)} is more than --generations {args.generations}")
    if args.k and (args.task not in CHECKS or args.generations == 1 or max(args.temperatures, default=0) == 0):
        raise ValueError("--k: pass@k is of several --generations above temperature 0 of a task with answers to check")
    if args.task == "tldr" and args.temperatures:
        optional("rouge_score.rouge_scorer", "rouge-score")
    if args.math_verify:
        if args.task != "math":
            raise ValueError(f"--math-verify is for --task math, not {args.task}")
        optional("math_verify", "math-verify")
    begun = ("generations*", "exposure*", "recovery*")
    if not open_out(args, begun, "results.json", free=("batch_size",)):
        return
    tokenizer = load_tokenizer(args.model)
    if args.task == "sums":
        sums.check_tokenizer(tokenizer)
    examples, notes = data.load(args, tokenizer, args.split)
    for note in notes:
        print0(note)
    rows = data.load_rows(args.task, args.data, args.split, args.columns, args.limit)
    references = {row["id"]: row["response"] for row in rows}
    if args.task in CHECKS:
        silent = [i for i in examples["id"] if CHECKS[args.task][0](references[i]) is None]
        if len(silent) == len(examples):
            how = r"\boxed{8}" if args.task == "math" else "#### 8"
            raise ValueError(f"no response of the data holds an answer as --task {args.task} writes it: {how}")
        if silent:
            print0(f"{len(silent)} references without an answer count as never reached, first: row {silent[0]}")

    model = model_of(args, tokenizer)
    tokens = max(len(row["x"]) + max(len(row["y"]), args.max_response * bool(args.temperatures)) for row in examples)
    if args.task in sums.TASKS:
        tokens = max(len(row["x"] + row["y"]) for row in examples) + args.max_response  # recovery begins inside of y
    check_fits(model, tokens, max(max(row["x"] + row["y"]) for row in examples), "prompt and response")
    test_set = hash_of(examples)
    metrics, details = {}, {}
    for t in args.temperatures:
        found, details[f"t{t:g}"] = accuracy(args, model, tokenizer, examples, references, t)
        metrics |= found
    if args.task in sums.TASKS:
        metrics |= recovery(args, model, tokenizer, examples)
    metrics |= exposure(args, model, tokenizer, examples)
    seconds = train_seconds(args.model)
    metrics |= {} if seconds is None else {"train_seconds": seconds}
    results = {
        "name": args.name, "seed": args.seed, "model": args.model, "task": args.task,
        "data": args.data or spec.hub[0], "split": args.split, "test_set": test_set[:16],
        "n": len(examples), "left_out": len(rows) - len(examples), "beta": args.beta, "generations": args.generations,
        "max_response": args.max_response, "dtype": args.dtype, "math_verify": bool(args.math_verify),
        "metrics": metrics, "details": details,
    }  # fmt: skip
    results |= {} if args.x is None else {"x": args.x}
    barrier()
    if RANK == 0:
        write_json(Path(args.out) / "results.json", results)
    shown = ", ".join(f"{title(key)} {cell(key, (value, None))}" for key, value in metrics.items())
    print0(f"{args.name}, seed {args.seed}, {len(examples)} examples: {shown}")


# ---------------------------------------------------------------------------------------------- best-of-N by a score
def best_of(args: argparse.Namespace) -> None:
    """Best-of-N where a verifier's scores select, into the results.json of a `run`: bon@K_tT, beside pass@K."""
    folder = Path(args.folder)
    generations = folder / f"generations-t{args.temperature:g}"
    if not (folder / "results.json").exists() or not generations.exists():
        raise ValueError(f"{folder}: no results.json and {generations.name} of `evaluate.py run` in it (--temperature)")
    from datasets import load_from_disk

    of, results = argparse.Namespace(**json.loads((folder / "args.json").read_text())), folder / "results.json"
    if of.task not in CHECKS:
        raise ValueError(f"{folder}: --task {of.task} has no checker of answers")
    rows, found = load_from_disk(str(generations)), json.loads(results.read_text())
    folders.check_unchanged(folder, vars(of))
    given = data.load_rows(of.task, of.data, of.split, of.columns, of.limit)
    references = {row["id"]: row["response"] for row in given}
    if missing := set(rows["id"]) - references.keys():
        raise ValueError(f"{folder}: --data {of.data} has no row {min(missing)} any more")
    scores = read_scores(f"--scores {args.scores}", args.scores, {row["id"]: len(row["z"]) for row in rows})
    n = len(rows[0]["z"])
    if args.k and max(args.k) > n:
        raise ValueError(f"--k {max(args.k)} is more than the {n} generations")
    right = dict(zip(rows["id"], checked(of, rows, references)[3], strict=True))
    ks = sorted({*(2**i for i in range(n.bit_length())), n, *(args.k or [])})
    values = {k: statistics.fmean(best_of_k(right[i], scores[i], k) for i in right) for k in ks}
    t = f"t{args.temperature:g}"
    kept = {name: value for name, value in found["metrics"].items() if not re.fullmatch(rf"bon@\d+_{t}", name)}
    found["metrics"] = kept | {f"bon@{k}_{t}": values[k] for k in args.k or [n]}  # of one file of scores
    by = {"scores": args.scores, "what it holds": folders.contents_of([Path(args.scores)])}
    found["details"][t] |= {"best_of_n_by_score": values, "best_of_n_scores": by}
    write_json(results, found)
    print0(f"{found['name']}: best of k by {args.scores}:", ", ".join(f"{k}: {v:.1%}" for k, v in values.items()))


# ---------------------------------------------------------------------------------------------- AlpacaEval
def alpaca(args: argparse.Namespace) -> None:
    """Writes the outputs file of the alpaca_eval package (Tables 2 and 4), which works out the win rates:
    a JSON list of {instruction, output, generator, dataset}, one for each instruction."""
    if not args.name.strip():
        raise ValueError("--name is empty: it is the generator in the leaderboard")
    args.task, args.columns = "ultrachat", f"prompt={args.instruction},response=output"
    init()
    out, begin = claim_file(args)
    tokenizer = load_tokenizer(args.model)
    examples, notes = data.load(args, tokenizer, args.split, need_response=False)
    rows = data.load_rows(args.task, args.data, args.split, args.columns, args.limit, need_response=False)
    if not all(isinstance(row["prompt"], str) for row in rows):
        raise ValueError(f"--data {args.data}: column {args.instruction!r} is list, not text; alpaca_eval has one turn")
    for note in notes:
        print0(note)
    if len(examples) < len(rows):
        raise ValueError(f"--data {args.data}: alpaca_eval needs an answer to each instruction; raise --max-prompt")
    model = model_of(args, tokenizer)
    longest = max(len(row["x"]) for row in examples) + args.max_response
    check_fits(model, longest, max(max(row["x"]) for row in examples), "instruction and answer")
    begin()

    def draw(rows: dict, each: Callable[[int, list], None]) -> list:
        drawn = generate.generate(
            model, rows["x"], ids=rows["id"], each=lambda i, samples: each(i, samples[0]),
            max_new_tokens=args.max_response, eos_token_id=ends(tokenizer), temperature=args.temperature,
            seed=args.seed, batch_size=args.batch_size,
        )  # fmt: skip
        return [samples[0] for samples in drawn]

    examples = examples.select_columns(["id", "x"])
    made = folders.offline(out.with_name(out.name + ".data"), None, examples, model, tokenizer, z=draw)
    texts = {row["id"]: response_text(tokenizer, row["z"]).strip() for row in made}
    if RANK == 0:
        write_json(out, [
            {"instruction": row["prompt"], "output": texts[row["id"]], "generator": args.name,
             "dataset": str(row.get("dataset", ""))} for row in rows
        ])  # fmt: skip
    print0(f"{len(rows)} outputs, {sum(not text for text in texts.values())} of them empty: {out}")


# ---------------------------------------------------------------------------------------------- the command
def temperatures(text: str) -> list[float]:
    """An argparse type: "0,0.1,1" -> [0.0, 0.1, 1.0]; "" is none."""
    return list(dict.fromkeys(number(0)(part) for part in filter(None, text.split(","))))


def numbers(text: str) -> list[int]:
    """An argparse type: "1,4" -> [1, 4]."""
    return [positive(part) for part in text.split(",")]


def main() -> None:
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("run", help="measure one model", allow_abbrev=False)
    data_flags(p, sorted(data.TASKS))
    group(p, "data").add_argument("--split", choices=["train", "test"], default="test", help="of a hub set")
    g = p.add_argument_group("what is measured")
    g.add_argument("--out", required=True, help="folder for results.json and what the model wrote")
    g.add_argument("--name", required=True, help="the method: the row of the table")
    g.add_argument("--seed", type=count, default=0, help="of the training run, and of the draws")
    g.add_argument("--temperatures", type=temperatures, help="default 0,0.1,1 with answers to check; tldr: 0.01")
    g.add_argument("--generations", type=positive, help="a problem, above temperature 0 (3; tldr: 1)")
    g.add_argument("--k", type=numbers, help="also pass@k and maj@k in the table, for these k (e.g. 1,4)")
    g.add_argument("--math-verify", action="store_true", default=None, help="math: compare with that package")
    g.add_argument("--beta", type=number(0, 1), default=0.2, help="share of the model's own tokens in g (Eq. 4)")
    g.add_argument("--x", type=number(), help="where tools/show.py puts this run in a plot, e.g. training examples")
    group(p, "machine").add_argument("--batch-size", type=positive, default=64, help="rows decoded at once by one rank")

    p = commands.add_parser("best-of", help="best-of-N by a verifier's scores", allow_abbrev=False)
    p.add_argument("folder", help="the --out of a `run`")
    p.add_argument("--scores", required=True, help="a .jsonl file: id, sample (from 0) and score of each generation")
    p.add_argument("--temperature", type=number(0), default=1.0, help="of the generations")
    p.add_argument("--k", type=numbers, help="best of so many in the table (default: of all)")

    p = commands.add_parser("alpaca", help="the outputs file of the alpaca_eval package", allow_abbrev=False)
    model_flags(p)
    g = p.add_argument_group("data")
    g.add_argument("--data", required=True, help="a .jsonl/.json/.parquet file (or hub set) of instructions")
    g.add_argument("--instruction", default="instruction", help="the column that holds them")
    g.add_argument("--split", choices=["train", "test"], default="test", help="of a hub set")
    g.add_argument("--limit", type=count, default=0, help="use only the first N rows (0: all)")
    g.add_argument("--max-prompt", type=count, default=2048, help="tokens of the instruction in its template")
    g.add_argument("--max-response", type=positive, default=2048, help="tokens of the answer")
    g = p.add_argument_group("what is written")
    g.add_argument("--name", required=True, help="the generator's name")
    g.add_argument("--out", required=True, help="the .json file")
    g.add_argument("--temperature", type=number(0), default=0.7, help="0 is greedy")
    g.add_argument("--seed", type=count, default=0, help="another seed is another generation")
    group(p, "machine").add_argument("--batch-size", type=positive, default=64, help="rows decoded at once by one rank")

    p = commands.add_parser("table", help="Markdown and JSON from several runs", allow_abbrev=False)
    p.add_argument("results", nargs="+", help="results.json files, or the .json of an earlier table")
    p.add_argument("--baseline", help="the name to take differences to (default: sft-more, if it is there)")
    p.add_argument("--out", help="write OUT.md and OUT.json, too")
    args = parser.parse_args()
    {"run": run, "best-of": best_of, "alpaca": alpaca, "table": table}[args.command](args)


if __name__ == "__main__":
    cli(main)
