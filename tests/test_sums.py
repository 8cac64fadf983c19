"""The sums task by text: as the toy task by word on its own tokenizer, and the same verdicts with any other."""

import functools
import hashlib
import json
import random
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import sums
import toy

Y = (
    "amy has 25 . first buys 15 : 25 + 15 = 40 , again 25 + 15 = 40 . second gives 9 : 40 - 9 = 31 , again 40 - 9 = 31 "
    ". #### 31"
)
KINDS = ("digits", "numbers", "metaspace digits", "metaspace numbers", "unigram")  # the subword tokenizers
DIGITS, NUMBERS = ("digits", "metaspace digits", "unigram"), ("numbers", "metaspace numbers")  # 40 is 4 0, or one token


@functools.cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """digits: byte-level BPE, digits one by one, as SmolLM2. numbers: as GPT-2. metaspace ...: as Llama 2, with a space
    before each text. unigram: SentencePiece's other model; here nearly letter by letter. phrases: tokens span words."""
    if kind == "words":
        return toy.tokenizer()
    unigram, metaspace = kind == "unigram", kind == "unigram" or "metaspace" in kind
    tok = Tokenizer(models.Unigram() if unigram else models.BPE())
    space = pre_tokenizers.Metaspace() if metaspace else pre_tokenizers.ByteLevel(False, use_regex=kind != "phrases")
    parts = [pre_tokenizers.Digits(True)] if "digits" in kind else []
    tok.pre_tokenizer = pre_tokenizers.Sequence([space, *parts] if metaspace else [*parts, space])
    tok.decoder = decoders.Metaspace() if metaspace else decoders.ByteLevel()
    options = {"vocab_size": 600, "special_tokens": ["<unk>", "<eos>"], "show_progress": False}
    options |= {"unk_token": "<unk>"} if unigram else {}
    options |= {} if metaspace else {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    rows = sums.problems(400, "texts of the tokenizer")
    trainer = (trainers.UnigramTrainer if unigram else trainers.BpeTrainer)(**options)
    tok.train_from_iterator([text for row in rows for text in row.values()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<eos>", bos_token="<eos>", unk_token="<unk>")


def ids_of(kind: str, text: str, eos: bool = True) -> list[int]:
    tok = tokenizer(kind)
    return tok(text, add_special_tokens=False)["input_ids"] + [tok.eos_token_id] * eos


def pieces(kind: str, ids: list[int]) -> list[str]:
    return [sums.spelling(tokenizer(kind)).piece(token) for token in ids]


def flawed(rng: random.Random, scramble: int = 0, **options) -> tuple[list[str], list[str]]:
    """(y, z) as words, z wrong in all the ways of toy.flawed, and with `scramble` words of any kind in it."""
    _, y = sums.problem(rng, **options)
    z = toy.flawed(y, rng)
    for _ in range(scramble):
        z[rng.randrange(len(z))] = rng.choice([*sums.OTHERS, *sums.NAMES, *sums.GAINS, *toy.NUMBERS])
    return y, z


# ---- by word, as toy.py had it before sums.py ----


def by_word(y: list[str], z: list[str]) -> list[str | None]:
    """The right words, None where nothing right can be said. (toy.py gave z's own there, and for sums over 40.)"""
    sentences = sums.sentences_of(y if y[-1] == "<eos>" else [*y, "<eos>"])
    number = {sentence[0]: i for i, sentence in enumerate(sentences)}
    labels, done, right, written = [], -1, None, []
    for word in z:
        k = len(written)
        if k == 0:
            label = sentences[min(done + 1, len(sentences) - 1)][0]
            done = number.get(word, done)
            right = sentences[done] if word in number else None
        elif right is None:
            label = None
        else:
            label = right[k]
            if right[k - 1] == "=" and written != right[:k]:
                total = sums.add(*written[-4:-1])
                label = str(total) if 0 <= total else None
            if word != right[k] and not (word.isdigit() and right[k].isdigit()):
                right = None
        labels.append(label)
        written = [] if word == "." else written + [word]
        if right is not None and len(written) == len(right):
            right = None
    return labels


def toy_labels(y: list[str], z: list[str]) -> list[str]:
    return [own if word is None or word not in toy.IDS else word for own, word in zip(z, by_word(y, z))]


def toy_quality(y: list[str], z: list[str], z_bar: list[str]) -> dict:
    wrong = [own != right for own, right in zip(z, toy_labels(y, z))]
    kept = [label == right for own, label, right in zip(z, z_bar, toy_labels(y, z)) if label != own]
    first = wrong.index(True) if True in wrong else len(z)
    return {
        "unmasked": len(kept) / len(z),
        "precision": sum(kept) / len(kept) if kept else None,
        "recall": sum(kept) / sum(wrong) if any(wrong) else None,
        "wrong_early": sum(label != own for own, label in zip(z[:first], z_bar)),
        "n": len(z),
    }


def toy_inject(y: list[str], seed: int | str) -> list[str]:
    rng = random.Random(f"inject {seed}")
    j = rng.choice([j for j, word in enumerate(y) if word == "=" and y[j - 4] == ":"]) + 1
    return y[:j] + [rng.choice([number for number in map(str, range(41)) if number != y[j]])]


def toy_recovery(y: list[str], prefix: list[str], continuation: list[str]) -> dict[str, bool]:
    final = sums.answer(" ".join(continuation))
    return {"restated": continuation[:7] == y[len(prefix) :][:7], "final": final == sums.answer(" ".join(y))}


# ---- problems ----


def test_problems_are_those_of_the_toy_task():
    for made, digest in (
        (sums.splits(60, 50, 40, seed=3), "3384fd10c3a8c529"),
        (sums.splits(), "d223580aae2ab183"),
        (sums.problems(50, 1, (2, 9), (1, 4), (), True), "27e552457885ccc6"),
    ):
        assert hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16] == digest


def test_difficulty():
    rows = sums.problems(100, 0, operands=(100, 499), n_steps=(5, 7), top=999)
    numbers = {int(word) for row in rows for word in row["response"].split() if word.isdigit()}
    assert 900 < max(numbers) <= 999
    for row in rows:
        assert sums.has_sum(row["response"])
        for a, sign, b, c in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", row["response"]):
            assert sums.add(a, sign, b) == int(c)
    assert len(sums.splits(9, 8, 7, top=99, operands=(20, 49))["train"]) == 9
    for options in ({"operands": (2, 21)}, {"n_steps": (3, 8)}):
        with pytest.raises(ValueError, match="must be at most 20 with numbers up to 40 .*, and 7"):
            sums.problems(1, 0, **options)


def test_answer():
    assert sums.answer("a #### 31 <eos>") == "31" and sums.answer("#### <eos>") is None and sums.answer("31") is None


def test_check_tokenizer():
    for kind in ("words", *KINDS):
        sums.check_tokenizer(tokenizer(kind))
    with pytest.raises(ValueError, match="cuts the same number .* now so, now so"):
        sums.check_tokenizer(tokenizer("phrases"))
    lower = Tokenizer(models.WordPiece({"[UNK]": 0, ".": 1, "amy": 2}, unk_token="[UNK]"))
    lower.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    lower = PreTrainedTokenizerFast(tokenizer_object=lower, unk_token="[UNK]")
    with pytest.raises(ValueError, match="no EOS token"):
        sums.check_tokenizer(lower)
    lower.eos_token = "[UNK]"
    with pytest.raises(ValueError, match="cannot spell"):
        sums.check_tokenizer(lower)


# ---- the word-level tokenizer: as toy.py by word ----


def test_labels_of_words_are_those_of_the_toy_task():
    rng, tok = random.Random(0), toy.tokenizer()
    for i in range(600):
        y, z = flawed(rng, scramble=rng.choice([0, 0, 1, 4]), n_steps=(1, 4), arbitrary=i % 5 == 0)
        for _ in range(i % 3):
            z[rng.randrange(len(z))] = rng.choice(toy.WORDS)  # <eos>, <pad>, <unk>
        y, z = y + ["<eos>"] * (i % 7 > 0), z + ["<eos>"] * (i % 4 > 0)
        y = y[: rng.randrange(1, len(y))] if i % 10 == 0 else y  # cut
        truth = toy_labels(y, z)
        ids, z_ids, labels = ([toy.IDS[word] for word in words] for words in (y, z, truth))
        assert sums.right_labels(tok, ids, z_ids) == labels
        assert sums.right_words(y, z, "<eos>") == by_word(y, z)
        other = [rng.choice([a, a, b, rng.choice(toy.WORDS)]) for a, b in zip(truth, z)]
        for z_bar in (truth, z, other):
            quality = sums.label_quality(tok, [ids], [z_ids], [[toy.IDS[word] for word in z_bar]])
            assert quality == toy_quality(y, z, z_bar)


def test_recovery_of_words_is_that_of_the_toy_task():
    rng, tok = random.Random(1), toy.tokenizer()
    for seed in range(300):
        y = [*sums.problem(rng)[1], "<eos>"]
        ids, prefix = [toy.IDS[word] for word in y], toy_inject(y, seed)
        start = [toy.IDS[word] for word in prefix]
        assert sums.inject_error(tok, ids, seed) == start
        for rest in (y[len(prefix) :], y[len(prefix) :][:9], toy.flawed(y, rng)[len(prefix) :], y[-3:], []):
            assert sums.recovery(tok, ids, start, [toy.IDS[word] for word in rest]) == toy_recovery(y, prefix, rest)


# ---- subword tokenizers ----


@pytest.mark.parametrize("kind", KINDS)
def test_y_is_right_and_text_comes_back(kind):
    rng, tok = random.Random(2), tokenizer(kind)
    for i in range(100):
        text = (" " if i % 2 else "") + " ".join(sums.problem(rng)[1])  # with and without a space before the first word
        y = ids_of(kind, text)
        assert sums.text_of(tok, y) == text.strip() == tok.decode(y, skip_special_tokens=True).strip()
        assert sums.right_labels(tok, y, y) == y == sums.right_labels(tok, y[:-1], y)
        other = ids_of(kind, text.strip() if i % 2 else f" {text}")  # one error where that space is wrong
        assert errors(kind, other, sums.right_labels(tok, y, other)).keys() <= {0}
        assert sums.label_quality(tok, [y], [y], [y]) == {
            "unmasked": 0, "precision": None, "recall": None, "wrong_early": 0, "n": len(y)
        }  # fmt: skip


def errors(kind: str, z: list[int], labels: list[int]) -> dict[int, str]:
    """{index of the word of z: the text up to it with the label at the first token of it that is wrong}"""
    found, text = {}, ""
    for own, label in zip(pieces(kind, z), pieces(kind, labels)):
        if own != label:
            inside = text[-1:].isalnum() and (own[0].isalnum() or label[0].isalnum())  # the word has begun before
            found.setdefault(len(sums.WORD.findall(text)) - inside, (text + label).strip())
        text += own
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_in_the_words_that_are_wrong(kind):
    """A word of z is wrong by word iff one of its tokens is; what the label makes of it begins the right word."""
    rng, tok, seen = random.Random(3), tokenizer(kind), 0
    for i in range(300):
        y, z = flawed(rng, scramble=i % 3)
        truth = [word and word.replace("<eos>", sums.END) for word in by_word(y, [*z, "<eos>"])]
        y_ids, z_ids, z = ids_of(kind, " ".join(y)), ids_of(kind, " ".join(z)), [*z, sums.END]
        wrong = errors(kind, z_ids, sums.right_labels(tok, y_ids, z_ids))
        expected = {j for j, word in enumerate(z) if truth[j] not in (None, word)}
        both = {j + 1 for j in wrong if truth[j].startswith(z[j])}  # a token too soon may be a wrong word itself, too
        assert wrong.keys() | (both & expected) == expected, (y, z)
        for j, made in wrong.items():
            right = " ".join([*z[:j], truth[j]]).replace(f" {sums.END}", sums.END)
            assert right.startswith(made) or re.match(rf"{re.escape(right)}[ \0]", made), (right, made)
        seen += len(wrong)
    assert seen > 300


@pytest.mark.parametrize("kind", KINDS)
def test_labels_against_the_slow_definition(kind):
    """Each label anew from the whole prefix and the definition by word; z and z_bar with any tokens in them."""
    rng, tok = random.Random(4), tokenizer(kind)

    def cut_there(word: str, n: int) -> bool:
        ids = tok(f". {word}", add_special_tokens=False)["input_ids"]
        return f". {word[:n]}" in ("".join(pieces(kind, ids[:i])).lstrip(" ") for i in range(len(ids)))

    def follows(words: list[str]) -> str:
        """The right continuation of whole words, six words of it."""
        out = ""
        for _ in range(6):
            right = by_word(y, [*words, "?"])[-1]
            if right is None:
                break
            out += f" {right}" if (words or lead) and right != "<eos>" else right
            words = [*words, right]
        return out.replace("<eos>", sums.END)

    def right(text: str, label: str, own: str) -> bool | None:
        """Is a label right behind a text? None where nothing right can be said."""
        words = sums.WORD.findall(text)
        open_word = words[-1] if words and re.search("[0-9A-Za-z#]$", text) else ""
        whole = [word.replace(sums.END, "<eos>") for word in (words[:-1] if open_word else words)]
        before = re.search(r"\s*$", text[: len(text) - len(open_word)])[0] + open_word
        rest = follows(whole)
        if before and not (rest.startswith(before) and rest != before and good_cut(before, rest)):
            if not open_word or sums.WORD.match(open_word + own)[0] != open_word:
                return None
            before, rest = "", follows([*whole, open_word])
        return None if not rest else good_cut(before + label, rest)

    def good_cut(text: str, rest: str) -> bool:
        if not rest.startswith(text):
            return text.startswith(f"{rest} ")
        n = len(text)
        begin = max((m.start() for m in re.finditer(r"(?<![^ ])[^ \0]", rest) if m.start() <= n), default=0)
        word = re.match(r"[^ \0]*", rest[begin:])[0]
        if n == 0 or n >= begin + len(word) or (n > begin and not word.isdigit()):
            return True
        return cut_there(word, n - begin)

    for i in range(60):
        y, z_words = flawed(rng, scramble=i % 3)
        y_ids, z = ids_of(kind, " ".join(y)), ids_of(kind, " ".join(z_words))[: rng.randint(20, 120)]
        for _ in range(i % 4):
            z[rng.randrange(len(z))] = rng.choice(z + [tok.eos_token_id, rng.randrange(len(tok))])
        labels, text, good, z_bar = sums.right_labels(tok, y_ids, z), "", [], []
        lead = pieces(kind, y_ids[:1])[0][:1] == " "
        for j, token in enumerate(z):
            z_bar.append(rng.choice([labels[j], rng.randrange(len(tok)), rng.choice(z)]))
            own, label, given = pieces(kind, [token, labels[j], z_bar[j]])
            if right(text, own, own) in (None, True):
                assert labels[j] == token, (text, own, label)
            else:
                assert labels[j] != token and right(text, label, own), (text, own, label)
            good.append(bool(right(text, given, own)))
            text += own
        quality = sums.label_quality(tok, [y_ids], [z], [z_bar])
        kept = [a for a, b, c in zip(good, z_bar, z) if b != c]
        assert quality["precision"] == sum(kept) / len(kept) and quality["unmasked"] == len(kept) / len(z)
        perfect = sums.label_quality(tok, [y_ids], [z], [labels])
        assert labels == z or perfect["precision"] == perfect["recall"] == 1 and perfect["wrong_early"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_labels_never_look_ahead(kind):
    rng, tok = random.Random(5), tokenizer(kind)
    for _ in range(60):
        y, z = (ids_of(kind, " ".join(words)) for words in flawed(rng, scramble=2))
        j = rng.randrange(len(z))
        other = z[:j] + [rng.randrange(len(tok)) for _ in range(5)]
        assert sums.right_labels(tok, y, other)[:j] == sums.right_labels(tok, y, z)[:j]
    assert sums.right_labels(tok, y, []) == [] and len(sums.right_labels(tok, [], z)) == len(z)
    assert sums.right_labels(tok, y, [len(tok) + 9] * 2)[0] == y[0]  # a model may have more ids than its tokenizer


def labelled(kind: str, before: str, wrong: str) -> str:
    """The text of Y up to and with `before`, where z goes on with `wrong`: the label at the first token of that."""
    tok, start = tokenizer(kind), Y[: Y.index(before) + len(before)]
    z = ids_of(kind, start + wrong, eos=False)
    kept = len(ids_of(kind, start, eos=False))
    assert "".join(pieces(kind, z[:kept])).lstrip() == start
    labels = sums.right_labels(tok, ids_of(kind, Y), z)
    assert labels[:kept] == z[:kept]
    return pieces(kind, labels)[kept]


def test_half_written_numbers():
    for kind in DIGITS:
        assert labelled(kind, "25 + 15 = 4", "1 , again") == "0"
        assert labelled(kind, "25 + 15 = 4", " , again") == "0"  # 4 is no whole number yet
        assert labelled(kind, "25 + 15 = 40", "1 , again") == (" " if kind == "unigram" else " ,")
        assert labelled(kind, "25 + 15 =", " 31 ,") == " " and labelled(kind, "25 + 15 = ", "31") == "4"
        assert labelled(kind, "25 + 15 =", " , again") == " "
    for kind in NUMBERS:
        assert labelled(kind, "25 + 15 =", " 31 ,") == " 40" == labelled(kind, "25 + 15 =", " 4 ,")
    for kind in KINDS:
        assert kind == "unigram" or labelled(kind, "25 + 15 = 40", " again") == " ,"
        assert labelled(kind, "#### 31", " . amy") == sums.END == labelled(kind, "#### 31", " 31")


@pytest.mark.parametrize("kind", ["words", *KINDS])
@pytest.mark.parametrize(
    "z, expected",
    [
        (  # a wrong result, then sums of z's own
            "amy has 25 . first buys 15 : 25 + 15 = 39 , again 25 + 15 = 39 . second gives 9 : 39 - 9 = 30 , again "
            "39 - 9 = 31 . #### 31",
            {12: "40", 19: "40", 25: "40", 32: "40", 36: "30"},
        ),
        (  # a sentence left out
            "amy has 25 . second gives 9 : 25 - 9 = 16 , again 25 - 9 = 16 . #### 16",
            {4: "first", 8: "40", 15: "40", 22: "31"},
        ),
        (  # one told twice
            "amy has 25 . first buys 15 : 25 + 15 = 40 , again 25 + 15 = 40 . first buys 14 : 25",
            {21: "second", 23: "15"},
        ),
        # other words: nothing right can be said before the next full stop
        ("amy has 25 . first buys 15 has eggs 9 = 3 . second gives 8", {7: ":", 15: "9"}),
        ("bob has 24 .", {0: "amy"}),
    ],
)
def test_by_hand(kind, z, expected):
    tok = tokenizer(kind)
    y, ids = ids_of(kind, Y), ids_of(kind, z, eos=False)
    found = errors(kind, ids, sums.right_labels(tok, y, ids))
    assert found.keys() == expected.keys()
    for j, made in found.items():
        assert " ".join([*z.split()[:j], expected[j]]).startswith(made)


@pytest.mark.parametrize("kind", KINDS)
def test_words_without_their_spaces_are_read(kind):
    z = "amy has 25. first buys 14:25 + 14 = 38 ,"
    ids = ids_of(kind, z, eos=False)
    found = errors(kind, ids, sums.right_labels(tokenizer(kind), ids_of(kind, Y), ids))
    assert list(found) == [3, 6, 7, 8, 10, 12] and found[12].endswith(("14 = 3", "14 = 39"))


def test_a_token_that_cannot_be_written_is_not_asked_for():
    z = Y[: Y.index("40 ,")] + "38 , again 25 + 38 = 40"  # 63 is no word of the toy model
    y, z = ids_of("words", Y), ids_of("words", z, eos=False)
    assert sums.right_labels(toy.tokenizer(), y, z)[-1] == z[-1]


# ---- recovery ----


@pytest.mark.parametrize("kind", KINDS)
def test_injection_and_recovery_agree_with_those_by_word(kind):
    rng, tok, other = random.Random(6), tokenizer(kind), 0
    for seed in range(200):
        words = sums.problem(rng)[1]
        y = ids_of(kind, (" " if seed % 2 else "") + " ".join(words))
        prefix, prefix_words = sums.inject_error(tok, y, seed), toy_inject(words, seed)
        text, right = sums.text_of(tok, prefix), words[len(prefix_words) - 1]
        if right.startswith(prefix_words[-1]) and kind in DIGITS:  # 4 is not wrong for 40 yet: drawn again
            other += 1
            assert text.split()[:-1] == prefix_words[:-1] and not right.startswith(text.split()[-1])
            prefix_words = text.split()
        assert text.split() == prefix_words
        start = ids_of(kind, (" " if seed % 2 else "") + f"{text} , again", eos=False)
        assert prefix == start[: len(prefix)]  # as in running text
        z = toy.flawed(words, rng)
        for rest in (words[len(prefix_words) :], z[len(prefix_words) :], words[-3:], words[-2:], [",", "again"], []):
            written = ids_of(kind, " " * (seed % 2) + " ".join([*prefix_words, *rest]))[len(prefix) :]
            assert sums.recovery(tok, y, prefix, written) == toy_recovery(words, prefix_words, rest)
    assert (other > 0) == (kind in DIGITS)


def test_injection_with_large_numbers():
    tok, injected = tokenizer("digits"), set()
    for i, row in enumerate(sums.problems(100, 0, operands=(100, 499), top=999)):
        y = ids_of("digits", row["response"])
        assert sums.right_labels(tok, y, y) == y
        text = sums.text_of(tok, sums.inject_error(tok, y, i))
        assert not row["response"].startswith(text) and row["response"].startswith(text.rpartition(" ")[0])
        injected.add(int(text.split()[-1]))
    assert max(injected) > 700 and min(injected) < 200


def test_a_wrong_number_may_be_written_on():
    tok, y = tokenizer("digits"), ids_of("digits", Y)
    start = "amy has 25 . first buys 15 : 25 + 15 = 3"
    prefix, written = (ids_of("digits", text, eos=False) for text in (start, "9 , again 25 + 15 = 40 . #### 31"))
    assert sums.recovery(tok, y, prefix, written) == {"restated": True, "final": True}
    written = ids_of("digits", "9 , again 25 + 15 = 4")
    assert sums.recovery(tok, y, prefix, written) == {"restated": False, "final": False}


def test_nothing_to_inject():
    with pytest.raises(ValueError, match="no sum to inject an error into: 'amy has 25 .'"):
        sums.inject_error(tokenizer("digits"), ids_of("digits", "amy has 25 .", eos=False), 0)
