"""One token for every row that is being decoded: the model behind its cache, and two ways to hold the rows.

`Leaving`: finished rows leave at every token, and the columns in use are no more than the rows need. Works with every
model and every attention. `Fixed`: what a GPU wants. The rows have slots in buffers of fixed shapes, so that a step can
be recorded as a CUDA graph, and replayed without Python; the host looks at what was drawn every CHECK tokens only, and
drops what was drawn past the end.

        Fixed      columns  0    1    2    3    4    5  |  …    a slot begins in column 0, and each writes the
        slot 0              x^1  x^2  y^1  y^2  y^3  .  |       next token into a column of its own. Attention reads
        slot 1              x^1  x^2  x^3  x^4  y^1  .  |       a slot's own columns (core/attend.py), which follow
        slot 2 (free)       what was there, not read    |       from lengths alone. In use are the first `rows` slots

Both draw the same tokens (in float32; tests/test_fixed.py). Needs torch, transformers, core/kv_cache.py and,
for `Fixed`, core/attend.py.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from core.kv_cache import Columns, Slots, join, keep_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rows = list[list[int]]  # token ids, one list a row
Pick = Callable[[Tensor, Tensor], Tensor]  # logits [N, V], noise keys [N] -> tokens [N]

# ------------------------------------------------------------------------------------------------------------ the model


def sharded(model: PreTrainedModel) -> bool:
    """Whether a pass gathers weights: they are in pieces (inside of fsdp.inference only with --lock-step)."""
    return getattr(model, "lock_step", False) or any(hasattr(p, "placements") for p in model.parameters())


@contextmanager
def bare(model: PreTrainedModel) -> Iterator[None]:
    """Without FSDP's hooks, where the weights are whole: they would cost time in each pass, and wait for streams, which
    a graph cannot record."""
    kept = [(m, name, getattr(m, name)) for m in model.modules() for name in ("_forward_pre_hooks", "_forward_hooks")]
    kept = [] if sharded(model) else [(m, name, hooks) for m, name, hooks in kept if hooks]
    try:
        for m, name, hooks in kept:
            its = lambda hook: "fsdp" in type(getattr(hook, "__self__", None)).__module__  # noqa: E731
            setattr(m, name, type(hooks)((key, hook) for key, hook in hooks.items() if not its(hook)))
        yield
    finally:
        for m, name, hooks in kept:
            setattr(m, name, hooks)


@contextmanager
def decoding(model: PreTrainedModel, stats: dict | None) -> Iterator[torch.device]:
    """eval mode (in train mode gradient checkpointing turns the cache off) and no_grad inside; all flags restored.

    no_grad, not inference_mode, so that it also runs inside FSDP; without its hooks, where it can. Counts forwards and
    tokens fed into `stats`.
    """
    modes = [(module, module.training) for module in model.modules()]
    stats = {} if stats is None else stats

    def count(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        stats["forwards"] = stats.get("forwards", 0) + 1
        stats["columns"] = stats.get("columns", 0) + kwargs["input_ids"].numel()

    device = next(model.parameters()).device
    model.eval()
    # graphs and kernels belong to the current GPU, which need not be the model's
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with bare(model), torch.no_grad(), current:
        hook = model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield device
        finally:
            hook.remove()
            for module, training in modes:
                module.training = training


def pad(rows: Rows, device: torch.device, left: bool) -> tuple[Tensor, Tensor]:
    """Ragged rows -> ids and mask, both int64 [B, W], with 0 where there is no token."""
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) * left + row + [0] * (width - len(row)) * (not left) for row in rows]
    lengths = torch.tensor([[len(row)] for row in rows], device=device)  # [B, 1]
    column = torch.arange(width, device=device)  # [W]
    mask = column >= width - lengths if left else column < lengths
    return torch.tensor(ids, dtype=torch.int64, device=device), mask.long()


def forward(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Cache, at: Tensor | None = None) -> Tensor:
    """Feeds ids [B, Q] behind the cached columns [B, S - Q]; mask [B, S] covers both. -> the logits [N, V] where `at`
    (bool [B, Q]) is true, in row order; without it those of the last column, [B, V]. [B, Q, V] is never made. Raises
    ValueError where the model has kept no keys and values, or its logits are NaN."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # [B, Q]; padding on the left has no position
    logits = call(model, ids, mask, positions, cache, at)
    if any(layer.get_seq_length() != mask.shape[1] for layer in cache.layers) or not cache.layers:
        raise ValueError(f"{type(model).__name__} does not keep keys and values of each token, and cannot be decoded")
    return checked(logits)


def call(
    model: PreTrainedModel, ids: Tensor, mask: Tensor | dict, positions: Tensor, cache: Cache, at: Tensor | None = None
) -> Tensor:
    """`forward`, with any mask that the model takes."""
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    inputs |= {cache_name(type(model)): cache, "use_cache": True}
    if at is None:
        return known(model, model(**inputs, logits_to_keep=1).logits[:, -1])  # [B, V]
    # [B, Q, d] -> [1, N, d] at the door of the output matrix
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][at][None],))
    try:
        return known(model, model(**inputs).logits[0])  # [N, V]
    finally:
        hook.remove()


def known(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """The logits [..., V], -inf (in place) at the ids in `model.absent`, if any: a vocabulary that is padded beyond the
    tokenizer's has ids that are no token."""
    absent = getattr(model, "absent", None)
    return logits if absent is None else logits.index_fill_(-1, absent, -torch.inf)


def checked(logits: Tensor) -> Tensor:
    """The logits. Raises ValueError where they are NaN, which a draw would take for token 0. (A row's NaN stays in its
    keys and values: its last logits show all.)"""
    if logits.isnan().any():
        raise ValueError("the model's logits are NaN: its weights are broken, or too large for --dtype")
    return logits


@functools.cache
def cache_name(kind: type) -> str:
    """What the forward of a class of models calls its cache: the name changes with transformers 5.24."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def prefill(model: PreTrainedModel, prompts: Rows, device: torch.device) -> tuple[Tensor, Tensor, Cache]:
    """One forward over the prompts, equal neighbours once -> last logits [B, V], lengths [B], cache, all of B rows."""
    different = [b == 0 or prompts[b] is not prompts[b - 1] for b in range(len(prompts))]
    ids, mask = pad([prompt for prompt, new in zip(prompts, different) if new], device, left=True)  # [B', P]
    cache = Cache(layer_class_to_replicate=Columns)
    logits, length = forward(model, ids, mask, cache), mask.sum(1)  # [B', V], [B']
    if not all(different):
        copy = torch.tensor(different, device=device).cumsum(0) - 1  # [B]
        for layer in cache.layers:
            layer.hold(*(t.index_select(0, copy) for t in layer.used()))
        logits, length = logits[copy], length[copy]
    return logits, length, cache


def right_aligned(length: Tensor, width: int) -> Tensor:
    """The mask, int64 [B, width], of rows of these lengths (int64 [B]) that are padded on the left."""
    return (torch.arange(width, device=length.device) >= width - length[:, None]).long()


def feed(model: PreTrainedModel, tokens: Tensor, length: Tensor, cache: Cache) -> Tensor:
    """One token [B] behind the `length` tokens [B] of each row in the cache -> the logits [B, V] after it."""
    return forward(model, tokens[:, None], right_aligned(length + 1, cache.get_seq_length() + 1), cache)


# ------------------------------------------------------------------------------------------------- rows: as they come


class Leaving:
    """The rows being decoded, finished ones leave at once: `advance` draws a token for each."""

    def __init__(self, model: PreTrainedModel, pick: Pick, ends: Tensor, most: int) -> None:
        """ends: the ids that end a row, int64 [E]. most: tokens that a row may have."""
        self.model, self.pick, self.ends, self.most = model, pick, ends, most
        self.names: list[Hashable] = []  # of the rows
        # logits [B, V], tokens cached [B], tokens drawn [B], tape [B, most]: a row's noise keys, and as they are used,
        # its tokens in their places
        self.logits = self.length = self.drawn = self.tape = self.cache = None

    def admit(self, names: list[Hashable], prompts: Rows, keys: Tensor) -> None:
        """Prompts whose rows join those at hand, none longer than their longest. keys: [B, most] noise."""
        logits, length, cache = prefill(self.model, prompts, keys.device)
        state = (logits, length, torch.zeros_like(length), keys)
        if self.names:
            join(self.cache, cache)
            state = (torch.cat(pair) for pair in zip((self.logits, self.length, self.drawn, self.tape), state))
        else:
            self.cache = cache
        self.logits, self.length, self.drawn, self.tape = state
        self.names = self.names + names

    def advance(self) -> list[tuple[Hashable, list[int]]]:
        """A token more for each row -> the names and tokens of those that are finished."""
        at, finished = self.drawn[:, None], []
        z = self.pick(self.logits, self.tape.gather(1, at)[:, 0])  # [B], z^j ~ p(.|x, z^{<j})
        self.tape.scatter_(1, at, z[:, None])  # a key is used once: its token takes its place
        self.drawn = self.drawn + 1
        done = ((self.drawn == self.most) | torch.isin(z, self.ends)).tolist()
        if any(done):
            for name, row, drawn, gone in zip(self.names, self.tape, self.drawn, done):
                if gone:
                    finished.append((name, row[:drawn].tolist()))
            order = keep_rows(self.cache, [b for b, gone in enumerate(done) if not gone], self.length)
            z, self.length, self.drawn, self.tape = (t[order] for t in (z, self.length, self.drawn, self.tape))
            self.names = [self.names[b] for b in order]
        if self.names:
            self.logits = feed(self.model, z, self.length, self.cache)  # [B, V]
            self.length = self.length + 1
        return finished


# ------------------------------------------------------------------------------------------------ rows: of fixed shapes

CHECK = 4  # tokens between two looks at what is finished: a row that ends sooner is drawn on, for nothing
GROW = 512  # columns by which the buffers grow: then all graphs are recorded anew
CHECKED = ("gpt_neox", "llama", "mistral", "gpt2", "qwen2", "qwen3", "gemma")  # architectures, tests/test_fixed.py


def why_not_fixed(model: PreTrainedModel) -> str:
    """What speaks against `Fixed` with this model, "" if nothing."""
    config = model.config.get_text_config()
    if config.model_type not in CHECKED:
        return f"fixed shapes are not checked for {config.model_type}"
    if config._attn_implementation not in ("sdpa", "packed"):  # which is sdpa outside of training passes
        return f"fixed shapes need sdpa attention, not {config._attn_implementation}"
    if not {*(getattr(config, "layer_types", None) or ())} <= {"full_attention", "sliding_attention"}:
        return f"fixed shapes do not know layers of {', '.join(sorted({*config.layer_types}))}"
    rope = getattr(config, "rope_parameters", None) or {}
    if any("dynamic" in str(part) or "longrope" in str(part) for part in (rope, *rope.values())):
        return "this model's rotary angles change with the length"
    if sharded(model):
        return "the model is sharded while it decodes (--lock-step)"
    from core import attend

    if model.device.type == attend.KIND and not attend.usable:
        return "fixed shapes need Triton on a GPU"
    return ""


def fixed_shapes(model: PreTrainedModel, device: torch.device, asked: bool | None) -> bool:
    """Whether `generate` holds its rows in fixed shapes. Raises ValueError where that is asked for and cannot be."""
    if asked is None:
        return device.type == "cuda" and not why_not_fixed(model)
    if asked and (why := why_not_fixed(model)):
        raise ValueError(f"fixed=True: {why}")
    return asked


def can_record(device: torch.device) -> bool:
    return device.type == "cuda"


def on_side_stream(work: Callable[[], None]) -> None:
    """What has to come before `record`, says torch.cuda.graph."""
    side, here = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        work()
    here.wait_stream(side)


def record(work: Callable[[], None], pool: object) -> tuple[Callable[[], None], object]:
    """work() as a CUDA graph, which does not run yet -> what replays it, and the memory that graphs share: none of them
    leaves anything in it for another."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        work()
    return graph.replay, graph.pool()


class Fixed:
    """The rows being decoded, in slots of fixed shapes: `advance` draws up to CHECK tokens for each."""

    def __init__(
        self, model: PreTrainedModel, pick: Pick, ends: Tensor, most: int, slots: int, looks: bool, stats: dict
    ) -> None:
        """looks: whether `pick` looks at what it draws, and so cannot be recorded. stats: counts what is replayed, too,
        which the hook of `decoding` does not see."""
        self.model, self.pick, self.ends, self.most = model, pick, ends, most
        self.looks, self.in_graph, self.stats = looks, can_record(ends.device), stats
        self.device, self.size = ends.device, slots
        self.slots: list[Hashable | None] = [None] * slots  # the row in each
        self.asked, self.have = [0] * slots, [0] * slots  # tokens of its prompt, and drawn, at the last look
        self.rows = self.room = 0  # slots in use, columns of the buffers
        new = functools.partial(torch.zeros, slots, dtype=torch.int64, device=self.device)
        self.number = torch.arange(slots, device=self.device)
        self.length, self.drawn, self.z = new(), new(), new()  # [slots]: tokens cached, tokens drawn, the last of them
        self.done = torch.ones(slots, dtype=torch.bool, device=self.device)
        self.tape = torch.zeros(slots, most, dtype=torch.int64, device=self.device)  # as in Leaving
        self.logits = self.cache = None  # [slots, V]
        self.forget_graphs()

    @property
    def names(self) -> list[Hashable]:
        return [name for name in self.slots if name is not None]

    def live(self) -> list[int]:
        return [slot for slot, name in enumerate(self.slots) if name is not None]

    def admit(self, names: list[Hashable], prompts: Rows, keys: Tensor) -> None:
        """Prompts whose rows take free slots. keys: [B, most] noise."""
        logits, length, cache = prefill(self.model, prompts, self.device)
        width, new = cache.get_seq_length(), [s for s, name in enumerate(self.slots) if name is None][: len(names)]
        if self.cache is None:
            self.logits = logits.new_zeros(self.size, logits.shape[1])
            self.cache = Cache(layers=[Slots(self.size, *layer.used()) for layer in cache.layers])
        self.reserve(width + min(self.most, GROW))
        at = torch.tensor(new, device=self.device)
        order = (torch.arange(width, device=self.device) - length[:, None]) % width  # [B, width], tokens before padding
        for layer, prompt in zip(self.cache.layers, cache.layers):
            layer.put(at, *(t.gather(2, order[:, None, :, None].expand_as(t)) for t in prompt.used()))
        self.logits[at], self.length[at], self.drawn[at], self.tape[at] = logits, length, 0, keys
        self.done[at] = False
        for slot, name, prompt in zip(new, names, prompts):
            self.slots[slot], self.asked[slot], self.have[slot] = name, len(prompt), 0
        self.rows = max(self.rows, next(n for n in self.sizes() if n > max(new)))

    def advance(self) -> list[tuple[Hashable, list[int]]]:
        """Up to CHECK tokens more for each row -> the names and tokens of those that are finished."""
        self.close_up()
        live = self.live()
        steps = min(CHECK, self.most - min(self.have[slot] for slot in live))
        self.reserve(max(self.asked[slot] + self.have[slot] for slot in live) + steps)
        for layer in self.cache.layers:
            layer.rows, layer.end = self.rows, self.room
            layer.row, layer.at = self.number[: self.rows], self.length[: self.rows]
        for _ in range(steps):
            if self.looks:
                self.draw()
                self.run(self.feed)
            else:
                self.run(self.step)
        done, drawn = torch.stack([self.done.long(), self.drawn]).tolist()  # the only wait for the device
        ended = [slot for slot in live if done[slot]]
        checked(self.logits[ended])
        finished = [(self.slots[s], row[: drawn[s]]) for s, row in zip(ended, self.tape[ended].tolist())]
        for slot in live:
            self.have[slot] = drawn[slot]
        for slot in ended:
            self.slots[slot] = None
        return finished

    # one step, in place: all of it may be recorded, so nothing here asks for a value

    def step(self) -> None:
        self.draw()
        self.feed()

    def draw(self) -> None:
        """A token for each slot in use; those that are done, or free, keep what they have."""
        logits, tape, drawn, done, z = (t[: self.rows] for t in (self.logits, self.tape, self.drawn, self.done, self.z))
        at = drawn.clamp(max=self.most - 1)[:, None]  # [rows, 1]
        kept = tape.gather(1, at)[:, 0]  # the key; of a slot that is done what stands there
        z.copy_(self.pick(logits, kept))
        tape.scatter_(1, at, torch.where(done, kept, z)[:, None])
        drawn += ~done
        done |= (drawn >= self.most) | (z[:, None] == self.ends).any(1)

    def feed(self) -> None:
        """The logits after z, and its keys and values in column `length` of its slot."""
        from core import attend

        length, done, z = (t[: self.rows] for t in (self.length, self.done, self.z))
        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        kinds = {*(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])}
        masks = {}
        for kind in kinds:
            sliding = window and kind == "sliding_attention"
            first = (length - window + 1).clamp(min=0) if sliding else torch.zeros_like(length)
            masks[kind] = torch.stack([first, length], 1)[:, None, None]  # [rows, 1, 1, 2]
        mask = masks[kinds.pop()] if len(kinds) == 1 else masks  # layers that differ get theirs by name
        with attend.over_slots(self.model):
            self.logits[: self.rows] = call(self.model, z[:, None], mask, length[:, None], self.cache)
        length += ~done

    # what a graph needs

    def run(self, work: Callable[[], None]) -> None:
        """work(), and from its second call with so many rows on, as a graph."""
        if not self.in_graph:
            work()
        elif self.rows not in self.graphs:  # as it is: what is set up at a first use must not be recorded
            self.graphs[self.rows] = None
            on_side_stream(work)
        else:
            replay = self.graphs[self.rows] or self.record(work)
            replay()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What replays work() at these shapes, and counts."""
        stats, before, rows = self.stats, dict(self.stats), self.rows
        try:
            replay, self.pool = record(work, self.pool)
        except RuntimeError as error:
            self.in_graph = False
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"decoding goes on without CUDA graphs, which is slower: {reason}", stacklevel=2)
            return work
        stats.clear()  # of what was recorded, nothing has run
        stats.update(before)

        def counted() -> None:
            replay()
            stats["forwards"] += 1
            stats["columns"] += rows

        self.graphs[self.rows] = counted
        return counted

    def forget_graphs(self) -> None:
        self.graphs: dict[int, Callable | None] = {}  # by rows in use
        self.pool = None

    # the shapes

    def sizes(self) -> list[int]:
        """How many slots may be in use: all of them, half of them, ... one; ascending."""
        return sorted({-(-self.size // 2**i) for i in range(self.size.bit_length() + 1)})

    def close_up(self) -> None:
        """Where half of the slots in use are free, the rows of the back ones move to the front."""
        live = self.live()
        size = next(n for n in self.sizes() if n >= len(live))
        if size >= self.rows:
            return
        free = [slot for slot in range(size) if self.slots[slot] is None]
        move = [(slot, free.pop(0)) for slot in live if slot >= size]  # from, to
        if move:
            source, to = torch.tensor(move, device=self.device).T
            for t in (self.logits, self.length, self.drawn, self.done, self.tape):
                t[to] = t[source]
            for layer in self.cache.layers:
                layer.put(to, layer.keys[source], layer.values[source])
            self.done[source] = True
        for source, to in move:
            for found in (self.slots, self.asked, self.have):
                found[to] = found[source]
            self.slots[source] = None
        self.rows = size

    def reserve(self, columns: int) -> None:
        """Buffers of at least so many columns."""
        if columns > self.room:
            self.room = columns if not self.room else -(-columns // GROW) * GROW
            for layer in self.cache.layers:
                layer.grow(self.room)
            self.forget_graphs()  # they write into the old ones
