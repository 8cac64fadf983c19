"""What a judge answers: the text in a reply, and the verdict in a text. Pure functions, for judge.py.

    preferred("Comparison: B is short.\\nPreferred: B")                        "B", to the letter
    preferred("<think>\\nPreferred: B\\n</think>\\n**Preferred: Summary A.**")    "A", leniently
    preferred("Preferred: A or B")                                            None: unparsed

A verdict is a line of its own, `Preferred: A` or `Preferred: B`, and the only line that begins with that word and a
colon. It is read leniently, and counted apart, where nothing else differs than case, bold, quotes, brackets, tags, a
list mark, a full-width colon, a last point, or the word Summary. Reasoning that stands in the text is cut off before.
"""

from __future__ import annotations

import json
import re
import unicodedata

RETRY = (408, 409, 425, 429)  # and 5xx: the same question may be answered later
FINAL = (401, 402, 403, 404)  # no other question will be answered, either
PASSING = re.compile(  # in the words of an error without a code
    r"rate.?limit|too.many|overload|capacity|time.?out|timed.out|temporar|unavailable|try.again|busy|(server|internal).?err",
    re.IGNORECASE,
)
BROKE = re.compile(r"insufficient.?(quota|credit|balance|fund)", re.IGNORECASE)  # which OpenAI says with code 429

WORD = r"reason(?:ing)?|analysis|reflection|scratchpad"  # ordinary words, too
THINK = rf"(?:[\w:]*(?:think|thought)(?:ing|s)?(?:[_-]\w+)?|{WORD})"
BEGIN, END = r"<\|begin_of_(?:thought|think\w*)\|>", r"<\|end_of_(?:thought|think\w*)\|>"
CHANNEL = r"<\|channel\|>\s*{}[^<]*<\|message\|>"  # of gpt-oss
TAG = re.compile(
    rf"(?P<open><{THINK}(?:\s[^<>/]*)?>|\[{THINK}\]|◁think▷|{BEGIN}|{CHANNEL.format('(?:analysis|commentary)')})"
    rf"|(?P<close></{THINK}\s*>|\[/{THINK}\]|◁/think▷|{END}|{CHANNEL.format('final')})",
    re.IGNORECASE,
)
MARK = r"[^\S\n]|[*_`~#>\"'“”‘’「」【】()\[\]{}|$\\-]|</?\w+>"
LINE = re.compile(rf"^(?:{MARK}|\d[.)])*preferred(?: summary)?(?:{MARK})*:(.*)$", re.IGNORECASE | re.MULTILINE)
CHOICE = re.compile(rf"(?:{MARK})*(?:(?:summary|option)\b(?:{MARK})*)?([AB])(?:{MARK}|[.。!])*", re.IGNORECASE)


class Unanswered(Exception):
    """No answer to one question. `again`: asked once more, it may be answered; `final`: none to any other, either."""

    def __init__(self, why: str, again: bool = False, final: bool = False) -> None:
        super().__init__(why)
        self.again, self.final = again, final


# ---------------------------------------------------------------------------------------------- a reply
def fault(why: str, code: int, words: str) -> Unanswered:
    """An error of the judge, by its code (as of HTTP; 0: none) and its words."""
    broke = bool(BROKE.search(words))
    again = code in RETRY or code >= 500 or (not code and bool(PASSING.search(words)))
    return Unanswered(f"{why}: {words}", again and not broke, broke or code in FINAL or 0 < code < 400)


def error_in(reply: dict, choice: dict) -> tuple[int, str] | None:
    """(code, words) of the error that a JSON object tells of; None if it tells of none."""
    error = reply.get("error") or choice.get("error")
    if not error and not choice and reply.keys() & {"message", "msg", "detail"}:  # {"object": "error", "message": ...}
        error = reply
    if not error:
        return None
    error = error if isinstance(error, dict) else {"message": error}
    words = next((error[name] for name in ("message", "msg", "detail") if error.get(name)), None) or error
    words = words if isinstance(words, str) else json.dumps(words, ensure_ascii=False)
    said = [str(error[name]) for name in ("code", "status", "type") if error.get(name)]
    code = next((int(one) for one in said if re.fullmatch(r"[45]\d\d", one)), 0)
    names = ", ".join(dict.fromkeys(one for one in said if not (code or one.isdigit() or one == "error")))
    return code, " ".join(f"{words} {names and f'({names})'}".split())[:200]


def answer_in(body: str) -> str:
    """The text of a chat completion. A judge that says nothing has answered "", one that refuses, that it does.

    Raises Unanswered with the error that the reply is in place of an answer, and ValueError where it is neither."""
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        if re.match(r"\s*(?:data|event|id|retry)?:", body):
            why = "the server streams its answer (server-sent events), which it was not asked to"
            raise Unanswered(why, final=True) from None
        raise ValueError("not the JSON of a chat completion") from None
    reply = reply if isinstance(reply, dict) else {}
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    if found := error_in(reply, choice):
        raise fault(f"HTTP 200, but error {found[0] or ''}".strip(), *found)
    if choice.get("finish_reason") == "error":
        raise Unanswered("the judge broke off (finish_reason: error)", again=True)
    message = choice.get("message", {"content": choice["text"]} if "text" in choice else None)  # text: of older servers
    if not isinstance(message, dict):
        raise ValueError("not the JSON of a chat completion")
    if text := text_of(message.get("content")):
        return text
    refusal = message.get("refusal")
    return f"(refused) {' '.join(refusal.split())}" if isinstance(refusal, str) and refusal.strip() else ""


def text_of(content: object) -> str:
    """Content is text, or a list of parts; those of type thinking, reasoning, ... are not the answer."""
    if content is None or isinstance(content, str):
        return content or ""
    text = ""
    for part in content if isinstance(content, list) else [content]:
        part = {"text": part} if isinstance(part, str) else part
        if not isinstance(part, dict):
            raise ValueError("the answer is not text")
        if part.get("type", "text") in ("text", "output_text") and isinstance(part.get("text"), str):
            text += "\n" * bool(text and LINE.match(part["text"])) + part["text"]
    return text


# ---------------------------------------------------------------------------------------------- a verdict
def spoken(text: str) -> str:
    """A text without its reasoning: what stands in tags, before one that only closes, after one that never does. An
    ordinary word in brackets within a line, `more [analysis] than B`, is no tag where nothing closes it."""
    said, begun, end = "", None, 0  # begun: the tag that opens the reasoning at hand
    for tag in TAG.finditer(text):
        if tag["open"]:
            said += "" if begun else text[end : tag.start()]
            begun = begun or tag
        else:
            said, begun = said if begun else "", None
        end = tag.end()
    if begun and re.fullmatch(rf"[<\[](?:{WORD})[^<]*", begun[0], re.IGNORECASE) and said.rpartition("\n")[2].strip():
        begun, end = None, begun.start()
    said += "" if begun else text[end:]
    return re.sub(r"<\|\w+\|>", "", said).replace("\r\n", "\n")  # <|im_end|>


def preferred(answer: str) -> str | None:
    """ "A" or "B"; None unless exactly one line says so, to the letter or leniently."""
    found = LINE.findall(unicodedata.normalize("NFKC", spoken(answer)))
    choice = CHOICE.fullmatch(found[0]) if len(found) == 1 else None
    return choice[1].upper() if choice else None


def to_the_letter(answer: str) -> bool:
    """Is a line of an answer `Preferred: A` or `Preferred: B`, and no more?"""
    return bool(re.search(r"^[ \t]*Preferred:[ \t]*[AB][ \t]*$", spoken(answer), re.MULTILINE))
