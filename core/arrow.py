"""Rows of token ids in Arrow files: mapped, not loaded, and read without a Python object for each token.

    rows = Rows(data)                       # of a data set, or a list of dicts: nothing is read yet
    rows[5]                                 # {"id": 5, "x": [7, 8], ...}: made when asked for
    rows["x"].lengths                       # int64 [rows]
    differing(rows["y"], rows["y_hat"])     # tokens that differ, row by row

50,000 rows of a thousand tokens are 0.2 GB as they lie on disk, which all processes of a machine share; as lists of
Python ints they would be 2 GB in each process. Needs numpy and pyarrow.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

BLOCK = 1000  # rows written, or compared, at a time


# ---------------------------------------------------------------------------------------------- writing
def column(values: list) -> pa.Array:
    """Values, one a row, as Arrow. Lists of ints are token ids: int32. Arrays keep their type; of [L, K] a row has L
    lists of K."""
    import pyarrow as pa

    if isinstance(values[0], np.ndarray) and values[0].ndim == 2:
        flat = np.concatenate(values)
        offsets = pa.array(np.cumsum([0, *map(len, values)]), pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(flat.reshape(-1), flat.shape[1]))
    array = pa.array(values)
    return array.cast(as_ids(array.type)) if pa.types.is_list(array.type) else array


def as_ids(kind: pa.DataType) -> pa.DataType:
    """Lists of int64, at any depth, and of nothing are lists of int32."""
    import pyarrow as pa

    if pa.types.is_list(kind):
        return pa.list_(as_ids(kind.value_type))
    return pa.int32() if pa.types.is_int64(kind) or pa.types.is_null(kind) else kind


def table(rows: list[dict]) -> pa.Table:
    """Rows with the same keys -> a table."""
    import pyarrow as pa

    return pa.table({name: column([row[name] for row in rows]) for name in rows[0]})


@contextlib.contextmanager
def writing(file: object, path: Path) -> Iterator[Callable[[pa.Table], None]]:
    """What writes a table, of one schema with those before it, to an open file. Its OSError names `path`."""
    import pyarrow as pa

    stream = None

    def put(some: pa.Table) -> None:
        nonlocal stream
        with one_line(path):
            stream = stream or pa.ipc.new_stream(file, some.schema)
            stream.write_table(some)

    yield put
    with one_line(path):
        if stream:
            stream.close()
        file.flush()


@contextlib.contextmanager
def one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error})") from None


def write(path: Path, tables: Iterable[pa.Table]) -> None:
    """One table after the other into an Arrow file, under a temporary name until it is whole. Raises OSError."""
    partial = path.with_name(path.name + ".partial")
    try:
        with one_line(path):
            file = open(partial, "wb")
        with file, writing(file, path) as put:
            for some in tables:
                put(some)
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def mapped(path: Path) -> pa.Table:
    """The table in an Arrow file, which is mapped into memory and keeps no file open (parts may be many)."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_all()


def save(folder: Path, parts: list[Path]) -> None:
    """Writes a folder that `datasets.load_from_disk` reads, with the rows of one Arrow file after the other. A column
    may differ in its type between them where some hold nothing but empty lists."""
    import pyarrow as pa
    from datasets import Dataset

    schemas = [mapped(part).schema.remove_metadata() for part in parts]
    schema = pa.unify_schemas(schemas, promote_options="permissive")
    # its own writer would hold a copy of all; so it writes the folder of no rows, and the file of rows is ours
    Dataset(schema.empty_table(), fingerprint=uuid.uuid4().hex).save_to_disk(folder, num_shards=1)
    write(folder / "data-00000-of-00001.arrow", (mapped(part).cast(schema) for part in parts))


# ---------------------------------------------------------------------------------------------- reading
class Lists(Sequence):
    """A column of lists as a sequence: lists[i] is a list of ids, or an array [L, K], and is made when asked for."""

    def __init__(self, found: pa.ChunkedArray) -> None:
        self.chunks = [pieces(chunk) for chunk in found.chunks if len(chunk)]
        self.starts = [0, *itertools.accumulate(len(offsets) - 1 for offsets, _ in self.chunks)]
        self.lengths = np.concatenate([np.diff(offsets) for offsets, _ in self.chunks] or [[]]).astype(np.int64)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, i: int) -> list | np.ndarray:
        found = self.at(i)
        return found if getattr(found, "ndim", 1) == 2 else found.tolist()

    def at(self, i: int) -> np.ndarray | pa.Array:
        """A view of the file's own values."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        chunk = bisect_right(self.starts, i) - 1
        (offsets, values), j = self.chunks[chunk], i - self.starts[chunk]
        return values[offsets[j] : offsets[j + 1]]

    @property
    def innermost(self) -> Lists:
        """The column itself; where a row is a list of lists, these, of all rows one after the other."""
        import pyarrow as pa

        found = [values[offsets[0] : offsets[-1]] for offsets, values in self.chunks]
        nested = found and all(isinstance(values, pa.ListArray | pa.LargeListArray) for values in found)
        return Lists(pa.chunked_array(found)) if nested else self

    @property
    def longest(self) -> np.ndarray:
        """The length of each row or, of lists of lists, of the longest list in it."""
        inner = self.innermost
        if inner is self:
            return self.lengths
        found = np.zeros(len(self), np.int64)
        np.maximum.at(found, np.repeat(np.arange(len(self)), self.lengths), inner.lengths)
        return found

    @property
    def least(self) -> float:
        """The smallest value; NaN where one is missing, or is no int."""
        return self._most(np.min)

    @property
    def largest(self) -> float:
        return self._most(np.max)

    def _most(self, function: Callable[[np.ndarray], int]) -> float:
        used = [values[offsets[0] : offsets[-1]] for offsets, values in self.chunks if offsets[-1] > offsets[0]]
        ints = all(isinstance(values, np.ndarray) and values.dtype.kind in "iu" for values in used)
        return function([int(function(values)) for values in used]) if ints and used else math.nan

    def values(self, start: int, stop: int) -> np.ndarray:
        """Those of the rows start ... stop - 1, in one array."""
        found = []
        for first, (offsets, values) in zip(self.starts, self.chunks):
            a, b = max(start - first, 0), min(stop - first, len(offsets) - 1)
            if a < b:
                found.append(values[offsets[a] : offsets[b]])
        return np.concatenate(found or [np.zeros(0, np.int32)])


def pieces(chunk: pa.Array) -> tuple[np.ndarray, np.ndarray | pa.Array]:
    """Offsets [rows + 1] and values of a chunk of lists: an array [values] or, of lists of one length, [values, K]; as
    Arrow where they are of another kind."""
    import pyarrow as pa

    if not pa.types.is_list(chunk.type):  # of fixed size, large, ...
        chunk = chunk.cast(pa.list_(chunk.type.value_type))
    if chunk.null_count:  # a list that is missing is an empty one
        chunk = pa.array([row or [] for row in chunk.to_pylist()], chunk.type)
    offsets, values = chunk.offsets.to_numpy(), chunk.values
    if values.null_count:
        return offsets, values
    if pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        return offsets, values.to_numpy()
    if pa.types.is_fixed_size_list(values.type):
        return offsets, values.flatten().to_numpy(zero_copy_only=False).reshape(-1, values.type.list_size)
    return offsets, values


class Rows(Sequence):
    """The rows of a data set (or table, or list of dicts) as dicts, each made when asked for."""

    def __init__(self, data: Dataset | pa.Table | list[dict]) -> None:
        import pyarrow as pa

        if not isinstance(data, pa.Table):
            data = table(data) if isinstance(data, list) else data.with_format("arrow")[:]
        self.table = data.replace_schema_metadata(None)
        self.columns = {name: a_column(data[name]) for name in data.column_names}
        self.lengths = {name: found.lengths for name, found in self.columns.items() if isinstance(found, Lists)}

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> dict:
        row = {name: found[i] for name, found in self.columns.items()}
        return {name: value if name in self.lengths else value.as_py() for name, value in row.items()}

    def tokens(self) -> np.ndarray:
        """In all lists of each row, int64 [rows]."""
        return sum(self.lengths.values(), np.zeros(len(self), np.int64))

    def pick(self, name: str, rows: Sequence[int]) -> Sequence:
        """A column of these rows alone."""
        import pyarrow as pa

        found = self.columns[name]
        return Picked(found, rows) if isinstance(found, Lists) else found.take(pa.array(rows, pa.int64())).to_pylist()


def beside(rows: Rows, others: Rows, order: Sequence[int], metadata: dict[str, str]) -> Iterator[pa.Table]:
    """The rows with the columns (of lists) of others[order], a block at a time."""
    for start in range(0, len(rows), BLOCK):
        some = rows.table.slice(start, BLOCK)
        for field in others.table.schema:
            values = [others.columns[field.name].at(i) for i in order[start : start + BLOCK]]
            values = [value if isinstance(value, np.ndarray) else value.tolist() for value in values]
            some = some.append_column(field, column(values).cast(field.type))
        yield some.replace_schema_metadata(metadata)


class Picked(Sequence):
    """Some items of another sequence, made when asked for."""

    def __init__(self, of: Sequence, rows: Sequence[int]) -> None:
        self.of, self.rows = of, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> list:
        return self.of[self.rows[i]]


def a_column(found: pa.ChunkedArray) -> Lists | pa.ChunkedArray:
    from pyarrow import types

    lists = types.is_list(found.type) or types.is_large_list(found.type) or types.is_fixed_size_list(found.type)
    return Lists(found) if lists else found


def differing(a: Lists, b: Lists) -> np.ndarray:
    """How many tokens of a row differ, int64 [rows]; -1 where a and b are not of one length."""
    found = np.where(a.lengths == b.lengths, 0, -1)
    for start in range(0, len(found), BLOCK):
        rows = slice(start, min(start + BLOCK, len(found)))
        size_a, size_b, same = a.lengths[rows], b.lengths[rows], found[rows] == 0
        kept_a = a.values(rows.start, rows.stop)[np.repeat(same, size_a)]
        kept_b = b.values(rows.start, rows.stop)[np.repeat(same, size_b)]
        row = np.repeat(np.arange(start, rows.stop)[same], size_a[same])
        np.add.at(found, row[kept_a != kept_b], 1)
    return found
