"""Tokenised rows, kept: made once, by one process, and mapped by all that come later.

    examples, said = tokenised(key, tokenizer, rows, convert)       # convert(tokenizer, some rows, said) -> examples

The files lie with the hub's data sets (HF_DATASETS_CACHE), or where that cannot be written, in the temporary folder of
the machine; they may be deleted at any time. The name is a hash of all that the rows depend on, the content of the
data's file included. (`datasets.map` keeps results, too, but knows a file by its name and time, and a tokenizer by its
pickle, which a first call changes.) A file is written under another name, locked by who writes it, and renamed when
it is whole: two runs never write one file, and a kill leaves nothing that would be read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from core import arrow
from core.ahead import Ahead
from core.ranks import from_first, print0

if TYPE_CHECKING:
    from datasets import Dataset


# ---------------------------------------------------------------------------------------------- what rows depend on
def hash_of(*files: str | Path) -> str:
    """Of the contents of files."""
    found = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            found.update(hashlib.file_digest(content, "sha256").digest())
    return found.hexdigest()


def hash_of_tokenizer(tokenizer) -> str:
    """Of all that its folder would hold, the chat template included, and of the code that reads it."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        content = [(path.name, hash_of(path)) for path in files]
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")]
    return repr((type(tokenizer).__name__, content, versions))


def hash_of_source(rows: object, source: str) -> str:
    """Of the file that rows come from, or what `datasets` has for that."""
    return rows._fingerprint if hasattr(rows, "_fingerprint") else hash_of(source)


def hash_of_functions(*functions: Callable) -> str:
    """Of the files that they stand in."""
    return hash_of(*sorted({function.__code__.co_filename for function in functions}))


# ---------------------------------------------------------------------------------------------- made once
@dataclasses.dataclass
class Said:
    """What there is to say of the rows of a source."""

    kept: int = 0
    cut: int = 0
    out: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # why: how many rows, and the first
    remarks: dict[str, list] = dataclasses.field(default_factory=dict)  # chat.Remarks keeps its own here

    def left_out(self, why: str, row: int) -> None:
        self.out.setdefault(why, [0, row])[0] += 1

    def why(self, texts: dict[str, str]) -> list[str]:
        found = [(*self.out[why], text) for why, text in texts.items() if why in self.out]
        return [f"{n} rows left out: {text}, first: row {first}" for n, first, text in found]


def tokenised(
    key: object, tokenizer, rows: Iterable, convert: Callable[[Ahead, list, Said], list[dict]]
) -> tuple[Dataset | None, Said]:
    """The examples that convert(tokenizer, some rows, said) gives, in a data set (None without any), and what was said.

    Called by all ranks. key: all that the examples depend on. Raises what convert raises, and OSError."""
    from datasets import Dataset

    name = hashlib.sha256(repr(key).encode()).hexdigest()[:32]

    def make(put: Callable) -> Said:
        ahead, said, rest = Ahead(tokenizer), Said(), iter(rows)
        while some := list(itertools.islice(rest, arrow.BLOCK)):
            if kept := convert(ahead, some, said):
                put(arrow.table(kept))
            said.kept += len(kept)
            ahead.forget()
        return said

    path = from_first(lambda: there(name) or made(name, make))
    if not path.exists():  # machines that share no file system: by a rank of each
        path = there(name) or made(name, make)
    said = Said(**json.loads(path.with_suffix(".json").read_text()))
    return Dataset.from_file(str(path)) if said.kept else None, said


def places() -> list[Path]:
    import datasets

    found = [Path(datasets.config.HF_DATASETS_CACHE) / "tokenised"]
    own = Path(tempfile.gettempdir()) / f"tokenised-{os.getuid()}"
    if not own.exists() or own.stat().st_uid == os.getuid():  # anyone may write there
        found.append(own)
    return found


def there(name: str) -> Path | None:
    for folder in places():
        if (path := folder / f"{name}.arrow").exists():
            try:
                json.loads(path.with_suffix(".json").read_text())
                return path
            except (FileNotFoundError, ValueError):  # somebody has deleted one half of it
                path.unlink(missing_ok=True)
    return None


def made(name: str, make: Callable) -> Path:
    """Makes the file in the first place that can be written."""
    for folder in places():
        path = folder / f"{name}.arrow"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            tidy(folder)
            begun = open_locked(path)
        except OSError as error:
            print0(f"{folder} cannot be written ({error.strerror}); HF_DATASETS_CACHE names another folder")
            problem = error
            continue
        if begun:
            with begun:
                write(path, begun, make)
        return path
    raise OSError(f"no folder for tokenised rows can be written ({problem.strerror}); HF_DATASETS_CACHE names one")


def open_locked(path: Path) -> object | None:
    """The file to write, which no other process writes; None where another has finished it. Waits for that one."""
    partial = path.with_suffix(".partial")
    while not path.exists():
        file = open(partial, "ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if same(file, partial) and not path.exists():  # else it was renamed, or given up, while we waited
                file.truncate(0)
                return file
        except BaseException:
            file.close()
            raise
        if same(file, partial):
            partial.unlink()
        file.close()
    return None


def same(file: object, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def write(path: Path, file: object, make: Callable) -> None:
    """Writes what make gives, and renames. Nothing is left of what was not finished."""
    partial, said = path.with_suffix(".partial"), path.with_suffix(".json")
    try:
        with arrow.writing(file, path) as put:
            found = make(put)
        with arrow.one_line(path):
            said.write_text(json.dumps(dataclasses.asdict(found)))  # first: it is there when the rows are
            partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        said.unlink(missing_ok=True)
        raise


def tidy(folder: Path) -> None:
    """Removes what killed processes have left: files that nobody holds a lock on."""
    for partial in folder.glob("*.partial"):
        with contextlib.suppress(OSError), open(partial, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()
