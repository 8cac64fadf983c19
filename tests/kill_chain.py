"""Run by test_faults.py: SFT -> BASH -> RAC -> BoN on two ranks, killed at random moments and begun again each time.

python kill_chain.py WORLD OUT KILLS [SEED]      prints a JSON object: how many kills fell into what

Importing torch takes seconds, so the ranks are forked from this process, which has imported the libraries, nothing of
the repository, and has started no thread. Else they are what torchrun starts: `python STAGE.py` with its variables.
"""

import json
import os
import random
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

import datasets  # noqa: F401, imported for the ranks
import torch
import torch.distributed.checkpoint  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("sft", "bash", "rac", "bon")


def command(stage: str, world: Path, folder: Path) -> list[str]:
    start = world / "llama" if stage == "sft" else folder / STAGES[STAGES.index(stage) - 1]
    flags = f"--model {start} --task ultrachat --columns response=response --data {world}/train.jsonl --batch-size 4"
    flags += f" --lr 1e-3 --max-prompt 40 --max-response 24 --checkpoint-every 2 --out {folder}/{stage}"
    flags += " --epochs 4" if stage == "sft" else " --iterations 2 --epochs 2"
    flags += {"bash": " --beta 0.5", "rac": " --max-reference 120", "bon": " --n 4 --best-of 2"}.get(stage, "")
    if stage == "bon":
        flags = flags.replace("--task ultrachat --columns response=response", "--task toy")
    return [f"{stage}.py", *flags.split()]


def any_text_has_an_answer() -> None:
    """BoN checks answers, and so small a model writes none."""
    import evaluate
    import tiny

    evaluate.CHECKS["toy"] = (tiny.parity, str.__eq__)


def launch(words: list[str], log: Path) -> list[int]:
    """The two ranks' process ids."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(2):
        if not (child := os.fork()):
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1), os.dup2(output, 2)
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            sys.argv, sys.path[0] = words, str(ROOT)
            code = 0
            try:
                if words[0] == "bon.py":
                    any_text_has_an_answer()
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
            except SystemExit as stop:
                code = bool(stop.code)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                code = 1
            os._exit(code)
        children.append(child)
    return children


def wait(children: list[int], seconds: float) -> bool:
    """Whether all have ended well within the time; if not, they are killed."""
    end, left = time.time() + seconds, list(children)
    while left and time.time() < end:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.remove(child)
                assert status == 0, f"a rank ended with status {status}"
        time.sleep(0.005)
    for child in left:
        os.kill(child, signal.SIGKILL)
    for child in left:
        os.waitpid(child, 0)
    return not left


def at_work(out: Path) -> str:
    """What a killed stage was doing, as far as its folder shows."""
    if list(out.glob("D_*.parts")):
        return "offline generation"
    if list(out.glob("checkpoints/*.partial")):
        return "writing a checkpoint"
    if (out / ".saving").exists() or (out / "config.json").exists():
        return "saving the model"
    return "training" if (out / "log.jsonl").exists() else "starting"


def main() -> None:
    world, out, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(int(sys.argv[4]) if len(sys.argv) > 4 else 0)
    torch.set_num_threads(1)
    seconds = {}
    (out / "whole").mkdir(parents=True)
    for stage in STAGES:
        started = time.time()
        assert wait(launch(command(stage, world, out / "whole"), out / "whole.log"), 120), "too slow"
        seconds[stage] = time.time() - started
    fell: dict[str, int] = {}
    chains = 0
    while sum(fell.values()) < kills:
        chains += 1
        folder = out / f"chain-{chains}"
        folder.mkdir()
        for stage in STAGES:
            killed = True
            while killed:
                enough = sum(fell.values()) >= kills
                patience = 120 if enough else rng.uniform(0.2, 1.1) * seconds[stage]
                killed = not wait(launch(command(stage, world, folder), folder.with_suffix(".log")), patience)
                if killed:
                    assert not enough, "hangs"
                    what = f"{stage}: {at_work(folder / stage)}"
                    fell[what] = fell.get(what, 0) + 1
    print(json.dumps({"chains": chains, "kills": fell}))


if __name__ == "__main__":
    main()
