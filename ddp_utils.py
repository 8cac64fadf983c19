"""What every stage shares: processes, FSDP2, the optimiser step, checkpoints, logs and offline generation.

    torchrun --nproc-per-node 8 sft.py ...     one process per GPU (NCCL), or per CPU share (gloo)
    python sft.py ...                          one process, no process group

A stage reads:

    run = Run(args, model, tokenizer)
    for batch, micro_batches in run.steps(rows, args.epochs):       # one phase: its own AdamW and schedule
        n = sum(len(row["y"]) for row in batch)                     # tokens of the global batch
        for rows in micro_batches:                                  # this rank's share of it
            run.backward(sft=loss_sum(rows) / n)                    # gradients add up
    run.finish()                                                    # a Hugging Face folder in --out

Exact normalisation: every rank sees the rows of the whole global batch, so it divides its sums by the *global* counts
and no rank, micro-batch or ragged length weighs more than another. FSDP averages gradients over ranks, hence the factor
world_size in `backward`. Master weights are float32; --dtype bfloat16 computes in bf16 and reduces in float32.

The model stays in eval mode, so dropout is off in training too (as in the code the paper builds on), and a step depends
on nothing but the weights, the batch and the seed. That is what makes a resumed run equal to an undisturbed one.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

# ---------------------------------------------------------------------------------------------- processes
RANK, WORLD, LOCAL_RANK = (int(os.environ.get(key, default)) for key, default in
                           (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # fmt: skip
BACKEND = {"cpu": "gloo", "cuda": "nccl"}


@functools.cache
def init() -> torch.device:
    """Joins the process group that torchrun describes (if any) and returns this rank's device."""
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")  # it works without a process group
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # load_model says itself, in one line, which weights are missing
    if torch.cuda.is_available():
        torch.cuda.set_device(LOCAL_RANK)
    device = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")
    if WORLD > 1:  # the long timeout: a rank may wait for others' generation; torchrun ends the peers of a dead one
        dist.init_process_group(BACKEND[device.type], timeout=datetime.timedelta(hours=6))
    return device


def print0(*words: object) -> None:
    """Prints on rank 0, without tearing a progress bar."""
    if RANK == 0:
        tqdm.write(" ".join(map(str, words)), file=sys.stderr)


def barrier() -> None:
    if WORLD > 1:
        dist.barrier()


def wait_for(path: Path) -> None:
    """A barrier after which every rank sees a file that rank 0 wrote (network file systems lag). Raises OSError."""
    barrier()
    patience = time.time() + 60
    while not path.exists():
        if time.time() > patience:
            raise OSError(f"{path}: rank 0 wrote it, rank {RANK} cannot see it; all nodes must share the --out folder")
        time.sleep(0.1)


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks."""
    if WORLD > 1:
        dist.all_reduce(values)
    return values


def fold_in(seed: int, *numbers: int) -> int:
    """A new seed (63 bits) from a seed and numbers such as the iteration or the step."""
    digest = hashlib.blake2b(repr((seed, *numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def first_line(error: BaseException) -> str:
    """Of another library's message, which may have many lines or none."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]  # what happened on the first rank that failed
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def cli(main: Callable[[], None]) -> None:
    """Runs a script's main. A user's mistake (ValueError, OSError) is one line, not a stack trace; DEBUG=1 shows it."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; what is finished is kept, and the same command goes on from there" if RANK == 0 else 1)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if os.environ.get("DEBUG"):
            raise
        if isinstance(error, torch.OutOfMemoryError):
            error = f"{first_line(error)} Lower --micro-batch-size or --generation-batch-size; see README, how big"
        if RANK:
            time.sleep(2)  # what rank 0 says as well is said once: torchrun ends the others meanwhile
        who = f"rank {RANK}: " if RANK else ""
        print(f"{Path(sys.argv[0]).name}: error: {who}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
        os._exit(2) if WORLD > 1 else sys.exit(2)
    if WORLD > 1:
        # At once: an interpreter that is taken down with gloo's threads in it may abort, a failure to torchrun.
        barrier()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)
    if dist.is_initialized():
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------- flags
def number(low: float = -math.inf, high: float = math.inf, kind: type = float) -> Callable[[str], float]:
    """An argparse type: a finite number within [low, high]."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
            good = math.isfinite(value) and low <= value <= high
        except (ValueError, OverflowError):  # no number, or a whole one beyond any float
            good = False
        if not good:
            bounds = f" in [{low:g}, {high:g}]" if math.isfinite(high) else f" of at least {low:g}"
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name}{bounds}")
        return value

    return parse


count = number(0, kind=int)


def model_flags(p: argparse.ArgumentParser) -> None:
    """What `model_of` reads: the flags of every command that runs a model."""
    p.add_argument("--model", required=True, help="Hugging Face folder or hub name")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation")
    p.add_argument("--shard", type=count, default=0, help="hybrid sharding: replicas of N-way shards (0: one shard)")
    p.add_argument("--lock-step", action="store_true", help="generate sharded: slow, where no device holds the model")


def data_flags(p: argparse.ArgumentParser, tasks: list[str], task: str | None = None) -> None:
    """The flags that say which model reads which examples: those of the stages, of evaluate.py and of generate.py."""
    model_flags(p)
    p.add_argument("--task", required=not task, default=task, choices=tasks, help="columns, templates, lengths, hub")
    p.add_argument("--data", help="a local .jsonl/.json/.parquet file, or another hub set")
    p.add_argument("--columns", default="", help="prompt=NAME,response=NAME where the file's columns differ")
    p.add_argument("--limit", type=count, default=0, help="use only the first N rows (0: all)")
    p.add_argument("--max-prompt", type=count, default=0, help="tokens of x (0: the task's own)")
    p.add_argument("--max-response", type=count, default=0, help="tokens of y and z (0: the task's own)")


def parser(doc: str, tasks: list[str], task: str | None = None) -> argparse.ArgumentParser:
    """The flags that every stage takes. doc: the stage's docstring. task: the default of --task, if any."""
    p = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    data_flags(p, tasks, task)
    p.add_argument("--out", required=True, help="folder for the model, log.jsonl and args.json")
    p.add_argument("--max-steps", type=count, default=0, help="at most so many steps in each phase (0: no limit)")
    p.add_argument("--batch-size", type=number(1, kind=int), default=512, help="rows in the global batch (Table 5)")
    p.add_argument("--micro-batch-size", type=number(1, kind=int), default=8, help="rows in one pass of one rank")
    p.add_argument("--lr", type=number(0), default=5e-6, help="peak learning rate (Table 5)")
    p.add_argument("--warmup", type=number(0, 1), default=0.1, help="share of the steps that warm up (Table 5)")
    p.add_argument("--clip", type=number(0), default=1.0, help="largest gradient norm")
    p.add_argument("--activation-checkpointing", action="store_true", help="recompute each block in the backward")
    p.add_argument("--compile", action="store_true", help="torch.compile each block's training pass")
    p.add_argument("--seed", type=count, default=0)
    p.add_argument("--checkpoint-every", type=count, default=500, help="steps between checkpoints (0: none)")
    p.add_argument("--eval-every", type=count, default=0, help="steps between looks at held-out rows (0: none)")
    p.add_argument("--eval-data", help="those rows: a file as for --data (default: the hub set's test split)")
    p.add_argument("--eval-rows", type=number(1, kind=int), default=64, help="how many of them")
    return p


# ---------------------------------------------------------------------------------------------- model
def load_tokenizer(path: str) -> AutoTokenizer:
    """The tokenizer of a model folder or hub name. Raises OSError in one line."""
    if not path.strip():
        raise ValueError("--model is empty: give a folder or a hub name")
    local = path.count("/") > 1 or path.startswith((".", "/")) or os.path.isdir(os.path.dirname(path))
    if not os.path.isdir(path) and (local or os.path.exists(path)):  # else it is a hub name
        raise FileNotFoundError(f"--model {path}: no such folder")
    expected = ("config.json", "tokenizer.json", "tokenizer_config.json")
    if os.path.isdir(path) and not any(os.path.exists(os.path.join(path, name)) for name in expected):
        raise OSError(f"--model {path}: not a model's folder, there is no config.json in it")
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a missing or broken tokenizer shows as OSError, ValueError, TypeError or ImportError
        raise OSError(f"--model {path}: no tokenizer could be loaded ({first_line(error)})") from None


def load_model(
    path: str, dtype: str = "float32", *, shard_size: int = 0, lock_step: bool = False,
    recompute: bool = False, compile: bool = False,
) -> torch.nn.Module:  # fmt: skip
    """A causal language model on this rank's device, sharded over the ranks where there are several. Raises OSError.

    The weights are read in float32 whatever their file says (a bf16 checkpoint would silently mean bf16 Adam moments),
    by rank 0 alone: the others never hold a whole model. shard_size, lock_step: see `shard` and `inference`.
    """
    device = init()
    if shard_size and WORLD % shard_size:
        raise ValueError(f"--shard {shard_size} does not divide the {WORLD} processes")
    try:
        config = AutoConfig.from_pretrained(path)
        if "MaskedLM" in str(config.architectures):
            raise ValueError(f"{config.model_type} is a masked language model; a causal one is needed")
        whole = None
        if RANK == 0:
            how = {"output_loading_info": True, "ignore_mismatched_sizes": True}
            whole, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **how)
            wrong = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
            if wrong:  # transformers would go on with random ones
                named = f"{', '.join(wrong[:3])}{', ...' if wrong[3:] else ''}"
                raise ValueError(f"{len(wrong)} weights are missing or not of the shape in config.json: {named}")
            if info["unexpected_keys"]:
                first = min(info["unexpected_keys"])
                print0(f"{len(info['unexpected_keys'])} weights in {path} are not used, first: {first}")
    except Exception as error:
        raise OSError(f"--model {path}: could not be loaded ({first_line(error)})") from None
    model = whole
    if WORLD > 1 or dtype != "float32":
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if compile:
        in_training(model, functools.partial(torch.compile, dynamic=True))
    if recompute:  # without dropout there is no random state to keep
        plain = {"use_reentrant": False, "preserve_rng_state": False}
        in_training(model, lambda forward: functools.partial(checkpoint, forward, **plain))
    if model is whole:
        return model.eval().to(device)
    model.lock_step = lock_step
    return fill(shard(model.eval(), dtype, shard_size), whole)


def model_of(args: argparse.Namespace) -> torch.nn.Module:
    """The model that the flags of a command name."""
    training = {"recompute": "activation_checkpointing", "compile": "compile"}  # flags of the stages alone
    training = {name: getattr(args, flag, False) for name, flag in training.items()}
    return load_model(args.model, args.dtype, shard_size=args.shard, lock_step=args.lock_step, **training)


def blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The transformer blocks."""
    names = set(model._no_split_modules or [])
    return [module for module in model.modules() if type(module).__name__ in names]


def in_training(model: torch.nn.Module, wrap: Callable[[Callable], Callable]) -> None:
    """Wraps the forward of each block in passes with gradients; decoding, with its cache, keeps the plain one."""
    for block in blocks(model):

        def forward(*args: object, plain: Callable, wrapped: Callable, **kwargs: object) -> object:
            return (wrapped if torch.is_grad_enabled() else plain)(*args, **kwargs)

        block.forward = functools.partial(forward, plain=block.forward, wrapped=wrap(block.forward))


def shard(model: torch.nn.Module, dtype: str = "float32", size: int = 0) -> torch.nn.Module:
    """FSDP2: each transformer block a group, then the root, in which tied embeddings stay together.

    size: HSDP, replicas of shards of so many ranks (0: one shard over all; 1: whole replicas)."""
    size = size or WORLD
    device = init().type
    if not dist.is_initialized():  # bf16 on one device: the same mixed-precision policy, on a group of one
        dist.init_process_group(BACKEND[device], store=dist.HashStore(), rank=0, world_size=1)
    names = ("replicate", "shard")
    mesh = dist.init_device_mesh(device, (WORLD // size, size), mesh_dim_names=names)
    options = {
        "mesh": mesh if size < WORLD else mesh["shard"],
        "mp_policy": MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32),
    }
    for block in blocks(model):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def fill(model: torch.nn.Module, whole: torch.nn.Module | None) -> torch.nn.Module:
    """Gives a sharded model on the meta device the weights of rank 0's whole one."""
    model.to_empty(device=init())
    options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dcp_state.set_model_state_dict(model, whole.state_dict() if whole else {}, options=options)
    source = dict(whole.named_buffers()) if whole else {}
    for name, buffer in model.named_buffers():  # RoPE's inv_freq is in no state dict: left out, it would be garbage
        if whole:
            buffer.copy_(source[name])
        dist.broadcast(buffer, 0)
    if whole:  # what save_pretrained needs to write the folder as it was read (names, settings)
        model.generation_config = whole.generation_config
        model._weight_conversions = getattr(whole, "_weight_conversions", None)
    return model


@contextlib.contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """no_grad; and inside, the ranks of a sharded model may run different numbers of forwards.

    A forward of a sharded model is a collective: a rank that ran fewer would leave the others waiting. So each holds
    all weights meanwhile. Or, with --lock-step, they stay sharded, and a rank that is done joins in the others'
    forwards. Not between a backward and its optimiser step (the root would keep stale weights)."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    together = bool(parts) and getattr(model, "lock_step", False)
    for part in [] if together else parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()

    def busy(one: int = 1) -> int:
        """How many ranks are about to run a forward."""
        return int(all_sum(torch.tensor(one, device=model.device)))

    # before FSDP's own hook, so that the collectives come in one order on all ranks
    hook = model.register_forward_pre_hook(lambda *_: [busy()] and None, prepend=True) if together else None
    try:
        with torch.no_grad():
            yield
            if hook:
                hook.remove()
                while busy(0):
                    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)  # the root stays


def check_fits(model: torch.nn.Module, tokens: int, largest_id: int, what: str) -> None:
    """Raises ValueError where a sequence of so many tokens, or a token id, would not fit the model."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and tokens > limit:
        raise ValueError(
            f"{what} take up to {tokens} tokens, the model has {limit} positions: lower --max-prompt or --max-response"
        )
    if largest_id >= model.config.vocab_size:
        raise ValueError(
            f"{what} hold token id {largest_id}, the model's vocabulary ends at {model.config.vocab_size - 1}: "
            "model and tokenizer do not belong together"
        )


def check_rows(model: torch.nn.Module, rows: datasets.Dataset, where: str = "", max_new_tokens: int = 0) -> None:
    """`check_fits` for what a stage reads of each row: x or f(x, y), then y, y_hat, z (RAC's, or DPO's rejected one),
    z_bar or what will be generated."""
    for row in rows:
        responses = [row[name] for name in ("y", "y_hat", "z", "z_bar") if name in row]
        tokens = max(len(row["x"]), len(row.get("f", []))) + max(max_new_tokens, *map(len, responses))
        largest = max(max(ids, default=0) for ids in (row["x"], *responses))
        check_fits(model, tokens, largest, f"{where}row {row['id']}: x and y")


# ---------------------------------------------------------------------------------------------- the training loop
def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the share `warmup` of the steps, then cosine to 0 (Table 5). step counts from 0."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def batch_rows(n: int, step: int, batch_size: int, seed: int) -> list[int]:
    """Row numbers of the step-th global batch: a pure function, so that a resumed run sees the same data.

    Each epoch is a fresh permutation of the n rows; its last batch may be smaller."""
    epoch, k = divmod(step, math.ceil(n / batch_size))
    generator = torch.Generator().manual_seed(fold_in(seed, epoch))
    return torch.randperm(n, generator=generator)[k * batch_size : (k + 1) * batch_size].tolist()


def length(row: dict) -> int:
    """Tokens in all of a row's sequences."""
    return sum(len(value) for value in row.values() if isinstance(value, list))


class Run:
    """One training run: --out, its log and checkpoints, the optimiser step. Each call of `steps` is a phase."""

    def __init__(self, args: argparse.Namespace, model: torch.nn.Module, tokenizer: AutoTokenizer) -> None:
        self.args, self.model, self.tokenizer, self.out = args, model, tokenizer, Path(args.out)
        self.device = model.device
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.phase = self.total = 0  # phases begun, steps done in all of them
        self.also: dict[str, float] = {}  # what a stage wants to be in the log line of its step
        self.watch: Callable[[], dict[str, float]] | None = None  # of --eval-every: likewise, from held-out rows
        self.resume = {"phase": 0, "step": 0}
        self.stopped = self._signal = self._stepping = False
        self._log = open(self.out / "log.jsonl", "ab", buffering=0) if RANK == 0 else None
        self._load_checkpoint()
        for sig in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, self._stop)

    def _stop(self, *_: object) -> None:
        """SIGTERM, Ctrl-C: while training, all ranks stop after one step, with a checkpoint; else at once."""
        self._signal = True
        if not self._stepping:
            raise SystemExit("stopped; the same command goes on from there" if RANK == 0 else 1)

    def steps(self, rows: datasets.Dataset, epochs: float) -> Iterator[tuple[list[dict], list[list[dict]]]]:
        """Yields (rows of the global batch, this rank's micro-batches); steps when the loop asks for the next batch.

        A phase has its own AdamW and schedule, like a run of its own: --iterations 2 is two runs in a row.
        """
        args, phase = self.args, self.phase
        self.phase += 1
        steps = math.ceil(epochs * math.ceil(len(rows) / args.batch_size))
        steps = min(steps, args.max_steps) if args.max_steps else steps
        if phase < self.resume["phase"] or not steps:  # done before the interruption, or nothing to do
            return
        self.optimizer = torch.optim.AdamW(self.params, lr=args.lr, weight_decay=0.0, fused=True)
        first = self.resume["step"] if phase == self.resume["phase"] else 0
        if first:
            self._load_optimizer()
        self._stepping = True
        title = f"{Path(sys.argv[0]).stem} {self.phase}"
        with tqdm(total=steps, initial=first, desc=title, disable=RANK != 0) as bar:
            for step in range(first, steps):
                started = time.time()
                picked = batch_rows(len(rows), step, args.batch_size, fold_in(args.seed, phase))
                batch = sorted((rows[i] for i in picked), key=length)  # little padding in a micro-batch
                micro_batches = self._micro_batches(batch)
                self._left, self._terms = len(micro_batches), {}
                yield batch, micro_batches
                record = self._update(learning_rate(step, steps, args.lr, args.warmup), batch)
                seconds = time.time() - started
                tokens = sum(len(row["x"]) + len(row["y"]) for row in batch)
                record |= {"tokens": tokens, "seconds": round(seconds, 4), **self.also}
                last = step + 1 == steps
                look = self.watch and (last or (step + 1) % args.eval_every == 0)
                held = self.watch() if look else {}
                self.total += 1
                self._write_log({"phase": self.phase, "step": step + 1, **record, **held})
                shown = {name: f"{value:.3f}" for name, value in record.items() if name in ("loss", *self._terms)}
                shown |= {name: f"{value:.3f}" for name, value in held.items()}
                bar.set_postfix(shown | {"tok/s": f"{tokens / seconds:.0f}"})
                bar.update()
                if self.stopped or (args.checkpoint_every and (last or (step + 1) % args.checkpoint_every == 0)):
                    self._save_checkpoint({"phase": phase + last, "step": 0 if last else step + 1})
                if self.stopped:
                    break
        self._stepping = False
        if self.stopped:
            raise SystemExit(f"stopped after step {step + 1}; the same command goes on from there" if RANK == 0 else 1)

    def _micro_batches(self, batch: list[dict]) -> list[list[dict]]:
        """This rank's share of a global batch. Ranks with fewer rows get some with empty sequences, so that all take
        part in every pass."""
        share, size = math.ceil(len(batch) / WORLD), self.args.micro_batch_size
        empty = {key: value if key in ("id", "x") else [] for key, value in batch[0].items()}
        mine = batch[RANK::WORLD]
        mine += [empty] * (share - len(mine))
        return [mine[i : i + size] for i in range(0, share, size)]

    def _write_log(self, record: dict) -> None:
        if self._log:
            try:
                self._log.write(json.dumps(record).encode() + b"\n")
            except OSError as error:
                raise OSError(f"{self.out / 'log.jsonl'} cannot be written ({error.strerror})") from None

    def offline(self, name: str, make: Callable[[list[dict]], list[dict]], rows: datasets.Dataset) -> datasets.Dataset:
        """The data set --out/name that make(rows) gives by the current weights; see `offline`. For the next phase."""
        begun = (self.phase, 0) < (self.resume["phase"], self.resume["step"])
        if begun and not (self.out / name).exists():
            raise ValueError(f"{self.out / name} is gone, and cannot be made again by weights that have moved on")
        return offline(self.out / name, make, rows, self.model, self.tokenizer)

    def backward(self, **terms: torch.Tensor) -> None:
        """Adds the gradients of the sum of the terms, each this rank's share of a global mean, for one micro-batch."""
        self._left -= 1
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(self._left == 0)  # reduce once, with the step's last micro-batch
        (sum(terms.values()) * WORLD).backward()
        for name, value in terms.items():
            self._terms[name] = self._terms.get(name, 0) + value.detach()

    def _update(self, lr: float, batch: list[dict]) -> dict[str, float]:
        """Clips, steps and returns what to log. Raises ValueError at a loss or gradient that is not finite."""
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.args.clip or math.inf)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        mine = [*map(float, self._terms.values())]
        bad = [float(rank == RANK and not math.isfinite(sum(mine))) for rank in range(WORLD)]
        stopped, *sums = all_sum(torch.tensor([float(self._signal), *bad, *mine], device=self.device)).tolist()
        self.stopped = stopped > 0  # agreed: all ranks stop at the same step
        bad, terms = sums[:WORLD], dict(zip(self._terms, sums[WORLD:], strict=True))
        if not math.isfinite(norm + sum(terms.values())):
            ranks = [rank for rank in range(WORLD) if bad[rank]] or range(WORLD)  # all, where only the gradient is bad
            where = "; ".join(f"rank {r}, rows {[row.get('id') for row in batch[r::WORLD]]}" for r in ranks)
            raise ValueError(
                f"step {self.total + 1}: loss {terms} or gradient norm {norm} is not finite ({where}); "
                "the last checkpoint is kept"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": sum(terms.values()), **terms, "grad_norm": norm, "lr": lr}

    # ------------------------------------------------------------------------------------------ checkpoints
    def _save_checkpoint(self, where: dict[str, int]) -> None:
        """Model, optimiser and position, under a temporary name and then renamed; the last two are kept.

        Each rank leaves the checksums of its files. Where the disk is full, the older checkpoints stay and the run goes
        on."""
        folder = self.out / "checkpoints" / f"{where['phase']:03d}-{where['step']:08d}"
        partial = folder.with_name(folder.name + ".partial")
        if RANK == 0:
            for left in folder.parent.glob("*.partial"):
                shutil.rmtree(left, ignore_errors=True)
        barrier()
        model, optimizer = dcp_state.get_state_dict(self.model, self.optimizer)
        problem = ""
        try:
            dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=partial)
            if RANK == 0:
                write_json(partial / "state.json", {**where, "total": self.total, "ranks": WORLD})
            own = [f for f in partial.iterdir() if f.name.startswith(f"__{RANK}_") or not RANK and f.name[:2] != "__"]
            write_json(partial / f"checksums-{RANK}.json", {f.name: checksum(f) for f in own})
        except (OSError, dcp.api.CheckpointException) as error:
            problem = first_line(error)
        if all_sum(torch.tensor(float(bool(problem)), device=self.device)):
            if RANK == 0:
                shutil.rmtree(partial, ignore_errors=True)
            problem = problem or "on another rank"
            print0(f"WARNING: no checkpoint at step {self.total}: {problem}; the older ones are kept, the run goes on")
        elif RANK == 0:
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            for old in self._checkpoints()[:-2]:
                shutil.rmtree(old)
        barrier()

    def _checkpoints(self) -> list[Path]:
        return sorted(folder for folder in (self.out / "checkpoints").glob("*-*") if not folder.suffix)

    def _load_checkpoint(self) -> None:
        """The newest that is whole, if any: position and weights now, the optimiser when its phase begins."""
        folders = self._checkpoints()
        barrier()  # all have looked before any is set aside
        while folders:
            self._from = folders.pop()
            problem = damage(self._from)
            if not all_sum(torch.tensor(float(bool(problem)), device=self.device)):
                self.resume = json.loads((self._from / "state.json").read_text())
                self.total = self.resume["total"]
                model = dcp_state.get_model_state_dict(self.model)
                dcp.load({"model": model}, checkpoint_id=self._from)
                dcp_state.set_model_state_dict(self.model, model)
                print0(f"goes on from {self._from} (step {self.total})")
                break
            before = f"goes back to {folders[-1].name}" if folders else "begins anew"
            print0(f"WARNING: checkpoint {self._from} is damaged ({problem or 'see the other ranks'}); {before}")
            if RANK == 0:
                aside = self._from.with_name(self._from.name + ".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                self._from.rename(aside)
        self._cut_log()

    def _load_optimizer(self) -> None:
        optimizer = dcp_state.get_optimizer_state_dict(self.model, self.optimizer)
        dcp.load({"optimizer": optimizer}, checkpoint_id=self._from)
        dcp_state.set_optimizer_state_dict(self.model, self.optimizer, optimizer)

    def _cut_log(self) -> None:
        """Drops the log lines of steps that will be done again."""
        if self._log:
            lines = (self.out / "log.jsonl").read_bytes().splitlines(keepends=True)[: self.total]
            self._log.truncate(0)
            self._log.write(b"".join(lines))

    def finish(self) -> None:
        """Saves a Hugging Face folder and removes the checkpoints. config.json, moved in last, marks the end."""
        save_model(self.model, self.tokenizer, self.out)
        barrier()
        if RANK == 0:
            shutil.rmtree(self.out / "checkpoints", ignore_errors=True)
        print0(f"saved {self.out}")


def start(
    args: argparse.Namespace,
    load_examples: Callable[[argparse.Namespace, AutoTokenizer], tuple[datasets.Dataset, list[str]]],
    max_new_tokens: int = 0,
    where: str = "",
) -> tuple[Run, datasets.Dataset]:
    """Opens --out, then reads tokenizer, examples and model: a mistake in the data shows before the weights are read.

    max_new_tokens: of what the stage will generate after x, and read after f(x, y); where: how the message on a row
    that does not fit the model begins. Ends the program where the same command has finished before."""
    init()
    if not open_out(args):
        raise SystemExit(0)
    tokenizer = load_tokenizer(args.model)
    examples, notes = load_examples(args, tokenizer)
    for note in notes:
        print0(note)
    if len(examples) < WORLD:
        raise ValueError(f"{len(examples)} examples for {WORLD} processes: use fewer processes")
    model = model_of(args)
    check_rows(model, examples, where, max_new_tokens)
    size = min(args.batch_size, len(examples))
    accumulation = math.ceil(math.ceil(size / WORLD) / args.micro_batch_size)
    print0(f"batch {size} = {WORLD} processes x {accumulation} micro-batches of up to {args.micro_batch_size} rows")
    run = Run(args, model, tokenizer)
    if args.eval_every:
        import evaluate  # which imports this file

        run.watch = evaluate.watch(run)
    return run, examples


def start_with_pairs(
    args: argparse.Namespace, load_examples: Callable, pair: tuple[str, str], max_new_tokens: int = 0
) -> tuple[Run, datasets.Dataset, datasets.Dataset | None]:
    """As `start`; and the rows of --pairs. Where no phase learns from other rows, they are the examples: --data is not
    read then."""
    if args.pairs is None:
        return *start(args, load_examples, max_new_tokens), None
    where = f"--pairs {args.pairs}, "
    if args.iterations == 1 and not args.sft_epochs:

        def load_pairs(args: argparse.Namespace, tokenizer: AutoTokenizer) -> tuple[datasets.Dataset, list[str]]:
            rows = read_pairs(args.pairs, pair, tokenizer)
            return rows, [f"{len(rows)} rows of --pairs {args.pairs}; --data, its limit and its lengths are not used"]

        run, pairs = start(args, load_pairs, where=where)
        return run, pairs, pairs
    run, examples = start(args, load_examples, max_new_tokens)
    pairs = read_pairs(args.pairs, pair, run.tokenizer)
    check_rows(run.model, pairs, where)
    return run, examples, pairs


# ---------------------------------------------------------------------------------------------- folders
def write_json(path: Path, value: object) -> None:
    """Writes under a temporary name and renames, so that a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(value, indent=2) + "\n")
        partial.rename(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror})") from None


# Flags that change no result, but for rounding: the same run may go on with others.
FREE = ("out", "checkpoint_every", "micro_batch_size", "generation_batch_size", "shard", "lock_step", "compile",
        "activation_checkpointing", "share_prompt", "eval_every", "eval_data", "eval_rows")  # fmt: skip


def given(args: argparse.Namespace) -> dict[str, object]:
    """What a command was given: its script, its flags, and for the files and folders among them what they hold."""
    flags = {key: value for key, value in vars(args).items() if key not in FREE}
    paths = {key: Path(flags[key]) for key in ("model", "data", "pairs") if flags.get(key)}
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


def checksum(path: Path, crc: int = 0, parts: int = 0) -> int:
    """CRC-32 of a file, going on from crc; or of so many parts of 1 MiB, spread over it, where it is larger."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start in range(0, size, max(1 << 20, size // parts if parts else 0)):
            file.seek(start)
            crc = zlib.crc32(file.read(1 << 20), crc)
    return crc


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files, "" if nothing. Each rank reads its share of them."""
    try:
        ranks = json.loads((checkpoint / "state.json").read_text())["ranks"]
        sums: dict[str, int] = {}
        for rank in range(ranks):
            sums |= json.loads((checkpoint / f"checksums-{rank}.json").read_text())
        changed = [name for name in sorted(sums)[RANK::WORLD] if checksum(checkpoint / name) != sums[name]]
    except (OSError, ValueError, KeyError) as error:
        return first_line(error)
    return f"{changed[0]} has changed" if changed else ""


def save_model(model: torch.nn.Module, tokenizer: AutoTokenizer, out: Path) -> None:
    """A Hugging Face folder of float32 weights, written aside and moved in, config.json last. Called by all ranks."""
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


def fingerprint(tokenizer: AutoTokenizer) -> str:
    """Identifies a tokenizer by its vocabulary, so that token ids are not read with another one."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def offline(
    folder: Path,
    make: Callable[[list[dict]], list[dict]],
    rows: datasets.Dataset,
    model: torch.nn.Module,
    tokenizer: AutoTokenizer,
    chunk: int = 128,
) -> datasets.Dataset:
    """The rows that make(list of rows) returns, in order, as a data set in `folder`.

    Chunks of rows are divided over the ranks and each is kept as soon as it is done, so an interrupted command goes on
    where it stopped, at any number of ranks. make runs under `inference`.
    """
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
            datasets.Dataset.from_list([row for part in done for row in part["rows"]]).save_to_disk(partial)
            seconds = sum(part["seconds"] for part in done) / min(WORLD, len(done))  # of one rank
            write_json(partial / "source.json", {"tokenizer": fingerprint(tokenizer), "seconds": seconds})
            partial.rename(folder)
        wait_for(folder / "dataset_info.json")
    if RANK == 0:
        shutil.rmtree(parts, ignore_errors=True)
    return datasets.load_from_disk(str(folder))


def read_pairs(folder: str, pair: tuple[str, str], tokenizer: AutoTokenizer) -> datasets.Dataset:
    """A D_s or D_r made before, here or by another program. pair: the two columns that must be of equal length.

    Raises ValueError, with the folder and the column or row, where the data set does not fit."""
    if not (Path(folder) / "dataset_info.json").exists():
        raise ValueError(f"--pairs {folder}: not a folder written by datasets' save_to_disk")
    source = Path(folder) / "source.json"
    try:
        made_with = json.loads(source.read_text())["tokenizer"] if source.exists() else None
        data = datasets.load_from_disk(folder)
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
