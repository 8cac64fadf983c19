"""The folder --out: whose run it is, what is kept in it, and what is whole.

    if not open_out(args): return                                      # this very command has finished there before
    d_s = offline(out / "D_s_1", make, rows, model, tokenizer)         # what the model makes, kept as it grows
    save_model(model, tokenizer, out)                                  # an ordinary Hugging Face folder

Two rules. What a reader could take for whole is written under another name and renamed, so that a crash never leaves
half of it. And a folder belongs to the command that began it, with its flags and what its data and models held: the
same command goes on there, any other is refused.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from lib.fsdp import inference
from lib.ranks import RANK, WORLD, barrier, first_line, print0, wait_for

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


# ---------------------------------------------------------------------------------------------- files
def write_json(path: Path, value: object) -> None:
    """Writes under a temporary name and renames, so that a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(value, indent=2) + "\n")
        partial.rename(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror})") from None


def checksum(path: Path, crc: int = 0, parts: int = 0) -> int:
    """CRC-32 of a file, going on from crc; or of so many parts of 1 MiB, spread over it, where it is larger."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start in range(0, size, max(1 << 20, size // parts if parts else 0)):
            file.seek(start)
            crc = zlib.crc32(file.read(1 << 20), crc)
    return crc


# ---------------------------------------------------------------------------------------------- whose run it is
# Flags that change no result, but for rounding: the same run may go on with others.
FREE = ("out", "checkpoint_every", "micro_batch_size", "generation_batch_size", "shard", "lock_step", "compile",
        "activation_checkpointing", "share_prompt", "eval_every", "eval_data", "eval_rows")  # fmt: skip


def given(args: argparse.Namespace) -> dict[str, object]:
    """What a command was given: its script, its flags, and for the files and folders among them what they hold."""
    flags = {key: value for key, value in vars(args).items() if key not in FREE}
    paths = {key: Path(flags[key]) for key in ("model", "data", "pairs", "score") if flags.get(key)}
    there = {key: path for key, path in paths.items() if path.is_file() or path.is_dir()}  # no pipe, no hub name
    contents = {f"what --{key} holds": contents_of(path) for key, path in there.items()}
    return {"script": Path(sys.argv[0]).name, **flags, **contents}


def contents_of(path: Path) -> str:
    """Size and CRC-32 of a file, or of the weights or rows in a folder. Of a large file 16 MiB are read, spread over it
    (retrained weights differ everywhere; to read all of a 70B model would take minutes)."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".arrow"))
    crc = 0
    for file in files:
        crc = checksum(file, crc, parts=16)
    return f"{sum(file.stat().st_size for file in files)} bytes, CRC-32 {crc:08x}"


def open_out(
    args: argparse.Namespace,
    begun: tuple[str, ...] = ("D_*",),
    done: str = "config.json",
    free: tuple[str, ...] = (),
) -> bool:
    """Claims --out for this command and writes args.json. False: this very command has finished there before.

    begun: patterns of what is in --out, beside a log, once work has begun; done: the file that marks the end; free:
    flags that change no result, beside FREE.
    Raises ValueError where --out holds another command's run (naming the flags that differ), or is in use.
    """
    if not args.out.strip():
        raise ValueError("--out is empty: give a folder")
    out, flags = Path(args.out), given(args)
    if RANK == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = open(out / ".lock", "w")  # held until the process ends
        except OSError as error:
            raise OSError(f"--out {out} cannot be written ({error.strerror})") from None
        open_out.lock = lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out {out}: another run is writing there") from None
    barrier()
    there = [path for name in (*begun, "log.jsonl", done, "config.json") for path in out.glob(name)]
    held = any(path.name != "log.jsonl" or path.stat().st_size for path in there)  # a log opens before the first step
    if held and not (out / "args.json").exists():
        raise ValueError(f"--out {out} holds a model or results that this command did not make; choose another folder")
    if held:
        try:
            old = dict(json.loads((out / "args.json").read_text()))
        except (ValueError, TypeError):
            raise ValueError(f"--out {out}: args.json is broken; choose another folder or delete it") from None
        differ = sorted(key for key in old.keys() | flags.keys() if old.get(key) != flags.get(key) and key not in free)
        if old.get("script", flags["script"]) != flags["script"]:  # whose flags are others
            differ = ["script"]
        if differ:
            names = {key: f"--{key.replace('_', '-')}" for key in vars(args)}
            named = ", ".join(f"{names.get(key, key)} {old.get(key)} -> {flags.get(key)}" for key in differ)
            raise ValueError(f"--out {out} belongs to another run ({named}); choose another folder or delete it")
        if (out / done).exists():
            print0(f"{out}: already done")
            if RANK == 0:
                shutil.rmtree(out / "checkpoints", ignore_errors=True)
            return False
    barrier()
    if RANK == 0:
        write_json(out / "args.json", flags)
    wait_for(out / "args.json")
    return True


def claim_file(args: argparse.Namespace) -> tuple[Path, Callable[[], None]]:
    """--out of a command that writes one file, and what to call when its work begins: that leaves the flags beside it.

    Raises ValueError where the file exists, or where another call's work is left beside it."""
    out, flags, kept = Path(args.out), Path(args.out + ".args.json"), given(args)
    if out.exists():
        raise ValueError(f"--out {args.out} exists already; choose another file or delete it")
    try:
        same = flags.exists() and json.loads(flags.read_text()) == kept
    except ValueError:  # half a file
        same = False
    if not same and any(out.parent.glob(out.name + ".*")):
        raise ValueError(f"{out}.* are left from a call with other flags; choose another --out or delete them")

    def begin() -> None:
        barrier()
        if RANK == 0:
            try:
                out.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OSError(f"--out {out} cannot be written ({error.strerror})") from None
            write_json(flags, kept)

    return out, begin


# ---------------------------------------------------------------------------------------------- models
def save_model(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """A Hugging Face folder of float32 weights, written aside and moved in, config.json last. Called by all ranks."""
    from torch.distributed.checkpoint import state_dict as dcp_state

    # gathered by all ranks together, weight by weight; kept by rank 0 alone, in host memory
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp_state.get_model_state_dict(model, options=options)
    if RANK == 0:
        names = {name for named in (model.named_parameters, model.named_buffers) for name, _ in named()}
        state = {name: value for name, value in state.items() if name in names}  # tied weights once
        partial = out / ".saving"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            model.save_pretrained(partial, state_dict=state)
            tokenizer.save_pretrained(partial)
        except Exception as error:  # safetensors has errors of its own
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(f"--out {out}: the model cannot be written ({first_line(error)})") from None
        for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(out / file.name)
        partial.rmdir()


# ---------------------------------------------------------------------------------------------- offline data sets
def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identifies a tokenizer by its vocabulary, so that token ids are not read with another one."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def offline(
    folder: Path,
    make: Callable[[list[dict]], list[dict]],
    rows: Dataset,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    chunk: int = 128,
) -> Dataset:
    """The rows that make(list of rows) returns, in order, as a data set in `folder`.

    Chunks of rows are divided over the ranks and each is kept as soon as it is done, so an interrupted command goes on
    where it stopped, at any number of ranks. make runs under `inference`.
    """
    from datasets import Dataset, load_from_disk

    parts = folder.with_name(folder.name + ".parts")
    if not (folder / "dataset_info.json").exists():
        if RANK == 0 and not (parts / "chunk.json").exists():  # as begun: the number of ranks may change
            parts.mkdir(parents=True, exist_ok=True)
            write_json(parts / "chunk.json", min(chunk, math.ceil(len(rows) / WORLD)))
        wait_for(parts / "chunk.json")
        chunk = json.loads((parts / "chunk.json").read_text())
        starts = range(0, len(rows), chunk)
        with inference(model):
            for start in tqdm(starts[RANK::WORLD], desc=folder.name, unit="chunk", disable=RANK != 0):
                part = parts / f"{start:09d}.json"
                if not part.exists():
                    started = time.time()
                    made = make([rows[i] for i in range(start, min(start + chunk, len(rows)))])
                    write_json(part, {"seconds": time.time() - started, "rows": made})
        barrier()
        if RANK == 0:
            done = [json.loads((parts / f"{start:09d}.json").read_text()) for start in starts]
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            Dataset.from_list([row for part in done for row in part["rows"]]).save_to_disk(partial)
            seconds = sum(part["seconds"] for part in done) / min(WORLD, len(done))  # of one rank
            write_json(partial / "source.json", {"tokenizer": fingerprint(tokenizer), "seconds": seconds})
            partial.rename(folder)
        wait_for(folder / "dataset_info.json")
    if RANK == 0:
        shutil.rmtree(parts, ignore_errors=True)
    return load_from_disk(str(folder))


def read_pairs(folder: str, pair: tuple[str, str], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """A D_s or D_r made before, here or by another program. pair: the two columns that must be of equal length.

    Raises ValueError, with the folder and the column or row, where the data set does not fit."""
    from datasets import load_from_disk

    if not (Path(folder) / "dataset_info.json").exists():
        raise ValueError(f"--pairs {folder}: not a folder written by datasets' save_to_disk")
    source = Path(folder) / "source.json"
    try:
        made_with = json.loads(source.read_text())["tokenizer"] if source.exists() else None
        data = load_from_disk(folder)
        data[0]
    except Exception as error:  # OSError, ValueError, KeyError or TypeError; IndexError without rows
        raise ValueError(f"--pairs {folder}: cannot be read, or has no rows ({first_line(error)})") from None
    columns = {"x", "y", *pair}
    if not columns <= set(data.column_names):
        missing = ", ".join(sorted(columns - set(data.column_names)))
        raise ValueError(f"--pairs {folder}: no column {missing}; there are {', '.join(data.column_names)}")
    if source.exists() and made_with != fingerprint(tokenizer):
        raise ValueError(f"--pairs {folder}: was made with another tokenizer than this model's")
    for i, row in enumerate(data):
        for name in sorted(columns):
            ids = row[name]
            if not (isinstance(ids, list) and ids and all(isinstance(token, int) for token in ids)):
                raise ValueError(f"--pairs {folder}, row {i}: {name} must be a list of token ids, and not empty")
            if not 0 <= min(ids) <= max(ids) < len(tokenizer):
                raise ValueError(
                    f"--pairs {folder}, row {i}: {name} has ids from {min(ids)} to {max(ids)}, the tokenizer's end at "
                    f"{len(tokenizer) - 1}"
                )
        a, b = (len(row[name]) for name in pair)
        if a != b:
            raise ValueError(f"--pairs {folder}, row {i}: {pair[0]} has {a} tokens, {pair[1]} has {b}")
    return data if "id" in data.column_names else data.add_column("id", list(range(len(data))))
