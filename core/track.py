"""--track: what log.jsonl has, in a tracker, which is imported here alone. Keys, projects and modes are its own, from
its environment variables (WANDB_PROJECT, WANDB_MODE=offline, ...)."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

from core.ranks import first_line, fold_in, print0


def check(kind: str | None) -> None:
    if kind and importlib.util.find_spec(kind) is None:
        raise ValueError(f"--track {kind} needs that package: pip install {kind}")


def tracker(kind: str, out: Path, flags: dict, done: int) -> tuple[Callable[[int, dict], None], Callable[[], None]]:
    """What takes the number of a step and its record, and what ends the tracking. done: steps already told of."""
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer, module = SummaryWriter(str(out / "tensorboard"), purge_step=done + 1), None
    else:
        module, own = importlib.import_module(kind), fold_in(0, str(out.resolve()), (out / "log.jsonl").stat().st_ino)
        how = {"project": os.environ.get(f"{kind.upper()}_PROJECT", "bash-rac"), "resume": "allow"}
        if kind == "wandb":
            how |= {"name": out.name, "id": f"{own:x}", "dir": str(out)}
        else:
            how["name"] = f"{out.name}-{own:x}"  # it goes on with a run of this name
        try:
            module.init(config=flags, **how)
        except Exception as error:  # no key, no network
            offline = " (offline: WANDB_MODE=offline)" if kind == "wandb" else ""
            raise OSError(f"--track {kind}: {first_line(error)}{offline}") from None

    broken = False

    def safely(what: Callable[[], None]) -> None:
        nonlocal broken
        try:
            if not broken:
                what()
        except Exception as error:  # the run is worth more than its tracking, and log.jsonl has it all
            broken = True
            print0(f"WARNING: --track {kind} has failed, nothing more is told to it: {first_line(error)}")

    def put(step: int, record: dict) -> None:
        shown = [f"**{key}**: {text}" for said in record.get("samples", []) for key, text in said.items()]  # Markdown
        texts = {"samples": "\n\n".join(shown)} if shown else {}
        if module:
            return module.log(record | texts, step=step)
        for name, value in (record | texts).items():
            (writer.add_text if name in texts else writer.add_scalar)(name, value, step)

    end = module.finish if module else writer.close
    return (lambda step, record: safely(lambda: put(step, record))), lambda: safely(end)
