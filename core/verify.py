"""Hugging Face's math-verify in a process of its own, which ends where a comparison takes too long.

    equal("0.5", r"\\frac{2}{4}")    True             equal("9^{9^{9}}", "5")    False, after some seconds

Its own time limits are signals of Python's: for the main thread alone, and a number that is a mile long hears none
before it is calculated. Here the system ends the process, whatever it is at, and the next comparison starts another.
Otherwise one process serves them all.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import threading

SECONDS = 5.0  # of processor time for one comparison, so that a busy machine changes no result
MEMORY = 4 << 30  # bytes, for a number that is a mile long
lock = threading.Lock()


@functools.cache
def worker() -> subprocess.Popen:
    """The process that compares. Raises ValueError where it cannot start."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, __file__, str(SECONDS)], text=True, encoding="utf-8", **pipes)
    if process.stdout.readline() != "ready\n":
        raise ValueError("math-verify does not start: python -c 'import math_verify' says why")
    return process


def ask(a: str, b: str) -> bool | None:
    """Is a = b in value? None where that took too long."""
    with lock:
        process = worker()
        try:
            process.stdin.write(json.dumps([a, b]) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            process.kill()
            process.wait()
            worker.cache_clear()
        return json.loads(answer) if answer else None


@functools.lru_cache(maxsize=1 << 16)
def bearable(answer: str) -> bool:
    """Is it compared with 1 in time? One that is not is waited for once, not with each answer that it meets."""
    return ask(answer, "1") is not None


@functools.lru_cache(maxsize=1 << 16)
def equal(a: str, b: str) -> bool:
    return bearable(a) and bearable(b) and bool(ask(a, b))


def serve(seconds: float) -> None:
    """The process: a line [a, b] in, a line true or false out."""
    import math_verify  # from here on, nothing else writes to what was stdout

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard < 0 else min(MEMORY, hard), hard))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the system's own way: it ends the process
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        a, b = (math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in json.loads(line))
        same = bool(math_verify.verify(b, a, timeout_seconds=None))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(same), file=out, flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its files are not the packages of their names
    serve(float(sys.argv[1]))
