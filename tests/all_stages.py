"""Run by test_training.py, alone or under torchrun: every stage on every architecture, in one process a rank.

python all_stages.py WORLD NAME ARCHITECTURES [flags]
"""

import sys

import bash
import ddp_utils as ddp
import rac
import scs
import sft


def main() -> None:
    world, name, archs, *extra = sys.argv[1:]
    for arch in archs.split(","):
        for stage in (sft, scs, bash, rac):
            out = f"{world}/{name}-{arch}-{stage.__name__}"
            flags = f"--model {world}/{arch} --task toy --data {world}/train.jsonl --out {out} --epochs 2"
            flags += " --batch-size 6 --clip 0.5 --max-prompt 40 --max-response 24 --checkpoint-every 0"
            flags += " --lr 1e-4"  # AdamW steps by about lr where a gradient is rounding noise (attention's key bias)
            chosen = [flag for flag in extra if stage is not sft or flag != "--share-prompt"]
            sys.argv = [f"{stage.__name__}.py", *flags.split(), *chosen]
            if stage is rac:
                sys.argv += ["--temperature", "0.7", "--task", "ultrachat", "--columns", "response=response"]
                sys.argv += ["--max-reference", "120"]
            stage.main()


ddp.cli(main)
