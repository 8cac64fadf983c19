"""Win rate against the reference by an LLM judge (Tables 1 and 7), with the prompt of appendix A.1.

    python evaluate.py run --model runs/bash --task tldr --name bash --out runs/eval/tldr
    JUDGE_API_KEY=... python tools/judge.py runs/eval/tldr --judge-url https://api.openai.com/v1 --judge-model gpt-4

The judge is any OpenAI-compatible endpoint. Each verdict is appended to a file at once, so an interrupted command goes
on without asking (and paying) twice. The win rate goes into the results.json of `evaluate.py run`, for its table.

Decisions
- The judge reads the whole post. One `Preferred: A` or `Preferred: B` on a line of its own is a verdict. One that says
  so in bold, with a last point or the like is read, and counted apart; anything else is unparsed (tools/verdicts.py).
  An empty summary has lost, unasked. The layout of the prompt's headings is ours, where the paper's is not clear.
- Which summary is A is drawn for each example by (--seed, example).
- The key is read from the environment alone, sent to that host alone, and written nowhere.
"""

from __future__ import annotations

import argparse
import datetime
import email.utils
import fcntl
import hashlib
import http.client
import json
import math
import os
import random
import re
import statistics
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, from whatever folder this is called
import data
from core.flags import count, new_parser, number
from core.ranks import cli, first_line, fold_in, print0
from core.rows import ids_of, read, write_json
from folders import check_unchanged
from tools.verdicts import Unanswered, answer_in, error_in, fault, preferred, to_the_letter

PROMPT = """\
Which of the following summaries does a better job of summarizing the most important points in the given forum post, \
without including unimportant or irrelevant details? Judge based on accuracy, coverage, and coherence.

[post]
{post}

[summary A]
{a}

[summary B]
{b}

Instructions:
FIRST provide a one-sentence comparison of the two summaries, explaining which you prefer and why.
SECOND, on a new line, state only A or B to indicate your choice. Your response should use the format:
Comparison: one-sentence comparison and explanation
Preferred: A or B"""  # appendix A.1
PATIENCE = 600.0  # seconds of Retry-After that are waited for


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """None: a redirect would carry the key to another host."""


@dataclass
class Judge:
    """An OpenAI-compatible endpoint. The key stands in the request's header and nowhere else."""

    url: str  # up to and without /chat/completions
    model: str
    key: str = field(default="", repr=False)
    options: dict = field(default_factory=dict)  # of the request, e.g. temperature and max_tokens
    timeout: float = 120.0  # of one attempt, in seconds
    retries: int = 6
    wait: float = 1.0  # before the first retry; doubles each time, at most a minute
    stop: threading.Event = field(default_factory=threading.Event)
    not_before: float = 0.0  # after a Retry-After, for all threads

    def ask(self, prompt: str) -> str:
        """The answer's text. Raises Unanswered."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], **self.options}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        url = self.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        for attempt in range(self.retries + 1):
            self.pause(self.not_before - time.monotonic())
            after = 0.0
            try:
                return self.hide(self.once(request))
            except urllib.error.HTTPError as error:
                found = fault(f"HTTP {error.code}", error.code, self.said(error))
                after = retry_after(error.headers.get("Retry-After"))
                if found.again and after > PATIENCE:
                    found = Unanswered(f"{found} (asks to wait {after:.0f} s)", final=True)
                self.not_before = max(self.not_before, time.monotonic() + after)
            except Unanswered as error:
                found = error
            except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: no JSON, or no answer in it
                why = "timed out" if isinstance(error, TimeoutError) else getattr(error, "reason", None) or error
                found = Unanswered(why if isinstance(why, str) else first_line(why), again=True)
            why = self.hide(str(found))
            if not found.again:
                raise Unanswered(why, final=found.final) from None
            if attempt < self.retries:
                self.pause(max(after, min(60, self.wait * 2**attempt) * random.uniform(0.5, 1)))
        raise Unanswered(f"{why} ({self.retries + 1} attempts)")

    def once(self, request: urllib.request.Request) -> str:
        """One attempt, within `timeout` seconds in all."""
        ends, parts = time.monotonic() + self.timeout, []
        with urllib.request.build_opener(NoRedirect).open(request, timeout=self.timeout) as reply:
            while part := reply.read1(1 << 16):
                parts.append(part)
                if time.monotonic() > ends:
                    raise TimeoutError
                if sum(map(len, parts)) > 1 << 22:
                    raise ValueError("the answer has no end")
        return answer_in(self.hide(b"".join(parts).decode("utf-8-sig", errors="replace")))

    def pause(self, seconds: float) -> None:
        if seconds > 0 and self.stop.wait(seconds) or self.stop.is_set():
            raise Unanswered("stopped", final=True)

    def said(self, error: urllib.error.HTTPError) -> str:
        """The words of an error, or the start of its text, on one line."""
        try:
            text = self.hide(error.read(2000).decode(errors="replace"))
        except (OSError, http.client.HTTPException):
            text = ""
        try:
            told = error_in(json.loads(text), {})
        except (ValueError, AttributeError, RecursionError):
            told = None
        return told[1] if told else " ".join(text.split())[:200] or str(error.reason)

    def hide(self, text: str) -> str:
        """Without the key, should a server repeat it. A short one (k, EMPTY) is hidden as a word, not within words."""
        key = re.escape(self.key) if len(self.key) >= 8 else rf"(?<!\w){re.escape(self.key)}(?!\w)"
        return re.sub(key, "***", text) if self.key else text


def retry_after(value: str | None) -> float:
    """Seconds to wait, of a Retry-After header: a number or a date; 0 where it is neither."""
    try:
        seconds = float(value or 0)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        seconds = date.timestamp() - datetime.datetime.now(datetime.timezone.utc).timestamp()
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def ask_all(judge: Judge, questions: list[dict], keep: Callable[[dict, str], None], concurrency: int) -> list[tuple]:
    """Asks `concurrency` at a time; keep(question, answer) as soon as each is there. Returns [(question, why not)].

    Gives up where a failure is final, or as many in a row fail as are asked at a time (or 4). Raises what keep does."""
    todo, lock, failed, broken = iter(questions), threading.Lock(), [], []
    busy, in_a_row = min(concurrency, len(questions)), 0

    def one(question: dict) -> None:
        nonlocal in_a_row
        try:
            answer = judge.ask(question["prompt"])
            with lock:
                keep(question, answer)
                in_a_row = 0
        except Unanswered as error:
            with lock:
                failed.append((question, error))
                in_a_row += 1
                if error.final or in_a_row >= max(concurrency, 4):
                    judge.stop.set()

    def work() -> None:
        nonlocal busy
        try:
            while not judge.stop.is_set():
                with lock:
                    question = next(todo, None)
                if question is None:
                    break
                one(question)
        except BaseException as error:
            broken.append(error)
            judge.stop.set()
        with lock:
            busy -= 1

    def wait() -> None:
        while busy:  # not Thread.join: interrupted, it takes the thread for ended (Python 3.11)
            time.sleep(0.02)

    for _ in range(busy):
        threading.Thread(target=work, daemon=True).start()
    try:
        wait()
    except KeyboardInterrupt:
        judge.stop.set()
        print0("stopping: waiting for the answers under way (Ctrl-C again: leave them)")
        wait()
        raise
    if broken:
        raise broken[0]
    return failed


def summaries(path: Path, t: float | None, limit: int) -> tuple[list[dict], Path]:
    """What is to be judged: [{id, post, reference, responses}], and where the verdicts belong.

    path: OUT of `evaluate.py run --task tldr`, or a .jsonl file as `generate.py` writes it (prompt, reference and
    responses, or response). Raises ValueError naming the file and row."""
    from datasets import load_from_disk

    if path.is_file():
        if t is not None:
            raise ValueError(f"{path}: --temperature chooses among the generations of `evaluate.py run`, not in a file")
        rows = []
        for i, row in enumerate(read(str(path))):
            texts = row.get("responses", [row["response"]] if "response" in row else None)
            post, reference = row.get("post", row.get("prompt")), row.get("reference")
            for name, value in (("prompt", post), ("reference", reference)):
                if not isinstance(value, str) or not value.strip():
                    raise ValueError(f"{path}, row {i}: no {name}")
            if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
                raise ValueError(f"{path}, row {i}: responses must be a list of texts, and not empty")
            rows.append({"id": row.get("id", i), "post": post, "reference": reference, "responses": texts})
        if not rows:
            raise ValueError(f"{path}: no rows")
        ids_of(rows, path)
        return rows[: limit or None], path.with_suffix(".verdicts.jsonl")
    try:
        flags = json.loads((path / "args.json").read_text())
        task, source, split, columns = (flags[name] for name in ("task", "data", "split", "columns"))
        there = sorted(float(made.name[13:]) for made in path.glob("generations-t*") if (made / "state.json").exists())
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: neither a .jsonl file nor the --out of `evaluate.py run`") from None
    if task != "tldr":
        raise ValueError(f"{path}: an evaluation of --task {task}; the judge compares summaries (tldr)")
    if t is None and len(there) == 1:
        t = there[0]
    if t not in there:
        named = ", ".join(f"{value:g}" for value in there) or "none"
        raise ValueError(f"{path}: --temperature must name one of its generations; there are {named}")
    check_unchanged(path, flags)
    truth = {row["id"]: row for row in data.load_rows(task, source, split, columns)}
    rows = []
    for row in load_from_disk(str(path / f"generations-t{t:g}")).to_list()[: limit or None]:
        if row["id"] not in truth:
            raise ValueError(f"{path}: row {row['id']} is not in the data any more")
        true = truth[row["id"]]
        rows.append({"post": true["prompt"], "reference": true["response"], "responses": row["text"], "id": row["id"]})
    return rows, path / f"verdicts-t{t:g}.jsonl"


def questions_of(rows: list[dict], model: str, options: dict, seed: int) -> list[dict]:
    """One question a response. Which of A and B is the model's is drawn from (seed, id, sample). `key` names a
    question by its content, so that a verdict is never used for another text, judge or prompt."""
    made = []
    for row in rows:
        for sample, text in enumerate(row["responses"]):
            ours = "AB"[fold_in(seed, row["id"], sample) % 2]
            pair = [text.strip(), row["reference"].strip()]
            a, b = pair if ours == "A" else pair[::-1]
            prompt = PROMPT.format(post=row["post"].strip(), a=a, b=b)
            key = hashlib.sha256(json.dumps([model, options, ours, prompt], sort_keys=True).encode()).hexdigest()[:24]
            made.append({"key": key, "id": row["id"], "sample": sample, "model_is": ours, "prompt": prompt})
            made[-1]["empty"] = not text.strip()
    return made


def win_rate(questions: list[dict], verdicts: dict[str, dict]) -> dict:
    """Counts, and the share of parsed verdicts for the model with its standard error. An empty response has lost."""
    answered = [(q, verdicts[q["key"]]["answer"]) for q in questions if q["key"] in verdicts]
    chosen = [(q, preferred(answer)) for q, answer in answered]
    empty = sum(q["empty"] for q in questions)
    wins = sum(choice == q["model_is"] for q, choice in chosen)
    parsed = sum(choice is not None for _, choice in chosen)
    n = parsed + empty
    won: dict[int, list[bool]] = {q["id"]: [] for q in questions}  # samples of one post are no independent ones
    for q, choice in [*((q, c) for q, c in chosen if c), *((q, "") for q in questions if q["empty"])]:
        won[q["id"]].append(choice == q["model_is"])
    posts = [sum(some) / len(some) for some in won.values() if some]
    return {
        "questions": len(questions), "wins": wins, "losses": n - wins, "empty": empty,
        "lenient": sum(preferred(answer) is not None and not to_the_letter(answer) for _, answer in answered),
        "unparsed": len(chosen) - parsed, "unanswered": len(questions) - empty - len(chosen),
        "win_rate": wins / n if n else None,
        "standard_error": statistics.pstdev(posts) / math.sqrt(len(posts)) if n else None,
        "chose_a": sum(choice == "A" for _, choice in chosen) / parsed if parsed else None,  # a fair judge: near 1/2
    }  # fmt: skip


def read_verdicts(path: Path) -> dict[str, dict]:
    """The verdicts of an earlier call, by key. A last line that a crash cut short is taken off the file."""
    if not path.exists():
        return {}
    text = path.read_bytes()
    if text and not text.endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)
        print0(f"{path}: the last line was cut short, and is left out")
    found = read(str(path))
    for i, row in enumerate(found):
        if not (isinstance(row.get("key"), str) and isinstance(row.get("answer"), str)):
            raise ValueError(f"{path}, line {i + 1}: not a verdict; choose another --out")
    return {row["key"]: row for row in found}


def judge_from(args: argparse.Namespace) -> Judge:
    """The judge that the flags name. Raises ValueError before anything is asked."""
    try:
        url = urllib.parse.urlsplit(args.judge_url)
        good = url.scheme in ("http", "https") and url.hostname and (url.port or 1) and not url.query
    except ValueError:
        good = False
    if not good or "@" in url.netloc:
        raise ValueError(
            "--judge-url must be http(s)://HOST/PATH, without a password (the key goes into JUDGE_API_KEY)"
        )
    key = os.environ.get("JUDGE_API_KEY", "").strip()
    if not key.isascii() or not key.isprintable():
        raise ValueError("JUDGE_API_KEY holds a character that no header can carry")
    base = args.judge_url.rstrip("/").removesuffix("/chat/completions")
    return Judge(base, args.judge_model, key, args.judge_options, args.judge_timeout, args.judge_retries)


def judge(args: argparse.Namespace) -> None:
    """Asks for the verdicts that are not there yet, each appended to a file at once; then the win rate."""
    endpoint = judge_from(args)
    if args.out and not args.out.endswith(".jsonl"):
        raise ValueError(f"--out {args.out}: the file of verdicts must end in .jsonl")
    rows, path = summaries(Path(args.path), args.temperature, args.limit)
    path = Path(args.out) if args.out else path
    questions = questions_of(rows, args.judge_model, args.judge_options, args.seed)
    try:
        file = open(path, "ab", buffering=0)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another judge is writing there") from None
        verdicts = read_verdicts(path)
        todo = list({q["key"]: q for q in questions if not q["empty"] and q["key"] not in verdicts}.values())
        print0(f"{len(questions)} questions, {len(todo)} to ask; verdicts in {path}")

        def keep(question: dict, answer: str) -> None:
            row = {name: question[name] for name in ("key", "id", "sample", "model_is")} | {"answer": answer}
            choice = preferred(answer)
            row["verdict"] = choice and ("model" if choice == question["model_is"] else "reference")
            file.write(json.dumps(row).encode() + b"\n")
            verdicts[row["key"]] = row
            bar.update()

        with tqdm(total=len(todo), desc="judge", unit="verdict") as bar:
            failed = ask_all(endpoint, todo, keep, args.concurrency)
    found = {"judge": {"model": args.judge_model, "options": args.judge_options, "seed": args.seed}}
    found |= win_rate(questions, verdicts)
    if found["unanswered"] and (endpoint.stop.is_set() or not args.skip_failed):
        (question, why), *_ = sorted(failed, key=lambda pair: not pair[1].final or str(pair[1]) == "stopped")
        raise ValueError(
            f"{found['unanswered']} of {len(questions)} questions have no answer (row {question['id']}: {why}); the "
            f"others are kept in {path}, and the same command asks for the rest"
            + ("" if endpoint.stop.is_set() else " (--skip-failed: go without)")
        )
    if found["win_rate"] is None:
        raise ValueError(f"none of the {found['unparsed']} answers in {path} could be parsed: no win rate")
    write_json(path.with_suffix(".json"), found)
    results, t = Path(args.path) / "results.json", path.stem.removeprefix("verdicts-t")
    if not args.out and not args.limit and results.exists():  # into the table
        old = json.loads(results.read_text())
        old["metrics"][f"win_rate_t{t}"] = found["win_rate"]
        old["details"][f"win_rate_t{t}"] = {name: value for name, value in found.items() if name != "judge"}
        write_json(results, old | {"judge": {"model": args.judge_model, "options": args.judge_options}})
    print(
        f"win rate {found['win_rate']:.1%} ± {found['standard_error']:.1%} against the reference "
        f"({found['wins']} of {found['wins'] + found['losses']}, {found['empty']} of them empty); "
        f"{found['unparsed']} unparsed, {found['unanswered']} unanswered, {found['lenient']} read leniently; "
        f"A chosen {found['chose_a'] or 0:.0%}"
    )


def options(text: str) -> dict:
    """An argparse type: a JSON object."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or {"model", "messages", "stream"} & found.keys():
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object of request options such as temperature")
    return found


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("path", help="the --out of `run --task tldr`, or a .jsonl file of generate.py")
    parser.add_argument(
        "--judge-url", required=True, help="OpenAI-compatible, e.g. http://localhost:8000/v1; JUDGE_API_KEY"
    )
    parser.add_argument("--judge-model", required=True)
    parser.add_argument("--judge-options", type=options, default={}, help="of the request, e.g. '{\"temperature\": 0}'")
    parser.add_argument("--judge-timeout", type=number(0.01), default=120, help="seconds for one answer")
    parser.add_argument("--judge-retries", type=count, default=6)
    parser.add_argument("--concurrency", type=number(1, 1000, int), default=8, help="questions asked at a time")
    parser.add_argument(
        "--skip-failed", action="store_true", help="a win rate without the questions that got no answer"
    )
    parser.add_argument("--temperature", type=number(0), help="of the generations, where `run` made several")
    parser.add_argument("--limit", type=count, default=0, help="only the first N rows (0: all)")
    parser.add_argument("--seed", type=count, default=0, help="of the order of A and B")
    parser.add_argument("--out", help="the .jsonl file of verdicts (default: beside what is judged)")
    judge(parser.parse_args())


if __name__ == "__main__":
    cli(main)
