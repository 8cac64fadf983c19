"""core/answers.py: what a text answers, which answers are the same, and what several samples come to."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from core import answers, verify


# ---------------------------------------------------------------------------------------------- answers
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 3 * 4 = <<3*4=12>>12\n#### 12", "12"),
        ("#### 1,234,567", "1234567"),
        ("#### -3.50", "-3.50"),
        ("#### 1 and then #### 2", "1"),  # the first
        ("####12", None),  # strict: one space
        ("#### $12", None),
        ("the answer is 12", None),
        ("#### ", None),
        ("", None),
    ],
)
def test_gsm8k_answer(text, answer):
    assert answers.gsm8k_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 3 * 4 = <<3*4=12>>12\n#### 12", "12"),
        ("The answer is $1,234.50.", "1234.50"),
        ("He has 3 left, i.e. 3.", "3"),  # the point is no part of a number of one digit
        ("It is 17.", "17"),
        ("#### 5 of 9", "9"),  # the last
        ("minus -7", "-7"),
        ("-$5 it is", "-5"),
        ("none", None),
        ("", None),
    ],
)
def test_gsm8k_flexible(text, answer):
    assert answers.gsm8k_flexible(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1}, no: \boxed{ 2 }", "2"),
        (r"\fbox{7}", "7"),
        (r"$x = \boxed 7$ indeed", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x \mid x > \sqrt{2}\right.}", r"\left\{x \mid x > \sqrt{2}\right."),
        (r"\boxed{1} and \boxed{\frac{1}{2}", None),  # cut off: the last one decides
        (r"\boxed{}", None),
        (r"\boxed{3}. Nothing to box: \boxed{ } \fbox{}", "3"),
        (r"So \boxed{7}. (In a \boxed environment, as wished.)", "7"),
        (r"I write \boxed before it: \boxed{12}, not \boxed 13", "12"),
        (r"Use \boxed{} for the answer. \boxed{-4}", "-4"),
        (r"$\boxed 42$, and \boxed stands for the answer", "42"),
        (r"as \boxed says", None),
        (r"\boxed \frac12", r"\frac12"),
        (r"\boxed{\text{so }\boxed{5}}", "5"),
        ("\\\\boxed{\\\\{1, 2\\\\}}", "\\\\{1, 2\\\\}"),
        ("\\boxed{" * 3000, None),
        (r"\boxed", None),
        ("42", None),
        ("", None),
    ],
)
def test_math_answer(text, answer):
    assert answers.math_answer(text) == answer


# Each line: ways to write one answer. Then each line: two answers that are not the same.
SAME = r"""
10 ~ 10\% ~ \$10 ~ 10. ~ 10^\circ ~ 10^{\circ} ~ 10 \text{ cm} ~ 10\text{ cm}^2 ~ x = 10 ~ 10.0 ~ +10 ~ (10)
10 ~ {10} ~ \(10\) ~ $10$
10 ~ 10\text{cm} ~ 10\,\mathrm{kg} ~ 10 cm ~ 10 square units ~ 10 \mbox{ inches} ~ 10\text{ m/s}
10 ~ 10 miles per hour ~ 10°
10 ~ y=10 ~ \text{10} ~ \mathbf{10} ~ 10\\ ~ 10 \text{degrees} ~ \text{\$}10 ~ k = 10\text{ cm} ~ 10\text{m}
10 ~ 10\text{}
\frac{1}{2} ~ \dfrac12 ~ \tfrac{1}2 ~ 1/2 ~ 0.5 ~ .5 ~ \frac 1 2 ~ $0.5$ ~ \frac{2}{4} ~ \\frac{1}{2}
\frac{1}{2} ~ {\frac{1}{2}} ~ \cfrac12 ~ 50/100
-\frac{3}{4} ~ \frac{-3}{4} ~ -3/4 ~ -\frac34 ~ \frac{3}{-4} ~ -0.75 ~ - \dfrac{3}{4} ~ −0.75 ~ -.750
\frac{7}{8} ~ 0.875 ~ 7/8
2\frac{1}{3} ~ \frac{7}{3} ~ 2 \frac13 ~ 7/3 ~ 2 1/3 ~ 2.\overline{3}
-1\frac12 ~ -3/2 ~ -1.5
1.50 ~ \$1.50 ~ \frac{3}{2} ~ 1.50 dollars ~ \$1.5
\frac{1}{6} ~ 0.1\overline{6} ~ 0.1\bar6
\frac{\sqrt{3}}{2} ~ \frac{\sqrt3}2 ~ \dfrac{\sqrt 3}{2} ~ \sqrt{3}/2 ~ \frac{1}{2}\sqrt{3} ~ 0.5\sqrt3
\frac{\sqrt{3}}{2} ~ \frac12 \sqrt {3} ~ \\frac{\\sqrt{3}}{2}
3\sqrt{2} ~ 3 \sqrt 2 ~ 3\cdot\sqrt{2} ~ 3*\sqrt2 ~ 3√2 ~ \frac{6\sqrt2}{2}
\frac{\pi}{4} ~ \frac\pi4 ~ \frac\pi 4 ~ \pi/4 ~ \frac{1}{4}\pi ~ 0.25\pi ~ π/4
-\frac{3\pi}{4} ~ \frac{-3\pi}{4} ~ -3\pi/4 ~ -\frac34\pi ~ -0.75 \pi
\frac{1}{\sqrt2} ~ 1/\sqrt{2}
\frac{3}{2\sqrt{2}} ~ 3/(2\sqrt2) ~ 1.5/\sqrt2
2\pi r ~ 2 \pi r ~ r = 2\pi r ~ 2\cdot\pi r
12345 ~ 12,345 ~ 12,\!345 ~ 12{,}345 ~ 12\,345 ~ 12 345 ~ \$12,345 ~ 12345.0 ~ 12,345 \text{ feet}
1{,}234{,}567 ~ 1,234,567 ~ 1234567 ~ 1\,234\,567
\frac{1,000}{3} ~ 1000/3 ~ 1,000/3 ~ \frac{1{,}000}3
1011_2 ~ 1011_{2} ~ 1011_{ 2 }
4{,}210_5 ~ 4210_{5}
x_{12} ~ x_12
5,-3 ~ -3,5 ~ -3, 5 ~ 5 \text{ and } -3 ~ 5\text{ or }-3 ~ 5 or -3 ~ x=5,-3 ~ x = 5 \text{ or } x = -3
5,-3 ~ \{5,-3\} ~ x \in \{-3,5\}
30^\circ,150^\circ ~ 150^{\circ}, 30^{\circ} ~ 30°,150° ~ 30,\, 150 ~ 30 \text{ or } 150 ~ 150\text{ and }30
20\%,100\% ~ 100\%, 20\% ~ 20%,100% ~ 20, 100
\$5,\$100 ~ $5$,$100$ ~ 5, 100 ~ \$100 \text{ or } \$5
0,180 ~ 180, 0 ~ 0^\circ, 180^\circ
1,2,3 ~ 3,2,1 ~ 1, 3, \text{ and } 2 ~ \left\{ 2, 1, 3 \right\} ~ \lbrace 1,2,3 \rbrace
11,\! 111,\! 111,\! 100 ~ 11111111100
32,\! 349 ~ 32349
\{1\pm\sqrt{5},-2\} ~ -2, 1+\sqrt{5}, 1-\sqrt5
\pm 3 ~ 3, -3 ~ x = \pm3 ~ ±3 ~ -3 \text{ or } 3
1\pm\sqrt{7} ~ 1-\sqrt7, 1+\sqrt7
\frac{-1\pm\sqrt5}{2} ~ \frac{-1+\sqrt{5}}{2},\frac{-1-\sqrt{5}}{2}
1,234, 5,678 ~ 5678, 1234
x=1,y=2 ~ y=2, x=1
(1,2),(3,4) ~ (3, 4), (1, 2) ~ \{(3,4),(1,2)\} ~ (1,2) \text{ and } (3,4)
(1,\frac{1}{2}) ~ (1,0.5) ~ \left(1, \tfrac12\right) ~ (1,\,2/4) ~ (x, y) = (1, .5) ~ \bigl(1, \frac12\bigr)
(-\infty,\frac{1}{2}] ~ \left(-\infty, \tfrac12\right] ~ (-∞, 0.5] ~ x \in (-\infty,\frac12]
[1,2) ~ x \in [1,2) ~ x\in\left[1, 2\right)
(-\infty,-2)\cup(2,\infty) ~ (2, \infty) \cup (-\infty, -2) ~ x \in (-\infty,-2)\cup (2,+\infty)
\begin{pmatrix} 1 \\ -0.5 \end{pmatrix} ~ \begin{pmatrix}1\\-\frac{1}{2}\end{pmatrix}
\begin{pmatrix} 1 \\ -0.5 \end{pmatrix} ~ \begin{pmatrix} 1 \\ -1/2 \\ \end{pmatrix}
\\begin{pmatrix} x & 2 \\\\ 3 & 4 \\end{pmatrix} ~ \begin{pmatrix}x&2\\3&4\end{pmatrix}
\text{Evelyn} ~ Evelyn ~ \textbf{Evelyn} ~ \mathrm{Evelyn} ~ \text{Evelyn}. ~ \text{ Evelyn }
\text{(C)} ~ C ~ (C) ~ \textbf{(C)} ~ \text{C.}
x^2+2x-1 ~ x^{2} + 2x - 1 ~ 2x - 1 + x^2 ~ y = x^2+2x-1 ~ f(x) = x^2 + 2x - 1
3+4i ~ 4i+3 ~ 3 + 4 i
\frac{x+1}{2} ~ (x+1)/2 ~ \frac12(x+1) ~ \frac{1+x}{2}
x^{\frac{1}{2}} ~ x^{1/2} ~ x^{0.5} ~ x^\frac12
9^{9^{9}} ~ 9^{9^9} ~ {9}^{9^{9}}
3\times10^5 ~ 3\cdot 10^{5} ~ 3 × 10^5 ~ 3.0 \times 10^5
x \le 5 ~ x\leq5 ~ x ≤ 5
1<x\le2 ~ 1 < x \leq 2
\sqrt[3]{2} ~ \sqrt[3]2
\binom{5}{2} ~ \dbinom52
\log_2 3 ~ \log_{2}{3}
\emptyset ~ \varnothing
0 ~ -0 ~ 0.00
\theta = \frac{\pi}{3} ~ \pi/3
"""
DIFFERENT = r"""
1 ~ -1
1 ~ 2
12 ~ 1 2
1,2 ~ 12
x=5 ~ y=5
x = 5 ~ k = 5
\theta=1 ~ \phi=1
x=1,y=2 ~ x=2,y=1
x=1,y=2 ~ 1,2
x_1=2, x_2=3 ~ x_1=3, x_2=2
1011_2 ~ 1011_3
1011_2 ~ 1011
1011_2 ~ 10112
0.33 ~ \frac{1}{3}
0.333... ~ \frac{1}{3}
0.333... ~ 0.333
0.3333333333 ~ 1/3
0.\overline{3} ~ 0.3
1.\overline{3} ~ .\overline{3}
\frac{1}{2} ~ \frac{2}{1}
\frac{1}{2} ~ -\frac{1}{2}
1\frac{1}{2} ~ \frac{1}{2}
1\frac{1}{2} ~ 11/2
2\cdot\frac12 ~ 2\frac12
-2\frac12 ~ -\frac32
\frac{1}{0} ~ 1
\frac{}{2} ~ \frac{1}{2}
50\% ~ 0.5
(1,2) ~ (2,1)
(1,2) ~ [1,2]
(1,2) ~ 1,2
(1,2) ~ \{1,2\}
[1,2] ~ [2,1]
(1,2] ~ [1,2)
(1,2,3) ~ (3,2,1)
(1,234) ~ 1,234
(1,234) ~ 1234
(1,2),(3,4) ~ (2,1),(3,4)
[1,2]\cup[3,4] ~ [2,1]\cup[3,4]
A \cup B ~ A \cap B
1,2 ~ 1,2,3
1,2,2 ~ 1,2
1,23 ~ 123
0,180 ~ 180
0,100,200 ~ 100200
60\text{ or }120 ~ 60120
30^\circ,150^\circ ~ 30150
1A_{16} ~ A_{16}
1E2_{16} ~ E2_{16}
10,00 ~ 1000
0,5 ~ 0.5
1.000 ~ 1000
\{5\} ~ 5
[5] ~ 5
\pm 2 ~ 2
5 \text{ or } 6 ~ 5
2^{10} ~ 1024
2^3 ~ 3^3
\frac{2^3}{2} ~ \frac{3^3}{3}
x^{12} ~ x^1 2
x^{-1} ~ x-1
5! ~ 5
3:4 ~ 4:3
3:4 ~ 3
1:2 ~ 1/2
2+3 ~ 5
2\cdot3 ~ 6
2\cdot 3 ~ 23
x+1 ~ x-1
a-b ~ b-a
-(x+1) ~ -x+1
\frac{x+1}{2} ~ x+\frac12
1/2x ~ \frac{1}{2}x
2i ~ 2
2\mathrm{i} ~ 2
3\text{x} ~ 3
5 \text{ cm} ~ 6 \text{ cm}
\sqrt{2} ~ 2
\sqrt{23} ~ \sqrt{2}3
\sqrt[3]{2} ~ \sqrt{2}
\sqrt{x+1} ~ \sqrt{x}+1
\sin\frac{\pi}{4} ~ \frac{\sin\pi}{4}
\sin x/2 ~ \frac{\sin x}{2}
\frac{\sin x}{2}y ~ \frac{\sin xy}{2}
\overline{1}2 ~ \overline{12}
|x-1| ~ |1-x|
\log_2 3 ~ \log_3 2
\binom{5}{2} ~ \binom{2}{5}
x<5 ~ x>5
x<5 ~ x\leq5
\text{A} ~ \text{B}
\text{ a} ~ \text{ b}
\text{New }\text{York} ~ \text{New }
\text{Evelyn} ~ \text{Evelyn Brown}
\begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}2\\1\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}1&2\end{pmatrix}
"""


@pytest.mark.parametrize("line", SAME.strip().splitlines())
def test_math_equal_forms(line):
    """Hendrycks' rules, and beyond. Of those with a name, the names must agree."""
    forms = line.split(" ~ ")
    for form in forms:
        assert answers.math_equal(forms[0], form) and answers.math_equal(form, forms[0]), form
        assert answers.math_normal(form) == answers.math_normal(forms[0])


@pytest.mark.parametrize("line", DIFFERENT.strip().splitlines())
def test_math_equal_tells_apart(line):
    a, b = line.split(" ~ ")
    assert answers.math_equal(a, a) and answers.math_equal(b, b)
    assert not answers.math_equal(a, b) and not answers.math_equal(b, a)


@pytest.mark.parametrize("nothing", [None, "", " ", "$", "$$", r"\left", "{}", ".", ",", r"\text{}", r"\!"])
def test_no_answer_equals_nothing(nothing):
    assert not any(answers.math_equal(nothing, other) or answers.math_equal(other, nothing)
                   for other in (nothing, None, "", "$", "1", "0"))  # fmt: skip


def test_math_normal_takes_whatever_a_model_writes():
    """Unbalanced, endless or senseless: some spelling, in no time."""
    parts = r"""\frac { } ( ] \{ \} \sqrt[ \pm ^ _ 1, x+ . / & \\ \begin{pmatrix} \end{pmatrix}
               \overline{3} 0.\overline{ 99 \text{""".split()
    for a in parts:
        for b in parts:
            for text in (a + b, (a + b) * 20, (a + b) * 2000):
                assert isinstance(answers.math_normal(text), str)


# ---------------------------------------------------------------------------------------------- of several samples
def test_pass_at_k():
    """Against the share of all k-subsets of n samples that hold a right one."""
    from itertools import combinations

    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations(range(n), k))
                expected = sum(any(i < c for i in subset) for subset in subsets) / len(subsets)
                assert answers.pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)
    for n, c, k in ((3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4), (0, 0, 1)):
        with pytest.raises(ValueError, match="pass@k"):
            answers.pass_at_k(n, c, k)


def test_majority():
    assert answers.majority(["2", "1", "1"]) == "1"
    assert answers.majority(["2", "1", "1", "2"]) == "2"  # a tie: the first
    assert answers.majority([None, None, "3"]) == "3"  # no answer, no vote
    assert answers.majority([None, None]) is None
    assert answers.majority([]) is None
    halves = ["7", r"\frac12", "0.5", "7", "1/2"]
    assert answers.majority(halves, answers.math_equal) == r"\frac12"
    assert answers.majority(halves) == "7"
    assert answers.majority(["x=5", "y=5", "5", "y=5"], answers.math_equal) == "x=5"  # 5 is its second
    assert answers.majority(["1", "3", "5"], lambda a, b: int(a) % 4 == int(b) % 4) == "1"  # any equality


def test_majority_is_linear(monkeypatch):
    """Four times the answers, all of them different: not more than four times the comparisons."""
    calls, whole = [], answers.math_equal
    monkeypatch.setattr(answers, "math_equal", lambda a, b: calls.append(1) or whole(a, b))
    for n in (200, 800):
        calls.clear()
        given = [rf"\frac{{{i}}}{{7}}" for i in range(n)] * 2
        assert answers.majority([*given, "1/7"], answers.math_equal) == r"\frac{1}{7}"
        assert len(calls) == n + 1


def test_of_several_by_hand():
    """Three problems, four samples each: the true answer is 1."""
    given = [["2", "1", "1", None], ["1", "2", "2", "3"], [None, None, None, "2"]]
    right = [[a == "1" for a in row] for row in given]
    at = {k: answers.of_several(given, right, answers.same, k) for k in (1, 2, 3, 4)}
    assert at[1]["pass"] == pytest.approx((2 / 4 + 1 / 4 + 0) / 3)
    assert at[2]["pass"] == pytest.approx((1 - 1 / 6 + 1 - 3 / 6 + 0) / 3)
    assert at[4]["pass"] == pytest.approx(2 / 3)  # best of N: any is right
    assert [at[k]["maj"] for k in (1, 2, 3, 4)] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1 / 3])
    assert answers.of_several(given[:1], right[:1], answers.same, 2)["maj"] == 0  # 2 and 1: the first wins
    assert answers.of_several(given[:1], right[:1], answers.same, 3)["maj"] == 1


def test_math_verify():
    pytest.importorskip("math_verify", reason="an optional package")
    assert answers.math_verified(r"\sqrt{12}", r"2\sqrt{3}") and not answers.math_equal(r"\sqrt{12}", r"2\sqrt{3}")
    assert answers.math_verified("1+x", r"\frac{2x+2}{2}")
    assert not answers.math_verified("3", "4")
    assert answers.math_verified(r"\text{what}?", r"\text{what}?")  # to the letter, though not parsed
    for nothing in (None, ""):
        assert not answers.math_verified(nothing, "4") and not answers.math_verified("4", nothing)
        assert not answers.math_verified(nothing, nothing)


@pytest.fixture
def hasty(monkeypatch):
    """A process that waits a second, not five."""
    pytest.importorskip("math_verify", reason="an optional package")
    monkeypatch.setattr(verify, "SECONDS", 1)
    verify.worker.cache_clear()
    yield
    verify.worker.cache_clear()


def test_math_verify_ends(hasty):
    """Numbers that no machine writes down are wrong after some seconds, once each, from any thread; others are not."""
    began = time.time()
    with ThreadPoolExecutor(2) as pool:
        monsters = ["9^{9^{9}}", r"2^{2^{2^{2^{2^{2}}}}}"]
        assert list(pool.map(answers.math_verified, monsters, ["5", "7"])) == [False, False]
        assert list(pool.map(answers.math_verified, ["0.5", "7"], [r"\frac{3}{6}", "8"])) == [True, False]
    assert time.time() - began < 60
    again = time.time()
    assert not any(answers.math_verified(a, str(i)) for a in monsters for i in range(50))
    assert answers.majority([*monsters, "1/2", "2/4"], answers.math_verified) == "1/2"
    assert time.time() - again < 20


def test_math_verify_survives_its_process():
    pytest.importorskip("math_verify", reason="an optional package")
    assert answers.math_verified("4/6", "2/3")
    verify.worker().kill()
    assert not answers.math_verified("6/9", "2/3")  # the one that was under way
    assert answers.math_verified("8/12", "2/3")
