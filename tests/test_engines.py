"""--z FILE: responses from any engine are trained on as if they had been drawn here, and checked before."""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import decoders, normalizers, pre_tokenizers

import bon
import data
import engine_z
import evaluate
import generate
import spin
import test_stages
import tiny
from core import fsdp, ranks
from test_cache import word_bpe
from test_reports import sentence_piece
from test_stages import base, fails, run
from test_training import free_port, largest_difference, log
from tools import judge

__all__ = ["base"]  # pytest finds fixtures by name
ROOT = Path(__file__).parent.parent
RAC = ["--max-reference", "200"]


def rows_of(base, tokenizer):
    found, _ = data.examples("ultrachat", tokenizer, data=str(base / "train.jsonl"), columns="response=response",
                             max_response=12)  # fmt: skip
    return found.to_list()


def drawn_here(base, n=1):
    """What the stages draw from that model in iteration 1: id -> its samples."""
    tokenizer, model = fsdp.load_tokenizer(str(base / "model")), fsdp.load_model(str(base / "model"))
    rows = rows_of(base, tokenizer)
    x, ids = ([row[name] for row in rows] for name in ("x", "id"))
    z = generate.generate(model, x, max_new_tokens=12, eos_token_id=1, n=n, seed=ranks.fold_in(0, 1), ids=ids)
    return dict(zip(ids, z, strict=True))


def lines(found, tokenizer=None):
    """Rows of a file: of token ids or, with a tokenizer, of text."""
    rows = [{"id": own, "responses": z} for own, z in found.items()]
    if tokenizer:
        for row in rows:
            row["finish_reasons"] = ["stop" if z[-1] == 1 else "length" for z in row["responses"]]
            row["responses"] = [tokenizer.decode(z, skip_special_tokens=True) for z in row["responses"]]
    return rows


def byte_level():
    """One that merges, and decodes what it has merged."""
    tokenizer = word_bpe()
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def drawn(base):
    return drawn_here(base)


@pytest.fixture
def stages(monkeypatch):
    """run() knows spin and bon, too; and a task whose answers so small a model can write."""
    monkeypatch.setitem(test_stages.STAGES, "spin", spin)
    monkeypatch.setitem(test_stages.STAGES, "bon", bon)
    monkeypatch.setitem(evaluate.CHECKS, "ultrachat", (tiny.parity, evaluate.same))


# ------------------------------------------------------------------------------------------------ as if drawn here
FLAGS = {"rac": RAC, "spin": ["--iterations", "2"], "bon": ["--n", "4", "--best-of", "2"]}


@pytest.mark.parametrize("stage", FLAGS)
def test_token_ids_from_a_file_train_as_if_drawn_here(base, stages, tmp_path, monkeypatch, stage):
    z = drawn_here(base, n=4 if stage == "bon" else 1)
    file = write(tmp_path / "z.jsonl", lines(z)[::-1])  # in any order
    own = run(monkeypatch, stage, base, tmp_path / "own", *FLAGS[stage])
    read = run(monkeypatch, stage, base, tmp_path / "read", "--z", file, *FLAGS[stage])
    assert largest_difference(own, read) == 0
    for folder in [path for path in own.glob("D_*") if path.is_dir()]:
        found = datasets.load_from_disk(str(read / folder.name)).to_list()
        assert found == datasets.load_from_disk(str(folder)).to_list()
        if folder.name.endswith("_1"):
            assert [row["z"] for row in found] == [z[row["id"]][0] if stage != "bon" else z[row["id"]] for row in found]
    assert json.loads((read / "args.json").read_text())["what --z holds"].startswith(f"{file.stat().st_size} bytes")


def test_text_as_generate_writes_it(base, drawn, tmp_path, monkeypatch, capsys):
    """generate.py's own file: text to read, its end marked, the tokens as they were drawn, who drew them. The reference
    is the data's, whole."""
    words = ["generate.py", "--model", base / "model", "--task", "ultrachat", "--data", base / "train.jsonl"]
    words += ["--columns", "response=response", "--max-response", 8, "--out", tmp_path / "z.jsonl"]
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    generate.main()
    written = [json.loads(row) for row in (tmp_path / "z.jsonl").read_text().splitlines()]
    made = {row["id"]: row["z"][0] for row in datasets.load_from_disk(str(tmp_path / "z.jsonl.data"))}
    texts = [json.loads(row)["response"] for row in (base / "train.jsonl").read_text().splitlines()]
    for row in written:
        assert row["reference"] == texts[row["id"]] and row["token_ids"] == [made[row["id"]]]
        assert row["finish_reasons"] == ["stop" if made[row["id"]][-1] == 1 else "length"]
        assert row["drawn_by"]["model"] == str(base / "model") and "CRC-32" in row["drawn_by"]["weights"]
    out = run(monkeypatch, "rac", base, tmp_path / "rac", "--z", tmp_path / "z.jsonl", *RAC)
    assert {row["id"]: row["z"] for row in datasets.load_from_disk(str(out / "D_r_1"))} == made
    assert "WARNING: z" not in capsys.readouterr().err


def test_generate_hands_the_judge_the_whole_post(base, tmp_path, monkeypatch):
    """Of tldr, where the query is cut."""
    post = "the model writes its own answer . " * 30
    write(tmp_path / "posts.jsonl", [{"post": post, "summary": "its own"}])
    words = ["generate.py", "--model", base / "model", "--task", "tldr", "--data", tmp_path / "posts.jsonl"]
    words += ["--max-prompt", 40, "--max-response", 4, "--out", tmp_path / "z.jsonl"]
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    generate.main()
    questions, _ = judge.summaries(tmp_path / "z.jsonl", None, 0)
    assert [question["post"] for question in questions] == [post]


def test_text_behind_a_prompt_is_tokenised_as_the_model_reads_it(tmp_path):
    """Where the border falls between tokens, as data.encode cuts them apart; else alone. Both give the text back."""
    tokenizer = byte_level()
    for prompt, text in [("def f(x):\n", "    return x"), ("a", " tokenizer"), ("x = token", "izer"), ("", "row é \n")]:
        x, y = data.encode(tokenizer, prompt, text)
        file = engine_z.File("z", tokenizer, 1, 99)
        assert file.from_text(text, x, "here") == y[:-1]
        assert tokenizer.decode(y[:-1]) == text


def llama_2():
    """As that of Llama 2 and Mistral 7B: a space is put before a text, and behind a special token in it."""
    tokenizer = sentence_piece(scheme="never")
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


@pytest.mark.parametrize("make", [sentence_piece, lambda: sentence_piece(scheme="always"), llama_2, byte_level])
@pytest.mark.parametrize("kind", ["text", "ids"])
def test_an_answer_behind_a_template_is_read_as_y_is(tmp_path, make, kind):
    """z of y's text is y, and y's token ids are its own, also where a tokenizer puts a space before a text alone."""
    tokenizer = make()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}{{ eos_token }}\n{% endfor %}the:\n"
    texts = ["the end of a turn", "it is so and so on", "< is | it > so", "boss", "a turn is a turn"] * 2
    rows = [{"question": "is it so ?", "answer": text} for text in texts]
    examples, _ = data.examples("gsm8k", tokenizer, data=str(write(tmp_path / "train.jsonl", rows)))
    file = engine_z.File("z", tokenizer, 1, 99)
    for row, text in zip(examples, texts, strict=True):
        z = tokenizer.decode(row["y"][:-1]) if kind == "text" else row["y"]
        assert kind == "ids" or engine_z.squeezed(z) == engine_z.squeezed(text)
        assert file.ids_of(z, "stop", row["x"], row["id"], "here") == row["y"]
    assert kind == "text" or file.said["same again"] == file.said["looked at"] == len(texts)


def test_a_tokenizer_that_normalises_reads_what_it_is_given(tmp_path):
    """As Qwen's, which bring a text to Unicode's NFC: the ohm sign comes back as the letter omega."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    question, answer = "how many \u2126 are 5 \u2126 ?", "so 5 \u2126"
    train = write(tmp_path / "train.jsonl", [{"question": question, "answer": answer}])
    (row,) = data.examples("gsm8k", tokenizer, data=str(train))[0]
    file = engine_z.File("z", tokenizer, 1, 99)
    file.check_prompt(question, row["x"], "row 0 (id 0)")
    assert file.from_text(answer, row["x"], "row 0 (id 0)") == row["y"][:-1]
    with pytest.raises(ValueError, match="its prompt is not that of the data's row 0"):
        file.check_prompt(question + "5", row["x"], "row 0 (id 0)")


def test_the_first_d_alone_is_the_files(base, drawn, tmp_path, monkeypatch):
    """--refresh-every and --iterations: z of D_r_1 from the file, z of D_r_2 by the current model."""
    z = {own: [[5, 1]] for own in drawn}
    file = write(tmp_path / "z.jsonl", lines(z))
    for flags in (["--refresh-every", "2"], ["--iterations", "2"]):
        out = run(monkeypatch, "rac", base, tmp_path / flags[0], "--z", file, *flags, *RAC)
        first, second = (datasets.load_from_disk(str(out / f"D_r_{k}"))["z"][:] for k in (1, 2))
        assert {*map(tuple, first)} == {(5, 1)} and {*map(tuple, second)} != {(5, 1)}


# ------------------------------------------------------------------------------------------------ what is said
def notes(base, tmp_path, rows, tokenizer=None, **flags):
    """What checking a file of these rows says."""
    import argparse

    tokenizer = tokenizer or fsdp.load_tokenizer(str(base / "model"))
    (tmp_path / "args.json").write_text(json.dumps({"model": str(base / "model"), "what --model holds": "9 bytes"}))
    known = {"z": str(write(tmp_path / "z.jsonl", rows)), "task": "ultrachat", "data": str(base / "train.jsonl")}
    known |= {"columns": "response=response", "limit": 0, "max_response": 12, "out": str(tmp_path), "sft_epochs": 0}
    args = argparse.Namespace(**known | {"model": str(base / "model")} | flags)
    examples = datasets.Dataset.from_list(rows_of(base, tokenizer))
    return engine_z.check(args, tokenizer, examples)


def test_what_is_cut_or_added_is_said(base, drawn, tmp_path):
    rows = lines({own: [[5, 6, 1]] for own in drawn})
    rows[1] |= {"responses": [""], "finish_reasons": ["stop"]}
    rows[2] |= {"responses": [[5] * 20], "finish_reasons": ["length"]}
    rows[3] |= {"responses": [[7, 8]], "finish_reasons": ["stop"]}
    rows[4] |= {"responses": ["7 8"], "finish_reasons": ["length"], "prompt": ""}
    said = notes(base, tmp_path, rows)
    assert said[0].startswith("9 responses z from ")
    assert said[1:4] == [
        "1 of them ended by themselves without their end: <eos> was put behind them, first: id 3",
        "1 of them are empty: <eos> alone, first: id 1",
        "1 of them cut at 12 tokens (--max-response), without <eos>, first: id 2",
    ]
    found = {}
    file = engine_z.File(str(tmp_path / "z.jsonl"), fsdp.load_tokenizer(str(base / "model")), 1, 12)
    x = {row["id"]: row["x"] for row in rows_of(base, file.tokenizer)}
    for own, (z,) in file.each(x.get):
        found[own] = z
    eight = file.tokenizer.convert_tokens_to_ids(["7", "8"])
    assert [found[i] for i in range(5)] == [[5, 6, 1], [1], [5] * 12, [7, 8, 1], eight]


@pytest.mark.parametrize("by, flags, told", [
    ({}, {}, "does not say which model drew it (drawn_by)"),
    ({"model": "runs/other"}, {}, "WARNING: z was drawn by runs/other, which is not --model"),
    ({"model": "moved", "weights": "9 bytes"}, {}, ""),  # the same weights in another place
    ({"model": "same", "weights": "8 bytes"}, {}, "WARNING: z was drawn by same, which is not --model"),
    ({"weights": "9 bytes"}, {"sft_epochs": 1}, "WARNING: z was drawn before --sft-epochs"),
])  # fmt: skip
def test_a_stale_z_is_warned_of(base, drawn, tmp_path, by, flags, told):
    said = notes(base, tmp_path, [row | {"drawn_by": by} for row in lines(drawn)], **flags)
    assert told in said[-1] if told else len(said) == 1


def test_rows_left_out_are_not_asked_for(base, drawn, tmp_path, monkeypatch, capsys):
    """By --max-prompt: their z is there, and not read."""
    file = write(tmp_path / "z.jsonl", lines(drawn))
    tokenizer = fsdp.load_tokenizer(str(base / "model"))
    longest = max(len(row["x"]) for row in rows_of(base, tokenizer))
    run(monkeypatch, "rac", base, tmp_path / "out", "--z", file, "--max-prompt", str(longest - 1), *RAC)
    assert re.search(r"^[1-3] rows of --z are for rows of the data that were left out$", capsys.readouterr().err, re.M)


# ------------------------------------------------------------------------------------------------ bad input
def change(i, **keys):
    return lambda rows: rows[:i] + [{k: v for k, v in (rows[i] | keys).items() if v is not ...}] + rows[i + 1 :]


BAD = {
    "of no row": (lambda rows: [*rows, {"id": 99, "response": [1]}], "id 99 is no row of the data (1 such)"),
    "a row without": (lambda rows: rows[:-1], "no response to the row of id 8 (1 such)"),
    "twice": (lambda rows: [*rows, rows[0]], "a second row of id 0"),
    "no rows": (lambda rows: [], "no rows"),
    "no id": (change(2, id=...), "row 2: id must be a whole number, that of the row in the data, not None"),
    "another prompt": (change(0, prompt="amy has eggs"), "row 0 (id 0): its prompt is not that of the data's row 0"),
    "other ids of x": (change(0, prompt=[5, 5]), "row 0 (id 0): its prompt is not that of the data's row 0"),
    "nothing": (change(1, responses=...), "row 1 (id 1): must have response, or a list of responses; there are id"),
    "two": (change(1, responses=[[5, 1], [6, 1]]), "row 1 (id 1): 2 responses; one is learnt from"),
    "no list": (change(1, responses="so"), "responses and finish_reasons must be lists, with an entry for each"),
    "no ids": (change(1, token_ids="5 1"), "row 1 (id 1): token_ids must be a list with a list of ids for each"),
    "text as ids": (change(1, token_ids=["5 1"]), "token_ids must be a list with a list of ids for each response"),
    "ids of two": (change(1, token_ids=[[5, 1], [6, 1]]), "row 1 (id 1): 2 responses; one is learnt from"),
    "no token": (change(1, responses=[[]]), "a response must be a text, or a list of token ids that is not empty"),
    "no text": (change(1, responses=[7]), "a response must be a text, or a list of token ids that is not empty"),
    "empty, cut": (change(1, responses=[""], finish_reasons=["length"]), "row 1 (id 1): a response without any token"),
    "no end": (change(1, responses=[[5]]), 'does not end with <eos>, and no finish_reason says "length": was it cut?'),
    "unmarked": (change(1, responses=["7"]), 'a text needs finish_reason, "stop" (it ended) or "length" (it was cut)'),
    "refused": (change(1, finish_reasons=["content_filter"]), "finish_reason 'content_filter' is neither"),
    "goes on": (change(1, responses=[[5, 1, 5, 1]]), "goes on after <eos>, which ends a response; leave out what"),
    "foreign id": (change(1, responses=[[5, 999, 1]]), "token id 999 is not in this model's vocabulary"),
    "foreign text": (change(1, responses=["7 été"], finish_reasons=["stop"]), "makes '7' of '7 été': its text cannot"),
    "special": (change(1, responses=["7 <eos>"], finish_reasons=["stop"]), "holds the special token <eos> as text"),
    "half special": (change(1, responses=["7 <eo"], finish_reasons=["length"]), "breaks off inside of the special"),
    "half a pair": (change(1, responses=["7 \ud800"], finish_reasons=["stop"]), "not text at character 2"),
    "not JSON": (None, "z.jsonl, line 1: not valid JSON"),
    "drawn by": (change(0, drawn_by="me"), "drawn_by must be an object of texts (model, weights, tokenizer)"),
    "drawn by what": (change(0, drawn_by={"model": ["a"]}), "drawn_by must be an object of texts (model, weights, "),
    "a number": (change(1, responses=5), "responses and finish_reasons must be lists, with an entry for each response"),
    "fingerprint": (change(0, drawn_by={"tokenizer": "x"}), "its token ids are of another tokenizer than this model's"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line(base, tmp_path, monkeypatch, capsys, name):
    spoil, message = BAD[name]
    rows = lines({own: [[5, 6, 1]] for own in range(9)})
    file = write(tmp_path / "z.jsonl", spoil(rows) if spoil else rows)
    if spoil is None:
        file.write_text('{"id": 0,')
    line = fails(monkeypatch, capsys, "rac", base, tmp_path / "out", "--z", file, *RAC)
    assert line.startswith("rac.py: error: ") and message in line and str(file) in line


def test_flags_that_contradict(base, stages, tmp_path, monkeypatch, capsys):
    line = fails(monkeypatch, capsys, "rac", base, tmp_path / "o", "--z", "z.jsonl", "--pairs", "D")
    assert line == "rac.py: error: --z brings responses, --pairs whole rows: choose"
    assert "no such file" in fails(monkeypatch, capsys, "spin", base, tmp_path / "o", "--z", "missing.jsonl")
    assert "--dco draws nothing" in fails(monkeypatch, capsys, "bon", base, tmp_path / "o", "--z", "z.jsonl", "--dco")
    file = write(tmp_path / "z.jsonl", lines({own: [[5, 1]] * 3 for own in range(9)}))
    line = fails(monkeypatch, capsys, "bon", base, tmp_path / "p", "--z", file, "--n", "4")
    assert line.endswith("row 0 (id 0): 3 responses; --n 4 needs as many")


def test_token_ids_of_another_tokenizer(base, tmp_path):
    """Where nothing else tells: their text, tokenised, is not they."""
    tokenizer = byte_level()
    texts = ["the rows of the data set", "tokenizer and limit", "as the model reads it", "def examples(task)"] * 3
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    good = lines({own: [[*ids[own], 0]] for own in range(9)})
    assert len(notes(base, tmp_path, good, tokenizer)) == 2
    shifted = lines({own: [[*(1 + (7 * t) % 400 for t in ids[own]), 0]] for own in range(9)})
    with pytest.raises(ValueError, match="only [0-2] of 9 are what this tokenizer makes of their text"):
        notes(base, tmp_path, shifted, tokenizer)


# ------------------------------------------------------------------------------------------------ a real server
@pytest.fixture
def server(tmp_path):
    """`transformers serve` with a tiny model in tmp_path/runs/sft: its base URL."""
    pytest.importorskip("fastapi", reason="transformers serve needs fastapi, uvicorn and openai")
    pytest.importorskip("uvicorn"), pytest.importorskip("openai")
    tokenizer = tiny.word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tiny.model("llama", vocab=len(tokenizer), pad_token_id=2).save_pretrained(tmp_path / "runs/sft")
    tokenizer.save_pretrained(tmp_path / "runs/sft")
    command = Path(sys.executable).parent / "transformers"
    if not command.exists():
        pytest.skip("the command `transformers` is not beside this python")
    port = free_port()
    words = [command, "serve", "runs/sft", "--port", str(port), "--device", "cpu"]
    with open(tmp_path / "server.log", "w") as printed:
        process = subprocess.Popen(list(map(str, words)), cwd=tmp_path, stdout=printed, stderr=printed)
    try:
        deadline = time.time() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                break
            except OSError:
                if process.poll() is not None or time.time() > deadline:
                    pytest.skip("transformers serve does not start: " + (tmp_path / "server.log").read_text()[-300:])
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def test_a_real_server_end_to_end(server, tmp_path, monkeypatch, capsys):
    """The code of docs/data.md, as it stands there, asks the server; rac.py trains on what it wrote."""
    rows = [{"question": f"how many eggs has amy ? {i}", "answer": f"so #### {i}"} for i in range(5)]
    write(tmp_path / "train.jsonl", rows)
    (code,) = [part for part in re.findall(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.S)
               if "OpenAI(" in part]  # fmt: skip
    assert "http://localhost:8000/v1" in code and '"max_tokens": 512' in code
    code = code.replace("http://localhost:8000/v1", server).replace('"max_tokens": 512', '"max_tokens": 16')
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/data.md", "exec"), {})
    drawn = [json.loads(line) for line in Path("z.jsonl").read_text().splitlines()]
    assert [row["id"] for row in drawn] == [*range(5)] and {row["finish_reason"] for row in drawn} <= {"stop", "length"}
    flags = ["--columns", "prompt=question,response=answer", "--max-response", "16", "--z", "z.jsonl"]
    here = tmp_path / "runs"
    shutil.copy("train.jsonl", here)
    out = run(monkeypatch, "rac", here, tmp_path / "rac", *flags, model="sft", task="gsm8k")
    d_r = datasets.load_from_disk(str(out / "D_r_1"))
    tokenizer = fsdp.load_tokenizer("runs/sft")
    for row, line in zip(d_r, drawn, strict=True):
        assert tokenizer.decode(row["z"], skip_special_tokens=True) == line["response"]
        assert (row["z"][-1] == 1) == (line["finish_reason"] == "stop") and len(row["z"]) <= 17
    printed = capsys.readouterr().err
    assert "5 responses z from z.jsonl" in printed and torch.isfinite(torch.tensor(log(out)[-1]["loss"]))
    assert "WARNING: z was drawn by runs/sft, which is not --model" in printed  # known there by another path
