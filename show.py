"""To look at: RAC's corrections as a page, training curves, accuracy over data or epochs, sentence distances.

    python show.py corrections runs/rac/D_r_1 --model runs/rac --out corrections.html      # Figs. 1, 5 and 6
    python show.py corrections runs/rac/D_r_1 --model runs/rac --terminal 5
    python show.py plots runs/sft runs/bash runs/rac --out plots                           # log.jsonl of each
    python show.py plots runs/eval/*/results.json --x-label "training examples" --out plots         # Figs. 3 and 4
    python show.py distance sft=z-sft.jsonl rac=z-rac.jsonl --out distance                 # Fig. 2

`corrections` marks each token of z that the label z_bar changes as [z→z_bar]. The page is one file that asks for
nothing over the network; what the model wrote is text in it, never markup (a content security policy forbids any other
script), and control characters are spelt out, here and in the terminal.

`plots` writes PNG and SVG: training.* has a panel for the loss, each of its terms, gradient norm, learning rate,
tokens/s and what --eval-every measured. From results.json files of `evaluate.py run --x NUMBER` (training examples,
epochs, ...) it draws each metric over x, a line a --name, the mean ± standard error over seeds.

`distance` reads what `generate.py --n 256 --temperature 1` wrote, embeds responses and references, and draws a violin
of 1 - cosine similarity for each query and file; the box inside shows minimum, quartiles, median and maximum. (The
paper does not say which distance and embedding it takes.)
"""

from __future__ import annotations

import argparse
import base64
import functools
import hashlib
import html
import math
import os
import statistics
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np

import data
import ddp_utils as ddp
import evaluate

# ---------------------------------------------------------------------------------------------- corrections
STYLE = """
:root { color-scheme: light dark; --back: #fff; --fore: #1a1a1a; --soft: #595959; --line: #c8c8c8; --box: #f5f5f5;
        --del: #8a1c1c; --del-back: #fbe3e3; --ins: #14532d; --ins-back: #dff3e4; }
@media (prefers-color-scheme: dark) { :root { --back: #161616; --fore: #ececec; --soft: #b0b0b0; --line: #4a4a4a;
        --box: #222; --del: #ffb4b4; --del-back: #4a1f1f; --ins: #a8efbd; --ins-back: #153d23; } }
body { background: var(--back); color: var(--fore); font: 16px/1.5 system-ui, sans-serif; max-width: 72rem;
       margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 0; }
h3 { font-size: .9rem; color: var(--soft); margin: .5rem 0 0; }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem; } dd { margin: 0; }
form { position: sticky; top: 0; background: var(--back); border-bottom: 1px solid var(--line); padding: .5rem 0; }
input { width: 5rem; font: inherit; } output { margin-left: 1rem; }
article { border-top: 1px solid var(--line); padding: .75rem 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
@media (max-width: 45rem) { .pair { grid-template-columns: 1fr; } }
.text { background: var(--box); padding: .5rem; margin: .25rem 0; white-space: pre-wrap; overflow-wrap: anywhere;
        unicode-bidi: isolate; font: 14px/1.6 ui-monospace, monospace; }
.c { white-space: pre-wrap; font-weight: bold; }
del { color: var(--del); background: var(--del-back); text-decoration: none; }
ins { color: var(--ins); background: var(--ins-back); text-decoration: underline; }
"""
SCRIPT = """
const rows = [...document.querySelectorAll('article')], low = document.getElementById('low');
const high = document.getElementById('high'), shown = document.getElementById('shown');
function filter() {
  let n = 0;
  for (const row of rows) {
    row.hidden = !(row.dataset.share >= Number(low.value) && row.dataset.share <= Number(high.value));
    n += !row.hidden;
  }
  shown.textContent = n + ' of ' + rows.length + ' rows shown';
}
function address() {
  const found = /^#([0-9.]+)-([0-9.]+)$/.exec(location.hash);
  if (found) { low.value = found[1]; high.value = found[2]; }
  filter();
}
low.addEventListener('input', filter);
high.addEventListener('input', filter);
addEventListener('hashchange', address);
address();
"""


def visible(text: str) -> str:
    """Text in which nothing acts: control characters (those of the terminal, too), reversals of the reading direction
    and lone surrogates are spelt out, as \\x1b or \\u202e. Newlines and tabs stay."""
    acts = {"Cc", "Cs", "Zl", "Zp"}
    turns = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A)), "\u200e", "\u200f", "\u061c"}
    return "".join(
        repr(c)[1:-1] if c not in "\n\t" and (unicodedata.category(c) in acts or c in turns) else c for c in text
    )


def piece(tokenizer, before: list[int], token: int) -> str:
    """What a token adds to the text before it; its name in the vocabulary where that is no whole character."""
    before = before[-6:]
    old, new = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (before, [*before, token]))
    if new.startswith(old) and not new.endswith("\ufffd"):
        return visible(new[len(old) :])
    return visible(f"⟨{tokenizer.convert_ids_to_tokens(token)}⟩")


def blank(text: str) -> str:
    """A token between brackets: blanks and emptiness are shown."""
    return (
        text.replace("\n", "⏎").replace("\t", "⇥")
        if text.strip()
        else {"": "∅"}.get(text) or (text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣"))
    )


def marked(tokenizer, z: list[int], z_bar: list[int]) -> list[tuple[str, str | None]]:
    """z in pieces: (text, None) of tokens that stay, (z^j, z_bar^j) where the label differs."""
    parts: list[tuple[str, str | None]] = []
    for j, (a, b) in enumerate(zip(z, z_bar, strict=True)):
        text = piece(tokenizer, z[:j], a)
        if a != b:
            label = piece(tokenizer, z[:j], b)
            if all(word[:1] == " " and word.strip() for word in (text, label)):  # their space goes before the mark
                text, label = text[1:], label[1:]
                parts.append((" ", None))
            parts.append((blank(text), blank(label)))
        elif parts and parts[-1][1] is None:
            parts[-1] = (parts[-1][0] + text, None)
        else:
            parts.append((text, None))
    return parts


def share(row: dict) -> float:
    """Tokens of z that are corrected, in percent."""
    return 100 * sum(a != b for a, b in zip(row["z"], row["z_bar"], strict=True)) / len(row["z"])


def counts(d_r) -> dict[str, str]:
    """What a D_r holds, in words."""
    tokens = sum(map(len, d_r["z"]))
    wrong = [sum(a != b for a, b in zip(*pair, strict=True)) for pair in zip(d_r["z"], d_r["z_bar"], strict=True)]
    equal = sum(y == z for y, z in zip(d_r["y"], d_r["z"], strict=True))
    return {
        "Rows": f"{len(wrong):,}",
        "Tokens of z": f"{tokens:,}",
        "Tokens corrected (z̄ ≠ z)": f"{sum(wrong):,} ({sum(wrong) / tokens:.1%})",
        "Rows without a correction": f"{wrong.count(0):,} ({wrong.count(0) / len(wrong):.1%})",
        "Rows where z is the reference": f"{equal:,} ({equal / len(wrong):.1%})",
    }


def page(title: str, numbers: dict[str, str], rows: list[dict], tokenizer) -> str:
    """The whole HTML page. Everything that is not written here goes through `safe`."""

    def safe(text: str) -> str:
        return html.escape(visible(text), quote=True)

    def body(parts: list[tuple[str, str | None]]) -> str:
        shown = []
        for a, b in parts:
            shown.append(
                safe(a) if b is None else f'<span class="c">[<del>{safe(a)}</del>→<ins>{safe(b)}</ins>]</span>'
            )
        return "".join(shown)

    def text(ids: list[int]) -> str:
        return safe(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def allow(code: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"

    articles = []
    for row in rows:
        percent, number = share(row), safe(str(row["id"]))
        wrong = sum(a != b for a, b in zip(row["z"], row["z_bar"], strict=True))
        articles.append(
            f'<article data-share="{percent:.4f}" aria-label="row {number}">\n'
            f"<h2>Row {number}: {wrong} of {len(row['z'])} tokens corrected ({percent:.1f} %)</h2>\n"
            f'<details><summary>Prompt x</summary><div class="text">{text(row["x"])}</div></details>\n'
            '<div class="pair">\n'
            f'<section><h3>The model\'s z, corrections as [z→z̄]</h3><div class="text">'
            f"{body(marked(tokenizer, row['z'], row['z_bar']))}</div></section>\n"
            f'<section><h3>The reference y</h3><div class="text">{text(row["y"])}</div></section>\n'
            "</div>\n</article>\n"
        )
    summary = "".join(f"<dt>{safe(name)}</dt><dd>{safe(value)}</dd>\n" for name, value in numbers.items())
    policy = (
        f"default-src 'none'; style-src {allow(STYLE)}; script-src {allow(SCRIPT)}; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{safe(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{safe(title)}</h1>\n"
        "<p>The model wrote z. Shown the reference y, it would have written z̄ after each beginning of z. A token that "
        'differs is marked <span class="c">[<del>z</del>→<ins>z̄</ins>]</span>: Eq. 7 trains on these alone. '
        "⏎ is a new line, ␣ a space.</p>\n"
        f"<dl>\n{summary}</dl>\n"
        '<form aria-label="filter"><label>Corrected from <input id="low" type="number" min="0" max="100" value="0"> %'
        '</label> <label>to <input id="high" type="number" min="0" max="100" value="100"> %</label>'
        f'<output id="shown" aria-live="polite">{len(rows)} of {len(rows)} rows shown</output></form>\n'
        f"{''.join(articles)}</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def coloured(parts: list[tuple[str, str | None]], colour: bool) -> str:
    """z for a terminal: [z→z_bar], red and underlined green where there is colour."""
    red, green, off = ("\x1b[31m", "\x1b[32;4m", "\x1b[0m") if colour else ("", "", "")
    return "".join(a if b is None else f"[{red}{a}{off}→{green}{b}{off}]" for a, b in parts)


def has_colour() -> bool:
    """A terminal that wants colour (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def corrections(args: argparse.Namespace) -> None:
    """The page and the terminal view of a D_r."""
    if not args.out and not args.terminal:
        raise ValueError("nothing to do: give --out PAGE.html, --terminal N or both")
    tokenizer = ddp.load_tokenizer(args.model)
    try:
        d_r = ddp.read_pairs(args.d_r, ("z", "z_bar"), tokenizer)
    except ValueError as error:
        raise ValueError(str(error).replace("--pairs ", "", 1)) from None
    numbers = counts(d_r)
    rows = [{"id": i, **row} for i, row in enumerate(d_r.select(range(min(len(d_r), max(args.limit, args.terminal)))))]
    if args.out:
        some = rows[: args.limit]
        numbers |= {"On this page": f"the first {len(some):,} rows (--limit)"} if len(some) < len(d_r) else {}
        text = page(f"Corrections in {'/'.join(Path(args.d_r).parts[-2:])}", numbers, some, tokenizer)
        try:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            Path(args.out).write_text(text, encoding="utf-8")
        except OSError as error:
            raise OSError(f"--out {args.out} cannot be written ({error.strerror})") from None
        ddp.print0(f"{len(some)} rows: {args.out}")
    if args.terminal:
        print(", ".join(f"{name}: {value}" for name, value in counts(d_r).items()))
    for row in rows[: args.terminal]:
        z = coloured(marked(tokenizer, row["z"], row["z_bar"]), has_colour())
        y = visible(tokenizer.decode(row["y"], clean_up_tokenization_spaces=False))
        print(f"\nrow {visible(str(row['id']))}, {share(row):.1f} % corrected\n  z: {z}\n  y: {y}")


# ---------------------------------------------------------------------------------------------- plots
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKS = "os^Dvx*P<>"
NOT_DRAWN = ("phase", "step", "tokens", "seconds")


@functools.cache
def pyplot():
    """matplotlib without a display, colours that differ in lightness, and files that are the same each time."""
    evaluate.optional("matplotlib", "matplotlib").use("Agg")
    plt = evaluate.optional("matplotlib.pyplot", "matplotlib")
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
    ddp.print0(f"{out / name}.png and .svg")


def how(i: int) -> dict:
    """The i-th line: told apart without colour by its dashes and marks."""
    return {"linestyle": LINES[i % len(LINES)], "marker": MARKS[i % len(MARKS)], "color": f"C{i % 5}", "markersize": 4}


def log_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{quantity: [(step of the whole run, value)]} of a run's log.jsonl. Raises ValueError naming file and line."""
    path, curves = folder / "log.jsonl", {}
    rows = data.read(str(path))
    if not rows:
        raise ValueError(f"{path}: no steps")
    for number, row in enumerate(rows, 1):
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
        name: [(x, *evaluate.mean_se(list(seeds.values()))) for x, seeds in sorted(places.items())]
        for name, places in found.items()
    }


def metrics_over_x(runs: list[dict], args: argparse.Namespace) -> None:
    """A figure for each metric, a line for each name (Figs. 3 and 4)."""
    first, plt = runs[0], pyplot()
    for one in runs:
        if isinstance(one.get("x"), bool) or not isinstance(one.get("x"), int | float):
            raise ValueError(f"{one['file']} has no x; `evaluate.py run --x NUMBER` says where a run stands in a plot")
        for key in evaluate.SAME:
            if one[key] != first[key]:
                raise ValueError(f"{one['file']} has {key} {one[key]}, {first['file']} has {first[key]}: not one plot")
    every = list(dict.fromkeys(key for one in runs for key in one["metrics"]))
    if args.log_x and min(one["x"] for one in runs) <= 0:
        raise ValueError("--log-x needs every x above 0")
    if args.metric and args.metric not in every:
        raise ValueError(f"--metric {args.metric}: no such metric; there are {', '.join(every)}")
    for metric in [args.metric] if args.metric else every:
        figure, axis = plt.subplots(figsize=(5, 3.5))
        scale = 100 if evaluate.percent(metric) else 1
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
        axis.set_ylabel(evaluate.title(metric))
        axis.legend()
        figure.tight_layout()
        save(figure, Path(args.out), metric.replace("@", "-at-"))


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
    runs_over_x = evaluate.read_results(results)
    pyplot()
    if runs:
        training(runs, Path(args.out))
    if runs_over_x:
        metrics_over_x(runs_over_x, args)


# ---------------------------------------------------------------------------------------------- sentence distance
Embed = Callable[[list[str]], np.ndarray]  # texts -> [N, d]


def sentence_transformer(name: str) -> Embed:
    """The embedder that --embedder names. Raises ValueError where package or model is missing."""
    package = evaluate.optional("sentence_transformers", "sentence-transformers")
    try:
        return package.SentenceTransformer(name).encode
    except Exception as error:
        raise ValueError(f"--embedder {name}: could not be loaded ({ddp.first_line(error)})") from None


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
    rows = data.read(path)
    for i, row in enumerate(rows):
        texts = row.get("responses")
        if not (isinstance(texts, list) and len(texts) > 1 and all(isinstance(text, str) for text in texts)):
            raise ValueError(f"{path}, row {i}: responses must be a list of two texts or more (generate.py --n 256)")
        if not isinstance(row.get("reference"), str) or not row["reference"].strip():
            raise ValueError(f"{path}, row {i}: no reference")
    by_id = {row.get("id", i): row for i, row in enumerate(rows)}
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
        name, _, path = given.rpartition("=")
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
    ddp.write_json(
        out / "distance.json", {"embedder": args.embedder, "rows": ids, "medians": medians, "distances": groups}
    )
    if len(ids) > 8:
        ddp.print0(f"{len(ids)} queries; the first 8 are drawn (--rows chooses), {out / 'distance.json'} has all")
    drawn = {name: found[:8] for name, found in groups.items()}
    violins(drawn, [f"query {i}" for i in ids[:8]], out)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("corrections", help="what RAC's labels change in z", allow_abbrev=False)
    p.add_argument("d_r", help="a D_r folder, as rac.py writes it")
    p.add_argument("--model", "--tokenizer", required=True, help="the folder whose tokenizer wrote it")
    p.add_argument("--out", help="the page, an .html file")
    p.add_argument("--limit", type=ddp.number(1, kind=int), default=200, help="rows on the page")
    p.add_argument("--terminal", type=ddp.count, default=0, help="print the first N rows")
    p = commands.add_parser("plots", help="training curves; metrics over data size or epochs", allow_abbrev=False)
    p.add_argument("runs", nargs="+", help="folders with a log.jsonl, or results.json files")
    p.add_argument("--out", required=True, help="a folder")
    p.add_argument("--metric", help="only this one of results.json")
    p.add_argument("--x-label", default="x", help="what --x of `evaluate.py run` is")
    p.add_argument("--log-x", action="store_true")
    p = commands.add_parser("distance", help="sentence distances to the reference", allow_abbrev=False)
    p.add_argument("files", nargs="+", help="NAME=FILE, files of `generate.py --n N`")
    p.add_argument("--out", required=True, help="a folder")
    p.add_argument("--embedder", default="sentence-transformers/all-mpnet-base-v2", help="of sentence-transformers")
    p.add_argument("--rows", type=lambda text: [ddp.count(part) for part in text.split(",")], default=[], help="ids")
    args = parser.parse_args()
    {"corrections": corrections, "plots": plots, "distance": distance}[args.command](args)


if __name__ == "__main__":
    ddp.cli(main)
