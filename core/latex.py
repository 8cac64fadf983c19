r"""One spelling for the ways to write an answer of MATH: what math_equal compares.

    normal(r"\dfrac{-1}{2}")     ("-1/2", "")             normal("x = 1, -2")           ("-2; 1", "x")
    normal(r"3\pi/4")            (r"3/4*\pi", "")         normal(r"(2, .5)")            ("(2, 1/2)", "")

The rules are those of hendrycks/math, and what people report that these miss. Nothing is worked out, only written in
one way: 2 + 3 is not 5, and 0.33 is not 1/3. Two answers are the same where they differ in no more than

looks       spaces, $, \left and \right, \dfrac, doubled backslashes, a last point, ^\circ, %, \text{} around it all;
            braces that LaTeX does without (\frac12, \sqrt3, x^2, 2516_8); the signs −, π, √, ≤, … and their commands
units       behind a number: \text{ cm}^2, \mathrm{kg}, "5 cm", "10 square units" (so 5 cm is 5 m)
thousands   1,234 and 1{,}234 and 1\,234 are 1234; but (1,234) is a pair
numbers     their exact value: 0.25, .250, \frac{1}{4}, \frac{2}{8}, 1/4; 1\frac{1}{2} is 3/2; 0.\overline{3} is 1/3
a factor    in front: -\frac{\pi}{2}, \frac{-\pi}{2}, -\pi/2, -0.5\pi; (x+1)/2, \frac{1}{2}(x+1)
order       of a sum; of a list, where the answer is one: 1,-2 and \{-2, 1\} and 1 \text{ or } -2; of A \cup B; \pm 2 is
            a list, too. But not of a pair, an interval, a matrix: (1,2) is neither (2,1) nor [1,2] nor 1,2
a name      x = 5 and x \in [1,2] are 5 and [1,2]; the name is told beside the spelling, for x = 5 is 5 but not y = 5
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction

SIGNS = str.maketrans({
    "−": "-", "–": "-", "π": r"\pi ", "θ": r"\theta ", "∞": r"\infty ", "√": r"\sqrt ", "×": r"\times ", "·": r"\cdot ",
    "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "±": r"\pm ", "∪": r"\cup ", "∈": r"\in ", "°": r"^{\circ}",
    "\u00a0": " ",
})  # fmt: skip
ALIASES = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "le": "leq", "ge": "geq",
    "ne": "neq", "lbrace": "{", "rbrace": "}", "lbrack": "[", "rbrack": "]", "bar": "overline",
    "varnothing": "emptyset",
}  # fmt: skip
COMMAND = r"\\[a-zA-Z]+|\\."
NUMBER = r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
SIGN = r"(?:\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})|\^?\\degree(?![a-zA-Z])|\\?[$%])"  # left out; 90^\circ is 90
THOUSANDS = rf"(?<![0-9.])(?<![0-9],)[1-9][0-9]{{0,2}}(?:,[0-9]{{3}})+(?!,?[0-9])(?:\.[0-9]+)?|{NUMBER}"
ARGUMENTS = {r"\frac": 2, r"\binom": 2, r"\sqrt": 1}
OPEN = ("(", "[", "{", r"\{", r"\langle", r"\lfloor", r"\lceil", r"\lvert", r"\begin")
CLOSE = (")", "]", "}", r"\}", r"\rangle", r"\rfloor", r"\rceil", r"\rvert", r"\end")
RELATION = r"[=<>:]|\\(?:leq|geq|neq|in|mid|equiv|approx|sim|cong|to|mapsto|subset|subseteq)(?![a-zA-Z])"
NAME = (  # x, AB, \theta, x_1, f(x), (x, y)
    r"(?:[a-zA-Z]{1,2}|\\[a-zA-Z]+)(?:\s*_\s*(?:\{[^{}]*\}|\w))?(?:\s*\([a-zA-Z]\))?|\([a-zA-Z](?:\s*,\s*[a-zA-Z])+\)"
)
TEXT = r"\\(?:text(?:bf|it|rm|sf|normal)?|mbox|math(?:rm|bf|it|sf)|operatorname)\s*"
UNIT = (
    r"(?:mm|cm|dm|km|kg|mg|ml|ft|yd|mi|in|inch(?:es)?|feet|foot|yards?|miles?|(?:kilo|centi|milli)?(?:met(?:er|re)|gram|"
    r"lit(?:er|re))s?|pounds?|lbs?|ounces?|oz|degrees?|radians?|percent|dollars?|cents?|mph|seconds?|min|minutes?|"
    r"hours?|days?|weeks?|months?|years?|units?|people|students|ways|points?)(?:\s*\^\s*\{?[0-9]\}?)?"
)


@functools.lru_cache(maxsize=1 << 16)
def normal(answer: str) -> tuple[str, str]:
    """(the one spelling, the name it is given or ""). The spelling is "" where nothing is answered."""
    try:
        if len(answer) <= 1000:
            return several(plain(answer))
    except RecursionError:  # hundreds of brackets
        pass
    return "".join(answer.split()), ""


def plain(s: str) -> str:
    """Without what only changes the looks."""
    if r"\begin" not in s or not re.search(r"(?<!\\)(?:\\\\)*\\(?!\\)", s):  # in a matrix, \\ ends a row
        s = s.replace(r"\\", "\\")
    s = re.sub(r"\\([a-zA-Z]+)", lambda m: "\\" + ALIASES.get(m[1], m[1]), s.translate(SIGNS))
    s = re.sub(r"\\(?:left|right)(?:\.|(?![a-zA-Z]))|\\(?:[bB]igg?[lrm]?|displaystyle)(?![a-zA-Z])|\\!\s*", "", s)
    s = re.sub(rf"{SIGN}\s*,|,\s*(?={SIGN})", ", ", s)  # no comma of thousands
    s = re.sub(rf"{TEXT}\{{\s*\}}", "", s.replace(r"\$", ""))
    s = re.sub(SIGN, "", s)
    s = re.sub(r"(?<!\\)\\[()\[\],;: ]|\\q?quad(?![a-zA-Z])|~|\s+", " ", s)
    s = re.sub(r"(?<=[0-9])\{,\}(?=[0-9]{3})", "", s).replace("{,}", ",")
    s = re.sub(r"(?<![0-9.,])[0-9]{1,3}(?: [0-9]{3})+(?![0-9])", lambda m: m[0].replace(" ", ""), s)
    s = re.sub(r"(?<![0-9.,])([0-9]+) ([0-9]+)\s*/\s*([0-9]+)$", r"\1\\frac{\2}{\3}", s)  # 2 1/2
    s = re.sub(r"(?<![0-9.,])([0-9]*)\.([0-9]*)\s*\\overline\s*(?:([0-9])|\{([0-9]+)\})", repeating, s)
    s = re.sub(rf"{TEXT}\{{\s*(?:,?\s*(?:or|and)|,)\s*\}}|(?<![\\a-zA-Z])(?:or|and)(?![a-zA-Z])", ", ", s)
    while m := re.fullmatch(rf"\s*(?:{TEXT})?\{{([^{{}}]*)\}}\s*\.?\s*", s):
        s = m[1]
    return re.sub(r"(?<!\.)\.$", "", s.strip().rstrip(" ;\\"))


def repeating(m: re.Match) -> str:
    """0.1\\overline{6} as a fraction, of whole, fixed and repeated digits."""
    whole, fixed, repeat = m[1] or "0", m[2], m[3] or m[4]
    top = int(whole + fixed + repeat) - int(whole + fixed)
    return rf"\frac{{{top}}}{{{'9' * len(repeat) + '0' * len(fixed)}}}"


# ---------------------------------------------------------------------------------------------- lists and brackets
def split(s: str, at: str, number: str = NUMBER) -> list[str]:
    """s cut where `at` stands in no brackets; what was cut at are the odd elements, as in re.split."""
    depth, start, found = 0, 0, []
    for m in re.finditer(rf"{number}|(?P<at>{at})|{COMMAND}|.", s, re.DOTALL):
        depth += (m[0] in OPEN) - (m[0] in CLOSE)
        if depth < 0:
            return [s]
        if m["at"] and not depth:
            found += [s[start : m.start()], m[0]]
            start = m.end()
    return [s] if depth else [*found, s[start:]]


def closed(s: str, i: int = 0) -> tuple[int, int, int]:
    """Of the bracket that opens at s[i]: where its inside begins and ends, and where it has closed (0: never)."""
    depth, inside = 0, 0
    for m in re.compile(rf"{COMMAND}|.", re.DOTALL).finditer(s, i):
        depth += (m[0] in OPEN) - (m[0] in CLOSE)
        inside = inside or m.end()
        if depth <= 0:
            return (inside, m.start(), m.end()) if m.start() > i else (0, 0, 0)
    return 0, 0, 0


def items(s: str, number: str = NUMBER) -> list[str]:
    """The parts of a list. One with a \\pm is two."""
    found = []
    for item in split(s, "[,;]", number)[::2]:
        signs = re.split(r"\\pm(?![a-zA-Z])", item)
        whole_set = re.fullmatch(r"\s*\\\{.*\\\}\s*", item, re.DOTALL)  # its items are looked at one by one
        two = len(signs) == 2 and not whole_set
        both = (("-", "+".join(signs)), ("+", "-".join(signs))) if two else [("", item)]
        found += [re.sub(r"\\mp(?![a-zA-Z])", mp, one).strip() if mp else one.strip() for mp, one in both]
    return [item for item in found if item]


def several(s: str) -> tuple[str, str]:
    """An answer that may be a list, and the one name of its parts."""
    found = items(s, THOUSANDS)
    named = [re.fullmatch(rf"({NAME})\s*(?:=|\\in(?![a-zA-Z]))(.+)", item, re.DOTALL) for item in found]
    named = [m if m and len(split(m[2], RELATION)) == 1 else None for m in named]
    names = {re.sub(r"[\s{}]", "", m[1]) for m in named if m}
    if len(names) == 1:
        found = [m[2] if m else item for m, item in zip(named, found, strict=True)]
    return "; ".join(sorted(filter(None, map(one, found)))), names.pop() if len(names) == 1 else ""


def one(s: str) -> str:
    """Something in brackets, a union, or an expression without its unit."""
    s = s.strip()
    begin, end, after = closed(s)
    if after == len(s) and s and s[:begin] != r"\begin":
        left, right, inside = s[:begin], s[end:], s[begin:end]
        inner = [one(item) for item in items(inside)]
        inner = sorted(inner) if left in ("{", r"\{") else inner
        if left == "{" or left + right == "()" and len(inner) == 1 or left == r"\{" and len(inner) > 1:
            return "; ".join(inner)
        return left + ", ".join(inner) + right
    if len(parts := split(s, r"\\cup(?![a-zA-Z])")) > 1:
        return r"\cup".join(sorted(map(one, parts[::2])))
    m = re.fullmatch(rf"(.+?)\s*{TEXT}\{{([^{{}}]*)\}}(?:\s*\^\s*\{{?[0-9]\}}?)?", s, re.DOTALL)
    if m and not re.search(rf"[_^]$|{TEXT}", m[1]):  # _\text{eight}; \text{a}\text{b}
        number = re.search(r"[0-9})]$|\\[a-zA-Z]+$", m[1]) and (len(m[2].strip()) > 1 or m[2].strip() in "msgh")
        s = m[1] if m[2][:1].isspace() or number else s
    s = re.sub(rf"(?<=[0-9}})])\s*(?:(?:square|cubic|sq\.?)\s*)?{UNIT}(?:\s*(?:/|per)\s*{UNIT})?$", "", s)
    return expression(re.sub(rf"{TEXT}\{{([^{{}}]*)\}}", r"{\1}", s))


# ---------------------------------------------------------------------------------------------- expressions
def expression(s: str) -> str:
    """Sums, and the relations between them."""
    parts = enumerate(split(s, RELATION))
    return "".join(part if i % 2 else written(*total(part)) for i, part in parts if part.strip())


def written(factor: Fraction, rest: str) -> str:
    return {1: "", -1: "-"}.get(factor, f"{factor}*") + rest if rest else str(factor)


def total(s: str) -> tuple[Fraction, str]:
    """A sum as (factor, rest). A number has no rest; several terms have no factor."""
    s = s.strip()
    while s[:1] in ("(", "{") and (where := closed(s))[2] == len(s) and s[slice(*where[:2])].strip():
        s = s[slice(*where[:2])].strip()
    terms = [""]
    for i, part in enumerate(split(s, "[+-]") if "|" not in s else [s]):
        sign = i % 2 and (not terms[-1].strip(" +-") or re.search(r"(?:[*/^_]|\\(?:cdot|times|div))\s*$", terms[-1]))
        if i % 2 and not sign:
            terms.append("")
        terms[-1] += part
    if len(terms) == 1:
        return product(s)
    return Fraction(1), "(" + "+".join(sorted(written(*product(term)) for term in terms)) + ")"


def argument(s: str, i: int, token: str = ".") -> tuple[str, int]:
    """What a command finds at s[i] to take, and its end: {...} less its braces, a command with its own, a token."""
    while s[i : i + 1] == " ":
        i += 1
    begin, end, after = closed(s, i) if s[i : i + 1] == "{" else (0, 0, 0)
    if after:
        return s[begin:end], after
    m = re.compile(rf"{COMMAND}|{token}|.", re.DOTALL).match(s, i)
    after = m.end() if m else i
    for _ in range(ARGUMENTS.get(m[0], 0) if m else 0):
        _, after = argument(s, after)
    return s[i:after], after


def over(s: str) -> str:
    """a/b as \\frac{a}{b}, where it is clear what is divided by what: not \\sin x/2, 1/2x or a/b/c."""
    top, *slash = split(s, "/")
    if len(slash) != 2 or not top.strip() or re.search(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc|log|ln)", top):
        return s
    bottom = slash[1].strip()
    end = closed(bottom)[2] if bottom[:1] == "(" else argument(bottom, 0, THOUSANDS)[1]
    while end and bottom[end : end + 1] in ("^", "_"):
        end = argument(bottom, end + 1, NUMBER)[1]
    return rf"\frac{{{top}}}{{{bottom}}}" if end == len(bottom) else s


def product(s: str) -> tuple[Fraction, str]:
    """One term as (factor, rest). The factor is of the number and the fraction in front."""
    signs, s = re.fullmatch(r"([\s+-]*)(.*)", s, re.DOTALL).groups()
    if not s:
        return Fraction(1), signs.strip() or "{}"
    s, factor, rest, i = over(s), Fraction(1), "", 0
    # but nothing is taken from 2^x, 5!, 2516_8, 1A_{16}, 3:4
    follows = re.compile(r"(?![0-9A-F]+\s*_\s*\{?\s*[0-9])\s*(?:$|[a-zA-Z\\({*])").match
    if (m := re.match(THOUSANDS, s)) and follows(s, m.end()):
        factor, i = Fraction(m[0].replace(",", "")), m.end()
    if m := re.compile(r"\s*(\\cdot|\*)?\s*\\frac(?![a-zA-Z])").match(s, i):
        top, end = argument(s, m.end())
        bottom, end = argument(s, end)
        (a, p), (b, q) = total(top), total(bottom)
        if b and follows(s, end):
            mixed = i and not m[1] and not p + q and 0 < a / b < 1 and factor.denominator == 1  # 1\frac{1}{2}
            factor, i = factor + a / b if mixed else factor * a / b, end
            whole = not s[end:].strip() or len(p) in (argument(p, 0)[1], closed(p)[2])
            rest = rf"\frac{{{p or 1}}}{{{q}}}" if q else p if whole else f"({p})"
    while i < len(s):
        text, i = atom(s, i)
        rest += " " * (rest[-1:].isdigit() and text[:1].isdigit()) + text
    return (-1) ** signs.count("-") * factor, rest


def atom(s: str, i: int) -> tuple[str, int]:
    """What stands at s[i], in one spelling, and its end."""
    m = re.compile(rf"\s*({THOUSANDS}|{COMMAND}|\S|$)", re.DOTALL).match(s, i)
    start, i, token = m.start(1), m.end(), m[1]
    begin, end, after = closed(s, start) if token in ("(", "{") else (0, 0, 0)
    if after:
        inside = expression(s[begin:end])
        return inside if token == "{" or closed(inside)[2] == len(inside) > 0 else f"({inside})", after
    if token in ("^", "_"):
        raised, i = argument(s, i, rf"[+-]?(?:{NUMBER})")
        return token + "{" + expression(raised) + "}", i
    if token in ("*", r"\cdot", r"\times"):
        number = re.match(r"\s*[0-9.]", s[i:])
        return r"\cdot" if number else r"\times" if token == r"\times" else "", i
    if m := re.compile(r"\\begin\s*(\{\w+\*?\})(.*?)(?:\\\\\s*)?\\end\s*\1", re.DOTALL).match(s, start):
        cells = [cell if j % 2 else one(cell) for j, cell in enumerate(re.split(r"(\\\\|&)", m[2]))]
        return r"\begin" + m[1] + "".join(cells) + r"\end", m.end()
    if not re.match(r"\\[a-zA-Z]", token):
        return token.replace(",", "") or token, i
    if token == r"\sqrt" and (m := re.compile(r"\s*\[([^\[\]]*)\]").match(s, i)):
        token, i = f"{token}[{m[1].strip()}]", m.end()
    taken = ARGUMENTS.get(token.partition("[")[0], 0)
    while taken or s[i : i + 1] == "{":
        inside, i = argument(s, i)
        token, taken = f"{token}{{{expression(inside)}}}" if inside.strip() or taken else token, max(0, taken - 1)
    return token + " " * s[i:].lstrip()[:1].isalpha(), i
