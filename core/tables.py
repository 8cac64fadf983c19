"""The table of several runs: one row a method, mean ± standard error over seeds, and differences seed by seed.

    runs = read_results(["runs/eval/bash-1/results.json", ...])
    print(markdown(summarise(runs, baseline="sft-more")))
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from pathlib import Path

from core.rows import write_json


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


def percent(metric: str) -> bool:
    return metric.startswith(("accuracy", "recovery", "flexible", "pass@", "maj@", "bon@", "rouge", "win_rate"))


def title(metric: str) -> str:
    """A column's head, as in the paper's tables where it has one."""
    if metric.startswith("accuracy_t"):
        return "Greedy (%)" if metric == "accuracy_t0" else f"Temperature = {metric[10:]} (%)"
    if found := re.fullmatch(r"(flexible|(?:pass|maj|bon)@\d+|rouge[12L]|win_rate)_t([\d.e+-]+)", metric):
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
ALSO = ("dtype", "math_verify")  # ... and these, where a file has them


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
        except FileNotFoundError:
            told = "no such file; the --out of `evaluate.py run` has a results.json"
            raise FileNotFoundError(f"{path}: {told}") from None
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
        for key in (*SAME, *(key for key in ALSO if key in one and key in first)):
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

    drawn = any(key.startswith("accuracy") for key in columns)
    accuracies = f"Accuracies in percent (above temperature 0: of {run['generations']} generations), " if drawn else ""
    caption = (
        f"Task {run['task']}, {run['n']} test examples (set {run['test_set']}); mean ± standard error over seeds. "
        f"{accuracies}NLL in nats per token of y; g: the model's own mixed prefix of Eq. 4, β = {run['beta']:g}; Gap: "
        "the NLL given g less that given y."
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
        write_json(Path(f"{args.out}.json"), made)
