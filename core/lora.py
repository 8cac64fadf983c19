"""LoRA (Hu et al. 2021, arXiv 2106.09685): each linear layer of the blocks gets a narrow path beside it, which alone
learns.

    W x   ->   W x + alpha/R B (A x)          W [out, in] stays; A [R, in] is drawn, B [out, R] begins at 0

W is kept in --dtype, without gradient or moments; A and B are float32 weights, used in the dtype of x. So a model of P
parameters takes 2 P bytes and 16 for each parameter of A and B, in place of 16 P (docs/scale.md).

peft's layers are put in the places of the linear ones within the model. The model keeps its class: the decoder, FSDP2,
checkpointing and `batches.losses` see the one that they know. Without its adapter (`switched_off`) it is the model of
the start.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from core.answers import optional
from core.flags import count, group, number
from core.ranks import first_line, fold_in

NAME = "default"  # of the adapter among those that a layer of peft's may have
PREFIX = "base_model.model."  # of the weights in a peft folder


# ---------------------------------------------------------------------------------------------- flags
def add_flags(p: argparse.ArgumentParser) -> None:
    g = group(p, "one GPU")
    g.add_argument("--lora-rank", type=count, default=0, help="train a LoRA adapter of this rank alone (0: off)")
    g.add_argument("--lora-alpha", type=number(0), help="its scale is alpha / rank (default: twice the rank)")
    g.add_argument("--lora-targets", help="names of linear layers, q_proj,v_proj (default: all those of the blocks)")


def settle(args: argparse.Namespace) -> None:
    """Fills in the default of --lora-alpha. Raises ValueError where the flags contradict each other, or without peft.

    Where LoRA is off, its flags are as good as not there: a run begun without them goes on."""
    if not args.lora_rank:
        if args.lora_alpha is not None or args.lora_targets is not None:
            raise ValueError("--lora-alpha and --lora-targets are for --lora-rank, which is 0")
        args.lora_rank = None
        return
    args.lora_alpha = 2.0 * args.lora_rank if args.lora_alpha is None else args.lora_alpha
    try:
        optional("peft", "peft")
    except ValueError as error:
        raise ValueError(f"--lora-rank: {error}") from None


@dataclass
class Lora:
    """What an adapter is made from."""

    rank: int
    alpha: float
    targets: str | None  # names, with commas; None: all
    seed: int  # of A
    base: str  # as it is named in the adapter's folder


def of(args: argparse.Namespace) -> Lora | None:
    """The adapter that the flags of a command ask for; None without, as for commands that do not train."""
    if not getattr(args, "lora_rank", None):
        return None
    base = os.path.abspath(args.model) if os.path.isdir(args.model) else args.model
    return Lora(args.lora_rank, args.lora_alpha, args.lora_targets, args.seed, base)


# ---------------------------------------------------------------------------------------------- in the model
def chosen(model: torch.nn.Module, blocks: list[torch.nn.Module], lora: Lora) -> tuple[list[str], list[str], list[str]]:
    """The names that choose layers, as peft takes them; the layers' own, of the blocks; and those of others that the
    same names would choose. Raises ValueError where a name chooses none, or the rank is above what any layer has."""
    from transformers.pytorch_utils import Conv1D  # GPT-2's: a linear layer whose weight is [in, out]

    def ends_with(name: str, target: str) -> bool:
        return f".{name}".endswith(f".{target}")

    inside = {module for block in blocks for module in block.modules()}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}
    ours = {name: module for name, module in linear.items() if module in inside}
    last = list(dict.fromkeys(name.rpartition(".")[2] for name in ours))  # in the model's order
    given = [name.strip() for name in lora.targets.split(",")] if lora.targets is not None else last
    for target in given:
        if not target or not any(ends_with(name, target) for name in ours):
            raise ValueError(
                f"--lora-targets: no linear layer of the blocks is called {target!r}; there are {', '.join(last)}"
            )
    names = [name for name in ours if any(ends_with(name, target) for target in given)]
    if not names:
        raise ValueError("--lora-rank: the blocks of this model have no linear layers")
    widest = max(min(ours[name].weight.shape) for name in names)
    if lora.rank > widest:
        raise ValueError(f"--lora-rank {lora.rank}: the layers that it is for have at most rank {widest}; lower it")
    others = [name for name in linear if name not in ours and any(ends_with(name, target) for target in given)]
    return given, names, others


def add(model: torch.nn.Module, blocks: list[torch.nn.Module], lora: Lora, dtype: torch.dtype) -> str:
    """Freezes a model's weights, in dtype, and puts an adapter in it -> what to say of it. Raises ValueError."""
    from peft import LoraConfig, inject_adapter_in_model

    given, names, others = chosen(model, blocks, lora)
    whole = sum(p.numel() for p in model.parameters())
    deep = any(p.dim() > 2 for block in blocks for p in block.parameters())
    for p in model.parameters():  # not buffers: RoPE's frequencies are float32 in any model
        p.requires_grad_(False)
        p.data = p.data.to(dtype)
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=given, bias="none",
        exclude_modules="|".join(map(re.escape, others)) or None,  # a list would mean ends of names
        task_type="CAUSAL_LM", base_model_name_or_path=lora.base,
        fan_in_fan_out=not any(isinstance(model.get_submodule(name), torch.nn.Linear) for name in names),
    )  # fmt: skip
    inject_adapter_in_model(config, model)
    found = layers(model)
    assert [*found] == names, f"peft chose {[*found]}, not {names}"
    for i, layer in enumerate(found.values()):
        layer.cast_input_dtype_enabled = False  # to that of A; here A is cast to that of x
        for part in (layer.lora_A[NAME], layer.lora_B[NAME]):
            part.weight = torch.nn.Parameter(torch.zeros_like(part.weight, dtype=torch.float32))
            part.forward = functools.partial(in_dtype_of, part)
        a = layer.lora_A[NAME].weight.data
        if not a.is_meta:  # as nn.Linear draws, from a seed of its own: the same A on any number of ranks
            generator = torch.Generator(a.device).manual_seed(fold_in(lora.seed, i))
            a.uniform_(-1 / math.sqrt(a.shape[1]), 1 / math.sqrt(a.shape[1]), generator=generator)
    learn = sum(p.numel() for p in model.parameters() if p.requires_grad)
    note = f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(given)}: {learn:,} parameters learn, beside "
    note += f"{whole:,} that stay"
    return note + ("; the experts' weights, which are no linear layers, have none" if deep else "")


def in_dtype_of(linear: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A float32 weight used in the dtype of x; its gradient is float32. (FSDP2's mixed precision does the same, but
    with all weights of a block, and W needs no copy.)"""
    return F.linear(x, linear.weight.to(x.dtype))


def layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers that have an adapter, by name; none in a model without."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@contextlib.contextmanager
def switched_off(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Inside, the model computes without its adapter. For passes without gradients.

    Not by peft's enable_adapters, which changes requires_grad as well: FSDP2 looks at that when it first runs."""
    parts = [*layers(model).values()]
    for layer in parts:
        layer._disable_adapters = True
    try:
        yield model
    finally:
        for layer in parts:
            layer._disable_adapters = False


# ---------------------------------------------------------------------------------------------- folders
def taken_out(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Merges the adapter's weights in a whole state dict into those they stand beside: W + alpha/R B A, in float32.
    Afterwards the dict is that of the plain model. Returns the adapter, as a peft folder names its weights."""
    adapter = {}
    for name, layer in layers(model).items():
        a, b = (state.pop(f"{name}.{part}.{NAME}.weight") for part in ("lora_A", "lora_B"))
        adapter |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
        more = layer.scaling[NAME] * (b @ a)  # [out, in]
        plain = state.pop(f"{name}.base_layer.weight").float()
        state[f"{name}.weight"] = plain + (more.T if layer.fan_in_fan_out else more)
        if f"{name}.base_layer.bias" in state:
            state[f"{name}.bias"] = state.pop(f"{name}.base_layer.bias")
    for name, value in state.items():
        state[name] = value.float() if value.is_floating_point() else value
    return adapter


def write(model: torch.nn.Module, adapter: dict[str, torch.Tensor], folder: Path) -> None:
    """A peft folder of the adapter."""
    from safetensors.torch import save_file

    config = model.peft_config[NAME]
    config.inference_mode = True
    config.save_pretrained(folder)
    file = folder / "adapter_config.json"
    kept = json.loads(file.read_text())
    kept["target_modules"] = sorted(kept["target_modules"])  # of a set, in another order in each process
    file.write_text(json.dumps(kept, indent=2) + "\n")
    save_file({name: value.contiguous() for name, value in adapter.items()}, folder / "adapter_model.safetensors")


def merged(model: torch.nn.Module, folder: str) -> torch.nn.Module:
    """A float32 model with the adapter of a peft folder, or of a hub name, merged into its weights. Raises
    ValueError."""
    from peft import PeftModel

    shapes = {name: p.shape for name, p in model.named_parameters()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # that peft uses an old name of transformers'
            with_adapter = PeftModel.from_pretrained(model, folder)
    except Exception as error:
        raise ValueError(f"the adapter does not fit its base: {first_line(error)}") from None
    if not hasattr(with_adapter, "merge_and_unload"):
        raise ValueError(f"an adapter of kind {with_adapter.peft_type}, which cannot be merged into weights")
    model = with_adapter.merge_and_unload().requires_grad_(True)  # peft had frozen what it adapts
    if {name: p.shape for name, p in model.named_parameters()} != shapes:
        raise ValueError("the adapter changes the shapes of its base: merge it there, and save that")
    return model
