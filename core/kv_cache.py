"""The decoder's cache: keys and values that are written in place, and rows that come and go.

        columns    0    1    2    3    4  |  5    6 …        a layer's buffers are [R, H, C, d]: rows, heads, columns
        row 0     pad  pad  x^1  x^2  y^1 | free             in use are rows 0 … B - 1 and columns start … end
        row 1     x^1  x^2  x^3  x^4  y^1 | free             finished rows leave, waiting ones take their places

A row's tokens are always the last ones of the columns in use, with padding on the left: a model with a sliding window
counts columns, so gaps in the middle would be counted, too. Needs torch and transformers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

FREE = 64  # columns that a buffer has to spare when it is made


class Columns(DynamicLayer):
    """A layer's keys and values: the first `rows` rows and the columns start … end of two buffers [R, H, C, d]. A token
    is written into the next free column, where a DynamicLayer copies all that came before it."""

    rows = start = end = 0

    def hold(self, keys: Tensor, values: Tensor, free: int = 0) -> None:
        """Takes [R, H, C, d] for its buffers, whose last `free` columns are free."""
        self.keys, self.values, self.is_initialized = keys, values, True
        self.rows, self.start, self.end = len(keys), 0, keys.shape[2] - free

    def used(self) -> tuple[Tensor, Tensor]:
        rows, columns = slice(self.rows), slice(self.start, self.end)
        return self.keys[rows, :, columns], self.values[rows, :, columns]  # [B, H, S, d] each

    def get_seq_length(self) -> int:
        return self.end - self.start

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        new = key_states.shape[2]
        if not self.is_initialized:
            self.hold(key_states[:, :, :0], value_states[:, :, :0])
        if self.end + new > self.keys.shape[2]:  # the rows that are not in use stay, for `join`
            rows, old = self.rows, (t[:, :, self.start : self.end] for t in (self.keys, self.values))
            self.hold(*(F.pad(t, (0, 0, 0, new + FREE)) for t in old), new + FREE)
            self.rows = rows
        self.end += new
        keys, values = self.used()
        keys[:, :, -new:], values[:, :, -new:] = key_states, value_states
        return keys, values


class Slots(Columns):
    """A layer's keys and values in slots that do not move: row r of the buffers [R, H, C, d] holds a row's tokens from
    column 0 on, and a new token is written into column at[r]. In use are the first `rows` slots and `end` columns."""

    row: Tensor  # int64 [rows]: 0, 1, ...
    at: Tensor  # int64 [rows]

    def __init__(self, slots: int, keys: Tensor, values: Tensor) -> None:
        """Empty buffers for keys and values like these, [., H, ., d]."""
        super().__init__()
        self.hold(*(t.new_zeros(slots, t.shape[1], 0, t.shape[3]) for t in (keys, values)))

    def grow(self, columns: int) -> None:
        # zeros, not anything: what is masked is multiplied by 0, and a NaN would stay one
        self.keys, self.values = (F.pad(t, (0, 0, 0, columns - t.shape[2])) for t in (self.keys, self.values))

    def put(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keys and values [N, H, S, d] of N rows into the slots [N], from column 0 on."""
        self.keys[slots, :, : keys.shape[2]] = keys
        self.values[slots, :, : values.shape[2]] = values

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        for t, new in ((self.keys, key_states), (self.values, value_states)):
            t[self.row, :, self.at] = new[:, :, 0]  # [rows, H, d]
        return self.used()


def keep_rows(cache: Cache, rows: list[int], length: Tensor) -> list[int]:
    """Keeps these rows (ascending), and the columns that their lengths need, in place: only rows behind the new end are
    moved, into the places of those that leave -> the rows in their new order."""
    width, size = max(length[rows].tolist(), default=0), len(rows)
    move = dict(zip(sorted({*range(size)} - {*rows}), [row for row in rows if row >= size]))  # to: from
    for layer in cache.layers:
        layer.start = layer.end - width
        for t in layer.used() if move else ():
            t[[*move]] = t[[*move.values()]]
        layer.rows = size
    return [move.get(row, row) for row in range(size)]


def join(cache: Cache, other: Cache) -> None:
    """Puts the rows of `other`, which are no longer than those of `cache`, into the places of rows that have left."""
    for layer, new in zip(cache.layers, other.layers):
        layer.rows += new.rows
        for t, u in zip(layer.used(), new.used()):
            t[-new.rows :] = F.pad(u, (0, 0, t.shape[2] - u.shape[2], 0))


def close_gaps(cache: Cache, mask: Tensor, rows: list[int]) -> Tensor:
    """Keeps these rows, and moves their tokens to the right, so that all padding is on the left again -> the new mask
    [B', S']. (Attention would bear gaps, but a sliding window counts columns.)"""
    mask, row = mask[rows], torch.tensor(rows, device=mask.device)
    order = mask.argsort(dim=1, stable=True)[:, -int(mask.sum(1).max()) :]  # [B', S'], zeros first
    for layer in cache.layers:
        h, width = layer.keys.shape[1:3]  # C columns; the S' of each head are rows of one matrix [R·H·C, d]:
        head = row[:, None] * h + torch.arange(h, device=mask.device)  # [B', H]; index_select is 6 times as fast as
        where = head[..., None] * width + layer.start + F.pad(order, (0, FREE))[:, None]  # gather or t[where]
        new = (t.view(-1, t.shape[3]).index_select(0, where.flatten()) for t in (layer.keys, layer.values))
        layer.hold(*(t.view(*where.shape, -1) for t in new), FREE)  # [B', H, S' + FREE, d]
    return mask.gather(1, order)
