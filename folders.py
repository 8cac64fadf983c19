"""The folder --out: whose run it is, what is kept in it, and what is whole.

    if not open_out(args): return                                      # this very command has finished there before
    d_r = offline(out / "D_r_1", make, rows, model, tokenizer, z=draw)      # what the model makes, kept as it grows
    save_model(model, tokenizer, out)                                  # an ordinary Hugging Face folder

Two rules. What a reader could take for whole is written under another name and renamed, so that a crash never leaves
half of it. And a folder belongs to the command that began it, with its flags and what its data and models held: the
same command goes on there, any other is refused.
"""

from __future__ import annotations

import argparse
import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from core import arrow, lora
from core.fsdp import inference
from core.kinds import bases, write_folder
from core.ranks import RANK, WORLD, barrier, first_line, from_first, print0, wait_for
from core.rows import write_json

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


# ---------------------------------------------------------------------------------------------- files
def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            crc = zlib.crc32(part, crc)
    return crc


# ---------------------------------------------------------------------------------------------- whose run it is
# Flags that change no result, but for rounding: the same run may go on with others.
FREE = ("out", "checkpoint_every", "micro_batch_size", "generation_batch_size", "shard", "lock_step", "compile",
        "activation_checkpointing", "share_prompt", "packed", "eval_every", "eval_data", "eval_rows",
        "attn_implementation", "eval_samples", "track")  # fmt: skip


WEIGHTS = (".safetensors", ".bin", ".arrow")  # or rows
# What else of a model folder decides what a run does, each named apart where it has changed.
PARTS = {
    "tokenizer and chat template": ("token*", "*.jinja", "*.model", "*.tiktoken", "vocab*", "merges*", "*tokens*.json"),
    "config and generation settings": ("config.json", "generation_config.json", "adapter_config.json"),
}


def given(args: argparse.Namespace) -> dict[str, object]:
    """What a command was given: its script, its flags, and for the files and folders among them what they hold."""
    flags = {key: value for key, value in vars(args).items() if key not in FREE}
    paths = {key: Path(flags[key]) for key in ("model", "data", "pairs", "z", "score") if flags.get(key)}
    there = {key: path for key, path in paths.items() if path.is_file() or path.is_dir()}  # no pipe, no hub name
    files = {
        f"what --{key} holds": [path] if path.is_file() else [f for f in path.iterdir() if f.suffix in WEIGHTS]
        for key, path in there.items()
    }
    if "model" in there:
        files |= {
            f"the {part} of --model": {file for name in names for file in there["model"].glob(name) if file.is_file()}
            for part, names in PARTS.items()
        }
    based = bases(flags["model"])[1:] if "model" in paths else []  # of an adapter
    for base in filter(os.path.isdir, based):
        named = {file for names in PARTS.values() for name in names for file in Path(base).glob(name)}
        files[f"what {base} holds"] = named | {file for file in Path(base).iterdir() if file.suffix in WEIGHTS}
    contents = {what: contents_of(some) for what, some in files.items()}
    if "model" in paths and "model" not in there:
        contents["the revision of --model"] = revision(flags["model"])
    contents |= {f"the revision of {base}": revision(base) for base in based if not os.path.isdir(base)}
    return {"script": Path(sys.argv[0]).name, **flags, **contents}


def revision(name: str) -> str | None:
    """The commit of a hub model that would be loaded now."""
    from transformers.utils import cached_file

    try:
        return Path(cached_file(name, "config.json")).parent.name  # …/snapshots/COMMIT/config.json
    except Exception:  # which is said where the model is needed
        return None


def check_unchanged(folder: Path, flags: dict[str, object]) -> None:
    """Raises ValueError where the file of --data is not what it was for the command that had these flags."""
    path, was = flags.get("data"), flags.get("what --data holds")
    if was and os.path.isfile(path) and contents_of([Path(path)]) != was:
        raise ValueError(f"{folder}: --data {path} has changed since that run: there are other references in it")


def contents_of(files: Iterable[Path]) -> str:
    """Size and CRC-32 of files, all of which are read, at 1 to 3 GB a second: a run of other weights is another run,
    even where one row of a large matrix differs. (Who loads the weights next finds them in memory.)"""
    files = sorted(files)
    with ThreadPoolExecutor(4) as pool:  # zlib and reading let go of the interpreter
        sums = list(pool.map(checksum, files))
    crc = sums[0] if len(sums) == 1 else zlib.crc32(repr(sums).encode())
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
    out, flags = Path(args.out), from_first(lambda: given(args))  # files are read once, not by each rank
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
    there = [path for name in (*begun, "log.jsonl", "checkpoints/*", done, "config.json") for path in out.glob(name)]
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
            if RANK == 0:  # what a crash at the very end has left
                for name in ("checkpoints", SAVING):
                    shutil.rmtree(out / name, ignore_errors=True)
            return False
    barrier()
    if RANK == 0:
        write_json(out / "args.json", flags)
    wait_for(out / "args.json")
    return True


def claim_file(args: argparse.Namespace) -> tuple[Path, Callable[[], None]]:
    """--out of a command that writes one file, and what to call when its work begins: that leaves the flags beside it.

    Raises ValueError where the file exists, or where another call's work is left beside it."""
    out, flags, kept = Path(args.out), Path(args.out + ".args.json"), from_first(lambda: given(args))
    if out.exists():
        raise ValueError(f"--out {args.out} exists already; choose another file or delete it")
    try:
        same = flags.exists() and json.loads(flags.read_text()) == kept
    except ValueError:  # half a file
        same = False
    if not same and any(out.parent.glob(glob.escape(out.name) + ".*")):
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
SAVING = ".saving"  # in --out: what is on its way there


def save_model(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, out: Path, dtype: str = "float32") -> None:
    """A Hugging Face folder of float32 weights (or rounded to bfloat16), written aside and moved in, config.json last.
    Called by all ranks.

    An adapter is merged into them, and lies beside them in a folder of its own."""
    from torch.distributed.checkpoint import state_dict as dcp_state

    # gathered by all ranks together, weight by weight; kept by rank 0 alone, in host memory
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp_state.get_model_state_dict(model, options=options)
    if RANK == 0:
        names = {name for named in (model.named_parameters, model.named_buffers) for name, _ in named()}
        state = {name: value for name, value in state.items() if name in names}  # tied weights once
        adapter = lora.taken_out(model, state)
        if dtype != "float32":
            kind = getattr(torch, dtype)
            state = {name: value.to(kind) if value.is_floating_point() else value for name, value in state.items()}
        partial = out / SAVING
        shutil.rmtree(partial, ignore_errors=True)
        try:
            write_folder(model, tokenizer, state, partial)
            if adapter:
                lora.write(model, adapter, partial / "adapter")
            if dtype != "float32":  # transformers has written the model's own
                config = json.loads((partial / "config.json").read_text())
                write_json(partial / "config.json", config | {"dtype": dtype})
        except Exception as error:  # safetensors has errors of its own
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(f"--out {out}: the model cannot be written ({first_line(error)})") from None
        for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
            if (out / file.name).is_dir():  # of an attempt before: a folder does not replace a folder
                shutil.rmtree(out / file.name)
            file.replace(out / file.name)
        partial.rmdir()


def check_saves(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> None:
    """Writes the folder once without its weights, aside: what could not be saved shows before the first step. Raises
    ValueError."""
    if RANK == 0:
        with tempfile.TemporaryDirectory() as folder:
            try:
                note = write_folder(model, tokenizer, {}, Path(folder))
            except Exception as error:
                why = first_line(error)
                raise ValueError(f"--model {args.model}: could not be saved after training ({why})") from None
        if note:
            print0(f"--model {args.model}: {note}")


# ---------------------------------------------------------------------------------------------- offline data sets
def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identifies a tokenizer by its vocabulary, so that token ids are not read with another one."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


KEEP = 30  # seconds that a row drawn may wait in memory for others to be written with


def offline(
    folder: Path,
    make: Callable[[list[dict]], list[dict]] | None,
    rows: Dataset,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    chunk: int = 128,
    **column: Callable[[dict[str, Sequence], Callable[[int, list], None]], list],
) -> Dataset:
    """The rows, in order, with what the model adds to them, as a data set in `folder`.

    column (z=draw_z, say) is decoded first: z = draw_z(columns, each) gets this rank's share of all the rows at once,
    so that the decoder's batch refills until they end, and calls each(i, z) as soon as the i-th is finished (or returns
    all in a list). Then follows make(list of rows) -> list of rows, chunk by chunk: what is in a chunk does not depend
    on when its rows were finished. Both run under `inference`, and one of them may be left out.

    What is finished is kept in Arrow files, which no rank ever holds as Python objects together; so an interrupted
    command goes on where it stopped, at any number of ranks, and the data set is the same.
    """
    from datasets import load_from_disk

    parts = folder.with_name(folder.name + ".parts")
    if not (folder / "dataset_info.json").exists():

        def begin() -> None:
            (parts / "drawn").mkdir(parents=True, exist_ok=True)
            if not (parts / "chunk.json").exists():  # as begun: the number of ranks may change
                write_json(parts / "chunk.json", min(chunk, math.ceil(len(rows) / WORLD)))

        from_first(begin)
        wait_for(parts / "chunk.json")
        rows, files = arrow.Rows(rows), [parts / "drawn.arrow"]
        for name, draw in column.items():
            rows = drawn(parts, name, draw, rows, model)
        if make:
            files = made(parts, make, rows, model)
        barrier()

        def gather() -> None:
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            arrow.save(partial, files)
            seconds = sum(float(arrow.mapped(part).schema.metadata[b"seconds"]) for part in parts.glob("*.arrow"))
            seconds /= min(WORLD, len(files) if make else len(rows))  # of one rank
            write_json(partial / "source.json", {"tokenizer": fingerprint(tokenizer), "seconds": seconds})
            partial.rename(folder)

        from_first(gather)
        wait_for(folder / "dataset_info.json")
    if RANK == 0:
        shutil.rmtree(parts, ignore_errors=True)
    return load_from_disk(str(folder))


def stamped(rows: list[dict], seconds: float) -> pa.Table:
    """As Arrow, with how long they took."""
    return arrow.table(rows).replace_schema_metadata({"seconds": str(seconds)})


def made(parts: Path, make: Callable, rows: arrow.Rows, model: torch.nn.Module) -> list[Path]:
    """Chunks of rows through `make`, divided over the ranks, each kept as soon as it is done: the files of all."""
    chunk = json.loads((parts / "chunk.json").read_text())
    files = {start: parts / f"{start:09d}.arrow" for start in range(0, len(rows), chunk)}
    with inference(model):
        for start in tqdm([*files][RANK::WORLD], desc=parts.stem, unit="chunk", disable=RANK != 0):
            if not files[start].exists():
                began = time.time()
                found = make([rows[i] for i in range(start, min(start + chunk, len(rows)))])
                arrow.write(files[start], [stamped(found, time.time() - began)])
    return [*files.values()]


def drawn(parts: Path, name: str, draw: Callable, rows: arrow.Rows, model: torch.nn.Module) -> arrow.Rows:
    """The rows with the column that `draw` adds to them, in the file parts/drawn.arrow.

    Each rank decodes an even share, by length, that is fixed beforehand. A queue from which ranks took as they get free
    would need them to talk while they decode (under --lock-step, in the middle of each other's forwards); and of many
    rows the shares are as good as even, since x and y say about how long z will be."""
    whole, kept = parts / "drawn.arrow", parts / "drawn"
    if not whole.exists():
        there = {i for part in kept.glob("*.arrow") for i in arrow.mapped(part)["row"].to_pylist()}
        share = np.argsort(-rows.tokens(), kind="stable")[RANK::WORLD].tolist()
        left = [i for i in share if i not in there]
        fresh, written = [], time.time()

        def flush() -> None:
            nonlocal written
            if fresh:  # a row is drawn once, so the name is new
                arrow.write(kept / f"{fresh[0]['row']:09d}.arrow", [stamped(fresh, time.time() - written)])
            fresh.clear()
            written = time.time()

        def keep(i: int, value: list) -> None:
            fresh.append({"row": left[i], name: value})
            bar.update()
            if time.time() - written > KEEP or len(fresh) >= arrow.BLOCK:
                flush()

        initial = len(share) - len(left)
        with tqdm(total=len(share), initial=initial, desc=parts.stem, unit="row", disable=RANK != 0) as bar:
            try:
                with inference(model):
                    found = draw({name: rows.pick(name, left) for name in rows.columns}, keep)
                    for i, value in enumerate(found):  # of a draw that does not hand them over one by one
                        keep(i, value)
            finally:
                flush()
        barrier()
        from_first(lambda: in_order(kept, rows, whole))
    wait_for(whole)
    if RANK == 0:
        shutil.rmtree(kept, ignore_errors=True)
    return arrow.Rows(arrow.mapped(whole))


def in_order(kept: Path, rows: arrow.Rows, whole: Path) -> None:
    """Writes the rows, with what the files in `kept` say of them in any order, to one file. Raises OSError."""
    import pyarrow as pa

    patience, order = time.time() + 60, np.full(len(rows), -1)
    while True:
        tables = [arrow.mapped(part) for part in sorted(kept.glob("*.arrow"))]
        if tables:
            found = pa.concat_tables(tables, promote_options="permissive")
            order[found["row"].to_numpy()] = np.arange(len(found))
        if (order >= 0).all():
            break
        if time.time() > patience:  # network file systems lag, but not so much
            raise OSError(f"{kept}: rank 0 cannot see what other ranks drew; all nodes must share the --out folder")
        time.sleep(0.1)
    seconds = sum(float(some.schema.metadata[b"seconds"]) for some in tables)
    arrow.write(whole, arrow.beside(rows, arrow.Rows(found.drop_columns("row")), order, {"seconds": str(seconds)}))


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
    vocab = max(tokenizer.get_vocab().values()) + 1  # not len: there may be holes
    if not fits(arrow.Rows(data), columns, pair, vocab):
        name_misfit(folder, data, columns, pair, vocab)
    return data if "id" in data.column_names else data.add_column("id", list(range(len(data))))


def fits(rows: arrow.Rows, columns: set[str], pair: tuple[str, str], vocab: int) -> bool:
    """Whether the columns hold lists of token ids, none empty, and those of the pair are of equal length."""
    for name in columns:
        ids = rows.columns[name]
        if not (isinstance(ids, arrow.Lists) and ids.lengths.all() and 0 <= ids.least <= ids.largest < vocab):
            return False
    return (rows.lengths[pair[0]] == rows.lengths[pair[1]]).all()


def name_misfit(folder: str, data: Dataset, columns: set[str], pair: tuple[str, str], vocab: int) -> None:
    """Raises ValueError that names the first row which does not fit."""
    for i, row in enumerate(data):
        for name in sorted(columns):
            ids = row[name]
            if not (isinstance(ids, list) and ids and all(isinstance(token, int) for token in ids)):
                raise ValueError(f"--pairs {folder}, row {i}: {name} must be a list of token ids, and not empty")
            if not 0 <= min(ids) <= max(ids) < vocab:
                raise ValueError(
                    f"--pairs {folder}, row {i}: {name} has ids from {min(ids)} to {max(ids)}, the tokenizer's end at "
                    f"{vocab - 1}"
                )
        a, b = (len(row[name]) for name in pair)
        if a != b:
            raise ValueError(f"--pairs {folder}, row {i}: {pair[0]} has {a} tokens, {pair[1]} has {b}")
