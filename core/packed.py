"""Training without padding: the rows of a micro-batch, one after the other, in one sequence (--packed).

    reason = prepare(model)                               # once; "" where the model can, else why it cannot
    inputs, columns = pack(prompts, segments, model)      # in the place of batches.pack

A row is a tree: its prompt, then what follows it (y, y_hat, z, ...), each of which sees the prompt and itself:

    column      0 1 2 3 4 5 6 7 8
    token       x x y y z x x x y                         two rows; the last token of a response is not read
    position    0 1 2 3 2 0 1 2 3                         as in a row that stands alone
    run         0 0 1 1 2 3 3 3 4                         of like columns
    stem        0 0 0 0 0 3 3 3 3                         the run of the row's prompt

So column q sees column k <= q where they are of one run, or k is of q's prompt. This one function (`sees`) is all that
keeps the rows apart. On a GPU it goes into torch's `flex_attention`, which skips the blocks of the matrix that hold
nothing. That has no backward on a CPU: there scaled_dot_product_attention gets the mask, one row at a time.

How a model gets there: transformers hands each layer's queries, keys, values and mask to a function that the model's
config names. `prepare` names `attend`, which does what "sdpa" does in all other passes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

BLOCK = 128  # columns; flex_attention's own


# ---------------------------------------------------------------------------------------------- what a model can
def uneven(config: object) -> str:
    """The kinds of a model's layers, where these differ in what they see (or see by some rule of their own), else ''.
    config: of the text model."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return ", ".join(sorted(kinds)) if len(kinds) > 1 or not kinds <= {"full_attention", "sliding_attention"} else ""


def window_of(config: object) -> int | None:
    """How many positions a token of an even model looks back over, itself included (None: all of them)."""
    kinds = set(getattr(config, "layer_types", None) or ["by its window"])
    return None if kinds == {"full_attention"} else getattr(config, "sliding_window", None) or None


def has_flex(device: torch.device) -> bool:
    """Does flex_attention have a backward there?"""
    return device.type == "cuda"


def prepare(model: torch.nn.Module) -> str:
    """Makes `losses` pack, for this model, and returns ''; or, where the model cannot, returns why and changes nothing.
    All other passes compute what they did."""
    if getattr(model, "packed", False):
        return ""
    config = model.config.get_text_config()
    if not getattr(model, "_supports_flex_attn", False):
        return f"{config.model_type} does not take flex_attention"
    by = config._attn_implementation
    if by != "sdpa" and not (by == "flex_attention" and has_flex(model.device)):
        return f"it needs sdpa attention, not {by}"
    if kinds := uneven(config):
        return f"the layers of {config.model_type} differ in what they see ({kinds})"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if has_flex(model.device) and width < 16:
        return f"flex_attention needs heads at least 16 wide, not {width}"
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if by == "sdpa":
        AttentionInterface.register("packed", attend)
        AttentionMaskInterface.register("packed", sdpa_mask)  # of passes that are not packed
        # for good, not for one pass: activation checkpointing runs the layers again in the backward
        config._attn_implementation = "packed"
    model.packed = True
    return ""


def attend(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: object,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """One layer's attention: [B, heads, S, d] each -> [B, S, heads, d]. An attention function of transformers: by
    flex_attention where the mask is a BlockMask, else as "sdpa" has it; where bounds of rows are given, row by row."""
    from torch.nn.attention.flex_attention import BlockMask
    from transformers.integrations.flex_attention import flex_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if isinstance(attention_mask, BlockMask):
        return flex_attention_forward(module, query, key, value, attention_mask, **kwargs)
    bounds = kwargs.pop("cu_seq_lens_q", None)  # the mask alone is enough: these save what lies between the rows
    if bounds is None or torch.compiler.is_compiling():
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows = []
    for a, b in itertools.pairwise(bounds.tolist()):
        q, k, v = (tensor[:, :, a:b] for tensor in (query, key, value))
        rows.append(sdpa_attention_forward(module, q, k, v, attention_mask[..., a:b, a:b], **kwargs)[0])
    return torch.cat(rows, dim=1), None


# ---------------------------------------------------------------------------------------------- the layout
def pack(
    prompts: list[list[int]], segments: list[list[list[int]]], model: torch.nn.Module
) -> tuple[dict[str, object], list[list[list[int]]]]:
    """Each prompt followed by its segments (token ids) -> the model's inputs, of one row [1, S]; and for each segment
    of each prompt the columns that predict its tokens: the prompt's last, then its own (its last token is not read).

    Example: [[5, 6], [8]] with [[1, 2, 3], [4]] and [[9, 9], []] gives
        input_ids  5 6 1 2 8 9    position_ids  0 1 2 3 0 1    columns  [[1, 2, 3], [1]] and [[4, 5], [4]]
    Raises ValueError where a prompt is empty: nothing would predict what follows it.
    """
    ids, position, run, stem = ([] for _ in range(4))  # of each column
    runs, columns, bounds = [], [], [0]  # runs: (start, end, its prompt's start, its prompt's end)
    for prompt, row in zip(prompts, segments, strict=True):
        if not prompt:
            raise ValueError("--packed: a row has an empty prompt")
        start, end, root = len(ids), len(ids) + len(prompt), len(runs)
        columns.append([])
        for s, tokens in enumerate([prompt, *(tokens[:-1] for tokens in row)]):
            at, first = len(ids), len(prompt) if s else 0
            ids += tokens
            position += range(first, first + len(tokens))
            run += [len(runs)] * len(tokens)
            stem += [root] * len(tokens)
            runs.append((at, len(ids), start, end))
            if s:
                columns[-1].append([end - 1, *range(at, len(ids))])
        bounds.append(len(ids))
    device = model.device
    flex = has_flex(device)
    if flex and len(ids) % BLOCK:  # whole blocks: fewer shapes to compile for; what fills the last one sees itself
        start, extra = len(ids), -len(ids) % BLOCK
        for values, value in ((ids, 0), (position, 0), (run, len(runs)), (stem, len(runs))):
            values += [value] * extra
        runs.append((start, len(ids), start, len(ids)))
    ids, position, run, stem = torch.tensor([ids, position, run, stem], device=device)
    mask = sees(position, run, stem, window_of(model.config.get_text_config()))
    inputs = {"input_ids": ids[None], "position_ids": position[None]}
    if flex:
        return inputs | {"attention_mask": block_mask(mask, runs, len(ids), device)}, columns
    column = torch.arange(len(ids), device=device)
    dense = mask(0, 0, column[:, None], column[None])  # [S, S]
    return inputs | {"attention_mask": dense[None, None], "cu_seq_lens_q": torch.tensor(bounds)}, columns


def sees(position: torch.Tensor, run: torch.Tensor, stem: torch.Tensor, window: int | None) -> Callable:
    """The mask as a function of columns (q, k), in the form that flex_attention wants; position, run, stem: [S]."""

    def mask(b: object, h: object, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        seen = (k <= q) & ((run[k] == run[q]) | (run[k] == stem[q]))
        return seen & (position[q] - position[k] < window) if window else seen

    return mask


def block_mask(mask: Callable, runs: list[tuple[int, int, int, int]], size: int, device: torch.device) -> object:
    """A BlockMask of `sees`. What flex's create_block_mask finds in S x S entries follows from the runs alone: in long
    micro-batches that matrix would take more memory than the attention. (A window leaves some blocks without an entry:
    they cost time, and change nothing.)"""
    from torch.nn.attention.flex_attention import BlockMask

    n = -(-size // BLOCK)
    seen = torch.zeros(n, n, dtype=torch.bool)  # query blocks by key blocks
    for start, end, prompt_start, prompt_end in runs:
        if start < end:
            rows = slice(start // BLOCK, -(-end // BLOCK))
            for a, b in ((prompt_start, prompt_end), (start, end)):
                seen[rows, a // BLOCK : -(-b // BLOCK)] = True
    seen = seen.tril().to(device)  # k <= q
    count = seen.sum(dim=1, dtype=torch.int32)
    order = seen.to(torch.uint8).argsort(dim=1, descending=True, stable=True).to(torch.int32)  # those seen come first
    how = {"BLOCK_SIZE": BLOCK, "mask_mod": mask, "seq_lengths": (size, size)}
    return BlockMask.from_kv_blocks(count[None, None], order[None, None], **how)
