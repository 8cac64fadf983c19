"""show.py: the corrections page (parsed, and in a real browser where there is one), the terminal view, the plots."""

import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import datasets
import numpy as np
import pytest

import tiny
import toy
from core import ranks, tables
from tools import corrections, plots, show

HOSTILE = ["<script>document.title='owned'</script>", "<img/src=x/onerror=alert(1)>", "</div></main>", "&lt;", '"><b>']
HOSTILE += ["\x1b[31mred", "\u202ereversed", "a\x00b", "-->", "{z}"]


# ---------------------------------------------------------------------------------------------- corrections
def folder(tmp_path: Path, words=HOSTILE, rows: list[dict] | None = None) -> Namespace:
    """A D_r and its tokenizer, and the flags that show it."""
    tokenizer = tiny.word_tokenizer([*tiny.WORDS, *words])
    tokenizer.save_pretrained(tmp_path / "model")
    hostile = tokenizer.convert_tokens_to_ids(words)
    three, four, five = tokenizer.convert_tokens_to_ids(["3", "4", "5"])
    rows = rows or [
        {"id": 0, "x": [three], "y": [three, four, 1], "z": [three, four, 1], "z_bar": [three, four, 1]},
        {"id": 1, "x": [four], "y": [three, four, 1], "z": [three, five, five, 1], "z_bar": [three, four, five, 1]},
        {"id": 2, "x": hostile, "y": hostile, "z": hostile, "z_bar": hostile[::-1]},
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "D_r_1")
    given = {"d_r": str(tmp_path / "D_r_1"), "model": str(tmp_path / "model"), "out": str(tmp_path / "p.html")}
    return Namespace(**given, limit=200, terminal=0, sheet=None)


def test_a_sheet_of_single_corrections(tmp_path):
    """One of a row, among those that are there; a bar or a newline does not break the table."""
    args = folder(tmp_path, ["|", "<b>"])
    args.out, args.sheet = None, str(tmp_path / "deep" / "sheet.md")
    corrections.corrections(args)
    head, line, *rows = (tmp_path / "deep" / "sheet.md").read_text().splitlines()
    assert head == "| row | z so far | z → z̄ | reference | verdict |" and line.count("|") == 6
    assert rows[0] == "| 1 | 3 |  5 →  4 | 3 4 <eos> | |"
    assert len(rows) == 2 and rows[1].startswith("| 2 | ") and rows[1].replace("\\|", "").count("|") == 6
    again = (tmp_path / "deep" / "sheet.md").read_text()
    corrections.corrections(args)
    assert (tmp_path / "deep" / "sheet.md").read_text() == again


class Outline(html.parser.HTMLParser):
    """Tags, attributes and text, as a browser reads them. Fails where a tag does not close."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text if self.open[-1:] not in (["script"], ["style"]) else ""


def test_page(tmp_path):
    args = folder(tmp_path)
    corrections.corrections(args)
    text = Path(args.out).read_text(encoding="utf-8")
    found = Outline(text)
    assert found.tags.count("script") == found.tags.count("style") == 1
    assert found.tags.count("article") == 3 and not {"img", "b", "link", "a", "iframe"} & set(found.tags)
    names = {name for name, _ in found.attributes}
    assert not {"src", "href", "style", "srcset", "action"} & names and not any(name[:2] == "on" for name in names)
    assert not re.search(r"https?://|//\w|@import|url\(", text)  # no request to anywhere
    policy = next(value for _, value in found.attributes if "default-src" in (value or ""))
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    for number in ("Rows3", "Tokens of z17", "Tokens corrected (z̄ ≠ z)11 (64.7%)", "without a correction1 (33.3%)"):
        assert number in found.text.replace("\n", "")
    assert "Row 1: 1 of 4 tokens corrected (25.0 %)" in found.text
    assert "3 [5→4] 5 <eos>" in found.text
    shares = [float(value) for name, value in found.attributes if name == "data-share"]
    assert shares == [0, 25, 100]
    for word in ("<script>document.title='owned'</script>", "<img/src=x/onerror=alert(1)>", "</div></main>", "&lt;"):
        assert word in found.text  # as text
    assert "\\x1b[31mred" in found.text and "\\u202ereversed" in found.text and "a\\x00b" in found.text
    assert not {"\x1b", "\u202e", "\x00"} & set(text)


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@pytest.mark.skipif(not browser(), reason="no Chromium on PATH or in CHROMIUM")
def test_page_in_a_browser(tmp_path):
    """The filter works; what the model wrote neither runs nor asks for anything."""
    asked = []

    class Listen(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    server = HTTPServer(("127.0.0.1", 0), Listen)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    there = f"http://127.0.0.1:{server.server_port}"
    words = [f"<img/src={there}/a>", f"<link/rel=stylesheet/href={there}/b>", *HOSTILE]
    args = folder(tmp_path, words)
    corrections.corrections(args)
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]

    def dom(address: str) -> str:
        made = subprocess.run([*command, "--dump-dom", address], capture_output=True, timeout=120, check=False)
        return made.stdout.decode()

    dom_all, dom_some = (dom(f"file://{args.out}{part}") for part in ("", "#20-60"))
    server.shutdown()
    server.server_close()
    assert "3 of 3 rows shown" in dom_all and " hidden" not in dom_all
    assert "1 of 3 rows shown" in dom_some
    assert re.findall(r'<article data-share="([\d.]+)"[^>]* hidden', dom_some) == ["0.0000", "100.0000"]
    assert "<title>Corrections in" in dom_all and "<title>owned" not in dom_all
    assert "&lt;script&gt;document.title" in dom_all
    assert not asked


def test_pieces_of_a_byte_tokenizer(tmp_path):
    """The pieces make up the text, blanks included; a token that is no whole character is shown by its name."""
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "the cat sat, the cat sat; the end\n" * 9}) + "\n")
    tokenizer = toy.byte_tokenizer([str(tmp_path / "t.jsonl")], 270)
    ids = tokenizer("the  cat\n\nsat — é")["input_ids"]
    parts = corrections.marked(tokenizer, ids, ids)
    assert len(parts) == 1 and parts[0][0].startswith("the  cat\n\nsat ⟨â⟩")
    other = [tokenizer("x")["input_ids"][0]] * len(ids)
    assert ("⏎", "x") in corrections.marked(tokenizer, ids, other)
    assert corrections.blank(" ") == "␣" and corrections.blank("") == "∅" and corrections.blank(" a") == " a"


def test_limit_is_said(tmp_path):
    args = folder(tmp_path)
    args.limit = 2
    corrections.corrections(args)
    found = Outline(Path(args.out).read_text(encoding="utf-8"))
    assert found.tags.count("article") == 2 and "the first 2 rows" in found.text


def test_terminal(tmp_path, capsys, monkeypatch):
    args = folder(tmp_path)
    args.out, args.terminal = None, 3
    corrections.corrections(args)
    plain = capsys.readouterr().out
    assert "row 1, 25.0 % corrected\n  z: 3 [5→4] 5 <eos>\n  y: 3 4 <eos>\n" in plain
    assert "\\x1b[31mred" in plain and "\x1b" not in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    corrections.corrections(args)
    coloured = capsys.readouterr().out
    assert "3 [\x1b[31m5\x1b[0m→\x1b[32;4m4\x1b[0m] 5" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain  # our own escapes are the only ones
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            corrections.corrections(args)
            assert capsys.readouterr().out == plain


def command(monkeypatch, capsys, *words: object) -> str:
    """The one line of an error."""
    monkeypatch.setattr(sys, "argv", ["show.py", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        ranks.cli(show.main)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 or lines[0].startswith("usage")
    return lines[-1]


def test_corrections_bad_input(tmp_path, monkeypatch, capsys):
    args = folder(tmp_path)
    given = ("corrections", args.d_r, "--model", args.model)
    assert "give --out PAGE.html, --terminal N or --sheet FILE.md" in command(monkeypatch, capsys, *given)
    missing = command(monkeypatch, capsys, "corrections", tmp_path / "no", "--model", args.model, "--terminal", 1)
    assert f"error: {tmp_path}/no: not a folder written by" in missing
    assert "no such folder" in command(monkeypatch, capsys, *given[:3], tmp_path / "no", "--terminal", 1)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in command(monkeypatch, capsys, *given, "--out", tmp_path / "file" / "p.html")
    datasets.load_from_disk(args.d_r).map(lambda row: {"z_bar": row["z_bar"][1:]}).save_to_disk(tmp_path / "short")
    short = command(monkeypatch, capsys, "corrections", tmp_path / "short", *given[2:], "--terminal", 1)
    assert "row 0: z has 3 tokens, z_bar has 2" in short


# ---------------------------------------------------------------------------------------------- plots
def log(path: Path, steps=10, **terms: float) -> Path:
    path.mkdir(parents=True)
    rows = [
        {"phase": 1, "step": i + 1, "loss": 2.0 / (i + 1), **terms, "grad_norm": 1.0, "lr": 0.1, "tokens": 50}
        | {"seconds": 0.5}
        | ({"held_nll": 1.0} if i % 5 == 4 else {})
        for i in range(steps)
    ]
    (path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def result(path: Path, name: str, seed: int, **kw) -> Path:
    same = {"task": "toy", "test_set": "abc", "beta": 0.2, "generations": 3, "max_response": 96, "n": 8}
    path.write_text(json.dumps({"name": name, "seed": seed, **same, **kw}))
    return path


def test_log_of(tmp_path):
    found = plots.log_of(log(tmp_path / "run", bash=1.5, sft=0.5))
    assert [*found] == ["loss", "bash", "sft", "grad_norm", "lr", "tokens/s", "held_nll"]
    assert found["tokens/s"][0] == (1, 100.0) and found["held_nll"] == [(5, 1.0), (10, 1.0)]
    assert plots.thinned([(i, float(i)) for i in range(1, 401)])[0][:2] == [1.5, 3.5]
    assert len(plots.thinned([(i, 0.0) for i in range(999)])[0]) <= 200


def test_training_plot(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    runs = [log(tmp_path / "bash", bash=1.5, sft=0.5), log(tmp_path / "other" / "bash", 700, sft=1.0)]
    args = Namespace(runs=[*map(str, runs)], out=str(tmp_path / "plots"), metric=None, x_label="x", log_x=False)
    plots.plots(args)
    svg = (tmp_path / "plots" / "training.svg").read_text()
    for text in ("loss", "bash", "sft", "grad_norm", "lr", "tokens/s", "held_nll", str(runs[1])):
        assert f">{text}</text>" in svg
    assert svg.count("stroke-dasharray") > 5  # lines differ by more than colour
    assert (tmp_path / "plots" / "training.png").read_bytes()[:4] == b"\x89PNG"
    plots.plots(args)
    assert (tmp_path / "plots" / "training.svg").read_text() == svg  # the same each time
    assert len({(str(plots.how(i)["linestyle"]), plots.how(i)["marker"]) for i in range(10)}) == 10


def test_metric_over_x(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    files = [
        result(tmp_path / f"{name}-{x}-{seed}.json", name, seed, x=x, metrics={"accuracy_t0": x / 1000 + seed / 10})
        for name in ("sft", "bash")
        for x in (100, 50)
        for seed in (1, 2)
    ]
    runs = tables.read_results([*map(str, files)])
    points = plots.over_x(runs, "accuracy_t0")
    assert points["sft"] == [
        (50, pytest.approx(0.2), pytest.approx(0.05)),
        (100, pytest.approx(0.25), pytest.approx(0.05)),
    ]
    args = Namespace(runs=[*map(str, files)], out=str(tmp_path / "p"), metric=None, x_label="examples", log_x=True)
    plots.plots(args)
    svg = (tmp_path / "p" / "accuracy_t0.svg").read_text()
    assert all(f">{text}</text>" in svg for text in ("sft", "bash", "examples", "Greedy (%)", "50", "100"))
    with pytest.raises(ValueError, match="a second sft, seed 1, at x = 100"):
        plots.over_x([*runs, runs[0]], "accuracy_t0")


def test_plots_bad_input(tmp_path, monkeypatch, capsys):
    def told(*words: object) -> str:
        return command(monkeypatch, capsys, "plots", *words, "--out", tmp_path / "p")

    (tmp_path / "empty").mkdir()
    assert "neither a log.jsonl nor a results.json is in it" in told(tmp_path / "empty")
    bad = log(tmp_path / "bad") / "log.jsonl"
    for content, message in (
        ("", "no steps"),
        ('{"loss": 1}\n{"loss": "low"}\n', "line 2: loss is not a number"),
        ('{"step": 1}\n', "line 1: no loss"),
        ('{"loss": 1}\n{"lo', "line 2: not valid JSON"),
    ):
        bad.write_text(content)
        assert message in told(tmp_path / "bad")
    a = result(tmp_path / "a.json", "sft", 1, metrics={"nll_y": 1.0})
    assert "a.json has no x" in told(a)
    b = result(tmp_path / "b.json", "sft", 1, metrics={"nll_y": 1.0}, x=1, test_set="other")
    a = result(tmp_path / "a.json", "sft", 2, metrics={"nll_y": 1.0}, x=1)
    assert "has test_set other" in told(a, b)
    assert "--metric bleu: no such metric; there are nll_y" in told(a, "--metric", "bleu")
    curve = log(tmp_path / "curve")
    assert "--metric chooses a metric of results.json files, and none was given" in told(curve, "--metric", "nll_y")
    b.write_text("{}")
    assert "b.json: not a results.json" in told(b)


# ---------------------------------------------------------------------------------------------- sentence distance
def angles(texts: list[str]) -> np.ndarray:
    """An embedder: a text names its angle in degrees."""
    angle = np.radians([float(text) for text in texts])
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * 7


def generations(path: Path, *rows: tuple[str, list[str]]) -> Path:
    made = [{"id": i, "prompt": "p", "reference": y, "responses": z} for i, (y, z) in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def test_distance_by_hand(tmp_path):
    rows = [{"reference": "0", "responses": ["0", "60", "90"]}, {"reference": "90", "responses": ["270"]}]
    first, second = plots.distances(rows, angles)
    assert first == pytest.approx([0, 0.5, 1]) and second == pytest.approx([2])
    with pytest.raises(ValueError, match="the embedder made"):
        plots.distances(rows, lambda texts: np.zeros((2, 2)))


def test_violins(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    sft = generations(tmp_path / "sft.jsonl", ("0", ["60", "80", "90"]), ("0", ["10", "20", "30"]))
    rac = generations(tmp_path / "z.jsonl", ("0", ["0", "10", "60"]), ("0", ["10", "10", "10"]))
    out = tmp_path / "out"
    args = Namespace(files=[str(sft), f"rac={rac}"], out=str(out), embedder="angles", rows=[])
    plots.distance(args, angles)
    made = json.loads((out / "distance.json").read_text())
    assert made["medians"]["rac"][0] == pytest.approx(1 - np.cos(np.radians(10)))
    assert made["distances"]["sft"][0] == pytest.approx(1 - np.cos(np.radians([60, 80, 90])))
    svg = (out / "distance.svg").read_text()
    assert all(f">{text}</text>" in svg for text in ("sft", "rac", "query 0", "query 1"))
    args.rows = [1]
    plots.distance(args, angles)
    assert json.loads((out / "distance.json").read_text())["rows"] == [1]


def test_distance_bad_input(tmp_path, monkeypatch, capsys):
    def told(*words: object) -> str:
        return command(monkeypatch, capsys, "distance", *words, "--out", tmp_path / "out")

    a = generations(tmp_path / "a.jsonl", ("0", ["1", "2"]))
    b = generations(tmp_path / "b.jsonl", ("9", ["1", "2"]))
    assert "a and b: not the same rows and references" in told(a, b)
    assert "a second file of the name a" in told(a, a)
    assert "no row 7 (--rows)" in told(a, "--rows", "7")
    assert "'runs/lr=1e-4/z.jsonl'" in told(a, "sft=runs/lr=1e-4/z.jsonl")
    assert "c.jsonl, row 0: responses must be a list of two texts" in told(generations(tmp_path / "c.jsonl", ("0", [])))
    assert "d.jsonl, row 0: no reference" in told(generations(tmp_path / "d.jsonl", (" ", ["1", "2"])))
    assert "is not a whole number" in told(a, "--rows", "x")
    row = {"id": 0, "reference": "0", "responses": ["1", "2"]}
    for i, ids in enumerate([(0, 0), (0, [1]), ("0", 1)]):
        file = tmp_path / f"{i}.jsonl"
        file.write_text("".join(json.dumps(row | {"id": own}) + "\n" for own in ids))
        assert f"{i}.jsonl: id must be a whole number, and another one in each row" in told(file)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert "pip install sentence-transformers" in told(a)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plots.pyplot.cache_clear()
    assert "pip install matplotlib" in told(a)
