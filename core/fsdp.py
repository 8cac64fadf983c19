"""The model on the ranks: loaded once, sharded by FSDP2, and made whole again to generate.

    model = load_model("runs/sft", "bfloat16")         # one process: a plain model; several: sharded over them
    with inference(model): ...                          # no gradients, and ranks may run different numbers of forwards

FSDP2 (`fully_shard`) cuts every weight into one piece a rank. Before a block computes, its pieces are gathered from all
ranks; after it, they are dropped again. Each rank so holds 1/WORLD of weights, gradients and moments, and one or two
whole blocks at a time. What has to be known to use it rightly stands where it matters, below.

Master weights are float32; --dtype bfloat16 computes in bf16 and reduces gradients in float32. The model stays in eval
mode: dropout is off in training, too, as in the code that the paper builds on.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from core import arrow, lora
from core.chat import settle_ends
from core.kinds import cached, check_kind, named_ends
from core.ranks import BACKEND, RANK, WORLD, all_sum, first_line, init, print0

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


# ---------------------------------------------------------------------------------------------- loading
def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name, with what ends a response (chat.ends). Raises OSError in one line,
    also where the folder holds no model that can be trained here: this is what a command reads first."""
    from transformers import AutoTokenizer

    if not path.strip():
        raise ValueError("--model is empty: give a folder or a hub name")
    local = path.count("/") > 1 or path.startswith((".", "/")) or os.path.isdir(os.path.dirname(path))
    if not os.path.isdir(path) and (local or os.path.exists(path)):  # else it is a hub name
        raise FileNotFoundError(f"--model {path}: no such folder")
    *adapters, base = check_kind(path)
    expected = ("config.json", "tokenizer.json", "tokenizer_config.json")
    if os.path.isdir(base) and not any(os.path.exists(os.path.join(base, name)) for name in expected):
        raise OSError(f"--model {path}: not a model's folder, there is no config.json in it")
    own = next((folder for folder in adapters if cached(folder, "tokenizer_config.json")), base)  # an adapter may have
    try:
        tokenizer = AutoTokenizer.from_pretrained(own, trust_remote_code=False)
    except Exception as error:  # a missing or broken tokenizer shows as OSError, ValueError, TypeError or ImportError
        where = "" if os.path.isdir(path) else "no such folder here, and from the hub "
        raise OSError(f"--model {path}: {where}no tokenizer could be loaded ({first_line(error)})") from None
    settle_ends(tokenizer, named_ends(base))
    return tokenizer


def load_model(
    path: str, dtype: str = "float32", *, shard_size: int = 0, lock_step: bool = False,
    recompute: bool = False, compile: bool = False, attention: str | None = None, adapter: lora.Lora | None = None,
) -> torch.nn.Module:  # fmt: skip
    """A causal language model on this rank's device, sharded over the ranks where there are several. Raises OSError.

    The weights are read in float32 whatever their file says (a bf16 checkpoint would silently mean bf16 Adam moments),
    by rank 0 alone: the others never hold a whole model. shard_size, lock_step: see `shard` and `inference`. recompute:
    activation checkpointing of each block; compile: torch.compile of each block; both in training passes only.
    attention: transformers' attn_implementation (None: its choice). adapter: of LoRA, to be put in; then the weights
    are frozen, and kept in `dtype` itself.
    """
    from transformers import AutoModelForCausalLM

    device = init()
    if shard_size and WORLD % shard_size:
        raise ValueError(f"--shard {shard_size} does not divide the {WORLD} processes")
    chosen = {"attn_implementation": attention} if attention else {}
    config, whole = read_weights(path, dtype if adapter else "float32", **chosen)
    model = whole
    # In bfloat16 FSDP2 makes the copies to compute with, on one device, too. Frozen weights need none.
    if WORLD > 1 or (dtype != "float32" and not adapter):
        with torch.device("meta"):  # shapes without memory: `fill` brings the values, once it is known who holds what
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **chosen)
    if adapter:
        notes = [lora.add(some, blocks(some), adapter, getattr(torch, dtype)) for some in {model, whole} - {None}]
        print0(notes[0])
    # Both wrap a block's forward, so they come before fully_shard: FSDP's gathering must stand outside of them. A block
    # that gathered inside of its recomputation would gather a second time, and in an order that ranks may not share.
    if compile:
        in_training(model, functools.partial(torch.compile, dynamic=True))
    if recompute:
        from torch.utils.checkpoint import checkpoint

        # without dropout there is no random state to keep
        plain = {"use_reentrant": False, "preserve_rng_state": False}
        in_training(model, lambda forward: functools.partial(checkpoint, forward, **plain))
    if model is whole:
        return model.eval().to(device)
    model.lock_step = lock_step
    return fill(shard(model.eval(), None if adapter else dtype, shard_size), whole)


def read_weights(path: str, dtype: str = "float32", **chosen: str) -> tuple[object, torch.nn.Module | None]:
    """The config of a model folder or hub name and, on rank 0, the whole model in float32; in `dtype`, where they will
    be frozen. The folder of an adapter: its base with the adapter merged, in float32. Raises OSError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    *adapters, base = check_kind(path)
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        if "MaskedLM" in str(config.architectures):
            raise ValueError(f"{config.model_type} is a masked language model; a causal one is needed")
        if RANK:
            return config, None
        how = {"output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False}
        read = torch.float32 if adapters else getattr(torch, dtype)
        whole, info = AutoModelForCausalLM.from_pretrained(base, dtype=read, **how, **chosen)
        wrong = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
        if wrong:  # transformers would go on with random ones
            named = f"{', '.join(wrong[:3])}{', ...' if wrong[3:] else ''}"
            raise ValueError(f"{len(wrong)} weights are missing or not of the shape in config.json: {named}")
        if info["unexpected_keys"]:
            first = min(info["unexpected_keys"])
            print0(f"{len(info['unexpected_keys'])} weights in {base} are not used, first: {first}")
        for folder, under in reversed([*zip(adapters, [*adapters[1:], base])]):
            whole = lora.merged(whole, folder)
            print0(f"--model {path}: an adapter; {folder} is merged into {under}")
        return config, whole
    except Exception as error:
        raise OSError(f"--model {path}: could not be loaded ({first_line(error)})") from None


def model_of(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    """The model that the flags of a command name. What it draws, and its labels, are tokens of this tokenizer: the ids
    that have none, where its vocabulary is padded beyond them, are in `model.absent` (see decode_step.known)."""
    training = {"recompute": "activation_checkpointing", "compile": "compile"}  # flags of the stages alone
    training = {name: getattr(args, flag, False) for name, flag in training.items()}
    training["adapter"] = lora.of(args)
    training["attention"] = attention = getattr(args, "attn_implementation", None)
    if attention and "flash" in attention and args.dtype == "float32":
        raise ValueError(f"--attn-implementation {attention} computes in 16 bits: give --dtype bfloat16 with it")
    model = load_model(args.model, args.dtype, shard_size=args.shard, lock_step=args.lock_step, **training)
    absent = sorted({*range(model.config.vocab_size)} - {*tokenizer.get_vocab().values()})
    model.absent = torch.tensor(absent, device=model.device) if absent else None
    return model


# ---------------------------------------------------------------------------------------------- sharding
def blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The transformer blocks: transformers names their classes for every architecture."""
    names = set(model._no_split_modules or [])
    return [module for module in model.modules() if type(module).__name__ in names]


def in_training(model: torch.nn.Module, wrap: Callable[[Callable], Callable]) -> None:
    """Wraps the forward of each block in passes with gradients; decoding, with its cache, keeps the plain one."""
    for block in blocks(model):

        def forward(*args: object, plain: Callable, wrapped: Callable, **kwargs: object) -> object:
            return (wrapped if torch.is_grad_enabled() else plain)(*args, **kwargs)

        block.forward = functools.partial(forward, plain=block.forward, wrapped=wrap(block.forward))


def shard(model: torch.nn.Module, dtype: str | None = "float32", size: int = 0) -> torch.nn.Module:
    """FSDP2: each transformer block a group of weights that is gathered at once, then the root, which takes the rest.

    dtype: what the weights are gathered in, None: in their own (those of an adapter differ from those beside it).
    size: HSDP, replicas of shards of so many ranks (0: one shard over all; 1: whole replicas). A block drops what it
    gathered after its forward, and gathers it again in the backward; not so on one rank, where that would save no more
    than the copies in dtype."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    size = size or WORLD
    device = init().type
    if not dist.is_initialized():  # bf16 on one device: the same mixed-precision policy, on a group of one
        dist.init_process_group(BACKEND[device], store=dist.HashStore(), rank=0, world_size=1)
    names = ("replicate", "shard")
    mesh = dist.init_device_mesh(device, (WORLD // size, size), mesh_dim_names=names)
    options = {
        "mesh": mesh if size < WORLD else mesh["shard"],
        "mp_policy": MixedPrecisionPolicy(dtype and getattr(torch, dtype), reduce_dtype=torch.float32),
    }
    # From the inside out: what a call finds already sharded it leaves alone. The embeddings and the output matrix stay
    # with the root, since tied ones are one weight: in two groups it would be two, each with half of the gradient.
    for block in blocks(model):
        fully_shard(block, reshard_after_forward=WORLD > 1, **options)
    return fully_shard(model, **options)


def fill(model: torch.nn.Module, whole: torch.nn.Module | None) -> torch.nn.Module:
    """Gives a sharded model on the meta device the weights of rank 0's whole one."""
    from torch.distributed.checkpoint import state_dict as dcp_state

    model.to_empty(device=init())  # memory, but no values yet
    # Each rank gets its pieces from rank 0, weight by weight: no other rank ever holds a whole model.
    options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dcp_state.set_model_state_dict(model, whole.state_dict() if whole else {}, options=options)
    # RoPE's inv_freq is a buffer that is in no state dict: after to_empty it would be garbage, without any error.
    source = dict(whole.named_buffers()) if whole else {}
    for name, buffer in model.named_buffers():
        if whole:
            buffer.copy_(source[name])
        dist.broadcast(buffer, 0)
    if whole:  # what save_pretrained needs to write the folder as it was read (names, settings)
        model.generation_config = whole.generation_config
        model._weight_conversions = getattr(whole, "_weight_conversions", None)
    return model


# ---------------------------------------------------------------------------------------------- generating
@contextlib.contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """no_grad; and inside, the ranks of a sharded model may run different numbers of forwards.

    A forward of a sharded model is a collective: a rank that ran fewer would leave the others waiting for ever. So each
    rank gathers all weights once and holds them meanwhile. Or, with --lock-step, they stay sharded, and a rank that is
    done joins in the others' forwards.

    A forward that is in here has the weights of this moment. One outside of it and without a backward would leave what
    it gathered behind, and the forward after the next optimiser step would compute with that."""
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    together = bool(parts) and getattr(model, "lock_step", False)
    for part in [] if together else parts:  # each by itself: neither call reaches the parts inside
        part.set_reshard_after_forward(False, recurse=False)  # else the first forward would drop the weights again
        part.reshard()  # what a forward without a backward has left may be of another step
        part.unshard()

    def busy(one: int = 1) -> int:
        """How many ranks are about to run a forward."""
        return int(all_sum(torch.tensor(one, device=model.device)))

    # before FSDP's own hook, so that the collectives come in one order on all ranks
    hook = model.register_forward_pre_hook(lambda *_: [busy()] and None, prepend=True) if together else None
    try:
        with torch.no_grad():  # not inference_mode, whose tensors could not take part in a later backward
            yield
            if hook:
                hook.remove()
                while busy(0):
                    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for part in parts:
            part.reshard()
            # as in `shard`, where FSDP's own default is that the root keeps its weights for the backward
            part.set_reshard_after_forward(part is not model and WORLD > 1, recurse=False)


# ---------------------------------------------------------------------------------------------- does it fit
LOWER = "lower --max-prompt or --max-response"


def check_fits(model: torch.nn.Module, tokens: int, largest_id: int, what: str, advice: str = LOWER) -> None:
    """Raises ValueError where a sequence of so many tokens, or a token id, would not fit the model. advice: what to do
    about the length."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and tokens > limit:
        raise ValueError(f"{what} take up to {tokens} tokens, the model has {limit} positions: {advice}")
    if largest_id >= model.config.vocab_size:
        raise ValueError(
            f"{what} hold token id {largest_id}, the model's vocabulary ends at {model.config.vocab_size - 1}: "
            "model and tokenizer do not belong together"
        )


def check_rows(model: torch.nn.Module, rows: Dataset, where: str = "", max_new_tokens: int = 0) -> None:
    """`check_fits` for what a stage reads of each row: x or f(x, y), then y, y_hat, z (RAC's, or DPO's rejected one),
    z_bar or what will be generated. (BoN's z is a list of samples.)"""
    found = arrow.Rows(rows)
    names = [name for name in ("y", "y_hat", "z", "z_bar") if name in found.lengths]
    longest = np.maximum.reduce([found.lengths[name] for name in ("x", "f") if name in found.lengths])
    longest = longest + np.maximum.reduce([found.columns[name].longest for name in names]).clip(min=max_new_tokens)
    columns = [found.columns[name].innermost for name in ("x", *names)]
    largest = max(column.largest for column in columns if column.lengths.any())
    limit = getattr(model.config, "max_position_embeddings", None)
    if largest < model.config.vocab_size and not (limit and longest.max() > limit):
        return
    for row in rows:  # to name the first one
        responses = [row[name] for name in ("y", "y_hat", "z", "z_bar") if name in row]
        responses = [ids for some in responses for ids in (some if some and isinstance(some[0], list) else [some])]
        tokens = max(len(row["x"]), len(row.get("f", []))) + max(max_new_tokens, *map(len, responses))
        largest = max(max(ids, default=0) for ids in (row["x"], *responses))
        too_long = limit and tokens > limit
        what = "f(x, y) and z" if too_long and len(row.get("f", [])) > len(row["x"]) else "x and y"
        advice = "leave the row out" if where else LOWER  # no flag shortens what --pairs has
        check_fits(model, tokens, largest, f"{where}row {row['id']}: {what}", advice)
