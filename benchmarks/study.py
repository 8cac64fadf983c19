"""When do BASH and RAC pay? The grid of runs on the toy task that docs/study.md stands on.

    OMP_NUM_THREADS=1 python benchmarks/study.py run                   # hours on two cores; called again, it goes on
    OMP_NUM_THREADS=1 python benchmarks/study.py run --only labels     # one factor (see FACTORS); --seeds 1 2: fewer
    OMP_NUM_THREADS=1 python benchmarks/study.py again                 # results/study/again.md: two cells once more
    python benchmarks/study.py report                                  # results/study/: tables and plots of the rows
    python benchmarks/study.py shares                                  # results/study/: implausible corrections

A run is a cell of the grid with a seed: a start (a training set, a base model, SFT) and a second stage, by the scripts
of this repository with the flags that the row shows, then evaluate.py on 300 test problems (greedy; one draw at
temperature 1; recovery; losses). Cells that settings are chosen from are also measured on 150 validation problems.
Odd seeds start from one base model, even ones from another. Each row of results/study/rows.jsonl is one run.

To save the seconds that importing torch takes, a stage is forked from this process, which has imported it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, load_from_disk
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import batches
import data
import evaluate
import generate  # noqa: F401
import rac
import rac_options
import sums
import toy
from core import (
    answers,  # noqa: F401, for the forked processes, as the next two
    flags,
    fsdp,
    ranks,
)
from core import rows as text_rows
from core.tables import mean_se, paired_difference
from tools import plots

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = toy.tokenizer()
ROWS = ROOT / "results" / "study" / "rows.jsonl"
TEST, VALID, SEEDS = 300, 150, [1, 2, 3, 4, 5]


# ---------------------------------------------------------------------------------------------- the grid
@dataclasses.dataclass(frozen=True)
class Start:
    """What the second stage starts from: `problems` of a kind, so many steps of SFT of a base model of this width.

    problems  twice      the toy task: after a wrong result the second sum can be put right from the context
              once       each sum is written once: to put it right takes the whole chain again, from the question
              arbitrary  written twice, results at random: a first result cannot be known, the second copies it
              easy       twice, with operands that the base has learnt: errors are slips of sampling
              apart      twice, each step from a number that the question gives: an error stays in its step
    replay    SFT keeps documents that read a reference, one for each two problems
    base      steps of the base model's training
    fresh     the second stage has as many problems of its own, which SFT has not seen
    """

    problems: str = "twice"
    n: int = 500
    sft_steps: int = 160
    width: int = 96
    replay: bool = False
    base: int = 900
    fresh: bool = False

    @property
    def second(self) -> str:
        """The second stage's problems."""
        return "second" if self.fresh else "train"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One setting. labels: of D_r, see `make_pairs` ("": the stage makes its own); temperature: of the draw of z."""

    method: str
    stage: str = ""
    flags: str = ""
    labels: str = ""
    temperature: float = 1.0
    lr: float = 1e-3
    steps: int = 96
    start: Start = Start()

    @property
    def key(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @property
    def name(self) -> str:
        extra = [f"lr{self.lr:g}"] * (self.lr != 1e-3) + [f"steps{self.steps}"] * (self.steps != 96)
        return "-".join([self.method, *extra])


def cells(start: Start = Start(), methods: str = "sft sft-more scs bash rac oracle", **settings: object) -> list[Cell]:
    """The plain methods from one start. oracle is RAC with the right labels, oracle-results with those after `=`."""
    known = {
        "sft": Cell("sft", steps=0),
        "sft-more": Cell("sft-more", "sft"),
        "sft-compute": Cell("sft-compute", "sft", steps=2 * 96 + 32),  # a joint step is two; drawing z, about one epoch
        "scs": Cell("scs", "scs"),
        "bash": Cell("bash", "bash"),
        "rac": Cell("rac", "rac", labels="current"),
        "oracle": Cell("oracle", "rac", labels="oracle"),
        "oracle-results": Cell("oracle-results", "rac", labels="results"),
    }
    return [dataclasses.replace(known[name], start=start, **settings) for name in methods.split()]


def labelled(names: str, start: Start = Start()) -> list[Cell]:
    """RAC from one start, each cell named for the labels that it learns (see `make_pairs`)."""
    return [Cell(name, "rac", labels=name, start=start) for name in names.split()]


SFT_MORE, SFT_COMPUTE = cells(methods="sft-more sft-compute")
PLAIN = "sft-more bash rac oracle-results"
ALL = "sft sft-compute " + PLAIN
LONGER = Start(base=3600)
APART = Start("apart", sft_steps=480)  # another form than the base's documents: it takes longer to learn
FACTORS = {  # in the order in which they run
    "methods": cells(methods="sft sft-more sft-compute scs bash rac oracle"),
    "labels": [Cell(f"results-{p:g}", "rac", labels=f"added-{p:g}-results") for p in (0.9, 0.75, 0.5)]
    + labelled("base teacher")
    + cells(Start(replay=True), "sft sft-compute sft-more rac"),
    "kept": [
        Cell("unmasked", "rac", "--unmasked", "current"),
        Cell("oracle-unmasked", "rac", "--unmasked", "oracle"),
        Cell("first", "rac", "--first-correction-only", "current"),
        Cell("oracle-first", "rac", "--first-correction-only", "oracle"),
        *cells(methods="oracle-results"),
        Cell("results", "rac", labels="current-results"),
        *labelled("oracle-plausible-0.1 oracle-plausible-0.01 oracle-plausible-0.001"),
        *labelled("plausible-0.1 plausible-0.01 plausible-0.001"),
        *labelled("sure-0.9 sure-0.9-plausible-0.001 base-plausible-0.001"),
        Cell("soft", "rac", "--labels topk"),
        Cell("soft-reverse", "rac", "--labels topk --kl reverse"),
        *labelled("teacher-plausible-0.001"),
        *labelled("plausible-0.001", Start(replay=True)),
    ],
    "base": cells(LONGER, ALL) + labelled("plausible-0.1 plausible-0.01 plausible-0.001", LONGER),
    "problems": [cell for kind in ("easy", "once", "arbitrary") for cell in cells(Start(kind), ALL)]
    + cells(APART, ALL + " oracle")
    + labelled("plausible-0.01", APART),
    "data": [cell for n in (125, 2000) for cell in cells(Start(n=n), ALL)],
    "saturation": cells(Start(sft_steps=640), ALL) + cells(Start(sft_steps=640, fresh=True), ALL),
    "beta": [Cell(f"bash-beta{b:g}", "bash", f"--beta {b:g}") for b in (0.5, 1)]
    + [Cell("bash-T0.5", "bash", "--temperature 0.5"), Cell("oracle-T0", "rac", labels="oracle", temperature=0)],
    "lr": cells(methods=PLAIN, lr=3e-4),
    "weight": [
        Cell("bash-alone", "bash", "--sft-weight 0"),
        Cell("oracle-alone", "rac", "--sft-weight 0", "oracle"),
    ],
    "length": cells(methods=PLAIN, steps=32),
    "iterations": [
        Cell("bash-4", "bash", "--iterations 4", steps=96 // 4),
        Cell("rac-4", "rac", "--iterations 4", steps=96 // 4),
        Cell("rac-4-start", "rac", "--iterations 4 --labels-from start", steps=96 // 4),
        Cell("rac-4-plausible-0.01", "rac", "--iterations 4 --plausible 0.01", steps=96 // 4),
        Cell("bash-refresh", "bash", f"--refresh-every {96 // 4}"),
        Cell("rac-refresh", "rac", f"--refresh-every {96 // 4}"),
    ],
    "preferences": [
        Cell(f"{m}-beta{b:g}", m, f"--beta {b:g}", lr=lr)
        for m in ("spin", "dpo")
        for lr in (1e-4, 1e-3)
        for b in (0.1, 1)
    ],
    "size": cells(Start(width=48), ALL + " scs oracle") + labelled("plausible-0.1 plausible-0.01", Start(width=48)),
}
AGAIN = cells(methods="sft-more oracle-results")
CHOSEN_FROM = {cell.key for cells in FACTORS.values() for cell in cells if cell.start == Start()}


# ---------------------------------------------------------------------------------------------- one run
def base_of(out: Path, start: Start, seed: int) -> Path:
    return out / "-".join(["base", str(start.width), *[str(start.base)] * (start.base != Start.base), "BA"[seed % 2]])


def teacher_of(cell: Cell) -> Start:
    """The start whose base model gives the labels `base` and `teacher`."""
    return dataclasses.replace(cell.start, base=LONGER.base) if "teacher" in cell.labels else cell.start


def home_of(out: Path, start: Start, seed: int) -> Path:
    parts = [start.problems, f"n{start.n}", f"sft{start.sft_steps}", f"w{start.width}", *["replay"] * start.replay]
    parts += [f"base{start.base}"] * (start.base != Start.base) + ["fresh"] * start.fresh
    return out / "-".join(parts) / f"seed-{seed}"


def stage_flags(home: Path, seed: int, split: str = "train") -> str:
    """The flags that all stages share."""
    data_flags = f"--task toy --data {home}/data/{split}.jsonl --seed {seed}"
    return f"{data_flags} --batch-size 16 --micro-batch-size 16 --warmup 0.1"


def script(words: str, log: Path) -> Callable[[], None]:
    """A command of this repository, to be called in a process of its own."""

    def call() -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.argv = words.split()
        sys.argv[0] = str(ROOT / sys.argv[0])
        runpy.run_path(sys.argv[0], run_name="__main__")

    return call


def make_data(folder: Path, start: Start, seed: int) -> None:
    """train, valid and test, disjoint by prompt; only train depends on the seed. And, for the second stage, second."""
    settings = {"operands": (2, 9) if start.problems == "easy" else (2, 15), "arbitrary": start.problems == "arbitrary"}
    partial_folder, seen = folder.with_name("data.partial"), set()
    trained = [(split, start.n, f"{split} {seed}") for split in dict.fromkeys(("train", start.second))]
    partial_folder.mkdir(parents=True, exist_ok=True)
    for split, n, key in (("test", TEST, "test"), ("valid", VALID, "valid"), *trained):
        rows = sums.problems(n, key, exclude=seen, **settings)
        seen |= {row["prompt"] for row in rows}
        if start.problems == "once":
            rows = [row | {"response": re.sub(r" , again [^.]*(?= \.)", "", row["response"])} for row in rows]
        if start.problems == "apart":
            rows = [apart(row) for row in rows]
        (partial_folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial_folder.rename(folder)


def apart(row: dict) -> dict:
    """`second amy gives 9` becomes `second amy has 31 , gives 9`, with a number at random."""
    rng, x, y = random.Random(row["prompt"]), row["prompt"], row["response"]
    for ordinal, verb, b, sign in re.findall(r"(\w+) (\w+) (\d+) : \d+ ([+-])", y):
        a = rng.choice([n for n in range(sums.TOP + 1) if 0 <= sums.add(n, sign, b) <= sums.TOP])
        result = sums.add(a, sign, b)
        x = re.sub(rf"({ordinal} \w+) {verb}", rf"\1 has {a} , {verb}", x)
        total = f"{a} {sign} {b} = {result}"
        y = re.sub(rf"({ordinal} {verb} {b} :) [^.]*", rf"\1 {total} , again {total} ", y)
    return row | {"prompt": x, "response": re.sub(r"#### \d+", f"#### {result}", y)}


def ids_of(text: str) -> list[int]:
    return [toy.IDS[word] for word in text.split()]


def make_replay(folder: Path, train: Path, seed: int) -> None:
    """A D_s for bash.py: the training problems as they are, and reference documents (input z, target its labels)."""
    rows = text_rows.read(str(train))
    made = [{"x": ids_of(row["prompt"]), "y": ids_of(row["response"] + " <eos>")} for row in rows]
    made = [row | {"y_hat": row["y"]} for row in made]
    rng = random.Random(f"replay {seed}")
    while len(made) < 1.5 * len(rows):
        tokens, targets = toy.document("reference", 4, rng)
        first = next(j for j, target in enumerate(targets) if target != -100)  # the last token of f(x, y)
        if -100 not in targets[first:]:
            made.append(
                {"x": tokens[: first + 1], "y": targets[first:], "y_hat": [*tokens[first + 1 :], toy.IDS["<eos>"]]}
            )
    partial_folder = folder.with_name("replay.partial")
    Dataset.from_list([{"id": i} | row for i, row in enumerate(made)]).save_to_disk(partial_folder)
    partial_folder.rename(folder)


def columns(rows: list[dict], *names: str) -> list[list]:
    return [[row[name] for row in rows] for name in names]


def make_pairs(folder: Path, drawn: Path, labels: str, base: Path, seed: int, problems: str) -> None:
    """A D_r with other labels on the same z. labels: whose, or whose-which, or which (current).

    current    those of the model that drew z: the paper's
    base       the base model's, before any fine-tuning           teacher   those of a base model trained for longer
    oracle     the right ones (for arbitrary problems, y's token at the same place)
    added-P    the right ones, and wrong ones where z is right, at random: of the numbers that differ, P are right
    and of those that differ from z, all, or only (z_bar = z elsewhere):
    results      the ones after `=` (of the right ones, unless it says current-results)
    sure-P       where the model that is shown the reference gives them at least P
    plausible-P  where the model that drew z, not shown the reference, gives them at least P
    """
    said = dict(re.findall(r"([a-z]+)-?([0-9.]*)", labels))  # {"oracle": "", "plausible": "0.01"}
    whose = next((name for name in said if name in ("current", "base", "teacher", "oracle", "added")), "current")
    whose = "oracle" if labels == "results" else whose
    rows, rng = [dict(row) for row in load_from_disk(str(drawn / "D_r_1"))], random.Random(f"labels {seed}")
    if whose in ("base", "teacher"):
        texts = ({"x": " ".join(toy.to_words(row["x"])), "y": " ".join(toy.to_words(row["y"])[:-1])} for row in rows)
        f = [ids_of(data.TOY_REFERENCE.format(**text)) for text in texts]
        model = fsdp.load_model(str(base), "float32")
        with fsdp.inference(model):
            found = rac.rac_labels(model, f, *columns(rows, "z"), 64)
        rows = [row | {"z_bar": z_bar} for row, z_bar in zip(rows, found, strict=True)]
    elif whose in ("oracle", "added"):
        for row in rows:
            same_place = row["y"] if len(row["y"]) == len(row["z"]) else row["z"]
            row["z_bar"] = same_place if problems == "arbitrary" else sums.right_labels(TOKENIZER, row["y"], row["z"])
    if whose == "added":
        numbers = [toy.IDS[word] for word in toy.NUMBERS]
        places = [(row, j) for row in rows for j, z in enumerate(row["z"]) if z in numbers]
        if "results" in said:
            places = [(row, j) for row, j in places if row["z"][j - 1] == toy.IDS["="]]
        right = sum(row["z"][j] != row["z_bar"][j] for row, j in places)
        places = [(row, j) for row, j in places if row["z"][j] == row["z_bar"][j]]
        p = float(said["added"])
        for row, j in rng.sample(places, round(right * (1 - p) / p)):
            row["z_bar"][j] = rng.choice([number for number in numbers if number != row["z"][j]])
    kept = []  # by each filter
    if "results" in said:
        kept.append([[False, *(z == toy.IDS["="] for z in row["z"][:-1])] for row in rows])
    if "sure" in said:
        kept.append([[logp[0] >= math.log(float(said["sure"])) for logp in row["top_logp"]] for row in rows])
    for i, row in enumerate(rows):
        for keep in kept:
            row["z_bar"] = [label if k else z for label, k, z in zip(row["z_bar"], keep[i], row["z"], strict=True)]
    if "plausible" in said:
        model, x, z, z_bar = fsdp.load_model(str(drawn.parent / "sft"), "float32"), *columns(rows, "x", "z", "z_bar")
        with fsdp.inference(model):
            found = rac_options.plausible_labels(model, x, z, z_bar, float(said["plausible"]), 64)
        rows = [row | {"z_bar": z_bar} for row, z_bar in zip(rows, found, strict=True)]
    made = folder.with_name(folder.name + ".partial")
    Dataset.from_list([{k: row[k] for k in ("id", "x", "y", "z", "z_bar")} for row in rows]).save_to_disk(made)
    made.rename(folder)


def make_preferences(path: Path, drawn: Path) -> None:
    rows = toy.preferences(dict(row) for row in load_from_disk(str(drawn / "D_r_1")))
    made = path.with_name(path.name + ".partial")
    made.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made.rename(path)


def start_job(out: Path, start: Start, seed: int) -> Iterator[Callable[[], None]]:
    """Data, SFT, and z of the SFT model with its labels."""
    home = home_of(out, start, seed)
    flags = stage_flags(home, seed)
    if not (home / "data").exists():
        yield partial(make_data, home / "data", start, seed)
    if not (home / "sft" / "config.json").exists():
        sft = f"--model {base_of(out, start, seed)} {flags} --lr 7e-4 --max-steps {start.sft_steps} --out {home}/sft"
        if start.replay:
            if not (home / "replay").exists():
                yield partial(make_replay, home / "replay", home / "data" / "train.jsonl", seed)
            yield script(f"bash.py {sft} --epochs 999 --sft-weight 0 --pairs {home}/replay", home / "log")
        else:
            yield script(f"sft.py {sft} --epochs 999", home / "log")
    if not (home / "z-1" / "config.json").exists():
        made = f"--epochs 0 --labels topk --topk 1 --out {home}/z-1"
        yield script(f"rac.py --model {home}/sft {stage_flags(home, seed, start.second)} {made}", home / "log")


def cell_job(out: Path, cell: Cell, seed: int) -> Iterator[Callable[[], None]]:
    """The second stage and its measurement; the row is left in the cell's folder."""
    home = home_of(out, cell.start, seed)
    folder, log = home / cell.name, home / f"{cell.name}.log"
    flags = stage_flags(home, seed, cell.start.second)
    if cell.stage:
        words = f"{cell.stage}.py --model {home}/sft {flags} --lr {cell.lr} --epochs 999 --max-steps {cell.steps} "
        words += cell.flags
        if cell.labels:
            pairs = home / f"{cell.name}-pairs"
            drawn = home / f"z-{cell.temperature:g}"
            if cell.temperature != 1:
                made = f"--epochs 0 --labels topk --topk 1 --temperature {cell.temperature} --out {drawn}"
                yield script(f"rac.py --model {home}/sft {flags} {made}", log)
            if not pairs.exists():
                base = base_of(out, teacher_of(cell), seed)
                yield partial(make_pairs, pairs, drawn, cell.labels, base, seed, cell.start.problems)
            words += f" --pairs {pairs}"
        if cell.stage == "dpo":
            preferences = home / "preferences.jsonl"
            if not preferences.exists():
                yield partial(make_preferences, preferences, home / "z-1")
            words += f" --data {preferences}"
        yield script(f"{words} --out {folder}", log)
    model = folder if cell.stage else home / "sft"
    test = f"evaluate.py run --model {model} --task toy --split test --name {cell.name} --seed {seed} --generations 1"
    yield script(f"{test} --data {home}/data/test.jsonl --temperatures 0,1 --out {folder}/test", log)
    if cell.key in CHOSEN_FROM:
        yield script(f"{test} --data {home}/data/valid.jsonl --temperatures 0 --out {folder}/valid", log)
    yield partial(measure, out, cell, seed, model)


def measure(out: Path, cell: Cell, seed: int, model: Path) -> None:
    """The row of one run, from what its evaluation left."""
    home = home_of(out, cell.start, seed)
    folder = home / cell.name
    metrics = json.loads((folder / "test" / "results.json").read_text())["metrics"]
    row = {"cell": dataclasses.asdict(cell), "name": cell.name, "seed": seed, "base": "BA"[seed % 2]} | metrics
    if (folder / "valid" / "results.json").exists():
        row["valid"] = json.loads((folder / "valid" / "results.json").read_text())["metrics"]["accuracy_t0"]
    made = folder / "D_r_1.json"
    row["labels"] = json.loads(made.read_text()) if made.exists() and cell.start.problems != "arbitrary" else None
    greedy, drawn = (load_from_disk(str(folder / "test" / f"generations-t{t}")) for t in (0, 1))
    repeats = [found for texts in greedy["text"] for text in texts if (found := copied(text.split())) is not None]
    row["copied"] = sum(repeats) / len(repeats) if repeats else None
    problems = text_rows.read(str(home / "data" / "test.jsonl"))
    row["distance"] = distance(drawn, problems)
    row["nll"] = nll_by_kind(model, problems)
    text_rows.write_json(folder / "row.json", row)


def copied(words: list[str]) -> float | None:
    """Of the sums of an answer that are written twice, the share whose second result repeats the first."""
    ends = [j for j in range(8, len(words) - 1) if words[j] == "=" and words[j - 4] == "again" and words[j - 7] == "="]
    return sum(words[j + 1] == words[j - 6] for j in ends) / len(ends) if ends else None


def distance(drawn: Dataset, problems: list[dict]) -> float:
    """1 - ROUGE-L of the draws and y: how far the model's own answers are from the reference (cf. Fig. 2)."""
    return 1 - evaluate.rouge(drawn["text"], [problems[i]["response"] for i in drawn["id"]])["rougeL"]


def nll_by_kind(model: Path, rows: list[dict]) -> dict[str, float]:
    """Nats per response given the reference's own prefix, by what the token is: they add up to the whole."""
    net, totals = fsdp.load_model(str(model), "float32"), dict.fromkeys(("first", "again", "number", "word"), 0.0)
    for i in range(0, len(rows), 64):
        x = [ids_of(row["prompt"]) for row in rows[i : i + 64]]
        y = [ids_of(row["response"] + " <eos>") for row in rows[i : i + 64]]
        with fsdp.inference(net), torch.no_grad():
            logp = batches.response_logits(net, batches.batch(x, y)).log_softmax(-1)
        for b, ids in enumerate(y):
            words = toy.to_words(ids)
            for j, word in enumerate(words):
                result = j > 4 and words[j - 1] == "=" and ("again" if words[j - 5] == "again" else "first")
                kind = result or ("number" if word in toy.NUMBERS else "word")
                totals[kind] -= float(logp[b, j, ids[j]]) / len(rows)
    return totals


# ---------------------------------------------------------------------------------------------- many runs
def schedule(jobs: list[tuple[str, Iterator[Callable[[], None]], Callable[[], None]]], at_once: int, title: str) -> int:
    """Runs the steps of each job in turn, each step in a forked process. Returns how many jobs failed."""
    waiting, running, failed = list(jobs), {}, 0

    def go_on(name: str, steps: Iterator, then: Callable[[], None]) -> None:
        step = next(steps, None)
        if step is None:
            then()
            bar.update()
        elif not (child := os.fork()):
            code = 1
            try:
                step()
                code = 0
            except SystemExit as stop:
                code = int(bool(stop.code))
            except BaseException as error:  # noqa: BLE001, a child must never go on as its parent
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        else:
            running[child] = (name, steps, then)

    with tqdm(total=len(jobs), desc=title) as bar:
        while waiting or running:
            while waiting and len(running) < at_once:
                go_on(*waiting.pop(0))
            if running:
                child, status = os.wait()
                name, steps, then = running.pop(child)
                if status:
                    bar.write(f"{name} failed", file=sys.stderr)
                    failed += 1
                    bar.update()
                else:
                    go_on(name, steps, then)
    return failed


def read_rows(path: Path = ROWS) -> dict[tuple[str, int], dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    starts = [Start(**row["cell"]["start"]) for row in rows]  # a field that came later has its default in older rows
    return {(Cell(**row["cell"] | {"start": s}).key, row["seed"]): row for s, row in zip(starts, rows, strict=True)}


def run(cells: list[Cell], seeds: list[int], out: Path, at_once: int, path: Path = ROWS) -> None:
    """Adds to the rows the runs that are not among them."""
    tqdm.monitor_interval = 0  # no thread in a process that forks
    out, done = out.resolve(), read_rows(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    todo = list(dict.fromkeys((cell, seed) for cell in cells for seed in seeds if (cell.key, seed) not in done))

    def keep(cell: Cell, seed: int) -> None:
        row = json.loads((home_of(out, cell.start, seed) / cell.name / "row.json").read_text())
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")

    bases = {}
    for start, seed in [(start, seed) for cell, seed in todo for start in (cell.start, teacher_of(cell))]:
        folder, words = base_of(out, start, seed), f"--steps {start.base} --width {start.width} --seed {1 - seed % 2}"
        if not folder.exists():
            make = script(f"toy.py base {words} --out {folder}", folder.with_suffix(".log"))
            bases[folder] = (folder.name, iter([make]), lambda: None)
    failed = schedule(list(bases.values()), at_once, "base models") if bases else 0
    for start in dict.fromkeys(cell.start for cell, _ in todo):
        title = f"{start.problems}, n {start.n}"
        runs = [(cell, seed) for cell, seed in todo if cell.start == start]
        starts = dict.fromkeys(seed for _, seed in runs)
        jobs = [(f"start {start}, seed {seed}", start_job(out, start, seed), lambda: None) for seed in starts]
        failed += schedule(jobs, at_once, f"starts: {title}")
        jobs = [(f"{c.name}, seed {s}", cell_job(out, c, s), partial(keep, c, s)) for c, s in runs]
        failed += schedule(jobs, at_once, f"runs: {title}")
    if failed:
        raise ValueError(f"{failed} jobs failed; their logs are in {out}. The same command tries them again")


# ---------------------------------------------------------------------------------------------- the report
METRICS = {  # column: key of a row, factor
    "Greedy (%)": ("accuracy_t0", 100),
    "T = 1 (%)": ("accuracy_t1", 100),
    "Restated (%)": ("recovery_restated", 100),
    "Final (%)": ("recovery_final", 100),
    "NLL given y": ("nll_y", 1),
    "Copied (%)": ("copied", 100),
    "Distance (%)": ("distance", 100),
}
OUTCOMES = ("Greedy (%)", "T = 1 (%)", "Restated (%)", "Final (%)")

PLOTS = {
    "labels": ("methods", "labels", "kept", "base"),
    "starts": ("problems", "data", "saturation", "size"),
    "settings": ("beta", "lr", "weight", "length", "iterations", "preferences"),
}


def control(cell: Cell, rows: dict[str, dict[int, dict]]) -> str:
    """The key of sft-more with the same start, learning rate and number of steps."""
    h = int(found.group(1)) if (found := re.search(r"--iterations (\d+)", cell.flags)) else 1
    same = dataclasses.replace(SFT_MORE, start=cell.start, lr=cell.lr, steps=cell.steps * h)
    return same.key if same.key in rows else dataclasses.replace(SFT_MORE, start=cell.start).key


def values(rows: dict[int, dict], metric: str) -> dict[int, float]:
    """{seed: value} of one column."""
    key, factor = METRICS[metric]
    return {seed: row[key] * factor for seed, row in rows.items() if row.get(key) is not None}


def plus_minus(mean: float, se: float | None, metric: str, sign: str = "") -> str:
    places = 4 if metric.startswith("NLL") else 1
    return f"{mean:{sign}.{places}f}" + ("" if se is None else f" ± {se:.{places}f}")


def table(cells: list[Cell], rows: dict[str, dict[int, dict]]) -> str:
    """Mean ± s.e. over seeds, and in brackets the paired difference to sft-more (see `control`)."""
    head = ["Start", "Cell", "Label precision (%)", "Validation (%)", *METRICS, "Seeds"]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    for cell in cells:
        if cell.key not in rows:
            continue
        mine, label = rows[cell.key], start_label(cell.start)
        quality = [row["labels"]["precision"] for row in mine.values() if (row["labels"] or {}).get("precision")]
        valid = [100 * row["valid"] for row in mine.values() if "valid" in row]
        out = [label, cell.name, f"{100 * sum(quality) / len(quality):.1f}" if quality else ""]
        out.append(f"{sum(valid) / len(valid):.1f}" if valid else "")
        for metric in METRICS:
            got = values(mine, metric)
            text = plus_minus(*mean_se(list(got.values())), metric) if got else ""
            base = values(rows.get(control(cell, rows), {}), metric)
            if got.keys() & base.keys() and control(cell, rows) != cell.key:
                mean, se, _ = paired_difference(got, base)
                text += f" ({plus_minus(mean, se, metric, '+')})"
            out.append(text)
        lines.append("| " + " | ".join([*out, str(len(mine))]) + " |")
    return "\n".join(lines)


def start_label(start: Start) -> str:
    label = f"{start.problems}, {start.n}, {start.sft_steps} steps, d {start.width}" + ", replay" * start.replay
    return label + f", base {start.base}" * (start.base != Start.base) + ", other problems" * start.fresh


def compute_table(rows: dict[str, dict[int, dict]]) -> str:
    """The methods less SFT of equal compute from the same start, paired; learning rate and steps of that SFT."""
    lines = ["| Start | Cell | " + " | ".join(OUTCOMES) + " |", "| --- | --- |" + " ---: |" * len(OUTCOMES)]
    for cell in dict.fromkeys(cell for cells in FACTORS.values() for cell in cells):
        control = dataclasses.replace(SFT_COMPUTE, start=cell.start).key
        if (
            cell.stage not in ("scs", "bash", "rac")
            or (cell.lr, cell.steps) != (Cell.lr, Cell.steps)
            or not rows.keys() >= {cell.key, control}
        ):
            continue
        out = [start_label(cell.start), cell.name]
        for metric in OUTCOMES:
            mean, se, _ = paired_difference(values(rows[cell.key], metric), values(rows[control], metric))
            out.append(plus_minus(mean, se, metric, "+"))
        lines.append("| " + " | ".join(out) + " |")
    return "\n".join(lines)


def chosen_table(rows: dict[str, dict[int, dict]]) -> str:
    """Of each method the setting with the best validation accuracy; its test outcomes, less those of the SFT so chosen.
    Iterations, weights, labels and filters are settings too. Labels from the answers (oracle) are a method apart."""
    settings: dict[str, list[Cell]] = {}
    for cell in dict.fromkeys(cell for cells in FACTORS.values() for cell in cells):
        if cell.key in CHOSEN_FROM & rows.keys() and cell.stage and not cell.labels.startswith("added"):
            name = {"sft": cell.method, "rac": "rac, right labels" if of_oracle(cell) else "rac"}.get(
                cell.stage, cell.stage
            )
            settings.setdefault(name, []).append(cell)

    def valid(cell: Cell) -> float:
        return sum(row["valid"] for row in rows[cell.key].values()) / len(rows[cell.key])

    best = {name: max(tried, key=valid) for name, tried in settings.items()}
    head = ["Method", "Settings", "Chosen", "Validation (%)", *OUTCOMES]
    lines = ["| " + " | ".join(head) + " |", "| --- | ---: | --- |" + " ---: |" * (len(head) - 3)]
    for name, cell in best.items():
        out = [name, str(len(settings[name])), cell.name, f"{100 * valid(cell):.1f}"]
        for metric in OUTCOMES:
            got = values(rows[cell.key], metric)
            difference = paired_difference(got, values(rows[best["sft-more"].key], metric))
            out.append(f"{plus_minus(*mean_se(list(got.values())), metric)}")
            out[-1] += f" ({plus_minus(*difference[:2], metric, '+')})" * (name != "sft-more")
        lines.append("| " + " | ".join(out) + " |")
    return "\n".join(lines)


def of_oracle(cell: Cell) -> bool:
    """Some or all of the labels are from the answers."""
    return cell.labels.startswith(("oracle", "results", "added"))


def by_cell(path: Path = ROWS) -> dict[str, dict[int, dict]]:
    rows: dict[str, dict[int, dict]] = {}
    for (key, seed), row in read_rows(path).items():
        rows.setdefault(key, {})[seed] = row
    return rows


def label_of(cell: Cell) -> str:
    start = cell.start
    parts = [start.problems] * (start.problems != "twice") + [f"{start.n} problems"] * (start.n != 500)
    parts += [f"{start.sft_steps} steps of SFT"] * (start.sft_steps != 160)
    parts += [f"width {start.width}"] * (start.width != 96) + ["longer base"] * (start.base != Start.base)
    parts += ["other problems"] * start.fresh
    return ", ".join([cell.name, *parts, *["replay"] * start.replay])


def plot(path: Path, factors: tuple[str, ...], rows: dict[str, dict[int, dict]]) -> None:
    """Each cell less its sft-more, with s.e., a column for each metric, a block for each factor."""
    pyplot = plots.pyplot()
    blocks = [[c for c in FACTORS[f] if c.key in rows and control(c, rows) in rows.keys() - {c.key}] for f in factors]
    names, places, at = [], {}, 0.0
    for block in blocks:
        for cell in block:
            if cell.method != "sft":
                places[cell] = at
                names.append((at, label_of(cell)))
                at += 1
        at += 0.7
    figure, axes = pyplot.subplots(1, len(OUTCOMES), figsize=(11, 0.8 + 0.24 * at), sharey=True, layout="constrained")
    for axis, metric in zip(axes, OUTCOMES, strict=True):
        for cell, place in places.items():
            got, base = values(rows[cell.key], metric), values(rows[control(cell, rows)], metric)
            mean, se, _ = paired_difference(got, base)
            colour = {"sft": "0.4", "scs": "C4", "bash": "C2"}.get(cell.stage, "C1" if of_oracle(cell) else "C0")
            axis.errorbar(mean, place, xerr=se or 0, fmt="o", ms=4, color=colour, capsize=2)
        axis.axvline(0, color="0.7", lw=1, zorder=0)
        axis.set_title(f"{metric.removesuffix(' (%)')}, points over sft-more", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", color="0.93")
    axes[0].set_yticks([place for place, _ in names], [name for _, name in names])
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def tables(rows: dict[str, dict[int, dict]]) -> str:
    text = "# The rows of the study, by factor\n\nMean ± s.e. over seeds; in brackets less sft-more of the same start, "
    text += "learning rate, number of steps and seed. Made by `python benchmarks/study.py report`.\n"
    for factor, cells in FACTORS.items():
        if any(cell.key in rows for cell in cells):
            text += f"\n## {factor}\n\n{table(cells, rows)}\n"
    text += f"\n## Less SFT of equal compute (sft-compute of the same start)\n\n{compute_table(rows)}\n"
    return text + f"\n## Settings chosen on the validation problems, standard start\n\n{chosen_table(rows)}\n"


def report() -> None:
    """Writes results/study/tables.md and the plots."""
    rows = by_cell()
    text = tables(rows)
    (ROWS.parent / "tables.md").write_text(text)
    for name, factors in PLOTS.items():
        plot(ROWS.parent / f"{name}.png", factors, rows)
    print(text)


def shares(out: Path) -> None:
    """Writes results/study/implausible.json: of each start that is there, for each seed, the share of the corrections,
    by its own labels and by the right ones, to which the model, not shown the reference, gives less than
    rac_options.IMPLAUSIBLE; measured on rac_options.SAMPLE rows."""
    found: dict[str, dict[str, list[float]]] = {}
    folders = sorted(path.parent for path in out.glob("*/seed-*/z-1/config.json"))
    if not folders:
        raise ValueError(f"--out {out}: no starts in it; `study.py run` makes them")
    for folder in tqdm(folders):
        rows = load_from_disk(str(folder / "D_r_1"))
        rows = [rows[i] for i in range(0, len(rows), math.ceil(len(rows) / rac_options.SAMPLE))]
        x, y, z, own = columns(rows, "x", "y", "z", "z_bar")
        model, start = fsdp.load_model(str(folder.parent / "sft"), "float32"), folder.parent.parent.name
        labels = {"own": own}
        if not start.startswith("arbitrary"):  # where the right labels are not the oracle's
            labels["right"] = [sums.right_labels(TOKENIZER, *pair) for pair in zip(y, z, strict=True)]
        for whose, z_bar in labels.items():
            with fsdp.inference(model):
                n, plausible = rac_options.count_plausible(model, x, z, z_bar, 64)
            found.setdefault(start, {}).setdefault(whose, []).append(round(1 - plausible / max(n, 1), 4))
    text_rows.write_json(ROWS.parent / "implausible.json", found)


def again(out: Path, at_once: int) -> None:
    """Two cells anew, their base models and starts too, beside the rows that stand: writes results/study/again.md."""
    seeds = SEEDS[:2]  # one of each base model
    run(AGAIN, seeds, out, at_once, out / "rows.jsonl")
    old, new = by_cell(), by_cell(out / "rows.jsonl")
    pairs = [(old[cell.key][seed], new[cell.key][seed]) for cell in AGAIN for seed in seeds]
    same = sum(all(a[key] == b[key] for key, _ in METRICS.values()) for a, b in pairs)
    text = "# Two cells, run once more from nothing\n\nMade by `python benchmarks/study.py again`. "
    text += f"{same} of {len(pairs)} rows came out the same in every digit of the columns below.\n"
    for title, rows in (("The rows of the study", old), ("Once more", new)):
        some = {cell.key: {seed: rows[cell.key][seed] for seed in seeds} for cell in AGAIN}
        text += f"\n## {title}\n\n{table(AGAIN, some)}\n"
    (ROWS.parent / "again.md").write_text(text)
    print(text)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    names = ("run", "again", "report", "shares")
    p, q, _, r = (commands.add_parser(name, allow_abbrev=False) for name in names)
    p.add_argument("--only", nargs="+", choices=list(FACTORS), default=list(FACTORS))
    p.add_argument("--seeds", nargs="+", type=flags.count, default=SEEDS)
    for command in (p, q):
        command.add_argument("--jobs", type=flags.number(1, kind=int), default=os.cpu_count() or 1, help="at a time")
    for command, folder in ((p, "out/study"), (q, "out/study-again"), (r, "out/study")):
        command.add_argument("--out", type=Path, default=folder, help="folder of models and logs, some hundred MB")
    args = parser.parse_args()
    if args.command == "run":
        run([cell for factor in args.only for cell in FACTORS[factor]], args.seeds, args.out, args.jobs)
    elif args.command == "again":
        again(args.out, args.jobs)
    elif args.command == "report":
        report()
    else:
        shares(args.out)


if __name__ == "__main__":
    ranks.cli(main)
