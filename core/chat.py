"""What stands between text and tokens: chat templates, the tokens that end a response, special tokens that are text.

    x = chat(tokenizer, "Why?")                     # through the tokenizer's chat template, up to the answer
    end, *others = ends(tokenizer)                  # y is trained to end with the first; decoding stops at any of them
    row = shield(tokenizer, row)                    # from here on "<eos>" in its texts is five characters, no token

A template is a program that came with the model: each of its faults is a ValueError of one line that names the model.
"""

from __future__ import annotations

import copy
import datetime
import functools
import os
import re

from core.ranks import first_line, print0
from core.rows import Turns


# ---------------------------------------------------------------------------------------------- chat templates
def as_turns(prompt: str | Turns) -> Turns:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def chat(tokenizer, prompt: str | Turns, system: str = "") -> str:
    """A question, or a dialogue that ends with one, ready for the answer: through the tokenizer's own chat template,
    else in the Zephyr form of A.1. `system` follows the dialogue's own system text. Raises ValueError.

    >>> chat(tokenizer_without_template, "Why?")
    '<|system|>\\n</s>\\n<|user|>\\nWhy?</s>\\n<|assistant|>\\n'
    """
    turns = as_turns(prompt)
    if turns[0]["role"] == "system":
        system = f"{turns[0]['content']}\n\n{system}" if system else turns[0]["content"]
        turns = turns[1:]
    whole = [{"role": "system", "content": system}, *turns]
    if not tokenizer.chat_template:
        text = "".join(f"<|{turn['role']}|>\n{turn['content']}{tokenizer.eos_token}\n" for turn in whole)
        return f"{text}<|assistant|>\n"
    if not system and not system_has_a_turn(tokenizer, str(tokenizer.chat_template)):
        return render(tokenizer, turns)
    if not system or system_is_read(tokenizer, str(tokenizer.chat_template)):
        try:
            return render(tokenizer, whole)
        except ValueError:  # some templates (Gemma, Mistral-Instruct) know no system turn
            pass
    return render(tokenizer, [*as_turns(f"{system}\n\n{turns[0]['content']}".strip()), *turns[1:]])


# The day that every template is told, so that a prompt is the same on all days of a run and of a comparison. It is the
# one that Llama 3.1's template writes where it cannot ask.
TODAY = datetime.datetime(2024, 7, 26)
_DIRECTIVES = [*(f"%-{c}" for c in "dmHIMSjy"), *(f"%{c}" for c in "aAbBcdefFDGgHhIjmMnpRrsStTuUVwWxXyYzZ")]
_REPLACED = "".join(f"|replace({d!r}, {TODAY.strftime(d)!r})" for d in _DIRECTIVES)
# Takes the place of transformers' function of that name; what follows it keeps the whitespace it begins with.
NO_CLOCK = f"{{% macro strftime_now(format) %}}{{{{ format{_REPLACED} }}}}{{% endmacro %}}{{{{ '' }}}}"


def render(tokenizer, turns: Turns, answer_begins: bool = True) -> str:
    """The text of a dialogue by the tokenizer's chat template; answer_begins: with the opening of the answer after it.
    Raises ValueError, in one line, where the template cannot do it."""
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = NO_CLOCK + template
        options = {"chat_template": template, "tokenize": False, "add_generation_prompt": answer_begins}
        return tokenizer.apply_chat_template(turns, **options)
    except Exception as error:  # a template may raise what it likes, and reach into what is not there
        reason = f"{first_line(error)}; it is given messages alone, no tools and no documents"
        raise ValueError(f"--model {tokenizer.name_or_path}: its chat template cannot be used ({reason})") from None


@functools.lru_cache(maxsize=16)
def system_is_read(tokenizer, template: str) -> bool:
    """Whether the chat template has the system's text anywhere: some leave it out without a word. template: as a key to
    the cache."""
    try:
        return "Be so." in render(tokenizer, [{"role": "system", "content": "Be so."}, *as_turns("How so?")])
    except ValueError:
        return False


@functools.lru_cache(maxsize=16)
def system_has_a_turn(tokenizer, template: str) -> bool:
    """Whether the chat template gives the system's text a turn before the user's. Else (it stands inside of the user's
    turn, or nowhere) an empty one would leave blank lines or an empty block there. template: as a key to the cache."""
    user = as_turns("How so?")
    try:
        with_system = render(tokenizer, [{"role": "system", "content": "Be so."}, *user])
    except ValueError:
        return False
    opening = [with_system]
    for before in ([], turns_of("And?", "So.")):
        try:
            opening.append(render(tokenizer, [*before, *user]))
        except ValueError:
            pass
    opening = [text.rpartition("How so?")[0] for text in opening]  # up to the question
    # what begins any user turn, of a dialogue's first as of its second: <|im_start|>user
    begins = os.path.commonprefix([text[::-1] for text in opening[1:]])[::-1]
    begins = begins.removeprefix(tokenizer.bos_token or "")
    return "Be so." in opening[0] and (len(opening) == 1 or bool(begins.strip()) and opening[0].endswith(begins))


def turns_of(question: str, answer: str) -> Turns:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


THINK = re.compile(r"(<(?:think|thinking|thought|reasoning)>|\[THINK\])(\s*)$")  # at the end of a prompt


def without_opening(prompt: str, response: str) -> str:
    """The response without the <think> that the chat template has already opened at the end of the prompt."""
    opened = THINK.search(prompt)
    text = response.lstrip()
    if not opened or not text.startswith(opened[1]):
        return response
    text = text[len(opened[1]) :]
    return text.lstrip() if opened[2] else text


# ---------------------------------------------------------------------------------------------- what ends a response
def ends(tokenizer) -> list[int]:
    """The ids that end a response. The first is the one that y ends with, and so what a model is taught to stop with;
    decoding stops at any of them. The decision is `settle_ends`'s; of a tokenizer from elsewhere it is the EOS."""
    return getattr(tokenizer, "ends", None) or [tokenizer.eos_token_id]


def settle_ends(tokenizer, named: list[int]) -> None:
    """Decides, once for training, decoding, labels, evaluation and the saved folder, which tokens end a response:
    the tokenizer's EOS and those `named` by the model's generation settings. y ends with the one that the chat template
    ends a turn with, where it is among them (Gemma and Phi have another EOS), and that one becomes the EOS."""
    own = tokenizer.eos_token_id
    if own is None:
        return
    known = [own, *(token for token in named if token != own and tokenizer.convert_ids_to_tokens(token) is not None)]
    if odd := [token for token in known if token not in tokenizer.added_tokens_decoder]:
        words = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(odd[:3])))
        print0(f"WARNING: --model {tokenizer.name_or_path} says that {words} ends an answer, which is no special token")
    end = turn_end(tokenizer, known)
    first = end if end in known else own
    tokenizer.ends = [first, *(token for token in known if token != first)]
    tokenizer.closing = tuple(token for token in {*known, end} if token in tokenizer.added_tokens_decoder)
    tokenizer.end_note = ""
    word, eos = (tokenizer.convert_ids_to_tokens(token) for token in (end if end is not None else own, own))
    if first != own:
        others = " or ".join(tokenizer.convert_ids_to_tokens(tokenizer.ends[1:]))
        tokenizer.end_note = f"y ends with {word}, as a turn of the chat template does; {others} ends an answer, too"
        before = probes(tokenizer)
        tokenizer.eos_token = word
        if probes(tokenizer) != before:  # the template writes the EOS elsewhere
            tokenizer.eos_token = eos
    elif end not in (None, own):
        tokenizer.end_note = (
            f"the chat template of --model {tokenizer.name_or_path} ends a turn with {word}, but y ends with {eos}: to "
            f"train and stop with {word}, make it eos_token in tokenizer_config.json"
        )


def probes(tokenizer) -> list[str]:
    """What the chat template makes of some dialogues; "" where it cannot."""
    found = []
    for turns in (as_turns("And?"), [*turns_of("Why?", "So."), *as_turns("And?")], turns_of("Why?", "So.")):
        try:
            found.append(render(tokenizer, turns, answer_begins=turns[-1]["role"] == "user"))
        except ValueError:
            found.append("")
    return found


def turn_end(tokenizer, known: list[int]) -> int | None:
    """The token (an added one, or one of `known`) that the chat template puts behind what the assistant says."""
    if not tokenizer.chat_template:
        return None
    try:
        text = render(tokenizer, turns_of("How does it end?", "It ends so."), answer_begins=False)
    except ValueError:  # which is said where the template is used
        return None
    _, found, behind = text.rpartition("It ends so.")
    tokens = {*known, *tokenizer.added_tokens_decoder}
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if found else []
    return next((token for token in ids if token in tokens), None)


def response_text(tokenizer, ids: list[int]) -> str:
    """The text of a response, without the token that ends it and without special tokens."""
    ids = ids[:-1] if ids and ids[-1] in ends(tokenizer) else ids
    return tokenizer.decode(ids, skip_special_tokens=True)


# ---------------------------------------------------------------------------------------------- special tokens as text
# Before each character of a special token's name that stands in the text of data: a noncharacter of Unicode, which no
# text holds. From here to `token_ids` it tells what the data say from what a template says.
MARK = "\ufdd0"
MARKUP = re.compile(r"</?(think|thinking|thought|reasoning)>|\[/?THINK\]")  # what reasoning is written with: tokens


@functools.lru_cache(maxsize=4)
def _specials(tokenizer, closing: tuple[int, ...], *_) -> tuple[dict[str, int], re.Pattern]:
    """The tokenizer's special tokens (name to id), with those that close a turn, and a pattern that finds one which is
    not marked as text. The rest of the arguments is a key to the cache."""
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special or i in closing}
    added |= {name: tokenizer.convert_tokens_to_ids(name) for name in tokenizer.all_special_tokens}
    added = {name: i for name, i in added.items() if name and not MARKUP.fullmatch(name)}
    names = sorted(map(re.escape, added), key=len, reverse=True)  # the longest first
    return added, re.compile(f"(?<!{MARK})(?:{'|'.join(names) or '(?!)'})")


def specials(tokenizer) -> tuple[dict[str, int], re.Pattern]:
    return _specials(tokenizer, getattr(tokenizer, "closing", ()), len(tokenizer), tokenizer.eos_token)


def shield(tokenizer, value):
    """A text, a dialogue or a row of them, in which special tokens are marked as text."""
    if isinstance(value, str):
        return specials(tokenizer)[1].sub(lambda found: "".join(MARK + c for c in found[0]), value)
    if isinstance(value, list):
        return [shield(tokenizer, part) for part in value]
    return {key: shield(tokenizer, part) for key, part in value.items()} if isinstance(value, dict) else value


def token_ids(tokenizer, text: str) -> list[int]:
    """The ids of a text, without any that the tokenizer adds; what `shield` has marked becomes no special token."""
    if MARK not in text:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    names, pattern = specials(tokenizer)
    if not tokenizer.is_fast:  # one of few: piece by piece
        ids, at = [], 0
        for found in [*pattern.finditer(text), None]:
            piece = text[at : found.start() if found else len(text)].replace(MARK, "")
            ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"] if piece else []
            ids += [names[found[0]]] if found else []
            at = found.end() if found else at
        return ids
    reader, stand_ins, back = _reader(tokenizer, getattr(tokenizer, "closing", ()), len(tokenizer), tokenizer.eos_token)
    text = pattern.sub(lambda found: stand_ins[found[0]], text).replace(MARK, "")
    never = {*names.values()} - {tokenizer.unk_token_id}

    def read(text: str) -> list[int]:
        return reader.encode(text, add_special_tokens=False).ids

    ids = []
    for token in read(text):
        if token in never:  # a vocabulary of words knows its name, too: spelled in two, that is another word
            name = reader.id_to_token(token)
            ids += [part for half in (name[:1], name[1:]) for part in read(half) if part not in never]
        else:
            ids.append(back.get(token, token))
    return ids


@functools.lru_cache(maxsize=4)
def _reader(tokenizer, *_) -> tuple[object, dict[str, str], dict[int, int]]:
    """A copy of the tokenizer to which special tokens are text, while stand-ins of the same manners are those tokens:
    so a text is cut, and joined, as ever. Its backend, name to stand-in, and the stand-in's id to the token's."""
    from tokenizers import AddedToken

    reader = copy.deepcopy(tokenizer.backend_tokenizer)
    reader.no_truncation()
    reader.no_padding()
    reader.encode_special_tokens = True
    names, _ = specials(tokenizer)
    stand_ins = {name: f"\ufdd1{i}\ufdd2" for name, i in names.items()}
    for name, i in names.items():
        own = tokenizer.added_tokens_decoder.get(i)
        manners = {key: getattr(own, key) for key in ("lstrip", "rstrip", "single_word")} if own else {}
        reader.add_tokens([AddedToken(stand_ins[name], normalized=False, special=False, **manners)])
    return reader, stand_ins, {reader.token_to_id(stand_ins[name]): i for name, i in names.items()}


class Remarks:
    """What is said of rows as they become tokens: special tokens in their text, words that are unknown, reasoning that
    is not closed.

    found: a dict that it is kept in, and that can be written as JSON: {"special": [rows, first row, last row, names],
    "unclosed": [rows, first row], "unknown": [rows, first row]}."""

    def __init__(self, tokenizer, found: dict[str, list] | None = None) -> None:
        self.tokenizer, self.found = tokenizer, {} if found is None else found
        unknown, others = tokenizer.unk_token_id, (tokenizer.eos_token_id, tokenizer.bos_token_id)
        self.unknown = None if unknown in others else unknown  # some name one that has another sense

    def read(self, row: dict, columns: tuple[str, ...]) -> dict:
        """The row with its special tokens marked as text, those in these columns counted."""
        text = " ".join(str(row.get(column, "")) for column in columns)
        names = specials(self.tokenizer)[1].findall(text)
        if not names:
            return row
        seen = self.found.setdefault("special", [0, row["row"], None, []])
        seen[0] += seen[2] != row["row"]  # a row may give several examples
        seen[2] = row["row"]
        seen[3] += [name for name in dict.fromkeys(names) if name not in seen[3]]
        return shield(self.tokenizer, row)

    def answered(self, row: dict, prompt: str, response: str) -> None:
        """Looks at a response behind its prompt."""
        opened = THINK.search(prompt)
        if opened and response.strip() and opened[1].replace("<", "</").replace("[", "[/") not in response:
            self.found.setdefault("unclosed", [0, row["row"]])[0] += 1

    def tokens(self, row: dict, ids: list[int]) -> None:
        """Looks at what has become of a row."""
        if self.unknown is not None and self.unknown in ids:
            self.found.setdefault("unknown", [0, row["row"]])[0] += 1

    def notes(self, uses_template: bool) -> list[str]:
        notes = [getattr(self.tokenizer, "end_note", "")] if uses_template else []
        if "special" in self.found:
            n, first, _, kinds = self.found["special"]
            named = f"{', '.join(kinds[:3])}{', ...' if kinds[3:] else ''}"
            notes.append(f"{n} rows hold special tokens in their text ({named}): read as text, first: row {first}")
        if "unclosed" in self.found:
            n, first = self.found["unclosed"]
            opens = "though the chat template opens it at the end of x"
            notes.append(f"WARNING: {n} responses close no reasoning, {opens}, first: row {first}")
        if "unknown" in self.found:
            n, first = self.found["unknown"]
            token = self.tokenizer.unk_token
            notes.append(f"WARNING: {n} rows hold words that the tokenizer does not know ({token}), first: row {first}")
        return [note for note in notes if note]
