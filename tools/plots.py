"""Training curves, metrics over data size or epochs, sentence distances (Figs. 2 to 4), pass@k over k: `python
tools/show.py plots`, `distance`, `pass-at-k`."""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np

from core.answers import optional
from core.ranks import first_line, print0
from core.rows import ids_of, read, write_json
from core.tables import SAME, mean_se, percent, read_results, title

# ---------------------------------------------------------------------------------------------- plots
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKS = "os^Dvx*P<>"
NOT_DRAWN = ("phase", "step", "tokens", "seconds")


@functools.cache
def pyplot():
    """matplotlib without a display, colours that differ in lightness, and files that are the same each time."""
    optional("matplotlib", "matplotlib").use("Agg")
    plt = optional("matplotlib.pyplot", "matplotlib")
    greys = ["#000000", "#0072b2", "#d55e00", "#56b4e9", "#e69f00"]
    plt.rcParams.update({"svg.hashsalt": "show.py", "axes.prop_cycle": plt.cycler(color=greys), "axes.grid": True})
    plt.rcParams.update({"grid.alpha": 0.3, "font.size": 9, "svg.fonttype": "none", "text.parse_math": False})
    return plt


def save(figure, out: Path, name: str) -> None:
    """OUT/name.png and OUT/name.svg."""
    out.mkdir(parents=True, exist_ok=True)
    for kind, about in (("png", {"Software": None}), ("svg", {"Date": None})):
        figure.savefig(out / f"{name}.{kind}", dpi=150, metadata=about)
    pyplot().close(figure)
    print0(f"{out / name}.png and .svg")


def how(i: int) -> dict:
    """The i-th line: told apart without colour by its dashes and marks."""
    return {"linestyle": LINES[i % len(LINES)], "marker": MARKS[i % len(MARKS)], "color": f"C{i % 5}", "markersize": 4}


def log_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{quantity: [(step of the whole run, value)]} of a run's log.jsonl. Raises ValueError naming file and line."""
    path, curves = folder / "log.jsonl", {}
    rows = read(str(path))
    if not rows:
        raise ValueError(f"{path}: no steps")
    for number, row in enumerate(rows, 1):
        row.pop("samples", None)  # texts
        bad = [name for name, value in row.items() if isinstance(value, bool) or not isinstance(value, int | float)]
        if bad or "loss" not in row:
            raise ValueError(f"{path}, line {number}: {f'{bad[0]} is not a number' if bad else 'no loss'}")
        if row.get("seconds"):
            row["tokens/s"] = row.get("tokens", 0) / row["seconds"]
        for name, value in row.items():
            if name not in NOT_DRAWN:
                curves.setdefault(name, []).append((number, value))
    return curves


def thinned(points: list[tuple[int, float]], most: int = 200) -> tuple[list[float], list[float]]:
    """At most `most` points: means of as many stretches of like length."""
    size = math.ceil(len(points) / most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return tuple([statistics.fmean(one[k] for one in group) for group in groups] for k in (0, 1))


def training(runs: dict[str, dict], out: Path) -> None:
    """A panel for each quantity, a line for each run."""
    plt = pyplot()
    last = ["grad_norm", "lr", "tokens/s"]
    every = list(dict.fromkeys(name for curves in runs.values() for name in curves))
    held = [name for name in every if name.startswith("held_")]
    names = [name for name in every if name not in last + held] + last + held
    names = [name for name in names if name in every]
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.6 * columns, 2.6 * lines + 0.5), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for name, axis in zip(names, axes.flat):
        for i, (run, curves) in enumerate(runs.items()):
            if name in curves:
                x, y = thinned(curves[name])
                axis.plot(x, y, label=run, markevery=max(1, len(x) // 6), **how(i))
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True)
    handles = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="upper center", ncols=4)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / (2.6 * lines + 0.5) * math.ceil(len(handles) / 4)))
    save(figure, out, "training")


def over_x(runs: list[dict], metric: str) -> dict[str, list[tuple[float, float, float | None]]]:
    """{name: [(x, mean, standard error over seeds)]}, in order of x."""
    found: dict[str, dict[float, dict[int, float]]] = {}
    for one in runs:
        if metric in one["metrics"]:
            seeds = found.setdefault(one["name"], {}).setdefault(one["x"], {})
            if one["seed"] in seeds:
                raise ValueError(f"{one['file']}: a second {one['name']}, seed {one['seed']}, at x = {one['x']:g}")
            seeds[one["seed"]] = one["metrics"][metric]
    return {
        name: [(x, *mean_se(list(seeds.values()))) for x, seeds in sorted(places.items())]
        for name, places in found.items()
    }


def check_same(runs: list[dict]) -> None:
    """Raises ValueError where runs do not belong in one plot."""
    for one in runs:
        for key in SAME:
            if one[key] != runs[0][key]:
                first = f"{runs[0]['file']} has {runs[0][key]}"
                raise ValueError(f"{one['file']} has {key} {one[key]}, {first}: not one plot")


def metrics_over_x(runs: list[dict], args: argparse.Namespace) -> None:
    """A figure for each metric, a line for each name (Figs. 3 and 4)."""
    plt = pyplot()
    for one in runs:
        if isinstance(one.get("x"), bool) or not isinstance(one.get("x"), int | float):
            raise ValueError(f"{one['file']} has no x; `evaluate.py run --x NUMBER` says where a run stands in a plot")
    check_same(runs)
    every = list(dict.fromkeys(key for one in runs for key in one["metrics"]))
    if args.log_x and min(one["x"] for one in runs) <= 0:
        raise ValueError("--log-x needs every x above 0")
    if args.metric and args.metric not in every:
        raise ValueError(f"--metric {args.metric}: no such metric; there are {', '.join(every)}")
    for metric in [args.metric] if args.metric else every:
        figure, axis = plt.subplots(figsize=(5, 3.5))
        scale = 100 if percent(metric) else 1
        for i, (name, points) in enumerate(over_x(runs, metric).items()):
            x, y = ([point[k] for point in points] for k in (0, 1))
            error = [scale * (point[2] or 0) for point in points]
            axis.errorbar(x, [scale * value for value in y], error, label=name, capsize=3, **how(i))
        if args.log_x:
            places = sorted({one["x"] for one in runs})
            axis.set_xscale("log")
            axis.set_xticks(places, [f"{x:g}" for x in places])
            axis.minorticks_off()
        axis.set_xlabel(args.x_label)
        axis.set_ylabel(title(metric))
        axis.legend()
        figure.tight_layout()
        save(figure, Path(args.out), metric.replace("@", "-at-"))


def pass_at_k(args: argparse.Namespace) -> None:
    """pass@k over k, a line a name, the mean ± standard error over seeds."""
    runs, key = read_results(args.results), f"t{args.temperature:g}"
    check_same(runs)
    points = []
    for one in runs:
        found = one.get("details", {}).get(key, {}).get("pass@k")
        if not found:
            raise ValueError(f"{one['file']}: no pass@k at {key}: `evaluate.py run` needs --generations for it")
        points += [{**one, "x": int(k), "metrics": {"pass@k": value}} for k, value in found.items()]
    figure, axis = pyplot().subplots(figsize=(5, 3.5))
    for i, (name, line) in enumerate(over_x(points, "pass@k").items()):
        k, mean, error = zip(*line, strict=True)
        axis.errorbar(k, [100 * v for v in mean], [100 * (v or 0) for v in error], label=name, capsize=3, **how(i))
    axis.set_xscale("log", base=2)
    ticks = sorted({one["x"] for one in points})
    axis.set_xticks(ticks, [str(k) for k in ticks])
    axis.minorticks_off()
    axis.set_xlabel("k")
    axis.set_ylabel(f"pass@k, T = {args.temperature:g} (%)")
    axis.legend()
    figure.tight_layout()
    save(figure, Path(args.out), "pass-at-k")


def plots(args: argparse.Namespace) -> None:
    """Curves of the folders that hold a log.jsonl, and metrics over x of the results.json files."""
    runs, results = {}, []
    for path in map(Path, args.runs):
        if path.is_dir() and (path / "log.jsonl").exists():
            name = path.resolve().name
            runs[name if name not in runs else str(path)] = log_of(path)
        elif path.is_dir():
            if not (path / "results.json").exists():
                raise ValueError(f"{path}: neither a log.jsonl nor a results.json is in it")
            results.append(str(path / "results.json"))
        else:
            results.append(str(path))
    runs_over_x = read_results(results)
    if args.metric and not runs_over_x:
        raise ValueError("--metric chooses a metric of results.json files, and none was given")
    pyplot()
    if runs:
        training(runs, Path(args.out))
    if runs_over_x:
        metrics_over_x(runs_over_x, args)


# ---------------------------------------------------------------------------------------------- sentence distance
Embed = Callable[[list[str]], np.ndarray]  # texts -> [N, d]


def sentence_transformer(name: str) -> Embed:
    """The embedder that --embedder names. Raises ValueError where package or model is missing."""
    package = optional("sentence_transformers", "sentence-transformers")
    try:
        return package.SentenceTransformer(name).encode
    except Exception as error:
        raise ValueError(f"--embedder {name}: could not be loaded ({first_line(error)})") from None


def distances(rows: list[dict], embed: Embed) -> list[list[float]]:
    """1 - cosine similarity of each response to its row's reference, row by row."""
    texts = [text for row in rows for text in (row["reference"], *row["responses"])]
    vectors = np.asarray(embed(texts), dtype=np.float64)
    if len(vectors) != len(texts) or vectors.ndim != 2:
        raise ValueError(f"the embedder made {vectors.shape} of {len(texts)} texts")
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    found, at = [], 0
    for row in rows:
        n = len(row["responses"])
        found.append((1 - vectors[at + 1 : at + 1 + n] @ vectors[at]).tolist())
        at += 1 + n
    return found


def responses(path: str, wanted: list[int]) -> list[dict]:
    """Rows of a file of `generate.py`, checked; `wanted`: their ids, or none for all."""
    rows = read(path)
    for i, row in enumerate(rows):
        texts = row.get("responses")
        if not (isinstance(texts, list) and len(texts) > 1 and all(isinstance(text, str) for text in texts)):
            raise ValueError(f"{path}, row {i}: responses must be a list of two texts or more (generate.py --n 256)")
        if not isinstance(row.get("reference"), str) or not row["reference"].strip():
            raise ValueError(f"{path}, row {i}: no reference")
    by_id = dict(zip(ids_of(rows, path), rows, strict=True))
    missing = [i for i in wanted if i not in by_id]
    if missing or not rows:
        raise ValueError(f"{path}: no row {missing[0]} (--rows)" if missing else f"{path}: no rows")
    return [{**by_id[i], "id": i} for i in wanted or by_id]


def violins(groups: dict[str, list[list[float]]], titles: list[str], out: Path) -> None:
    """Fig. 2: a panel for each query, a violin for each file; inside a box from minimum to maximum, median in white."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(titles), figsize=(max(3, 0.9 * len(groups)) * len(titles), 3.2), squeeze=False)
    for k, axis in enumerate(axes[0]):
        values = [found[k] for found in groups.values()]
        for shape, hatch in zip(axis.violinplot(values, showextrema=False)["bodies"], ("", "//", "..", "xx", "--") * 9):
            shape.set(facecolor="0.8", edgecolor="0.2", alpha=1, hatch=hatch)
        axis.boxplot(
            values, whis=(0, 100), widths=0.12, patch_artist=True, boxprops={"facecolor": "0.2"},
            medianprops={"color": "white", "linewidth": 2},
        )  # fmt: skip
        axis.set_xticks(range(1, len(groups) + 1), groups)
        axis.set_title(titles[k])
    axes[0][0].set_ylabel("distance to the reference")
    figure.tight_layout()
    save(figure, out, "distance")


def distance(args: argparse.Namespace, embed: Embed | None = None) -> None:
    """Distances of all responses, as distance.json and as violins. embed: instead of --embedder."""
    read = {}
    for given in args.files:
        # a file may have a = in its name or folder
        name, path = given.split("=", 1) if "=" in given and not Path(given).exists() else ("", given)
        name = name or Path(path).stem
        if name in read:
            raise ValueError(f"{given}: a second file of the name {name}; give NAME=FILE")
        read[name] = responses(path, args.rows)
    first, *others = read.items()
    for name, rows in others:
        if [(row["id"], row["reference"]) for row in rows] != [(row["id"], row["reference"]) for row in first[1]]:
            raise ValueError(f"{first[0]} and {name}: not the same rows and references")
    pyplot()
    embed = embed or sentence_transformer(args.embedder)
    groups = {name: distances(rows, embed) for name, rows in read.items()}
    ids, out = [row["id"] for row in first[1]], Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    medians = {name: [statistics.median(values) for values in found] for name, found in groups.items()}
    name = Path(args.embedder).name if Path(args.embedder).is_dir() else args.embedder
    write_json(out / "distance.json", {"embedder": name, "rows": ids, "medians": medians, "distances": groups})
    if len(ids) > 8:
        print0(f"{len(ids)} queries; the first 8 are drawn (--rows chooses), {out / 'distance.json'} has all")
    drawn = {name: found[:8] for name, found in groups.items()}
    violins(drawn, [f"query {i}" for i in ids[:8]], out)
