"""Rows tokenised together, once, and kept: the same as one by one; made anew when anything they depend on changes."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import time
import traceback
from argparse import Namespace
from pathlib import Path

import datasets
import numpy as np
import pytest

import data
import preferences
import tiny
from core import ahead, cache, rows
from test_data import CHATML, NO_SYSTEM, byte_tokenizer, turns, write

rng = random.Random(0)


@pytest.fixture(autouse=True)
def place(tmp_path_factory, monkeypatch):
    """An empty cache for each test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder / "tokenised"


def words(n):
    return " ".join(rng.choice(["amy", "has", "eggs", "zzz", "7", "12", "\n", "é", "?"]) for _ in range(n))


def word_bpe(template=None, bos=False):
    """A tokenizer that merges: the border of prompt and response may fall inside of a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["</s>", "<s>"], initial_alphabet=alphabet)
    backend.train_from_iterator([Path(data.__file__).read_text()], trainer)
    if bos:
        backend.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    found = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")
    found.chat_template = template
    return found


TOKENIZERS = {
    "words": tiny.word_tokenizer,
    "bytes": lambda: byte_tokenizer(eos_token="</s>"),
    "merges": word_bpe,
    "merges, BOS": lambda: word_bpe(CHATML, bos=True),
    "no system": lambda: word_bpe(NO_SYSTEM),
}


def plain(task, tokenizer, found, max_prompt, max_response, max_reference):
    """The definition: row by row."""
    spec, kept, cut, long_x, long_f, unknown = data.TASKS[task], [], 0, [], [], []
    for row in found:
        response = spec.before_response + row["response"].strip()
        x, y = data.encode(tokenizer, spec.x(row, tokenizer, max_prompt), response)
        example = {"id": row["id"], "x": x, "y": y[:max_response]}
        if max_reference:
            example["f"] = data.tokenize(tokenizer, spec.f(row, tokenizer, max_prompt))
        if len(x) > max_prompt:
            long_x.append(row["row"])
        elif max_reference and len(example["f"]) > max_reference:
            long_f.append(row["row"])
        else:
            cut += len(y) > max_response
            kept.append(example)
            if tokenizer.unk_token_id not in (None, tokenizer.eos_token_id) and tokenizer.unk_token_id in x + y:
                unknown.append(row["row"])
    return kept, cut, long_x, long_f, unknown


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("task", [*data.TASKS, "dialogues"])
def test_together_as_one_by_one(tmp_path, task, name, monkeypatch):
    """Row for row and note for note, over the borders of blocks."""
    monkeypatch.setattr(cache.arrow, "BLOCK", 7)
    tokenizer = TOKENIZERS[name]()
    if task == "dialogues":
        task, columns = "ultrachat", "prompt=messages,response=messages"
        found = [{"messages": turns(*(f"c {words(9)}" for _ in range(rng.randint(2, 6))))} for _ in range(20)]
    else:
        spec = data.TASKS[task]
        texts = [("a " + words(rng.randint(0, 60)), "b " + words(rng.randint(0, 30)), words(2)) for _ in range(40)]
        columns = f"prompt={spec.prompt},response={spec.response}"
        found = [dict(zip((spec.prompt, spec.response, "title"), text)) for text in texts]
    path = write(tmp_path / "d.jsonl", found)
    source = data.load_rows(task, path, columns=columns)

    def most(template):
        lengths = sorted(len(data.tokenize(tokenizer, template(row, tokenizer, 9999))) for row in source)
        return lengths[len(lengths) * 4 // 5]

    max_prompt, max_response = most(data.TASKS[task].x), 25
    for max_reference in (0, most(data.TASKS[task].f)):
        kept, cut, long_x, long_f, unknown = plain(task, tokenizer, source, max_prompt, max_response, max_reference)
        assert kept
        notes = [f"{len(kept)} examples of task {task} from {path}"]
        if long_x:
            over = f"x over {max_prompt} tokens (--max-prompt), first: row {long_x[0]}"
            notes.append(f"{len(long_x)} rows left out: {over}")
        if long_f:
            over = f"f(x, y) over {max_reference} tokens (--max-reference), first: row {long_f[0]}"
            notes.append(f"{len(long_f)} rows left out: {over}")
        if cut:
            notes.append(f"{cut} responses cut at {max_response} tokens (--max-response), without EOS")
        if unknown:
            what = f"words that the tokenizer does not know ({tokenizer.unk_token})"
            notes.append(f"WARNING: {len(unknown)} rows hold {what}, first: row {unknown[0]}")
        size = {"max_prompt": max_prompt, "max_response": max_response, "max_reference": max_reference}
        for _ in range(2):  # made, then found
            made, said = data.examples(task, tokenizer, data=path, columns=columns, **size)
            assert made.to_list() == kept and said == notes
            assert made.column_names == ["id", "x", "y", "f"][: 4 if max_reference else 3]


@pytest.mark.parametrize("name", ["words", "merges, BOS"])
def test_preferences_together_as_one_by_one(tmp_path, name, monkeypatch):
    monkeypatch.setattr(cache.arrow, "BLOCK", 5)
    tokenizer, most, room = TOKENIZERS[name](), 90, 100
    found = [{"prompt": "q" + words(rng.randint(0, 25)), "chosen": words(rng.randint(0, 9)), "rejected": words(2)}
             for _ in range(40)]  # fmt: skip
    path = write(tmp_path / "p.jsonl", found)
    flags = {"task": "ultrachat", "data": path, "columns": "", "limit": 0}
    args = Namespace(**flags, max_prompt=most, max_response=20, max_length=room)
    kept, out = [], {"x over": [], "chosen or": [], "chosen equals": [], "equal as far": []}
    for i, row in enumerate(found):
        x, y = data.encode(tokenizer, data.chat(tokenizer, row["prompt"]), row["chosen"].strip())
        _, z = data.encode(tokenizer, data.chat(tokenizer, row["prompt"]), row["rejected"].strip())
        size = min(20, room - len(x))
        if not (row["chosen"].strip() and row["rejected"].strip()):
            out["chosen or"].append(i)
        elif len(x) > most:
            out["x over"].append(i)
        elif y[:size] == z[:size]:
            out["chosen equals" if y == z else "equal as far"].append(i)
        else:
            kept.append({"id": i, "x": x, "y": y[:size], "z": z[:size]})
    made, notes = preferences.load_preferences(args, tokenizer)
    assert kept and made.to_list() == kept
    for why, left in out.items():
        assert [note for note in notes if why in note and f"{len(left)} rows left out" in note] or not left


def test_a_text_is_tokenized_once_and_many_in_a_call(tmp_path):
    """And the tokenizer is asked once whether it puts a BOS."""
    real, calls = word_bpe(CHATML), []

    class Counting:
        def __getattr__(self, name):
            return getattr(real, name)

        def __len__(self):
            return len(real)

        def __call__(self, text, **options):
            calls.append(text)
            return real(text, **options)

    found = [(f"q {i}", f"a {words(4)}") for i in range(30)]
    batched = ahead.Ahead(Counting())
    for start in (0, 15):
        some = found[start : start + 15]
        expected = [data.encode(real, *pair) for pair in some]
        assert batched.each(lambda pair: data.encode(batched, *pair), some) == expected
        assert batched.each(lambda pair: data.encode(batched, *pair), some)  # nothing new is asked
        batched.forget()
    texts = [text for call in calls for text in call]
    assert len(calls) <= 8 and len(texts) == len(set(texts)) and texts.count("a") == 1
    with pytest.raises(ValueError, match="row 3"):
        batched.each(lambda i: int("row 3" if i == 3 else i), range(5))


@pytest.mark.parametrize("name", ["words", "bytes", "merges", "merges, BOS"])
def test_a_post_is_cut_as_by_definition_in_at_most_twelve_tokenisations(name):
    """With newlines, blank lines, none, without spaces, in another script; half a word may be more tokens than all."""
    from core.cut import by_definition

    real, asked, longest = TOKENIZERS[name](), [], 0
    source = Path(subprocess.__file__).read_text()  # long, and not ours to change

    class Counting:
        def __getattr__(self, key):
            return getattr(real, key)

        def __call__(self, text, **options):
            asked.append(text)
            return real(text, **options)

    for k in range(36):
        start, size = rng.randrange(len(source) - 4000), rng.randint(10, 4000)
        post = source[start : start + size]
        post = [post, post.replace("\n", " "), post.replace("\n", "\n\n  \n"), "".join(post.split()),
                "".join(rng.choices("日本語の文章です🙂 ", k=size // 4)), " ".join(post.split())][k % 6]  # fmt: skip
        row, limit = {"prompt": post, "title": "t" * (k % 3)}, rng.choice([5, 30, 100, 300])

        def query(some, title=row["title"]):
            return (f"TITLE: {title}\n\n" if title else "") + f"POST: {some}\n\nTL;DR:"

        asked.clear()
        found = data.tldr_x(row, Counting(), limit)
        slow = by_definition(post, lambda some: len(data.tokenize(real, query(some))) - limit)  # noqa: B023
        assert found == query(slow), (k, limit)
        longest = max(longest, len([text for text in asked if text != "a"]))
        batched = ahead.Ahead(real)
        assert batched.each(lambda row: data.tldr_x(row, batched, limit), [row]) == [found]  # noqa: B023
    assert longest <= 12


# ------------------------------------------------------------------------------------------------ when it is made anew
def test_whatever_the_rows_depend_on_makes_them_anew(tmp_path, place, monkeypatch):
    path, given = tmp_path / "d.jsonl", {"max_prompt": 40}
    write(path, [{"prompt": f"how many {i}", "response": "3"} for i in range(9)])
    tokenizer = tiny.word_tokenizer()

    def is_new(**change):
        before = len(list(place.glob("*.arrow")))
        kw = {"task": "toy", "tokenizer": tokenizer, "data": str(path)} | given | change
        data.examples(kw.pop("task"), kw.pop("tokenizer"), **kw)
        return len(list(place.glob("*.arrow"))) - before

    assert is_new() and not is_new()
    (tmp_path / "moved.jsonl").write_bytes(path.read_bytes())
    assert not is_new(data=str(tmp_path / "moved.jsonl"))  # the content counts, not the name
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    from core.fsdp import load_tokenizer

    other = load_tokenizer(str(tmp_path / "tokenizer"))
    is_new(tokenizer=other)  # read from a folder it may hold more than one built in code
    other.save_pretrained(tmp_path / "copy")
    assert not is_new(tokenizer=load_tokenizer(str(tmp_path / "copy")))  # but not by where the folder lies
    changes = [{"limit": 3}, {"max_prompt": 39}, {"max_response": 5}, {"max_reference": 70}, {"need_response": False}]
    for change in [*changes, {"task": "gsm8k", "columns": "prompt=prompt,response=response"}]:
        assert is_new(**change) and not is_new(**change), change
    tokenizer.chat_template = CHATML
    assert is_new()
    tokenizer.add_tokens(["zzz"])
    assert is_new()
    tokenizer.eos_token = "<pad>"
    assert is_new()
    stat = path.stat()
    path.write_bytes(path.read_bytes().replace(b"3", b"4"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size and is_new()
    template = tmp_path / "mine.py"
    for text in ("'a'", "'b'"):
        template.write_text(f"def f(row, tokenizer, limit):\n    return row['prompt'] + {text}\n")
        scope = {}
        exec(compile(template.read_text(), str(template), "exec"), scope)
        monkeypatch.setitem(data.TASKS, "toy", dataclasses.replace(data.TASKS["toy"], x=scope["f"]))
        assert is_new()


def test_limit_stops_reading(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "how", "response": "3"}\n' * 5 + "{oops\n")
    found, notes = data.examples("toy", tiny.word_tokenizer(), data=str(path), limit=5)
    assert len(found) == 5 and len(notes) == 1
    with pytest.raises(ValueError, match="line 6: not valid JSON"):
        data.examples("toy", tiny.word_tokenizer(), data=str(path), limit=6)


def test_parquet_rows_are_streamed(tmp_path):
    found = [{"prompt": f"how {i}", "response": "3", "meta": {"a": [i]}} for i in range(2500)]
    datasets.Dataset.from_list(found).to_parquet(tmp_path / "d.parquet")
    assert rows.read(str(tmp_path / "d.parquet")) == found


# ------------------------------------------------------------------------------------------------ faults
def test_nothing_is_kept_of_rows_with_a_mistake(tmp_path, place):
    path = write(tmp_path / "d.jsonl", [{"prompt": "how", "response": "3"}] * 1500 + [{"prompt": "how"}])
    for _ in range(2):
        with pytest.raises(ValueError, match="d.jsonl, row 1500: no column 'response'"):
            data.examples("toy", tiny.word_tokenizer(), data=path)
        assert not list(place.iterdir())


def test_nothing_left_is_told_each_time(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"prompt": "how many", "response": "3"}] * 3)
    for _ in range(2):
        with pytest.raises(ValueError, match="no example is left: 3 rows left out: x over 1 tokens .*first: row 0"):
            data.examples("toy", tiny.word_tokenizer(), data=path, max_prompt=1)


def child(path, log, pause=0.0):
    """A process that loads the rows; `log` gets a line for each block that it makes."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        plain_each = ahead.Ahead.answer

        def slow(self):
            with open(log, "a") as file:
                file.write("block\n")
            time.sleep(pause)
            plain_each(self)

        ahead.Ahead.answer = slow
        found, _ = data.examples("toy", TOKENIZER, data=path)
        code = int(found["id"][:] != list(range(300)))
    except BaseException:
        traceback.print_exc()
    os._exit(code)


TOKENIZER = tiny.word_tokenizer()


def test_kills_and_two_at_once(tmp_path, place, monkeypatch):
    """Two processes make the same cache, one is killed at some moment: the other ends with the whole, made once."""
    monkeypatch.setattr(cache.arrow, "BLOCK", 20)
    path = write(tmp_path / "d.jsonl", [{"prompt": "how", "response": str(i % 50)} for i in range(300)])
    when = random.Random(1)
    for k in range(8):
        log = tmp_path / f"log-{k}"
        two = [child(path, log, 0.005) for _ in range(2)]
        time.sleep(when.uniform(0.0, 0.4))
        os.kill(two[0], signal.SIGKILL)
        assert os.waitpid(two[0], 0) and os.waitpid(two[1], 0)[1] == 0
        assert sorted(path.suffix for path in place.iterdir()) == [".arrow", ".json"]
        for file in place.iterdir():
            file.unlink()
    log = tmp_path / "log"
    three = [child(path, log, 0.002) for _ in range(3)]
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in three)
    once = len(log.read_text().split())
    for file in place.iterdir():
        file.unlink()
    log.unlink()
    assert os.waitpid(child(path, log), 0)[1] == 0 and len(log.read_text().split()) == once


@pytest.mark.parametrize("half", [None, ""])
def test_a_pair_of_which_one_half_is_gone_is_made_again(tmp_path, place, half):
    path = write(tmp_path / "d.jsonl", [{"prompt": "how", "response": "3"}])
    before = data.examples("toy", TOKENIZER, data=path)[0].to_list()
    (said,) = place.glob("*.json")
    said.unlink() if half is None else said.write_text(half)
    assert data.examples("toy", TOKENIZER, data=path)[0].to_list() == before
    assert sorted(path.suffix for path in place.iterdir()) == [".arrow", ".json"]


def test_what_a_killed_process_left_is_cleared_away(tmp_path, place):
    place.mkdir(parents=True)
    (place / "0123.partial").write_bytes(b"half")
    path = write(tmp_path / "d.jsonl", [{"prompt": "how", "response": "3"}])
    data.examples("toy", TOKENIZER, data=path)
    assert sorted(path.suffix for path in place.iterdir()) == [".arrow", ".json"]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    """The temporary folder takes its place; where that is no better, one line."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    path = write(tmp_path / "d.jsonl", [{"prompt": "how", "response": "3"}])
    found, _ = data.examples("toy", TOKENIZER, data=path)
    assert len(found) == 1 and "cannot be written (Not a directory)" in capsys.readouterr().err
    monkeypatch.setattr(cache, "places", lambda: [tmp_path / "file" / name for name in "ab"])
    with pytest.raises(OSError, match="no folder for tokenised rows can be written") as error:
        data.examples("toy", TOKENIZER, data=path, limit=1)
    assert "\n" not in str(error.value)


def test_a_full_disk_is_one_line(tmp_path, place):
    import resource

    path = write(tmp_path / "d.jsonl", [{"prompt": "how " * 50, "response": str(i)} for i in range(3000)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        with pytest.raises(OSError, match="cannot be written .*File too large") as error:
            data.examples("toy", TOKENIZER, data=path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value) and not list(place.iterdir())
    assert len(data.examples("toy", TOKENIZER, data=path)[0]) == 3000


def test_a_mistake_is_told_once_by_two_ranks(tmp_path):
    from test_training import launch

    path = write(tmp_path / "d.jsonl", [{"prompt": "how", "response": "3"}] * 1100 + [{"prompt": "how"}])
    tokenizer = tiny.word_tokenizer()
    tiny.model("llama", vocab=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ("--model", tmp_path / "model", "--task", "toy", "--data", path, "--out", tmp_path / "out")
    done = launch("sft.py", *words, ranks=2, check=False)
    assert done.stderr.count("row 1100: no column 'response'") == 1 and "[rank" not in done.stderr


def test_two_ranks_share_one(tmp_path, place):
    """The second finds what the first has made."""
    from test_training import launch

    path = write(tmp_path / "d.jsonl", [{"prompt": "how", "response": str(i % 50)} for i in range(30)])
    code = (
        "import json, sys, os, data, tiny; from core import ranks, ahead; ranks.init(); calls = []\n"
        "real = ahead.Ahead.answer; ahead.Ahead.answer = lambda self: calls.append(1) or real(self)\n"
        f"found, notes = data.examples('toy', tiny.word_tokenizer(), data={path!r})\n"
        "open(sys.argv[1] + os.environ['RANK'], 'w').write(json.dumps([len(calls), len(found), notes]))\n"
        "ranks.cli(lambda: None)"
    )
    (tmp_path / "load.py").write_text(code)
    launch(tmp_path / "load.py", tmp_path / "rank", ranks=2, HF_DATASETS_CACHE=str(place))
    first, second = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2))
    assert first[0] > 0 == second[0] and first[1:] == second[1:] and np.all(first[1] == 30)
