"""Run by test_training.py and test_preferences.py, alone or under torchrun: stages on architectures, in one process a
rank.

python all_stages.py WORLD NAME ARCHITECTURES [--runs A,B,...] [flags]      (by default the paper's four stages)
"""

import sys

import bash
import bon
import dpo
import evaluate
import rac
import scs
import sft
import spin
import tiny
from core import ranks

evaluate.CHECKS["toy"] = (tiny.parity, evaluate.same)  # so small a model writes no answers
RAC = "--temperature 0.7 --task ultrachat --columns response=response --max-reference 120"
RUNS = {
    "sft": (sft, ""),
    "scs": (scs, ""),
    "bash": (bash, ""),
    "rac": (rac, RAC),
    "bash-refresh": (bash, "--beta 0.5 --refresh-every 5"),
    "rac-refresh": (rac, RAC + " --refresh-every 5 --z {world}/z.jsonl"),
    "neftune": (sft, "--neftune-alpha 5"),
    "spin": (spin, "--iterations 2 --beta 0.5"),
    "dpo": (dpo, "--data {world}/pairs.jsonl --beta 0.5"),
    "bon": (bon, "--n 4 --best-of 2 --iterations 2"),
    "dco": (bon, "--dco"),
    "rac-soft": (rac, RAC + " --labels topk --topk 5 --kl reverse --labels-from start --iterations 2"),
}


def main() -> None:
    world, name, archs, *extra = sys.argv[1:]
    runs = ["sft", "scs", "bash", "rac"]
    if extra[:1] == ["--runs"]:
        runs, extra = extra[1].split(","), extra[2:]
    for arch in archs.split(","):
        for run in runs:
            stage, own = RUNS[run]
            flags = f"--model {world}/{arch} --task toy --data {world}/train.jsonl --out {world}/{name}-{arch}-{run}"
            flags += " --epochs 2 --batch-size 6 --clip 0.5 --max-prompt 40 --max-response 24 --checkpoint-every 0"
            flags += " --lr 1e-4"  # AdamW steps by about lr where a gradient is rounding noise (attention's key bias)
            chosen = [flag for flag in extra if stage is not sft or flag != "--share-prompt"]
            sys.argv = [f"{stage.__name__}.py", *flags.split(), *chosen, *own.format(world=world).split()]
            stage.main()


ranks.cli(main)
