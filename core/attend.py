"""Attention of one new token in each row over the row's own columns of the cache, for decode_step.Fixed.

Row b has the columns bounds[b] of its slot. Decoding takes as long as it reads. So on a GPU a Triton kernel reads these
columns and no others, once for all heads that share them. scaled_dot_product_attention, given a mask, would read all
columns of every slot: that is the definition, which tests compare with, and what runs elsewhere.

Needs torch, transformers and, on a GPU, triton, which comes with torch there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AttentionInterface

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without a GPU brings none
    triton = None
KIND, usable = "cuda", triton is not None  # where the kernel runs, and whether it does


@contextmanager
def over_slots(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model's attention is `slots`. Its mask is int64 [B, 1, 1, 2]: a row's first and last column."""
    config = model.config.get_text_config()
    AttentionInterface.register("slots", slots)
    before, config._attn_implementation = config._attn_implementation, "slots"
    try:
        yield
    finally:
        config._attn_implementation = before


def slots(
    module: torch.nn.Module, query: Tensor, keys: Tensor, values: Tensor, attention_mask: Tensor,
    scaling: float | None = None, **kwargs: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """An attention function of transformers."""
    global usable
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if usable and query.device.type == KIND and query.dtype != torch.float64:
        try:
            return by_kernel(query, keys, values, attention_mask, scale), None
        except Exception as error:  # of the compiler, on a GPU that this was not tried on
            if isinstance(error, torch.OutOfMemoryError) or KIND == "cuda" and torch.cuda.is_current_stream_capturing():
                raise
            usable, reason = False, (str(error).strip().splitlines() or [type(error).__name__])[0]
            warnings.warn(f"decoding goes on without its kernel, which is slower: {reason}", stacklevel=2)
    return by_mask(query, keys, values, attention_mask, scale), None


# Both: query [B, heads, 1, d], keys and values [B, H, C, d], bounds int64 [B, 1, 1, 2] -> [B, 1, heads, d].


def by_mask(query: Tensor, keys: Tensor, values: Tensor, bounds: Tensor, scale: float) -> Tensor:
    """The definition."""
    column = torch.arange(keys.shape[2], device=query.device)
    seen = (bounds[..., :1] <= column) & (column <= bounds[..., 1:])  # [B, 1, 1, C]
    if keys.shape[1] < query.shape[1]:
        keys, values = (t.repeat_interleave(query.shape[1] // keys.shape[1], 1) for t in (keys, values))
    out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=scale)
    return out.transpose(1, 2)


def by_kernel(query: Tensor, keys: Tensor, values: Tensor, bounds: Tensor, scale: float) -> Tensor:
    """The same, by the kernel: a softmax over blocks of columns as they come, rescaled at each new maximum (Milakov and
    Gimelshein 2018, arXiv 1805.02867). keys and values lie alike in memory, each head's [C, d] in one piece."""
    rows, heads, _, d = query.shape
    h = keys.shape[1]
    out = query.new_empty(rows, 1, heads, d)
    wide, most = (max(16, triton.next_power_of_2(n)) for n in (d, heads // h))  # 16: the least of tl.dot
    shape = {"H": h, "G": heads // h, "D": d, "WIDE": wide, "MOST": most}
    # columns read at a time, and how many such blocks are on their way: the best of 32 to 128, 2 and 3, on an H200
    how = {"BLOCK": 64, "num_stages": 3} if wide * keys.element_size() <= 256 else {"BLOCK": 32, "num_stages": 2}
    strides = (*query.stride()[:2], *keys.stride()[:2])
    kernel[(rows, h)](query, keys, values, bounds, out, scale, *strides, **shape, **how, num_warps=4)
    return out


if triton:

    @triton.jit
    def kernel(
        query, keys, values, bounds, out, scale, query_row, query_head, slot, slot_head,
        H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One row (axis 0) and one head of its keys (axis 1), for the G heads of queries that share it."""
        row, head = tl.program_id(0), tl.program_id(1)
        first, last = tl.load(bounds + 2 * row), tl.load(bounds + 2 * row + 1)
        g, d = tl.arange(0, MOST)[:, None], tl.arange(0, WIDE)[None]
        real = (g < G) & (d < D)
        q = tl.load(query + row * query_row + (head * G + g) * query_head + d, mask=real, other=0.0)  # [MOST, WIDE]
        base = row.to(tl.int64) * slot + head.to(tl.int64) * slot_head
        best = tl.full([MOST], float("-inf"), tl.float32)  # the largest score so far, of each head
        total = tl.zeros([MOST], tl.float32)  # the sum of exp(score - best)
        mean = tl.zeros([MOST, WIDE], tl.float32)  # ... and of the values so weighted
        for start in range(first, last + 1, BLOCK):
            column = start + tl.arange(0, BLOCK)
            at = base + column[:, None] * D + d
            there = (column[:, None] <= last) & (d < D)
            k = tl.load(keys + at, mask=there, other=0.0)  # [BLOCK, WIDE]
            v = tl.load(values + at, mask=there, other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [MOST, BLOCK]
            score = tl.where(column[None] <= last, score, float("-inf"))
            new = tl.maximum(best, tl.max(score, 1))
            p, fade = tl.exp(score - new[:, None]), tl.exp(best - new)
            total = total * fade + tl.sum(p, 1)
            mean = mean * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            best = new
        where = out + (row * H + head) * G * D + g * D + d
        tl.store(where, (mean / total[:, None]).to(out.dtype.element_ty), mask=real)
