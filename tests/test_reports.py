"""What users report of tools like this one: ends of turns, chat templates, special tokens in text, odd model folders,
files that change behind a run, a crash while the model is moved in."""

import datetime
import json
import os
import shlex
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

import data
import evaluate
import folders
import generate
import preferences
import rac
import sft
import tiny
from core import chat, decode_step, fsdp, kinds, ranks, rows

TEXTS = ["how many eggs does amy have ?", "  So: 3 + 4 = 7.\n\nThen  stop. ", "naïve – ü 😀", "a<b>c", "x"]


def word_level(chat_template=None):
    tokenizer = tiny.word_tokenizer([*tiny.WORDS, "<turn>", "<bot>"])
    tokenizer.chat_template = chat_template
    return tokenizer


def byte_bpe(*special, eos="<eos>", **kw):
    """Byte-level BPE with merges, as GPT-2's and Llama 3's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*TEXTS, "Write the <eos> end. os> eos>"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, **kw)
    tokenizer.add_special_tokens({"extra_special_tokens": [eos, *special]})
    return tokenizer


def sentence_piece(*special, eos="</s>", scheme="first", kind=models.Unigram, **kw):
    """Pieces with a space before the first word, as Llama 2's and Gemma's; in a Unigram one the EOS is a piece, too."""
    backend = Tokenizer(kind())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    options = {"vocab_size": 220, "show_progress": False, "special_tokens": ["<unk>", eos]}
    train = trainers.UnigramTrainer if kind is models.Unigram else trainers.BpeTrainer
    trainer = train(**options, **({"unk_token": "<unk>"} if kind is models.Unigram else {}))
    backend.train_from_iterator([*TEXTS, "< / s > < e o s > | end of a turn bos im"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token=eos, **kw)
    tokenizer.add_special_tokens({"extra_special_tokens": list(special)})
    return tokenizer


TOKENIZERS = {
    "words": word_level,
    "bytes": byte_bpe,
    "unigram": sentence_piece,
    "unigram, always": lambda **kw: sentence_piece(scheme="always", **kw),
    "pieces": lambda **kw: sentence_piece(kind=models.BPE, **kw),
}


def turned(opening: str, closing: str) -> str:
    """A chat template: `opening` with ROLE in it, the text, `closing`."""
    head, tail = opening.split("ROLE")
    return (
        f"{{% for m in messages %}}{head}{{{{ m.role }}}}{tail}{{{{ m.content }}}}{closing}\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{head}assistant{tail}{{% endif %}}"
    )


CHATML = turned("<|im_start|>ROLE\n", "<|im_end|>")
PHI = turned("<|ROLE|>\n", "<|end|>")


def write(path, *some: dict) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in some))
    return str(path)


def save(folder, tokenizer, settings: dict | None = None, arch: str = "llama", **kw):
    """A tiny model's folder; settings: its generation_config.json."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = tiny.model(arch, **{"vocab": len(tokenizer), **ids, **kw})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if settings is not None:
        (Path(folder) / "generation_config.json").write_text(json.dumps(settings))
    return model


def call(monkeypatch, module, flags: str) -> None:
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *shlex.split(flags)])
    module.main()


def told(monkeypatch, capsys, module, flags: str) -> str:
    """The one line in which a command is refused."""
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *shlex.split(flags)])
    with pytest.raises(SystemExit) as stop:
        ranks.cli(module.main)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------------------------------------ 1. the end of a turn
@pytest.mark.parametrize(
    "special, eos, template, named, first, note",
    [
        ("<|im_start|> <|im_end|>", "<eos>", CHATML, ["<|im_end|>", "<eos>"], "<|im_end|>", "y ends with <|im_end|>"),
        ("<|end|> <|user|>", "<eos>", PHI, ["<eos>", "<|user|>", "<|end|>"], "<|end|>", "y ends with <|end|>"),
        ("<|im_start|> <|im_end|>", "<|im_end|>", CHATML, ["<eos>"], "<|im_end|>", ""),
        ("<|im_start|> <|im_end|>", "<eos>", CHATML, [], "<eos>", "ends a turn with <|im_end|>, but y ends with <eos>"),
        ("<|end|>", "<eos>", PHI, ["<eos>"], "<eos>", "make it eos_token in tokenizer_config.json"),
        ("<|end|>", "<eos>", None, ["<|end|>"], "<eos>", ""),
        ("<|end|>", "<eos>", turned("[ROLE]", " {{ eos_token }}"), ["<|end|>"], "<eos>", ""),
        ("<|end|>", "<eos>", turned("[ROLE]", ""), ["<|end|>"], "<eos>", ""),
    ],
)
def test_one_decision_which_tokens_end_a_response(special, eos, template, named, first, note):
    tokenizer = byte_bpe("<eos>", *special.split(), eos=eos, chat_template=template)
    ids = tokenizer.convert_tokens_to_ids
    chat.settle_ends(tokenizer, [*map(ids, named), 99999])  # one without a token
    assert chat.ends(tokenizer)[0] == ids(first) == data.encode(tokenizer, "a", "b")[1][-1]
    assert sorted(chat.ends(tokenizer)) == sorted({ids(eos), *map(ids, named)})
    assert note in chat.Remarks(tokenizer).notes(uses_template=True)[0] if note else not tokenizer.end_note
    assert tokenizer.eos_token == first


def test_a_template_that_writes_the_eos_elsewhere_keeps_it():
    template = turned("{{ eos_token }}[ROLE]", "<|end|>")
    tokenizer = byte_bpe("<|end|>", chat_template=template)
    before = chat.chat(tokenizer, "Why?")
    chat.settle_ends(tokenizer, [tokenizer.convert_tokens_to_ids("<|end|>")])
    assert chat.chat(tokenizer, "Why?") == before and tokenizer.eos_token == "<eos>"
    assert data.encode(tokenizer, "a", "b")[1][-1] == tokenizer.convert_tokens_to_ids("<|end|>")


@pytest.mark.parametrize("settings", ["list", "config"])
def test_what_y_ends_with_is_saved_and_stops_transformers(tmp_path, monkeypatch, settings):
    """The EOS of the tokenizer, or of generation_config's list; the model learns one response by heart."""
    monkeypatch.chdir(tmp_path)
    tokenizer = word_level(chat_template=turned(" <bot> ROLE : ", " <turn> "))
    turn, eos = (tokenizer.convert_tokens_to_ids(token) for token in ("<turn>", "<eos>"))
    if settings == "list":
        save("base", tokenizer, {"eos_token_id": [eos, turn], "pad_token_id": 2})
    else:
        tokenizer.eos_token = "<turn>"
        save("base", tokenizer, eos_token_id=eos)
    write("d.jsonl", *[{"prompt": "how many eggs", "response": "amy has 3 eggs"}] * 8)
    flags = "--model base --task ultrachat --columns response=response --data d.jsonl"
    call(monkeypatch, sft, f"{flags} --out out --batch-size 8 --epochs 40 --lr 3e-3")
    assert json.loads(Path("out/config.json").read_text())["eos_token_id"] == turn
    assert GenerationConfig.from_pretrained("out").eos_token_id == [turn, eos]
    model, again = AutoModelForCausalLM.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
    assert again.eos_token == "<turn>"
    x = again("".join(chat.chat(again, "how many eggs")), return_tensors="pt")
    z = model.generate(**x, max_new_tokens=20, do_sample=False)[0, x["input_ids"].shape[1] :].tolist()
    assert again.decode(z) == "amy has 3 eggs <turn>"
    assert chat.ends(fsdp.load_tokenizer("out")) == [turn, eos]


@pytest.mark.parametrize("named", [range(3, 60), range(40, 100, 3)])
def test_every_decoder_stops_at_every_end(tmp_path, monkeypatch, named):
    """Many ordinary words are named as ends: draws are short, and end with one of them, which is not in the text."""
    monkeypatch.chdir(tmp_path)
    tokenizer = word_level()
    save("m", tokenizer, {"eos_token_id": [*named]})
    write("d.jsonl", *({"prompt": f"how many {i}", "response": f"#### {i}"} for i in range(9)))
    flags = "--model m --task ultrachat --columns response=response --data d.jsonl --max-response 50"
    call(monkeypatch, generate, f"{flags} --out z.jsonl")
    call(monkeypatch, rac, f"{flags} --out out --epochs 0")
    call(monkeypatch, evaluate, f"run {flags} --out e --name m --temperatures 1")
    alpaca = "alpaca --model m --data d.jsonl --instruction prompt --max-response 50 --name m --out a"
    call(monkeypatch, evaluate, alpaca)
    drawn = datasets.load_from_disk("z.jsonl.data")
    z = [row["z"][0] for row in drawn] + datasets.load_from_disk("out/D_r_1")["z"][:]
    z += [some for row in datasets.load_from_disk("e/generations-t1") for some in row["z"]]
    z += datasets.load_from_disk("a.data")["z"][:]
    assert sum(len(tokens) < 50 for tokens in z) > 40
    assert {tokens[-1] for tokens in z if len(tokens) < 50} <= {1, *named}
    assert not any({*tokens[:-1]} & {1, *named} for tokens in z)
    responses = [json.loads(line)["responses"][0] for line in open("z.jsonl")]
    assert responses == [tokenizer.decode(row["z"][0][:-1], skip_special_tokens=True) for row in drawn]
    assert json.loads(Path("e/results.json").read_text())["details"]["t1"]["without_eos"] < 0.2


# ------------------------------------------------------------------------------------------- special tokens in the text
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ordinary_text_has_the_ids_it_always_had_also_where_it_is_read_beside_special_text(name):
    tokenizer = TOKENIZERS[name]()
    eos = tokenizer.eos_token
    for text in [*TEXTS, f"{eos}{TEXTS[0]}", f"a {eos} b{eos}\n{TEXTS[1]}{eos}", f"<|user|>\nHi{eos}\n"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert chat.token_ids(tokenizer, text) == ids
        assert chat.token_ids(tokenizer, text + chat.MARK) == ids  # by the way of special text


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("row", [("how EOS then EOS", "a EOS .EOS"), ("EOS", "EOS EOS"), ("how many", "aEOSb")])
def test_special_tokens_in_data_are_text(tmp_path, name, row):
    """No id of one in x's data, in the middle of y, or in f; the template's own stay; and their text comes back."""
    tokenizer = TOKENIZERS[name]()
    eos, end = tokenizer.eos_token, tokenizer.eos_token_id
    prompt, response = (text.replace("EOS", eos) for text in row)
    path = write(tmp_path / "d.jsonl", {"prompt": "how", "response": "many"}, {"prompt": prompt, "response": response})
    found, notes = data.examples(
        "ultrachat", tokenizer, data=path, columns="response=response", max_reference=999, max_prompt=999
    )
    plain, special = found[0], found[1]
    assert special["y"].count(end) == 1 and special["y"][-1] == end
    assert special["x"].count(end) == plain["x"].count(end) == 2 and special["f"].count(end) == plain["f"].count(end)
    assert notes[1] == f"1 rows hold special tokens in their text ({eos}): read as text, first: row 1"
    if name in ("bytes", "pieces"):
        assert tokenizer.decode(special["y"][:-1]).strip() == response.strip()
        assert tokenizer.decode(special["x"]).count(eos) == 2 + prompt.count(eos)


def test_special_text_is_cut_as_by_a_tokenizer_that_does_not_know_it():
    own, twin = byte_bpe("<|im_end|>"), byte_bpe(eos="<other>")
    for text in ("Write the <eos> end.", "<|im_end|>", "a<eos><|im_end|> b", "\n<eos>"):
        assert data.encode(own, "x", text)[1][:-1] == twin(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("named", [["<|im_end|>"], []])
def test_a_turns_end_that_is_an_added_token_but_no_special_one_is_text_in_data(tmp_path, named):
    tokenizer = byte_bpe("<|im_start|>", chat_template=CHATML)
    tokenizer.add_tokens(["<|im_end|>", "<tool>"])
    end, tool = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<tool>"])
    chat.settle_ends(tokenizer, [end] if named else [])
    path = write(tmp_path / "d.jsonl", {"prompt": "a <|im_end|> b", "response": "c<|im_end|> <tool>"})
    found, notes = data.examples("ultrachat", tokenizer, data=path, columns="response=response")
    x, y = found["x"][0], found["y"][0]
    assert x.count(end) == 2 and y.count(end) == len(named) and y[-1] == chat.ends(tokenizer)[0]
    assert tool in y[:-1] and tokenizer.decode(y[:-1]) == "c<|im_end|> <tool>"
    assert "(<|im_end|>): read as text" in notes[-1]
    # an answer is text without its end, which skip_special_tokens would leave
    assert chat.response_text(tokenizer, y) == "c<|im_end|> <tool>"


def test_special_text_is_counted_in_dialogues_summaries_and_pairs(tmp_path):
    import argparse

    tokenizer = byte_bpe("<|im_start|>", "<|im_end|>", chat_template=CHATML)
    turn = {"role": "user", "content": "What is <|im_end|>?"}
    dialogue = [turn, {"role": "assistant", "content": "An end."}] * 2
    path = write(tmp_path / "a.jsonl", {"messages": dialogue})
    columns = "prompt=messages,response=messages"
    found, notes = data.examples("ultrachat", tokenizer, data=path, columns=columns)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [x.count(end) for x in found["x"]] == [2, 4]  # an empty system turn, and the turns
    assert "1 rows hold special tokens in their text (<|im_end|>)" in notes[-1]
    path = write(tmp_path / "b.jsonl", {"post": "p", "summary": "s", "title": "<eos>"})
    found, notes = data.examples("tldr", tokenizer, data=path)
    assert tokenizer.eos_token_id not in found["x"][0] and "(<eos>): read as text, first: row 0" in notes[-1]
    path = write(tmp_path / "c.jsonl", {"prompt": "p", "chosen": "a <eos> b", "rejected": "c"})
    flags = {"data": path, "columns": "", "limit": 0, "max_prompt": 0, "max_response": 0, "max_length": 99}
    found, notes = preferences.load_preferences(argparse.Namespace(task="ultrachat", **flags), tokenizer)
    assert found["y"][0].count(tokenizer.eos_token_id) == 1 and "1 rows hold special tokens" in notes[-1]


def test_a_long_post_with_special_text_fits_its_limit():
    tokenizer = byte_bpe()
    row = chat.shield(tokenizer, {"prompt": "stop <eos> here <eos> " * 30, "response": "r"})
    ids = data.tokenize(tokenizer, data.tldr_x(row, tokenizer, 100))
    assert len(ids) <= 100 and tokenizer.eos_token_id not in ids and tokenizer.decode(ids).endswith("\n\nTL;DR:")


# ------------------------------------------------------------------------------------------------ 2. chat templates
BROKEN = {
    "an undefined name's part": "{% for m in messages %}{{ m.content + documents[0].text }}{% endfor %}",
    "a filter that is not there": "{{ messages | unheard }}",
    "an arithmetic error": "{{ 1 // 0 }}{{ messages[0].content }}",
    "an unclosed block": "{% if messages %}{{ messages[0].content }}",
    "no such role": "{% for m in messages %}{% if m.role != 'human' %}{{ raise_exception('Human\\nor not') }}"
    "{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    save("model", word_level(chat_template=BROKEN[name]))
    write("d.jsonl", {"question": "how", "answer": "3"})
    line = told(monkeypatch, capsys, sft, "--model model --task gsm8k --data d.jsonl --out out")
    assert line.startswith("sft.py: error: --model model: its chat template cannot be used (")


FOLDED = {
    "in front, labelled": "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n' %}{% else %}"
    "{% set s = '' %}{% endif %}{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ s if loop.first }}"
    "Q: {{ m.content }}<eos>{% endfor %}<|assistant|>",
    "a block in the user's turn": "{% set s = messages[0].content if messages[0].role == 'system' else none %}"
    "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{% if loop.first and s is not none %}<sys>{{ s }}</sys>"
    "{% endif %}{{ m.content }}{% endfor %}[assistant]",
    "behind the question": "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% if loop.last "
    "and messages[0].role == 'system' %}\n\n{{ messages[0].content }}{% endif %}[/]{% endfor %}",
    "unknown": "{% for m in messages %}{% if m.role == 'system' %}{{ 1 / 0 }}{% endif %}[{{ m.content }}]{% endfor %}",
    "bare": "{% for m in messages %}{{ m.content }}\n{% endfor %}",
}


@pytest.mark.parametrize("name", FOLDED)
def test_no_empty_system_text_stands_in_the_users_turn(name):
    tokenizer = byte_bpe(chat_template=FOLDED[name])
    plain = tokenizer.apply_chat_template(chat.as_turns("Why?"), tokenize=False, add_generation_prompt=True)
    assert data.chat(tokenizer, "Why?") == plain
    assert "Be brief." in data.chat(tokenizer, "Why?", "Be brief.")


HELPFUL = "{% if messages[0].role != 'system' %}<|im_start|>system\nI help.<|im_end|>\n{% endif %}"


@pytest.mark.parametrize("template", [CHATML, PHI, HELPFUL + CHATML])
def test_an_empty_system_turn_of_its_own_stays_as_in_the_paper(template):
    tokenizer = byte_bpe("<|im_start|>", "<|im_end|>", chat_template=template)
    whole = [{"role": "system", "content": ""}, *chat.as_turns("Why?")]
    expected = tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
    assert data.chat(tokenizer, "Why?") == expected


@pytest.mark.parametrize("opening", ["<think>", "<think>\n", "<thinking>\n\n", "[THINK]"])
def test_reasoning_is_opened_once(tmp_path, opening):
    word = opening.strip()
    close = word.replace("<", "</").replace("[", "[/")
    template = turned("[ROLE]", "").replace("assistant]", f"assistant]{opening}")
    tokenizer = byte_bpe(chat_template=template)
    answers = (f"{word}\nFirst.\n{close}\n\nSo.", f"First.{close}So.", "So.")
    path = write(tmp_path / "d.jsonl", *({"prompt": "Why?", "response": text} for text in answers))
    found, notes = data.examples("ultrachat", tokenizer, data=path, columns="response=response")
    texts = [tokenizer.decode(row["x"] + row["y"]) for row in found]
    assert [text.count(word) for text in texts] == [1, 1, 1] and f"{opening}First" in texts[1]
    assert "1 responses close no reasoning" in notes[-1] and notes[-1].endswith("first: row 2")


@pytest.mark.parametrize(
    "written, expected",
    [
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{%- set day = strftime_now('%Y-%m-%d') -%}\nDay {{ day }}", "Day 2024-07-26"),
        ("{% set f = '%A, %-d %B' %}{{ strftime_now(f) if strftime_now is defined }}", "Friday, 26 July"),
        ("{% macro head() %}[{{ strftime_now('%H:%M') }}]{% endmacro %}\n{{ head() }}", "[00:00]"),
    ],
)
def test_a_template_that_writes_the_date_writes_the_same_one_on_every_day(monkeypatch, written, expected):
    tokenizer = byte_bpe(chat_template=written + "{% for m in messages %}|{{ m.content }}{% endfor %}")
    seen = set()
    for day in (1, 2):

        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(2031, 5, day, 7, 8)  # noqa: B023

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        seen.add(data.chat(tokenizer, "Why?", "S"))
    assert [text.lstrip("\n") for text in seen] == [f"{expected}|S|Why?"]


# ------------------------------------------------------------------------------------------------ 3. what a folder is
def flip(path: str, at: int = -1000) -> None:
    """One bit of a file, far inside of it; its size and times stay."""
    before, content = os.stat(path), bytearray(Path(path).read_bytes())
    content[at] ^= 1
    Path(path).write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def set_key(path: str, **change: object) -> None:
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | change))


CHANGES = {
    "one weight of many": (lambda: flip("model/model.safetensors", -9_000_001), "what --model holds"),
    "a row of the data": (lambda: flip("d.jsonl", -3), "what --data holds"),
    "a template in a file": (lambda: Path("model/chat_template.jinja").write_text("{{ messages }}"), "chat template"),
    "the EOS": (lambda: set_key("model/tokenizer_config.json", eos_token="<pad>"), "the tokenizer and chat template"),
    "a word": (lambda: flip("model/tokenizer.json", -300), "the tokenizer"),
    "what ends it": (lambda: set_key("model/generation_config.json", eos_token_id=[1, 5]), "generation settings"),
    "a setting": (lambda: set_key("model/config.json", rms_norm_eps=0.1), "the config and generation settings of"),
}


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_a_run_is_the_same_only_while_all_it_was_given_is(tmp_path, monkeypatch, capsys, name, done):
    monkeypatch.chdir(tmp_path)
    save("model", word_level(), vocab=80_000)  # 20 MB of weights
    write("d.jsonl", *({"prompt": "how", "response": f"{i}"} for i in range(8)))
    flags = "--model model --task toy --data d.jsonl --out out"
    args = sft.stage.parser("").parse_args(shlex.split(flags))
    assert folders.open_out(args)
    Path("out/config.json" if done else "out/log.jsonl").write_text("{}\n")
    assert folders.open_out(args) != done  # the same run goes on, or is done
    CHANGES[name][0]()
    with pytest.raises(ValueError, match="belongs to another run") as error:
        folders.open_out(args)
    assert CHANGES[name][1] in str(error.value)


def test_a_hub_models_revision_is_part_of_what_a_run_was_given(tmp_path, monkeypatch):
    import transformers.utils

    args = sft.stage.parser("").parse_args(shlex.split(f"--model some/name --task toy --out {tmp_path / 'out'}"))
    commits = iter(["ab12", "ab12", "cd34"])
    path = "/cache/models--some--name/snapshots/{}/config.json"
    monkeypatch.setattr(transformers.utils, "cached_file", lambda *_: path.format(next(commits)))
    for _ in range(2):
        assert folders.open_out(args)
        (tmp_path / "out" / "log.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="the revision of --model ab12 -> cd34"):
        folders.open_out(args)


@pytest.mark.parametrize("rewrite", ["copied over", "renamed"])
def test_a_parquet_file_is_read_itself(tmp_path, monkeypatch, rewrite):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = ("first", "other", "third")
    for name in names:
        turns = [{"role": "user", "content": name}]
        table = {"prompt": [f"{name} question", None], "n": [1, 2], "messages": [turns, turns]}
        datasets.Dataset.from_dict(table).to_parquet(tmp_path / name)
        os.utime(tmp_path / name, (1.7e9, 1.7e9))
    for name in names:
        if rewrite == "renamed":
            os.replace(tmp_path / name, tmp_path / "d.parquet")
        else:
            shutil.copy2(tmp_path / name, tmp_path / "d.parquet")
        first, second = rows.read(str(tmp_path / "d.parquet"))
        assert first["prompt"] == f"{name} question" and second["prompt"] is None
        assert first["messages"] == [{"role": "user", "content": name}]


# ------------------------------------------------------------------------------------------------ 4. models
STATES = ["mamba2", "falcon_mamba", "jamba", "bamba", "falcon_h1", "recurrent_gemma", "rwkv", "zamba2", "qwen3_next"]
STATES += ["nemotron_h", "minimax", "xlstm", "granitemoehybrid", "olmo_hybrid"]
STATES += [("lfm2", {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]})]
PLAIN = [*tiny.ARCHS, "gemma2", "gemma3_text", "phi", "phi3", "mixtral", "olmo2", "gpt_oss", "cohere2", "bloom", "opt"]


@pytest.mark.parametrize("kind", STATES, ids=str)
def test_a_model_with_states_is_refused_before_its_weights_are_read(tmp_path, kind):
    kind, settings = (kind, {}) if isinstance(kind, str) else kind
    AutoConfig.for_model(kind, **settings).save_pretrained(tmp_path)  # no weights at all
    word_level().save_pretrained(tmp_path)
    for load in (fsdp.load_tokenizer, fsdp.load_model):
        with pytest.raises(OSError, match=f"{kind} has layers that keep a state in place of keys and values"):
            load(str(tmp_path))


@pytest.mark.parametrize("kind", PLAIN)
def test_attention_models_are_not(tmp_path, kind):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    kinds.check_kind(str(tmp_path))


def test_a_model_that_ignores_the_cache_is_no_silent_fault():
    from transformers import RwkvConfig, RwkvForCausalLM

    model = RwkvForCausalLM(RwkvConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2)).eval()
    with pytest.raises(ValueError, match="RwkvForCausalLM does not keep keys and values of each token"):
        generate.generate(model, [[3, 4]], max_new_tokens=2, eos_token_id=1)


def remote(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {
        "AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}))  # fmt: skip
    (folder / "own.py").write_text("import pathlib; pathlib.Path('ran').touch()")


def remote_tokenizer(folder: Path) -> None:
    AutoConfig.for_model("llama").save_pretrained(folder)
    set_key(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own")
    (folder / "tokenizer.json").unlink()
    (folder / "own.py").write_text("import pathlib; pathlib.Path('ran').touch()")


def config(kind: str, **change: object):
    def prepare(folder: Path) -> None:
        AutoConfig.for_model(kind).save_pretrained(folder)
        set_key(folder / "config.json", **change)

    return prepare


def adapter(beside: str):
    def prepare(folder: Path) -> None:
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
        if beside:
            AutoConfig.for_model(beside).save_pretrained(folder)

    return prepare


ODD = {
    "an adapter without its base": (adapter(""), "an adapter"),  # more of it in test_lora.py, which needs peft
    "an adapter beside a config": (adapter("llama"), "an adapter"),
    "bits": (config("llama", quantization_config={"quant_method": "bitsandbytes"}), "quantised (bitsandbytes)"),
    "gptq": (config("qwen2", quantization_config={"quant_method": "gptq", "bits": 4}), "quantised (gptq)"),
    "code of its own": (remote, "code of its own (auto_map, own)"),
    "a tokenizer with code": (remote_tokenizer, "no tokenizer could be loaded"),
    "pictures": (config("llama4"), "llama4 is a model of more than text"),
    "more pictures": (config("gemma3n"), "gemma3n is a model of more than text"),
    "sounds": (config("moshi"), "moshi is a model of more than text"),
    "two stacks": (config("bart"), "bart is an encoder and a decoder"),
    "masked": (config("roberta"), "roberta is a masked language model"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_folder_is_named_as_what_it_is_and_its_code_is_not_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    word_level().save_pretrained("model")
    prepare, message = ODD[name]
    prepare(Path("model"))
    with pytest.raises(OSError) as error:
        fsdp.load_tokenizer("model")
    assert message in str(error.value) and str(error.value).startswith("--model model: ")
    assert not Path("ran").exists()


def test_the_language_model_of_a_larger_one_can_be_saved_alone(tmp_path):
    """As docs/data.md says."""
    from transformers import AutoModelForImageTextToText, Gemma3Config

    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": 60, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.2}
    vision = {**size, "image_size": 28, "patch_size": 14}
    whole = AutoModelForImageTextToText.from_config(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    ).eval()
    alone = AutoModelForCausalLM.from_config(whole.config.get_text_config())
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.lm_head.load_state_dict(whole.lm_head.state_dict())
    alone.save_pretrained(tmp_path)
    kinds.check_kind(str(tmp_path))
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert torch.allclose(fsdp.load_model(str(tmp_path))(ids).logits, whole(input_ids=ids).logits, atol=1e-5)


SETTINGS = [
    ({"temperature": 0.3}, "temperature"),
    ({"do_sample": False, "top_k": 7, "min_p": 0.1, "eos_token_id": [1, 4]}, "top_k, min_p"),
    ({"do_sample": True, "temperature": 0.3}, None),
]


@pytest.mark.parametrize("settings, dropped", SETTINGS)
def test_generation_settings_that_cannot_be_saved_are_left_out(tmp_path, monkeypatch, capsys, settings, dropped):
    monkeypatch.chdir(tmp_path)
    save("m", word_level(), settings)
    write("d.jsonl", {"prompt": "how", "response": "3"})
    call(monkeypatch, sft, "--model m --task toy --data d.jsonl --out out --max-steps 1 --checkpoint-every 0")
    saved, said = GenerationConfig.from_pretrained("out"), capsys.readouterr().err
    saved.validate(strict=True)
    if dropped:
        assert f"--model m: generation_config.json sets {dropped} but not do_sample: they are left out" in said
    assert saved.temperature == (None if dropped else 0.3) or dropped != "temperature"
    assert saved.eos_token_id == settings.get("eos_token_id", 1)


@pytest.mark.parametrize("settings", [{"num_return_sequences": 3}, {"length_penalty": 2.0, "temperature": 0.5}])
def test_what_could_not_be_saved_is_found_before_the_first_step(tmp_path, monkeypatch, capsys, settings):
    monkeypatch.chdir(tmp_path)
    save("m", word_level(), settings)
    write("d.jsonl", {"prompt": "how", "response": "3"})
    monkeypatch.setattr(sft.Run, "steps", lambda *_: pytest.fail("a step"))
    line = told(monkeypatch, capsys, sft, "--model m --task toy --data d.jsonl --out out")
    assert "error: --model m: " in line and "generation_config.json c" in line


@pytest.mark.parametrize("holes", [False, True])
def test_a_padded_vocabulary_gives_no_id_without_a_token(tmp_path, monkeypatch, holes):
    """Half of the ids are padding, and there may be gaps between the tokens; what is written can be read again."""
    monkeypatch.chdir(tmp_path)
    tokenizer = word_level()
    if holes:
        vocab = {word: i if i < 9 else 2 * i for word, i in tokenizer.get_vocab().items()}
        backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    ids = {*tokenizer.get_vocab().values()}
    save("m", tokenizer, vocab=2 * max(ids))
    write("d.jsonl", *({"prompt": f"how many {i}", "response": f"amy has {i} . now {i}"} for i in range(20)))
    flags = "--model m --task ultrachat --columns response=response --data d.jsonl --max-response 20"
    made = []
    call(monkeypatch, rac, f"{flags} --out rac --epochs 0")
    call(monkeypatch, rac, f"{flags} --out topk --epochs 0 --labels topk --topk 5 --temperature 0")
    for name in ("rac", "topk"):
        rows_ = datasets.load_from_disk(f"{name}/D_r_1")
        made += [token for row in rows_ for token in row["z"] + row["z_bar"]]
        made += [token for row in rows_ for top in row.get("top_ids", []) for token in top]
    import bash
    import spin

    call(monkeypatch, bash, f"{flags} --out bash --epochs 0 --beta 0.7")
    made += [token for y_hat in datasets.load_from_disk("bash/D_s_1")["y_hat"] for token in y_hat]
    call(monkeypatch, spin, f"{flags} --out spin --epochs 0")
    made += [token for z in datasets.load_from_disk("spin/D_spin_1")["z"] for token in z]
    call(monkeypatch, generate, f"{flags} --out z.jsonl --top-p 0.9 --n 3")
    made += [token for row in datasets.load_from_disk("z.jsonl.data") for z in row["z"] for token in z]
    assert len(made) > 1000 and {*made} <= ids
    call(monkeypatch, rac, f"{flags} --out again --max-steps 1 --pairs rac/D_r_1")


def test_where_nothing_is_padded_nothing_is_masked(tmp_path):
    from types import SimpleNamespace

    tokenizer = word_level()
    save(tmp_path, tokenizer)
    args = SimpleNamespace(model=str(tmp_path), dtype="float32", shard=0, lock_step=False)
    assert fsdp.model_of(args, tokenizer).absent is None
    logits = torch.randn(2, 5)
    assert decode_step.known(torch.nn.Linear(1, 1), logits) is logits


@pytest.mark.parametrize("templates", [None, {"default": CHATML, "tools": PHI, "rag": CHATML}])
def test_a_crash_between_any_two_moves_is_finished_by_the_same_command(tmp_path, monkeypatch, templates):
    """Several templates lie in a folder of their own in a tokenizer's folder."""
    monkeypatch.chdir(tmp_path)
    save("m", word_level(chat_template=templates))
    write("d.jsonl", *({"prompt": "how", "response": f"{i}"} for i in range(4)))
    flags = "--model m --task toy --data d.jsonl --batch-size 2 --checkpoint-every 1"
    call(monkeypatch, sft, f"{flags} --out whole")
    expected = {path.name: path.read_bytes() for path in Path("whole").rglob("*") if path.suffix == ".safetensors"}
    moves = len([path for path in Path("whole").iterdir() if path.suffix in (".json", ".jinja", ".safetensors")])
    replace, crashed = Path.replace, 0
    for k in range(moves + 2):
        left = [k]

        def until(self, target, left=left):
            if ".saving" in str(self):
                if not left[0]:
                    raise KeyboardInterrupt  # nobody handles it as an error of the disk
                left[0] -= 1
            return replace(self, target)

        for count in (k, 1):  # and once more, at another move
            left[0] = count
            monkeypatch.setattr(Path, "replace", until)
            try:
                call(monkeypatch, sft, f"{flags} --out out-{k}")
            except (KeyboardInterrupt, SystemExit) as error:
                crashed += isinstance(error, KeyboardInterrupt)
        monkeypatch.setattr(Path, "replace", replace)
        try:
            call(monkeypatch, sft, f"{flags} --out out-{k}")
        except SystemExit as done:  # finished before
            assert done.code == 0
        found = {path.name: path for path in Path(f"out-{k}").rglob("*")}
        assert found.keys() == {path.name for path in Path("whole").rglob("*")}
        assert all(found[name].read_bytes() == content for name, content in expected.items())
    assert crashed >= moves


def test_a_crash_after_the_last_move_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("m", word_level())
    write("d.jsonl", {"prompt": "how", "response": "3"})
    flags = "--model m --task toy --data d.jsonl --out out --checkpoint-every 1"
    rmdir = Path.rmdir
    monkeypatch.setattr(Path, "rmdir", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, sft, flags)
    monkeypatch.setattr(Path, "rmdir", rmdir)
    assert Path("out/.saving").exists() and Path("out/checkpoints").exists()
    with pytest.raises(SystemExit) as done:
        call(monkeypatch, sft, flags)
    assert done.value.code == 0 and not Path("out/.saving").exists() and not Path("out/checkpoints").exists()


# ------------------------------------------------------------------------------------------------ 5. data
POST = {"post": "It sleeps.", "summary": "Cat."}


@pytest.mark.parametrize("value", [None, float("nan"), "", " \n"])
@pytest.mark.parametrize("column", ["subreddit", "title"])
def test_a_missing_optional_value_is_left_out(tmp_path, value, column):
    tokenizer = byte_bpe()
    path = write(tmp_path / "d.jsonl", POST | {"subreddit": "pets", "title": "My cat"} | {column: value})
    found, _ = data.examples("tldr", tokenizer, data=path, max_reference=500)
    text = tokenizer.decode(found["x"][0])
    assert column.upper() not in text and "nan" not in text and "None" not in text
    assert column.upper() not in tokenizer.decode(found["f"][0])


@pytest.mark.parametrize("value, what", [(3, "int"), (2.5, "float"), (["a"], "list"), ({"a": 1}, "dict")])
@pytest.mark.parametrize("column", ["subreddit", "title"])
def test_an_optional_value_that_is_no_text_is_one_line(tmp_path, value, what, column):
    path = write(tmp_path / "d.jsonl", POST, POST | {column: value})
    with pytest.raises(ValueError, match=f"d.jsonl, row 1: column '{column}' is {what}, not text"):
        data.load_rows("tldr", path)


def test_a_missing_part_of_a_joined_column_is_passed_over(tmp_path):
    path = write(tmp_path / "d.jsonl", *({"a": "A", "b": b, "response": "r"} for b in ("B", None, float("nan"), "")))
    found = data.load_rows("ultrachat", path, columns="prompt=a+b,response=response")
    assert [row["prompt"] for row in found] == ["A\n\nB", "A", "A", "A"]
    found = data.load_rows("ultrachat", path, columns="prompt=a,response=b", need_response=False)
    assert [row["response"] for row in found] == ["B", "", "", ""]
    with pytest.raises(ValueError, match="row 1: column 'b' is NoneType, not text"):
        data.load_rows("ultrachat", path, columns="prompt=a,response=b")
    path = write(tmp_path / "e.jsonl", {"a": None, "b": float("nan"), "response": "r"})
    with pytest.raises(ValueError, match=r"row 0: empty prompt \(column 'a\+b'\)"):
        data.load_rows("ultrachat", path, columns="prompt=a+b,response=response")


SAID = [{"role": "user", "content": "Hi [x]"}, {"role": "assistant", "content": "Ho"}]
AS_TEXT = {
    "JSON": json.dumps(SAID),
    "JSON, indented": json.dumps(SAID, indent=2),
    "JSON of JSON": json.dumps(json.dumps(SAID)),
    "Python": str(SAID),
    "ShareGPT": json.dumps([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]),
    "numpy": str(SAID).replace("}, {", "}\n {"),
}


@pytest.mark.parametrize("name", AS_TEXT)
@pytest.mark.parametrize("columns", ["prompt=c,response=c", "prompt=c,response=response", "prompt=response,response=c"])
def test_a_dialogue_as_text_is_named_as_that(tmp_path, name, columns):
    path = write(tmp_path / "d.jsonl", {"c": AS_TEXT[name], "response": "r"})
    with pytest.raises(ValueError, match="row 0: column 'c' is a dialogue as text, not a list of messages"):
        data.load_rows("ultrachat", path, columns=columns)
    row = {"prompt": "p", "chosen": "c", "rejected": AS_TEXT[name]}
    with pytest.raises(ValueError, match="column 'rejected' is a dialogue as text"):
        preferences.preference(row, {key: key for key in row}, "d.jsonl, row 0")


@pytest.mark.parametrize("text", ['[{"a": 1}]', "[1, 2] is a list", '{"role": "user", "content": "x"}', "[{"])
def test_other_json_is_text(tmp_path, text):
    path = write(tmp_path / "d.jsonl", {"prompt": text, "response": text})
    assert data.load_rows("ultrachat", path, columns="response=response")[0]["response"] == text
    speaks_of_one = [SAID[0] | {"content": json.dumps(SAID)}, SAID[1]]
    path = write(tmp_path / "m.jsonl", {"messages": speaks_of_one})
    assert data.load_rows("ultrachat", path, columns="prompt=messages,response=messages")
