"""judge.py judge: against a server on loopback that answers well, and ones that misbehave in every way seen."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pytest
import torch

import evaluate
import tiny
from core import ranks
from tools import judge, verdicts

ROOT = Path(__file__).parent.parent
KEY = "sk-secret-0123456789"


# ---------------------------------------------------------------------------------------------- verdicts
LETTER = [
    ("Comparison: A is shorter.\nPreferred: A", "A"),
    ("Comparison: B.\r\nPreferred: B\r\n", "B"),
    ("  Preferred:   B  ", "B"),
    ("```\nPreferred: A\n```", "A"),
    ("Preferred: B<|im_end|>", "B"),
    ("Preferred: A\n\nI hope that helps!", "A"),
]
LENIENT = [
    ('Preferred: "A"', "A"),
    ("Preferred: B.", "B"),
    ("Preferred: **A**", "A"),
    ("**Preferred: B.**", "B"),
    ("**Preferred**: __A__", "A"),
    ("*Preferred:* A", "A"),
    ("`Preferred: B`", "B"),
    ("> Preferred: [A]", "A"),
    ("2. Preferred: (B)", "B"),
    ("### Preferred: $A$", "A"),
    ("preferred: a", "A"),
    ("PREFERRED: b", "B"),
    ("Preferred: Summary A", "A"),
    ("Preferred: [summary B].", "B"),
    ("Preferred summary: Option B", "B"),
    ("Preferred：Ａ。", "A"),
    ("<answer>Preferred: B</answer>", "B"),
    ("| Preferred: | B |", "B"),
]
UNPARSED = [
    "Preferred: A or B",
    "Preferred: A/B",
    "Preferred: A, B",
    "Preferred: neither",
    "Preferred: Neither A nor B",
    "Preferred: a tie",
    "Preferred: A?",
    "Preferred: AB",
    "Preferred: A because B is long",
    "Preferred: Summary A is better than B",
    "Preferred:\nA",
    "Preferred: A\nPreferred: B",
    "Preferred: A\n**Preferred: B**",
    "preferred: neither\nPreferred: B",
    "Preferred: A\nPreferred: A",
    "I think Preferred: A",
    "(refused) I cannot say Preferred: A",
    "A",
    "",
    "*" * 20000,
    "Preferred: A" + "-" * 20000 + "?",
]


@pytest.mark.parametrize(("answer", "choice"), LETTER + LENIENT)
def test_preferred(answer, choice):
    assert verdicts.preferred(answer) == choice
    assert verdicts.to_the_letter(answer) == ((answer, choice) in LETTER)


@pytest.mark.parametrize("answer", UNPARSED)
def test_unparsed(answer):
    assert verdicts.preferred(answer) is None


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("<think>\nPreferred: A\n</think>\nPreferred: B", "B"),
        ("Preferred: A, or no\nPreferred: A\n</think>\n\n**Preferred: B**", "B"),  # the template has opened it
        ("<think>\nFirst.\nPreferred: A\n", None),  # cut off while it thought
        ("<Thinking>Preferred: A</Thinking>Preferred: B", "B"),
        ("<think time='3'>\nPreferred: A</think >\nPreferred: B", "B"),
        ("[THINK]\nPreferred: A\n[/THINK]\nPreferred: B", "B"),
        ("<seed:think>\nPreferred: A</seed:think>Preferred: B", "B"),
        ("<reasoning>\nPreferred: A\n</reasoning>\nPreferred: B", "B"),
        ("◁think▷\nPreferred: A◁/think▷Preferred: B", "B"),
        ("<|begin_of_thought|>\nPreferred: A\n<|end_of_thought|>\nPreferred: B", "B"),
        ("<|channel|>analysis<|message|>\nPreferred: A<|end|><|channel|>final<|message|>Preferred: B<|return|>", "B"),
        ("<think>The tag <think> is mine.\nPreferred: A</think>\nPreferred: B", "B"),
        ("<think><think>so</think>\nPreferred: A\n</think>\nPreferred: B", "B"),
        ("Preferred: B\n<think>\nPreferred: A\n</think>", "B"),
        ("<think>\nPreferred: A\n</think>", None),
        ("Preferred: B, I <think>", None),
        ("A thoughtful <summary> is\nPreferred: B", "B"),
        ("Comparison: A is more [thoughtful] than B.\nPreferred: A", "A"),
        ("Comparison: A has more <analysis> than B.\nPreferred: A", "A"),
        ("So: [analysis] is\nPreferred: A\n[/analysis]\nPreferred: B", "B"),
        ("[analysis]\nPreferred: A", None),
        ("<thinking_process>\nPreferred: A\n</thinking_process>\nPreferred: B", "B"),
    ],
)  # fmt: skip
def test_reasoning_is_cut_off(answer, choice):
    assert verdicts.preferred(answer) == choice


def reply(content=None, finish="stop", **message) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}]}


def part(text, kind="text") -> dict:
    return {"type": kind, "text": text}


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (reply("Preferred: A"), "Preferred: A"),
        (reply(None), ""),
        (reply(None, reasoning_content="Preferred: A"), ""),
        (reply([part("Preferred: "), part("A")]), "Preferred: A"),
        (reply([part("Comparison: x."), part("Preferred: A", "output_text")]), "Comparison: x.\nPreferred: A"),
        (reply([{"type": "thinking", "thinking": [part("Preferred: B")]}, part("Preferred: A")]), "Preferred: A"),
        (reply([part("Preferred: B", "reasoning"), "so ", "A"]), "so A"),
        (reply(part("one part")), "one part"),
        (reply([]), ""),
        (reply(None, refusal="I cannot\nPreferred: A"), "(refused) I cannot Preferred: A"),
        (reply("", refusal="No."), "(refused) No."),
        (reply("", "content_filter"), ""),
        ({"choices": [{"text": "Preferred: B", "index": 0}]}, "Preferred: B"),
        ({"choices": [{"text": None}], "error": None}, ""),
    ],
)
def test_answer_in_a_reply(found, text):
    assert verdicts.answer_in(json.dumps(found)) == text


@pytest.mark.parametrize(
    ("found", "why", "again", "final"),
    [
        ({"error": {"message": "Insufficient credits", "code": 402}}, "error 402: Insufficient credits", False, True),
        ({"error": {"message": "slow\ndown", "code": "429"}, "choices": []}, "error 429: slow down", True, False),
        ({"error": {"message": "x", "code": 503, "status": "UNAVAILABLE"}}, "error 503: x", True, False),
        ({"error": {"message": "bad key", "code": 401}}, "error 401: bad key", False, True),
        ({"error": {"message": "too long", "code": 400}}, "error 400: too long", False, False),
        ({"error": {"message": "Wait", "type": "rate_limit_error"}}, "error: Wait (rate_limit_error)", True, False),
        ({"error": {"message": "You", "code": "insufficient_quota"}}, "error: You (insufficient_quota)", False, True),
        ({"error": "model overloaded"}, "error: model overloaded", True, False),
        ({"error": "model 'x' not found"}, "error: model 'x' not found", False, False),
        ({"error": [{"a": 1}]}, 'error: [{"a": 1}]', False, False),
        ({"object": "error", "message": "no such model", "code": 40301}, "error: no such model", False, False),
        ({"detail": [{"msg": "field"}]}, 'error: [{"msg": "field"}]', False, False),
        ({"choices": [{"error": {"code": 502, "message": "died"}, "message": {}}]}, "error 502: died", True, False),
        (reply("", "error"), "the judge broke off (finish_reason: error)", True, False),
        (reply("Preferred: A", "error"), "the judge broke off", True, False),
    ],
)  # fmt: skip
def test_an_error_in_a_reply(found, why, again, final):
    with pytest.raises(verdicts.Unanswered) as error:
        verdicts.answer_in(json.dumps(found))
    assert why in str(error.value) and (error.value.again, error.value.final) == (again, final)


@pytest.mark.parametrize("body", ['data: {"choices": []}\n\n', ": WAIT\n\ndata: {}\n\n", "\nevent: ping\n"])
def test_a_stream_is_named(body):
    with pytest.raises(verdicts.Unanswered, match="streams its answer") as error:
        verdicts.answer_in(body)
    assert error.value.final


BODIES = ("", "<html>", "[]", "null", "3", "[" * 100_000, '{"choices": [null]}', '{"choices": [{}]}', '{"choices": 3}')


@pytest.mark.parametrize("body", [*BODIES, '{"choices": [{"message": {"content": 3}}]}', '{"error": {}}'])
def test_what_is_neither(body):
    with pytest.raises(ValueError, match="not the JSON of a chat completion|not text"):
        verdicts.answer_in(body)


def test_prompt_of_the_paper():
    """Appendix A.1, word for word; braces in the texts stay as they are."""
    rows = [{"id": 7, "post": "{a} {post}", "reference": " the reference ", "responses": ["ours {b}"]}]
    (question,) = judge.questions_of(rows, "m", {}, seed=0)
    first, last = question["prompt"].split("\n")[0], question["prompt"].split("\n")[-1]
    assert first.startswith("Which of the following summaries does a better job of summarizing the most important")
    assert first.endswith("irrelevant details? Judge based on accuracy, coverage, and coherence.")
    assert "FIRST provide a one-sentence comparison of the two summaries, explaining which you" in question["prompt"]
    assert last == "Preferred: A or B"
    ours, other = ("A", "B") if question["model_is"] == "A" else ("B", "A")
    assert "[post]\n{a} {post}\n" in question["prompt"]
    assert f"[summary {ours}]\nours {{b}}\n" in question["prompt"]
    assert f"[summary {other}]\nthe reference\n" in question["prompt"]


def test_order_is_drawn_per_example_from_the_seed():
    rows = [{"id": i, "post": "p", "reference": "r", "responses": ["a", "b"]} for i in range(200)]
    orders = {seed: [q["model_is"] for q in judge.questions_of(rows, "m", {}, seed)] for seed in (0, 1)}
    assert 160 < orders[0].count("A") < 240
    assert orders[0] != orders[1]
    assert orders[0][::2] != orders[0][1::2]  # of each sample for itself
    part = judge.questions_of(rows[50:], "m", {}, 0)
    assert [q["model_is"] for q in part] == orders[0][100:]  # whatever the other rows are
    keys = {q["key"] for model in "mn" for q in judge.questions_of(rows[:1], model, {}, 0)}
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, 0), ("", 0), ("3", 3), ("0.5", 0.5), ("-4", 0), ("soon", 0), ("inf", 0), ("nan", 0)],
)
def test_retry_after(value, seconds):
    assert judge.retry_after(value) == seconds


def test_retry_after_a_date():
    from email.utils import formatdate

    assert 25 < judge.retry_after(formatdate(time.time() + 30, usegmt=True)) <= 30
    assert judge.retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


# ---------------------------------------------------------------------------------------------- a judge on loopback
def right(prompt: str) -> str:
    """A judge that prefers the summary with the word `good`."""
    a, b = prompt.split("[summary A]\n")[1].split("\n\nInstructions:")[0].split("\n\n[summary B]\n")
    return f"Comparison: one is good.\nPreferred: {'A' if 'good' in a else 'B'}"


def completion(text: str | None) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class Server(ThreadingHTTPServer):
    """`answer(handler, prompt, n)` replies to the n-th request of a prompt (counted from 0)."""

    daemon_threads = True

    def __init__(self, answer):
        self.answer, self.seen, self.headers, self.bodies = answer, [], [], []
        self.lock, self.now, self.most = threading.Lock(), 0, 0
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_):
        """A client that went away is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with server.lock:
            n = server.seen.count(prompt)
            server.seen.append(prompt)
            server.headers.append(dict(self.headers))
            server.bodies.append((self.path, body))
            server.now += 1
            server.most = max(server.most, server.now)
            self.open = True
        try:
            server.answer(self, prompt, n)
        finally:
            self.close_one()

    def close_one(self):
        """Before a reply is written: once it is, the client may ask again before this thread has its turn."""
        with self.server.lock:
            self.server.now -= self.open
            self.open = False

    def reply(self, status: int, body: bytes = b"", length: int | None = None, **headers: str):
        self.close_one()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    servers = []

    def start(answer) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def well(handler, prompt, n):
    handler.reply(200, completion(right(prompt)))


def flags(path, url, **kw) -> Namespace:
    given = {"path": str(path), "judge_url": url, "judge_model": "tiny", "judge_options": {}, "judge_timeout": 5}
    given |= {"judge_retries": 2, "concurrency": 4, "skip_failed": False, "temperature": None, "limit": 0, "seed": 0}
    return Namespace(**given | {"out": None} | kw)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Back-off of milliseconds."""
    monkeypatch.setattr(judge.Judge, "wait", 0.01)
    whole = judge.judge_from

    def short(args):
        judge = whole(args)
        judge.wait = 0.01
        return judge

    monkeypatch.setattr(judge, "judge_from", short)


def answers(tmp_path, n=8, good=6, **change) -> Path:
    """A file as generate.py writes it; the first `good` responses are the better ones."""
    path = tmp_path / "z.jsonl"
    rows = [
        {"id": i, "prompt": f"post {i}", "reference": "so so" if i < good else "good", "responses": [f"a {i}"]}
        for i in range(n)
    ]
    for i in range(good):
        rows[i]["responses"] = [f"good {i}"]
    rows[0] |= change
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def kept(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "z.verdicts.jsonl").read_text().splitlines()]


def test_a_good_judge(tmp_path, serve, capsys):
    server = serve(well)
    judge.judge(flags(answers(tmp_path), server.url, judge_options={"temperature": 0, "max_tokens": 99}))
    found = json.loads((tmp_path / "z.verdicts.json").read_text())
    assert {key: found[key] for key in ("questions", "wins", "losses", "empty", "unparsed", "lenient")} == {
        **{"questions": 8, "wins": 6, "losses": 2, "empty": 0, "unparsed": 0, "lenient": 0}
    }
    assert found["unanswered"] == 0
    assert found["win_rate"] == 0.75
    assert found["standard_error"] == pytest.approx((0.75 * 0.25 / 8) ** 0.5)
    assert found["judge"] == {"model": "tiny", "options": {"temperature": 0, "max_tokens": 99}, "seed": 0}
    assert sorted(row["id"] for row in kept(tmp_path)) == list(range(8))
    assert all(row["verdict"] == ("model" if row["id"] < 6 else "reference") for row in kept(tmp_path))
    path, body = server.bodies[0]
    assert path == "/v1/chat/completions"
    assert body["model"] == "tiny" and body["temperature"] == 0 and body["max_tokens"] == 99
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
    judge.judge(flags(tmp_path / "z.jsonl", server.url, judge_options={"temperature": 0, "max_tokens": 99}))
    assert len(server.seen) == 8  # nothing is paid for twice
    screen = capsys.readouterr()
    assert "win rate 75.0% ± 15.3% against the reference (6 of 8, 0 of them empty); 0 unparsed" in screen.out
    said = screen.out + screen.err + "".join(p.read_text() for p in tmp_path.iterdir())
    assert KEY not in said and "secret" not in said


def test_samples_of_one_post_are_no_independent_ones():
    questions = [{"key": f"{i} {k}", "id": i, "model_is": "A", "empty": False} for i in range(4) for k in range(16)]
    verdicts = {q["key"]: {"answer": f"Preferred: {'AB'[q['id'] % 2]}"} for q in questions}
    found = judge.win_rate(questions, verdicts)
    assert (found["win_rate"], found["standard_error"]) == (0.5, pytest.approx(0.25))


def test_concurrency_is_bounded(tmp_path, serve):
    def slow(handler, prompt, n):
        time.sleep(0.05)
        well(handler, prompt, n)

    server = serve(slow)
    judge.judge(flags(answers(tmp_path, n=12), server.url, concurrency=3))
    assert server.most == 3


def test_unparsed_and_empty_are_counted_apart(tmp_path, serve, capsys):
    def odd(handler, prompt, n):
        text = {"post 1": "Preferred: A or B", "post 2": None, "post 3": ""}
        found = next((text[key] for key in text if f"[post]\n{key}\n" in prompt), right(prompt))
        handler.reply(200, completion(found))

    server = serve(odd)
    judge.judge(flags(answers(tmp_path, responses=[" \n"]), server.url))
    found = json.loads((tmp_path / "z.verdicts.json").read_text())
    assert {key: found[key] for key in ("wins", "losses", "empty", "unparsed")} == {
        **{"wins": 2, "losses": 3, "empty": 1, "unparsed": 3}
    }
    assert found["win_rate"] == 2 / 5
    assert len(server.seen) == 7  # an empty summary has lost, unasked
    assert "3 unparsed" in capsys.readouterr().out


def test_what_is_read_leniently_is_counted(tmp_path, serve, capsys):
    """Reasoning for the other one before a bold verdict; lower case; a list of parts; to the letter: all are right."""

    def loose(handler, prompt, n):
        text, other = right(prompt), "AB"[right(prompt).endswith("A")]
        ours = text[-1]
        odd = {
            "post 0": f"<think>\nPreferred: {other}\n</think>\n**Preferred: Summary {ours}.**",
            "post 1": f"preferred: {ours.lower()}",
            "post 2": [{"type": "thinking", "thinking": f"Preferred: {other}"}, {"type": "text", "text": text}],
        }
        handler.reply(200, completion(next((odd[key] for key in odd if f"[post]\n{key}\n" in prompt), text)))

    judge.judge(flags(answers(tmp_path), serve(loose).url))
    found = json.loads((tmp_path / "z.verdicts.json").read_text())
    assert (found["win_rate"], found["lenient"], found["unparsed"]) == (0.75, 2, 0)
    assert "0 unparsed, 0 unanswered, 2 read leniently" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "asked", "why"),
    [
        ({"error": {"message": "Insufficient credits. Add more.", "code": 402}}, 1, "error 402: Insufficient credits"),
        ({"error": {"message": "No such model", "code": 404}}, 1, "HTTP 200, but error 404: No such model)"),
        ({"error": {"message": "Slow down", "code": 429}}, 3 * 4, "HTTP 200, but error 429: Slow down (3 attempts)"),
        ({"error": f"overloaded, says {KEY}"}, 3 * 4, "HTTP 200, but error: overloaded, says *** (3 attempts)"),
        (reply("", "error"), 3 * 4, "the judge broke off (finish_reason: error) (3 attempts)"),
        ('data: {"choices": [{"delta": {}}]}', 1, "the server streams its answer"),
    ],
)  # fmt: skip
def test_an_error_in_an_answer_of_200(tmp_path, serve, body, asked, why):
    """Its words are told; it is asked again only where that can help; such a question is unanswered, not unparsed."""
    text = body if isinstance(body, str) else json.dumps(body)
    server = serve(lambda handler, prompt, n: handler.reply(200, text.encode()))
    message = judged_with_error(flags(answers(tmp_path), server.url, concurrency=1))
    assert message.startswith("8 of 8 questions have no answer (row 0: ") and why in message
    assert len(server.seen) == asked and kept(tmp_path) == []


def test_an_error_that_passes(tmp_path, serve):
    """429 and 502 in the body of the first answers; then the judge answers."""

    def busy(handler, prompt, n):
        errors = [{"error": {"code": 429, "message": "busy"}}, {"choices": [{"error": {"code": 502, "message": "no"}}]}]
        handler.reply(200, json.dumps(errors[n]).encode() if n < 2 else completion(right(prompt)))

    judge.judge(flags(answers(tmp_path, n=3, good=2), serve(busy).url))
    assert json.loads((tmp_path / "z.verdicts.json").read_text())["win_rate"] == 2 / 3


def test_words_of_an_http_error(tmp_path, serve):
    """The message in its JSON; no credit is no credit for any question, whatever the code."""
    body = {"error": {"message": "You exceeded your quota", "type": "insufficient_quota", "code": "insufficient_quota"}}
    for status, error in ((402, {"detail": "Pay first"}), (429, body)):
        server = serve(lambda handler, prompt, n, e=error, s=status: handler.reply(s, json.dumps(e).encode()))
        message = judged_with_error(flags(answers(tmp_path), server.url, concurrency=1))
        told = "Pay first)" if status == 402 else "You exceeded your quota (insufficient_quota))"
        assert f"HTTP {status}: {told}" in message
        assert len(server.seen) == 1


def test_a_short_key_is_no_part_of_a_word():
    hidden = judge.Judge("http://h", "m", "k").hide
    assert hidden("<think> asked with k, of 'k'") == "<think> asked with ***, of '***'"
    assert judge.Judge("http://h", "m", KEY).hide(f"x{KEY}y") == "x***y"


def garbage(handler, prompt, n):
    bodies = [b"", b"<html>busy</html>", b'{"choices": []}', b"[]", b"null", b"\xff\xfe", b"[" * 100_000]
    handler.reply(200, bodies[n] if n < len(bodies) else completion(right(prompt)))


def fails(status: int, times: int = 2, **headers):
    def answer(handler, prompt, n):
        if n < times:
            handler.reply(status, b'{"error": {"message": "busy"}}', **headers)
        else:
            well(handler, prompt, n)

    return answer


def closes(handler, prompt, n):
    """Breaks off: without a word, in the head, in the body; then it answers."""
    body = completion(right(prompt))
    if n == 0:
        handler.connection.close()
    elif n == 1:
        handler.wfile.write(b"HTTP/1.1 2")
    elif n == 2:
        handler.reply(200, body[: len(body) // 2], length=len(body))
    elif n == 3:
        handler.wfile.write(b"what?\r\n\r\n")
    else:
        handler.reply(200, body)


def dawdles(handler, prompt, n):
    """The first time it says nothing, the second time it drips for ever; then it answers."""
    if n == 0:
        time.sleep(1)
    elif n == 1:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.02)
    else:
        well(handler, prompt, n)


@pytest.mark.parametrize(
    ("answer", "kw"),
    [
        (fails(429), {}),
        (fails(500), {}),
        (fails(503), {}),
        (fails(408), {}),
        (garbage, {"judge_retries": 7}),
        (closes, {"judge_retries": 4}),
        (dawdles, {"judge_timeout": 0.3}),
    ],
    ids=["429", "500", "503", "408", "garbage", "closes", "dawdles"],
)
def test_a_bad_judge_is_asked_again(tmp_path, serve, answer, kw):
    server = serve(answer)
    judge.judge(flags(answers(tmp_path, n=3, good=2), server.url, **kw))
    assert json.loads((tmp_path / "z.verdicts.json").read_text())["win_rate"] == 2 / 3
    assert len(kept(tmp_path)) == 3


def test_retry_after_is_honoured(tmp_path, serve):
    times = []

    def answer(handler, prompt, n):
        times.append(time.monotonic())
        fails(429, 1, Retry_After="1")(handler, prompt, n)

    serve_at = serve(answer)
    judge.judge(flags(answers(tmp_path, n=1, good=1), serve_at.url))
    assert times[1] - times[0] >= 1


def judged_with_error(args) -> str:
    with pytest.raises(ValueError) as error:
        judge.judge(args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_day_of_retry_after_ends_the_run(tmp_path, serve):
    server = serve(fails(429, 99, Retry_After="86400"))
    assert "asks to wait 86400 s" in judged_with_error(flags(answers(tmp_path), server.url))


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_a_refused_key_ends_the_run_at_once(tmp_path, serve, status, capsys):
    """And neither a server that repeats the key nor one that sends us elsewhere gets it on the screen or further."""
    elsewhere = serve(well)

    def refuse(handler, prompt, n):
        handler.reply(status, f"wrong key {KEY}".encode(), Location=elsewhere.url + "/chat/completions")

    server = serve(refuse)
    message = judged_with_error(flags(answers(tmp_path), server.url, concurrency=1))
    assert f"8 of 8 questions have no answer (row 0: HTTP {status}: wrong key ***)" in message
    assert len(server.seen) == 1 and not elsewhere.seen
    assert KEY not in message + capsys.readouterr().err


def test_a_judge_that_never_answers(tmp_path, serve):
    server = serve(lambda handler, prompt, n: time.sleep(0.6))
    message = judged_with_error(flags(answers(tmp_path), server.url, judge_timeout=0.1, judge_retries=1, concurrency=2))
    assert "timed out (2 attempts)" in message
    assert len(server.seen) <= 10  # not every question is tried
    server.shutdown()
    server.server_close()
    message = judged_with_error(flags(tmp_path / "z.jsonl", server.url))
    assert "8 of 8 questions have no answer" in message and "refused" in message


def test_one_question_that_is_refused(tmp_path, serve, capsys):
    """The others are kept; --skip-failed goes without; asked again, only that one is."""

    def picky(handler, prompt, n):
        if "[post]\npost 3\n" in prompt and len(server.seen) < 17:
            handler.reply(400, b"content filter")
        else:
            well(handler, prompt, n)

    server, path = serve(picky), answers(tmp_path)
    message = judged_with_error(flags(path, server.url, concurrency=1))
    assert message.startswith("1 of 8 questions have no answer (row 3: HTTP 400: content filter)")
    assert "--skip-failed" in message
    assert len(kept(tmp_path)) == 7 and len(server.seen) == 8
    judge.judge(flags(path, server.url, skip_failed=True))
    assert json.loads((tmp_path / "z.verdicts.json").read_text())["unanswered"] == 1
    assert "(5 of 7, 0 of them empty); 0 unparsed, 1 unanswered" in capsys.readouterr().out
    assert len(server.seen) == 9


def test_goes_on_after_a_kill(tmp_path, serve):
    """kill -9 in the middle, a torn last line: what was answered is not asked again."""
    hold = threading.Event()

    def some(handler, prompt, n):
        if len(server.seen) > 5 and not hold.is_set():
            hold.wait(20)
        well(handler, prompt, n)

    server, path = serve(some), answers(tmp_path, n=10)
    command = [sys.executable, str(ROOT / "tools" / "judge.py"), str(path), "--judge-url", server.url]
    command += ["--judge-model", "tiny", "--concurrency", "1"]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE) as process:
        ends = time.time() + 60
        while len(server.seen) < 6 and time.time() < ends:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    hold.set()
    before = kept(tmp_path)
    assert len(before) == 5
    with open(tmp_path / "z.verdicts.jsonl", "ab") as file:
        file.write(b'{"key": "torn')
    asked = len(server.seen)
    judge.judge(flags(path, server.url))
    assert len(server.seen) == asked + 5
    assert kept(tmp_path)[:5] == before and len(kept(tmp_path)) == 10
    assert json.loads((tmp_path / "z.verdicts.json").read_text())["win_rate"] == 0.6


def test_ctrl_c_waits_for_the_answers_under_way(tmp_path, serve):
    """They are paid for."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's job in the background begins without

    def interrupted(handler, prompt, n):
        if len(server.seen) == 3:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.3)
        well(handler, prompt, n)

    server = serve(interrupted)
    with pytest.raises(KeyboardInterrupt):
        judge.judge(flags(answers(tmp_path), server.url, concurrency=1))
    assert len(kept(tmp_path)) == len(server.seen) == 3


def test_another_text_or_judge_is_asked_anew(tmp_path, serve):
    server = serve(well)
    judge.judge(flags(answers(tmp_path), server.url))
    judge.judge(flags(answers(tmp_path, responses=["good but other"]), server.url))
    assert len(server.seen) == 9
    judge.judge(flags(tmp_path / "z.jsonl", server.url, judge_model="large"))
    assert len(server.seen) == 17


# ---------------------------------------------------------------------------------------------- of an evaluation
def evaluation(folder: Path, n=4) -> Path:
    """What `judge.py run --task tldr` leaves behind."""
    folder.mkdir()
    posts = [{"post": f"post {i}", "summary": "so so"} for i in range(n)]
    (folder / "posts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in posts))
    args = {"task": "tldr", "data": str(folder / "posts.jsonl"), "split": "test", "columns": ""}
    (folder / "args.json").write_text(json.dumps(args))
    made = [{"id": i, "x": [1], "y": [1], "z": [[1]], "text": ["good"]} for i in range(n)]
    datasets.Dataset.from_list(made).save_to_disk(folder / "generations-t0.01")
    results = {"name": "bash", "seed": 1, "n": n, "task": "tldr", "test_set": "a", "beta": 0.2, "generations": 1}
    results |= {"max_response": 53, "metrics": {"rouge1_t0.01": 0.25}, "details": {}}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_win_rate_goes_into_the_table(tmp_path, serve, capsys):
    server = serve(well)
    for name in "ab":
        judge.judge(flags(evaluation(tmp_path / name), server.url, judge_model=name if name == "b" else "tiny"))
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["metrics"] == {"rouge1_t0.01": 0.25, "win_rate_t0.01": 1.0}
    assert results["details"]["win_rate_t0.01"]["wins"] == 4
    capsys.readouterr()
    files = [str(tmp_path / name / "results.json") for name in "ab"]
    evaluate.table(Namespace(results=files[:1], baseline=None, out=None))
    assert "| bash | 25.0 | 100.0 | 1 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="win rates by different judges"):
        evaluate.table(Namespace(results=files, baseline=None, out=None))


def test_bad_input(tmp_path, serve, monkeypatch):
    server = serve(well)

    def told(path, **kw) -> str:
        return judged_with_error(flags(path, kw.pop("url", server.url), **kw))

    assert "row 0: no reference" in told(answers(tmp_path, reference=None))
    assert "row 0: no prompt" in told(answers(tmp_path, prompt=" "))
    for wrong in ([], "text", [3], None):
        assert "row 0: responses must be a list of texts" in told(answers(tmp_path, responses=wrong))
    (tmp_path / "e.jsonl").write_text("")
    assert "no rows" in told(tmp_path / "e.jsonl")
    (tmp_path / "e.jsonl").write_text("{}\n{\n")
    assert "e.jsonl, line 2: not valid JSON" in told(tmp_path / "e.jsonl")
    assert "--temperature chooses among the generations of" in told(answers(tmp_path), temperature=1.0)
    assert "neither a .jsonl file nor the --out" in told(tmp_path)
    folder = evaluation(tmp_path / "run")
    assert "there are 0.01" in told(folder, temperature=1.0)
    (folder / "posts.jsonl").write_text('{"post": "p", "summary": "s"}\n')
    assert "row 1 is not in the data any more" in told(folder)
    (folder / "args.json").write_text('{"task": "toy", "data": "", "split": "", "columns": ""}')
    assert "an evaluation of --task toy" in told(folder)
    path = answers(tmp_path)
    for url in ("ftp://a/v1", "localhost:8000", "http://", "http://me:pass@host/v1", "http://a:b/v1", "http://a?k=1"):
        message = told(path, url=url)
        assert "--judge-url must be http(s)://HOST/PATH" in message and "pass@" not in message
    (tmp_path / "z.verdicts.jsonl").write_text('{"key": 3}\n')
    assert "z.verdicts.jsonl, line 1: not a verdict" in told(path)
    assert "v.json: the file of verdicts must end in .jsonl" in told(path, out=str(tmp_path / "v.json"))
    assert "z.jsonl, line 1: not a verdict" in told(path, out=str(path))
    with pytest.raises(OSError, match="cannot be written"):
        judge.judge(flags(path, server.url, out=str(tmp_path / "no" / "v.jsonl")))
    for key in ("a\nb", "schlüssel"):
        monkeypatch.setenv("JUDGE_API_KEY", key)
        assert told(path) == "JUDGE_API_KEY holds a character that no header can carry"
    assert not server.seen


def test_none_parsed(tmp_path, serve):
    server = serve(lambda handler, prompt, n: handler.reply(200, completion("both are fine")))
    assert "none of the 8 answers" in judged_with_error(flags(answers(tmp_path), server.url))
    assert len(kept(tmp_path)) == 8


def test_command_line(tmp_path, serve, monkeypatch, capsys):
    server = serve(well)
    given = [str(answers(tmp_path)), "--judge-url", server.url, "--judge-model", "tiny"]
    monkeypatch.setattr(sys, "argv", ["judge.py", *given, "--judge-options", '{"temperature": 0}', "--limit", "2"])
    ranks.cli(judge.main)
    assert "win rate 100.0% ± 0.0% against the reference (2 of 2" in capsys.readouterr().out
    for wrong in ("3", "{", '{"model": "x"}'):
        monkeypatch.setattr(sys, "argv", ["judge.py", *given, "--judge-options", wrong])
        with pytest.raises(SystemExit):
            judge.main()
        assert "is not a JSON object of request options" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- a real server
def prefers_a(folder: Path) -> None:
    """A tiny model that answers `Preferred: A` to everything: trained here, on just that."""
    tokenizer = tiny.word_tokenizer([*tiny.WORDS, "Preferred:", "A", "B"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny.model("gpt_neox", vocab=len(tokenizer), max_position_embeddings=512)
        answer = tokenizer("Preferred: A")["input_ids"] + [1]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(60):
            prompts = torch.randint(0, len(tokenizer), (8, int(torch.randint(60, 140, ()))))
            prompts = torch.where(torch.rand(prompts.shape) < 0.7, 0, prompts)  # mostly unknown words, as in the test
            prompts[:, -1] = tokenizer.convert_tokens_to_ids("B")  # the last word of the judge's prompt
            ids = torch.cat([prompts, torch.tensor([answer] * 8)], dim=1)
            labels = ids.clone()
            labels[:, : prompts.shape[1]] = -100
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


SERVING = ("fastapi", "uvicorn", "accelerate")


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, SERVING)), reason="pip install transformers[serving] accelerate"
)
def test_transformers_serve(tmp_path, monkeypatch):
    """The whole way to an OpenAI-compatible server of another make."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    prefers_a(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", tmp_path / "model", "--host", "127.0.0.1"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with open(tmp_path / "server.log", "wb") as out:
        command += ["--port", str(port), "--device", "cpu"]
        server = subprocess.Popen([*map(str, command)], stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        ends = time.time() + 120
        while time.time() < ends and server.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        given = {"judge_model": str(tmp_path / "model"), "judge_options": {"max_tokens": 8, "temperature": 0}}
        args = flags(answers(tmp_path), f"http://127.0.0.1:{port}/v1", judge_timeout=60, concurrency=2, **given)
        judge.judge(args)
    finally:
        server.terminate()
        server.wait()
    found = json.loads((tmp_path / "z.verdicts.json").read_text())
    assert found["chose_a"] == 1 and found["unparsed"] == 0
    assert found["wins"] == sum(row["model_is"] == "A" for row in kept(tmp_path)) > 0
