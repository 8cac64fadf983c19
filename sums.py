"""The sums task as text: its problems, and what only such a task can measure: which label is right, who recovers.

    x   amy has 25 eggs . first amy buys 15 . bob finds 3 . second amy gives 9 . how many eggs does amy have ?
    y   amy has 25 . first buys 15 : 25 + 15 = 40 , again 25 + 15 = 40 . second gives 9 : 40 - 9 = 31 , again …
        #### 31

For any tokenizer that can spell it (`check_tokenizer`): one token a word, as the toy model's, bytes or pieces of words,
digits one by one or numbers whole. Rows of token ids are read as text, the text is judged word by word, and the
verdicts are carried back to the tokens. `y` and `z` are responses as in D_r: they end in EOS, unless they were cut.

    right_labels(tokenizer, y, z)                what a perfect corrector says for each token of z
    label_quality(tokenizer, ys, zs, z_bars)     how good given labels are
    inject_error(tokenizer, y, seed)             y up to and with one wrong result
    recovery(tokenizer, y, prefix, continuation) is it put right after such a prefix?
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from core.chat import ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = "amy bob cat dan eve fay gus hal ida joe kim leo mia ned".split()
THINGS = "eggs books coins cups pens hats cards shells stamps apples keys toys nuts balls".split()
GAINS = "buys wins finds gets picks earns takes makes".split()
LOSSES = "gives sells loses drops eats sends breaks spends".split()
ORDINALS = "first second third fourth".split()
LATER = "fifth sixth seventh".split()  # not in the toy model's vocabulary; the eighth step might lack a verb
TOP = 40  # the largest number, unless said otherwise
OTHERS = ". , : ? = + - #### has again how many does have".split()


# ---- problems ----


def add(a: int | str, sign: str, b: int | str) -> int:
    """The sum (or difference): add("25", "+", 15) is 40."""
    return int(a) + int(b) if sign == "+" else int(a) - int(b)


def problem(
    rng: random.Random, operands: tuple[int, int] = (2, 15), n_steps: tuple[int, int] = (3, 4),
    arbitrary: bool = False, top: int = TOP,
) -> tuple[list[str], list[str]]:  # fmt: skip
    """(x, y) as words, with numbers up to `top`. arbitrary: results at random, to be read and not calculated."""
    if 2 * operands[1] > top + 1 or n_steps[1] > len(ORDINALS + LATER):
        raise ValueError(
            f"operands up to {operands[1]}, {n_steps[1]} steps: must be at most {(top + 1) // 2} with numbers up to "
            f"{top} (else a step may have no sign), and {len(ORDINALS + LATER)}"
        )
    name, other = rng.sample(NAMES, 2)
    thing, state = rng.choice(THINGS), rng.randint(0, top)
    gains, losses = rng.sample(GAINS, len(GAINS)), rng.sample(LOSSES, len(LOSSES))
    x, y = [f"{name} has {state} {thing} ."], [f"{name} has {state} ."]
    for ordinal in (ORDINALS + LATER)[: rng.randint(*n_steps)]:
        operand = rng.randint(*operands)
        sign = rng.choice([sign for sign in "+-" if 0 <= add(state, sign, operand) <= top])
        verb = (gains if sign == "+" else losses).pop()
        result = rng.randint(0, top) if arbitrary else add(state, sign, operand)
        x.append(f"{ordinal} {name} {verb} {operand} .")
        total = f"{state} {sign} {operand} = {result}"
        y.append(f"{ordinal} {verb} {operand} : {total} , again {total} .")
        state = result
    if rng.random() < 0.5:  # a sentence about somebody else, to be left out
        x.insert(rng.randint(1, len(x)), f"{other} {gains.pop()} {rng.randint(*operands)} .")
    return " ".join(x + [f"how many {thing} does {name} have ?"]).split(), " ".join(y + [f"#### {state}"]).split()


def problems(
    n: int, seed: int | str, operands: tuple[int, int] = (2, 15), n_steps: tuple[int, int] = (3, 4),
    exclude: Collection[str] = (), arbitrary: bool = False, top: int = TOP,
) -> list[dict[str, str]]:  # fmt: skip
    """n different problems as {"prompt": x, "response": y}, none of whose prompts is in `exclude`."""
    rng, rows, seen = random.Random(f"problems {seed}"), [], set(exclude)
    while len(rows) < n:
        x, y = (" ".join(words) for words in problem(rng, operands, n_steps, arbitrary, top))
        if x not in seen:
            rows.append({"prompt": x, "response": y})
            seen.add(x)
    return rows


def splits(
    train: int = 500, valid: int = 300, test: int = 400, seed: int = 0, hard: float = 0,
    harder: dict | None = None, **difficulty,
) -> dict[str, list[dict]]:  # fmt: skip
    """The three sets, disjoint by prompt. Settings are chosen on valid, tables are made on test: both are always the
    same problems; only train depends on the seed. difficulty: operands, n_steps, top as in `problem`; the share `hard`
    of each set has the difficulty `harder`."""
    out, seen = {}, set()
    for split, n, key in (("test", test, "test"), ("valid", valid, "valid"), ("train", train, f"train {seed}")):
        m = round(hard * n)
        out[split] = problems(n - m, key, exclude=seen, **difficulty)
        seen |= {row["prompt"] for row in out[split]}
        if m:
            out[split] += problems(m, f"hard {key}", exclude=seen, **(harder or difficulty))
            seen |= {row["prompt"] for row in out[split]}
            random.Random(f"order {key}").shuffle(out[split])
    return out


def answer(text: str) -> str | None:
    """The value after the first `####`, or None."""
    found = re.search(r"####\s*(-?\d+)", text)
    return found.group(1) if found else None


# ---- the perfect corrector, by word ----

TASKS = ("toy", "sums")  # whose responses these are
END = "\0"  # the word, and the text, that EOS stands for
WORD = re.compile(r"[0-9]+|[A-Za-z]+|#+|\S")  # so that `40.` is two words: who leaves out a space is still understood
NUMBER = re.compile(r"[0-9]{1,9}")
BREAK = re.compile(f"[ {END}]")
SUM = re.compile(r"([0-9]{1,9}) ([+-]) ([0-9]{1,9})")


class Corrector:
    """What rightly comes next after any words, for one who has read y.

    Sentences are matched by their first word (`amy`, `first`, …, `####`), so a sentence of z that is left out, told
    twice or out of order is still compared with its own counterpart in y. Within a sentence the right word is y's at
    that place, however wrong the numbers before it are; with one exception: after `=`, where z's operands are not y's,
    it is what z's own sum comes to (39 - 9 = 30 and not y's 31: a label must agree with its context, unlike Fig. 6).
    At the head of a sentence the right word is y's next one. Once a sentence of z leaves the form of y's (other words,
    not just other numbers) nothing right can be said before the next `.`

        y      buys 15 : 25 + 15 = 40 , again 25 + 15 = 40 . second gives 9 : 40 - 9 = 31 , again 40 - 9 = 31 .
        z      buys 15 : 25 + 15 = 39 , again 25 + 15 = 39 . second gives 9 : 39 - 9 = 30 , again 39 - 9 = 30 .
        right  buys 15 : 25 + 15 = 40 , again 25 + 15 = 40 . second gives 9 : 40 - 9 = 30 , again 40 - 9 = 30 .

    A state is (the last sentence of y that z has begun, y's sentence to compare with or None, z's sentence so far).
    """

    def __init__(self, y: list[str], end: str = END):
        self.sentences = [tuple(words) for words in sentences_of(y if y[-1:] == [end] else [*y, end])]
        self.heads = {words[0]: i for i, words in enumerate(self.sentences)}
        self.start = (-1, None, ())

    def next(self, state: tuple) -> str | None:
        """The right word, None where nothing right can be said."""
        done, right, written = state
        k = len(written)
        if k == 0:
            return self.sentences[min(done + 1, len(self.sentences) - 1)][0]
        if right is None:
            return None
        if right[k - 1] == "=" and written != right[:k] and (own := SUM.fullmatch(" ".join(written[-4:-1]))):
            total = add(*own.groups())
            return str(total) if total >= 0 else None
        return right[k]

    def push(self, state: tuple, word: str) -> tuple:
        """The state after z's next word."""
        done, right, written = state
        k = len(written)
        if k == 0:
            done = self.heads.get(word, done)
            right = self.sentences[done] if word in self.heads else None
        elif right is not None and word != right[k] and not (NUMBER.fullmatch(word) and NUMBER.fullmatch(right[k])):
            right = None  # another form than that of y
        written = () if word == "." else (*written, word)
        if right is not None and len(written) == len(right):
            right = None  # z goes on after the end
        return done, right, written

    def text(self, state: tuple, lead: str, length: int) -> str:
        """What rightly comes next as text that begins with `lead`: whole words, of at least `length` characters unless
        END comes before, or nothing more can be said; "" where nothing can."""
        out = ""
        while len(out) < length or not out:
            word = self.next(state)
            if word is None:
                break
            out += word if word == END else lead + word
            state, lead = self.push(state, word), " "
        return out


def sentences_of(words: list[str]) -> list[list[str]]:
    """Words cut after each `.`"""
    out = [[]]
    for word in words:
        out[-1].append(word)
        if word == ".":
            out.append([])
    return out if out[-1] else out[:-1]


def right_words(y: list[str], z: list[str], end: str = END) -> list[str | None]:
    """The right word at every place of z, None where nothing right can be said. `end`: the word that EOS stands for."""
    corrector = Corrector(y, end)
    state, out = corrector.start, []
    for word in z:
        out.append(corrector.next(state))
        state = corrector.push(state, word)
    return out


# ---- tokens as text ----


class Spelling:
    """A tokenizer as we need it: what text each token adds, and which tokens it would write for a text.

    The text of a row is its pieces in a row, not `decode(row)`: a piece is what the token adds behind a full stop, so
    that neither the space that SentencePiece drops at the start of a text nor half of a character changes what other
    tokens add. A word-level tokenizer's pieces all begin with the space that its `decode` puts between two words.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...]):
        self.tokenizer, self.eos = tokenizer, ends[0]
        self.known: dict[int, str] = dict.fromkeys(ends, END)
        self.cut: dict[str, frozenset[int]] = {}
        self.anchor = self.encode(".")[-1:]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def piece(self, token: int) -> str:
        """The text that a token adds; END for EOS; U+FFFD for what adds none (an id beyond the vocabulary)."""
        if token not in self.known:
            added = self.decode([*self.anchor, token])[len(self.decode(self.anchor)) :]
            self.known[token] = added.replace(END, "\ufffd") or "\ufffd"
        return self.known[token]

    def text(self, ids: list[int]) -> str:
        return "".join(map(self.piece, ids))

    def written(self, before: str, text: str, after: str = "") -> list[tuple[int, int]]:
        """The tokens of `text` in its context as (token, where in `text` it begins), those that begin within `text`.

        For " 40" behind "15 =": [(" ", 0), ("4", 1), ("0", 2)] with SmolLM2, [(" 40", 0)] with GPT-2.
        """
        ids = self.encode(before + text + after)
        pieces = [self.piece(token) for token in ids]
        if not "".join(pieces).endswith(text + after):
            return []  # it cannot spell this
        found, begin = [], len(text + after) - sum(map(len, pieces))  # from the end: the start may have gained a space
        for token, piece in zip(ids, pieces):
            if 0 <= begin < len(text):
                found.append((token, begin))
            begin += len(piece)
        return found

    def cuts(self, word: str) -> frozenset[int]:
        """Where tokens begin within a word behind a space: {0, 1} for 40 with SmolLM2, nowhere with GPT-2."""
        if word not in self.cut:
            self.cut[word] = frozenset(begin for _, begin in self.written(". ", word))
        return self.cut[word]

    def beginnings(self, text: str) -> Iterator[int]:
        """Tokens that add a part of `text` from its start, the longest first."""
        for n in range(min(len(text), 32), 0, -1):
            part = text[:n]
            for name in (part, part.replace(" ", "Ġ"), part.replace(" ", "▁"), part.strip()):  # byte-level, metaspace,
                token = self.tokenizer.convert_tokens_to_ids(name)  # word-level; an unknown name gives <unk> or None
                if token is not None and self.piece(token) == part:
                    yield token


@functools.lru_cache(maxsize=4)
def _spelling(tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...]) -> Spelling:
    return Spelling(tokenizer, ends)


def spelling(tokenizer: PreTrainedTokenizerBase) -> Spelling:
    """One for each tokenizer and what ends its responses, so that each token is decoded once."""
    return _spelling(tokenizer, tuple(ends(tokenizer)))


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of a response without its EOS and the space before it."""
    return spelling(tokenizer).text(ids).replace(END, "").lstrip(" ")


# ---- right labels ----


class Reader:
    """Reads z token by token, and says at each place how the text rightly goes on.

    The word may be half written (`pending`): where 40 is right, `4` goes on with `0 , again`. In a number, and behind a
    space, this counts only where the tokenizer itself would cut; else `4` means 4, and is wrong from the start. What is
    no beginning of the right word has to be over before something right can be said.
    """

    def __init__(self, spell: Spelling, y: list[int]):
        self.spell, self.y = spell, y
        text = spell.text(y)
        self.corrector = Corrector(WORD.findall(text))
        self.state = self.corrector.start  # after the whole words of z so far
        self.lead = text[: len(text) - len(text.lstrip(" "))]  # between two words; before the first as in y
        self.text = self.pending = ""  # all so far, and what of it stands behind the whole words

    def right(self, own: str, length: int) -> tuple[str, str] | None:
        """(what of it is written, how the text rightly goes on behind the whole words); None where nothing can be said.
        `own` is z's next piece, which shows whether a wrong word goes on."""
        right = self.corrector.text(self.state, self.lead, len(self.pending) + length)
        if len(right) > len(self.pending) and self.begins(self.pending, right):
            return self.pending, right
        word = self.pending.strip()
        if not word or WORD.match(word + own).end() > len(word):
            return None
        right = self.corrector.text(self.corrector.push(self.state, word), " ", length)
        return ("", right) if right else None

    def begins(self, text: str, right: str) -> bool:
        """Is `text` a right beginning of `right`, or more than can be said?"""
        if not right.startswith(text):
            return text.startswith(f"{right} ")
        head, rest = text.rpartition(" ")[2], BREAK.split(right[len(text) :], maxsplit=1)[0]  # of a word cut in two
        return not text or not rest or head.isalpha() or head[:1] == "#" or len(head) in self.spell.cuts(head + rest)

    def write(self, pending: str, right: str) -> int | None:
        """The token that the tokenizer itself would write here, else any that is right; None if there is none."""
        rest = right[len(pending) :].partition(END)[0]
        if not rest:
            return self.spell.eos
        tokens = [] if self.text else self.y[:1]  # how a response begins behind its prompt, only y can tell
        before = " ".join(self.text.rpartition(END)[2].split(" ")[-3:])  # what a tokenizer may look back on
        tokens = [*tokens, *(token for token, begin in self.spell.written(before, rest) if begin == 0)]
        tokens.extend(self.spell.beginnings(rest))
        return next((token for token in tokens if self.begins(pending + self.spell.piece(token), right)), None)

    def read(self, piece: str) -> None:
        self.text += piece
        text, whole = self.pending + piece, 0
        for word in WORD.finditer(text):
            if word.end() < len(text) or not re.match("[0-9A-Za-z#]", word[0]):  # it cannot go on
                self.state, self.lead, whole = self.corrector.push(self.state, word[0]), " ", word.end()
        self.pending = text[whole:]


def judged(spell: Spelling, y: list[int], z: list[int], z_bar: list[int]) -> Iterator[tuple[int, bool]]:
    """(the right label, is z_bar right) for each position of z."""
    reader = Reader(spell, y)
    for token, label in zip(z, z_bar, strict=True):
        own, given, truth, good = spell.piece(token), spell.piece(label), token, False
        if found := reader.right(own, max(len(own), len(given)) + 1):
            pending, right = found
            good = reader.begins(pending + given, right)
            if not reader.begins(pending + own, right):
                written = reader.write(*reader.right(own, 24))  # some words more, lest it looks like the end of a text
                truth = token if written is None else written
        yield truth, good or label == truth
        reader.read(own)


def right_labels(tokenizer: PreTrainedTokenizerBase, y: list[int], z: list[int]) -> list[int]:
    """The right label for every position of z: what a perfect corrector that has read y writes there, given z^{<j}.

    It is z's own token where that is right, and where nothing right can be said (or the tokenizer cannot write it: that
    is, masked); else the token that the tokenizer itself would write. `Corrector` says what is right. As long as z.
    With digits one by one and `_` for a token that is a space alone:

        y       : _ 2 5 + _ 1 5 = _ 4 0 , again _ 2 5 + _ 1 5 = _ 4 0 .
        z       : _ 2 5 + _ 1 5 = _ 3 9 , again _ 2 5 + _ 1 5 = _ 4 1 .
        labels  : _ 2 5 + _ 1 5 = _ 4 9 , again _ 2 5 + _ 1 5 = _ 4 0 .        (no digit behind the 3 makes 40)
    """
    return [truth for truth, _ in judged(spelling(tokenizer), y, z, z)]


def label_quality(tokenizer: PreTrainedTokenizerBase, y_rows: list, z_rows: list, z_bar_rows: list) -> dict:
    """How good labels z_bar are, on rows of token ids (all positions of z count, EOS included).

    A label is right where its text begins the right continuation: several may be, and not only that of `right_labels`.

    unmasked      share of the positions with z_bar != z
    precision     share of those where z_bar is right (None if there are none)
    recall        share of the positions where z is wrong at which z_bar is right (None if there are none)
    wrong_early   wrong unmasked labels before the first error of z: they change what was right
    n             positions
    """
    spell = spelling(tokenizer)
    n = unmasked = right = errors = found = wrong_early = 0
    for y, z, z_bar in zip(y_rows, z_rows, z_bar_rows, strict=True):
        clean = True
        for z_j, label, (truth, good) in zip(z, z_bar, judged(spell, y, z, z_bar), strict=True):
            clean = clean and z_j == truth
            n += 1
            errors += z_j != truth
            unmasked += label != z_j
            right += label != z_j and good
            found += label != z_j != truth and good
            wrong_early += clean and label != z_j and not good
    return {
        "unmasked": unmasked / max(n, 1),
        "precision": right / unmasked if unmasked else None,
        "recall": found / errors if errors else None,
        "wrong_early": wrong_early,
        "n": n,
    }


# ---- recovery from an injected error ----


def inject_error(tokenizer: PreTrainedTokenizerBase, y: list[int], seed: int | str) -> list[int]:
    """y up to and with one wrong first result, of a step drawn at random: a teacher-forced prefix.

    For example `amy has 25 . first buys 15 : 25 + 15 = 7`. The wrong number may be any up to TOP (or to y's largest, if
    that is more), but none that the next token could still make right: 4 is no error for 40 where digits are tokens.
    """
    spell, rng = spelling(tokenizer), random.Random(f"inject {seed}")
    text = spell.text(y)
    words = list(WORD.finditer(text))
    is_number = [bool(NUMBER.fullmatch(word[0])) for word in words]
    signs = [j for j in range(4, len(words) - 1) if words[j][0] == "=" and words[j - 4][0] == ":" and is_number[j + 1]]
    if not signs:
        raise ValueError(f"no sum to inject an error into: {text[:80]!r}")
    j = rng.choice(signs)
    number = words[j + 1]
    right, most = number[0], max(TOP, *(int(word[0]) for word, good in zip(words, is_number) if good))
    wrong = right
    while right.startswith(wrong) and (wrong == right or len(wrong) in spell.cuts(right)):
        i = rng.choice(range(most))
        wrong = str(i + (i >= int(right)))  # any but the right one
    kept = end = 0  # y's tokens before the sign, from which on it is written anew: a cut may fall elsewhere now
    while end + len(spell.piece(y[kept])) <= words[j - 1].end():
        end += len(spell.piece(y[kept]))
        kept += 1
    new = text[end : number.start()] + wrong
    before, after = text[:end].split(" ")[-3:], text[number.end() :].partition(END)[0].split(" ")[:4]
    tokens = [token for token, _ in spell.written(" ".join(before), new, " ".join(after))]
    if spell.text(tokens) != new:
        raise ValueError(f"the tokenizer cannot write {new!r} here")
    return y[:kept] + tokens


def recovery(tokenizer: PreTrainedTokenizerBase, y: list[int], prefix: list[int], continuation: list[int]) -> dict:
    """Did the continuation of an `inject_error` prefix repeat the sum rightly at once; was its final answer right?"""
    spell = spelling(tokenizer)
    n = len(WORD.findall(spell.text(prefix)))
    truth, written = (WORD.findall(spell.text(ids)) for ids in (y, prefix + continuation))
    final = answer(spell.text(continuation))
    return {
        "restated": written[n : n + 7] == truth[n : n + 7],  # , again 25 + 15 = 40
        "final": final is not None and final == answer(spell.text(y)),
    }


# ---- is it this task? ----

N = "[0-9]{1,9}"


def has_sum(text: str) -> bool:
    """Has a response a sum that an error can be put into, and an answer? (Its form may be another than that of `y`.)"""
    return bool(re.search(rf": {N} [+-] {N} = {N}", text)) and answer(text) is not None


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError, in one line, where a tokenizer cannot spell all words of the task."""
    if tokenizer.eos_token_id is None:
        raise ValueError("this tokenizer has no EOS token, with which every response ends")
    spell, numbers = spelling(tokenizer), [str(i) for i in range(TOP + 1)]
    for text in [*OTHERS, *NAMES, *THINGS, *GAINS, *LOSSES, *ORDINALS, *numbers]:
        ids = spell.encode(f"amy {text} .")
        for back in (spell.decode(ids), spell.text(ids)):
            if back.lstrip(" ") != f"amy {text} .":
                raise ValueError(f"this tokenizer cannot spell {text!r} of the sums task: it comes back as {back!r}")
    for row in problems(20, "check"):
        y = [*spell.encode(row["response"]), spell.eos]
        if right_labels(tokenizer, y, y) != y:  # its tokens span words
            raise ValueError(f"this tokenizer cuts the same number of the sums task now so, now so: {row['response']}")
