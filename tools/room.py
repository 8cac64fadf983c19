"""Is there room for a model? Before hours of work: a causal LM that can be loaded, memory and disk for it.

    python tools/room.py --model runs/base --out out-real --models 9 --at-once 2
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, from whatever folder this is called
import torch

from core.flags import new_parser, positive
from core.fsdp import load_tokenizer
from core.kinds import check_kind
from core.ranks import cli, first_line


def main() -> None:
    p = new_parser(__doc__)
    p.add_argument("--model", required=True, help="Hugging Face folder or hub name")
    p.add_argument("--out", required=True, type=Path, help="where the trained models go")
    p.add_argument("--models", type=positive, default=1, help="how many of them")
    p.add_argument("--at-once", type=positive, default=1, help="how many are trained at a time")
    args = p.parse_args()
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        load_tokenizer(args.model)
        config = AutoConfig.from_pretrained(check_kind(args.model)[-1])  # an adapter's folder: its base
        with torch.device("meta"):
            parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    except Exception as error:
        reason = first_line(error).removeprefix(f"--model {args.model}: ")
        raise ValueError(
            f"--model {args.model}: {reason}; give the folder of a causal language model, or the name of one on a hub "
            "that can be reached"
        ) from None
    place = next(folder for folder in (args.out, *args.out.absolute().parents) if folder.exists())
    made = [file for kind in ("safetensors", "distcp") for file in args.out.rglob(f"*.{kind}")]  # of a call before
    gb, there = parameters / 1e9, sum(file.stat().st_size for file in made) / 1e9
    # float32 weights of each model, and three checkpoints of weights and moments of each that is in training
    disk, free = args.models * 4 * gb + args.at_once * 36 * gb - there, shutil.disk_usage(place).free / 1e9
    if disk > free:
        raise ValueError(f"--out {args.out}: needs about {disk:.0f} GB, {free:.0f} GB are free")
    # weights, gradients, moments; the weights once more while they are read; what is computed with
    memory, meminfo = args.at_once * (20 * gb + 1.5), Path("/proc/meminfo")
    if meminfo.exists() and not torch.cuda.is_available():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        have = int(lines["MemAvailable"].split()[0]) / 1e6
        if memory > have:
            need = f"{args.at_once} trainings at a time need about {memory:.0f} GB of memory"
            raise ValueError(f"{need}, {have:.0f} GB are free; JOBS=1 makes it one at a time")


if __name__ == "__main__":
    cli(main)
