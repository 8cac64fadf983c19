"""Run by test_lora.py under torchrun: the commands of a JSON file one after another, in one process a rank. A command
whose --out is called "cut" is stopped in its fifth step, and given again."""

import json
import sys
from pathlib import Path

import bash
import bon
import ddp_utils
import dpo
import evaluate
import folders
import rac
import scs
import sft
import spin
import tiny
from core import ranks

STAGES = {"sft": sft, "scs": scs, "bash": bash, "rac": rac, "spin": spin, "dpo": dpo, "bon": bon}
UPDATE = ddp_utils.Run.update


def stop(run, **also):
    run._signal = run.total == 4 and ranks.RANK == 0  # one rank is told; all are to stop
    UPDATE(run, **also)


def stage(words: list[str]) -> None:
    sys.argv = words
    main = STAGES[words[0].removesuffix(".py")].main
    if Path(words[words.index("--out") + 1]).name == "cut":
        ddp_utils.Run.update = stop
        try:
            main()
        except SystemExit:
            folders.open_out.lock = None  # let go, as at the end of a process
        finally:
            ddp_utils.Run.update = UPDATE
    main()


def main() -> None:
    evaluate.CHECKS["toy"] = (tiny.parity, evaluate.same)  # so small a model writes no answers
    for words in json.loads(Path(sys.argv[1]).read_text()):
        stage(words)


if __name__ == "__main__":
    ranks.cli(main)
