"""What RAC's labels change in z, on a page and in the terminal (Figs. 1, 5, 6): `python tools/show.py corrections`."""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import os
import random
import sys
import unicodedata
from pathlib import Path

from core.fsdp import load_tokenizer
from core.ranks import print0
from folders import read_pairs

SHEET = 50  # corrections on a sheet
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


def sheet(rows: list[dict], tokenizer) -> str:
    """A Markdown table of single corrections, one of each of SHEET rows at random, with a column to judge them in."""
    draw = random.Random(0)
    rows = [row for row in rows if row["z"] != row["z_bar"]]
    chosen = sorted(draw.sample(range(len(rows)), min(SHEET, len(rows))))

    def cell(text: str) -> str:
        return visible(text).replace("\n", "⏎").replace("|", "\\|")

    lines = ["| row | z so far | z → z̄ | reference | verdict |", "|---:|---|---|---|---|"]
    for row in (rows[i] for i in chosen):
        z, z_bar = row["z"], row["z_bar"]
        j = draw.choice([j for j in range(len(z)) if z[j] != z_bar[j]])
        before = "…" * (j > 30) + tokenizer.decode(z[max(0, j - 30) : j], clean_up_tokenization_spaces=False)
        own, label = (blank(piece(tokenizer, z[:j], token)) for token in (z[j], z_bar[j]))
        y = tokenizer.decode(row["y"], clean_up_tokenization_spaces=False)
        lines.append(f"| {row['id']} | {cell(before)} | {cell(own)} → {cell(label)} | {cell(y)} | |")
    return "\n".join(lines) + "\n"


def write(flag: str, path: str, text: str) -> None:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(f"{flag} {path} cannot be written ({error.strerror})") from None


def corrections(args: argparse.Namespace) -> None:
    """The page, the terminal view and the sheet of a D_r."""
    if not args.out and not args.terminal and not args.sheet:
        raise ValueError("nothing to do: give --out PAGE.html, --terminal N or --sheet FILE.md")
    tokenizer = load_tokenizer(args.model)
    try:
        d_r = read_pairs(args.d_r, ("z", "z_bar"), tokenizer)
    except ValueError as error:
        raise ValueError(str(error).replace("--pairs ", "", 1)) from None
    numbers = counts(d_r)
    rows = [{"id": i, **row} for i, row in enumerate(d_r.select(range(min(len(d_r), max(args.limit, args.terminal)))))]
    if args.sheet:
        write("--sheet", args.sheet, sheet([{"id": i, **row} for i, row in enumerate(d_r)], tokenizer))
    if args.out:
        some = rows[: args.limit]
        numbers |= {"On this page": f"the first {len(some):,} rows (--limit)"} if len(some) < len(d_r) else {}
        text = page(f"Corrections in {'/'.join(Path(args.d_r).parts[-2:])}", numbers, some, tokenizer)
        write("--out", args.out, text)
        print0(f"{len(some)} rows: {args.out}")
    if args.terminal:
        print(", ".join(f"{name}: {value}" for name, value in counts(d_r).items()))
    for row in rows[: args.terminal]:
        z = coloured(marked(tokenizer, row["z"], row["z_bar"]), has_colour())
        y = visible(tokenizer.decode(row["y"], clean_up_tokenization_spaces=False))
        print(f"\nrow {visible(str(row['id']))}, {share(row):.1f} % corrected\n  z: {z}\n  y: {y}")
