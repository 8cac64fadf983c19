"""The processes of a run: who am I, how many are we, what do the others say.

    torchrun --nproc-per-node 8 sft.py ...     one process per GPU (NCCL), or per CPU share (gloo)
    python sft.py ...                          one process, no process group

torchrun tells each process its place in three environment variables. Everything here works alike with one process, so
no script asks which of the two it is.

An import that only a run needs (here and in the files above this one) stands in the function that needs it: a second of
imports each, which `--help` and a mistyped flag need not wait for.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

RANK = int(os.environ.get("RANK", 0))  # this process, of all
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # how many there are
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # this process, of those on its node: the number of its GPU
BACKEND = {"cpu": "gloo", "cuda": "nccl"}


@functools.cache
def init() -> torch.device:
    """Joins the process group that torchrun describes (if any) and returns this rank's device."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")  # it works without a process group
    with contextlib.suppress(ImportError):  # the benchmarks of a GPU run without it
        import datasets

        datasets.disable_progress_bars()  # one bar at a time: our own
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # fsdp.load_model says itself, in one line, which weights are missing
    # On a Hopper GPU it is torch's first choice, and a little faster. But cuDNN makes a plan for each new shape, which
    # takes a tenth of a second to seconds, and here nearly every batch is of a new shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if torch.cuda.is_available():
        torch.cuda.set_device(LOCAL_RANK)
    device = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")
    if WORLD > 1:  # the long timeout: a rank may wait for others' generation; torchrun ends the peers of a dead one
        dist.init_process_group(BACKEND[device.type], timeout=datetime.timedelta(hours=6))
    return device


def print0(*words: object) -> None:
    """Prints on rank 0, without tearing a progress bar."""
    if RANK == 0:
        tqdm.write(" ".join(map(str, words)), file=sys.stderr)


def barrier() -> None:
    """Returns when every rank has called it."""
    if WORLD > 1:
        dist.barrier()


def from_first(make: Callable[[], object]) -> object:
    """What make() returns on rank 0, or its ValueError or OSError, on every rank. The others wait."""
    found = [None, None]
    if RANK == 0:
        try:
            found[0] = make()
        except (ValueError, OSError) as error:
            found[1] = error
    if WORLD > 1:
        dist.broadcast_object_list(found)
    if found[1]:
        raise found[1]
    return found[0]


def wait_for(path: Path) -> None:
    """A barrier after which every rank sees a file that rank 0 wrote (network file systems lag). Raises OSError."""
    barrier()
    patience = time.time() + 60
    while not path.exists():
        if time.time() > patience:
            raise OSError(f"{path}: rank 0 wrote it, rank {RANK} cannot see it; all nodes must share the --out folder")
        time.sleep(0.1)


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks."""
    if WORLD > 1:
        dist.all_reduce(values)
    return values


def fold_in(seed: int, *numbers: int) -> int:
    """A new seed (63 bits) from a seed and numbers such as the iteration or the step.

    Every random draw of a run comes from such a seed, not from a generator that carries state: a resumed run, or one
    on another number of ranks, draws the same."""
    digest = hashlib.blake2b(repr((seed, *numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def first_line(error: BaseException) -> str:
    """Of another library's message, which may have many lines or none."""
    failures = getattr(error, "failures", None)  # of torch's CheckpointException: by rank
    if failures and isinstance(failures, dict):
        error = next(iter(failures.values()))[0]  # what happened on the first rank that failed
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def cli(main: Callable[[], None]) -> None:
    """Runs a script's main. A user's mistake (ValueError, OSError) is one line, not a stack trace; DEBUG=1 shows it."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; what is finished is kept, and the same command goes on from there" if RANK == 0 else 1)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if os.environ.get("DEBUG"):
            raise
        if isinstance(error, torch.OutOfMemoryError):
            lower = "Lower --micro-batch-size or --generation-batch-size; see docs/scale.md"
            error = f"{first_line(error)} {lower}"
        if RANK:
            time.sleep(2)  # what rank 0 says as well is said once: torchrun ends the others meanwhile
        who = f"rank {RANK}: " if RANK else ""
        print(f"{Path(sys.argv[0]).name}: error: {who}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
        os._exit(2) if WORLD > 1 else sys.exit(2)
    if WORLD > 1:
        # At once: an interpreter that is taken down with gloo's threads in it may abort, a failure to torchrun.
        barrier()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)
    if dist.is_initialized():
        dist.destroy_process_group()
