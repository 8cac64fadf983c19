"""The training loop of every stage: the optimiser step, its log and its checkpoints, over any number of ranks.

A stage reads:

    for step in run.steps(rows, args.epochs):                       # a phase, with its own AdamW and schedule
        n = step.tokens("y")                                        # of the global batch
        for rows in step.micro_batches:                             # this rank's share
            run.backward(sft=loss_sum(rows) / n)                    # gradients add up
        run.update()                                                # clip, AdamW, schedule, log, checkpoint
    run.finish()                                                    # a Hugging Face folder in --out

Exact normalisation: every rank sees the lengths of the whole global batch, so it divides its sums by the *global*
counts, and no rank, micro-batch or ragged length weighs more than another. The rows themselves it reads for its share.

A step depends on nothing but the weights, the batch and the seed: there is no dropout, the batch is a function of
(seed, epoch, step), and every draw has a seed of its own. So a checkpoint needs weights, moments and a position,
and a resumed run is bitwise the undisturbed one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

import folders
from batches import length
from core import arrow, track
from core.ranks import RANK, WORLD, all_sum, barrier, first_line, fold_in, print0
from core.rows import write_json

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


# ---------------------------------------------------------------------------------------------- what a step is
def learning_rate(step: int, steps: int, peak: float, warmup: float, schedule: str = "cosine") -> float:
    """Linear warm-up over the share `warmup` of the steps, then cosine to 0 (Table 5), or linear to 0, or constant.
    step counts from 0."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    return peak * (steps - step) / max(1, steps - warm) if schedule == "linear" else peak


def adamw(params: list[torch.nn.Parameter], args: argparse.Namespace) -> torch.optim.AdamW:
    """The optimiser of a phase. Weight decay is of matrices, embeddings included, and not of norms and biases."""
    groups: list = params
    if args.weight_decay:
        groups = [{"params": [p for p in params if p.ndim >= 2]}]
        groups.append({"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0})
        groups = [group for group in groups if group["params"]]
    betas = tuple(args.adam_betas)
    return torch.optim.AdamW(
        groups, lr=args.lr, betas=betas, eps=args.adam_eps, weight_decay=args.weight_decay, fused=True
    )


def batch_rows(n: int, step: int, batch_size: int, seed: int) -> list[int]:
    """Row numbers of the step-th global batch: a pure function, so that a resumed run sees the same data.

    Each epoch is a fresh permutation of the n rows; its last batch may be smaller."""
    epoch, k = divmod(step, math.ceil(n / batch_size))
    generator = torch.Generator().manual_seed(fold_in(seed, epoch))
    return torch.randperm(n, generator=generator)[k * batch_size : (k + 1) * batch_size].tolist()


@dataclasses.dataclass
class Step:
    """One step of the optimiser."""

    rows: Sequence[dict]  # of the global batch, shortest first, each made when asked for
    ids: list[int]  # of these rows
    lengths: dict[str, np.ndarray]  # of their lists, by column
    micro_batches: list[list[dict]]  # this rank's share of the rows, up to --micro-batch-size of them in one pass
    lr: float
    number: int  # within the phase, from 1
    last: bool  # of the phase
    pause: bool  # that, or new rows are made behind it: a checkpoint is due

    def tokens(self, column: str) -> int:
        """Tokens of a column in the global batch: what the sums of all ranks and micro-batches are divided by."""
        return int(self.lengths[column].sum())


@dataclasses.dataclass
class Refresh:
    """Rows of a phase that the current model makes anew every so many steps, under one optimiser and one schedule.

    make(some, k) is the k-th D, of those of `rows` that the next `every` steps read, in the order of `rows`: so all of
    them together cost no more than one D of all rows does for each epoch."""

    rows: Dataset  # (x, y)
    every: int
    make: Callable[[Dataset, int], Dataset]


# ---------------------------------------------------------------------------------------------- the loop
class Run:
    """One training run: --out, its log and checkpoints, the optimiser step. Each call of `steps` is a phase."""

    def __init__(self, args: argparse.Namespace, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.args, self.model, self.tokenizer, self.out = args, model, tokenizer, Path(args.out)
        self.device = model.device
        learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.params = [*learnt.values()]
        # of what a checkpoint holds: with LoRA the adapter alone, the rest stays as --model has it
        self.names = learnt.keys() if len(learnt) < sum(1 for _ in model.parameters()) else None
        self.phase = self.total = 0  # phases begun, steps done in all of them
        self.watch: Callable[[], dict[str, float]] | None = None  # of --eval-every: measures held-out rows
        self.samples: Callable[[], list[dict[str, str]]] | None = None  # ... and shows what is said to some of them
        self.label: Callable | None = None  # rac.rac_labels, where the stage has labels: of these samples
        self.resume = {"phase": 0, "step": 0}
        self._place = (0, 0)  # phase and step that the weights have reached where rows are made
        self.stopped = self._signal = self._stepping = False
        self._step: Step | None = None
        self._log = open(self.out / "log.jsonl", "ab", buffering=0) if RANK == 0 else None
        self._load_checkpoint()
        self._track = self._untrack = None
        if args.track and RANK == 0:
            self._track, self._untrack = track.tracker(args.track, self.out, vars(args), self.total)
        for sig in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, self._stop)

    def _stop(self, *_: object) -> None:
        """SIGTERM, Ctrl-C: while training, all ranks stop after one step, with a checkpoint; else at once."""
        self._signal = True
        if not self._stepping:
            kept = self.args.checkpoint_every or not self.total
            then = "goes on from there" if kept else "trains anew: there is no checkpoint (--checkpoint-every 0)"
            raise SystemExit(f"stopped; the same command {then}" if RANK == 0 else 1)

    def steps(
        self, rows: Dataset | Refresh, epochs: float, spread: Callable[[dict], list[dict]] | None = None
    ) -> Iterator[Step]:
        """The steps of one phase over `rows`; each is to end with `update`. spread: the rows that a step reads for one.

        A phase has its own AdamW and schedule, like a run of its own: --iterations 2 is two runs in a row. Rows that
        are a `Refresh` change within the phase; which of them a step reads is the same as without.
        """
        args, phase = self.args, self.phase
        self.phase += 1
        fresh = rows if isinstance(rows, Refresh) else None
        n = len(fresh.rows if fresh else rows)
        steps = math.ceil(round(epochs * math.ceil(n / args.batch_size), 6))  # 1.1 * 50 is a little over 55
        steps = min(steps, args.max_steps) if args.max_steps else steps
        self._place = (self.phase, 0)
        if phase < self.resume["phase"] or not steps:  # done before the interruption, or nothing to do
            return
        self.optimizer = adamw(self.params, args)
        first = self.resume["step"] if phase == self.resume["phase"] else 0
        if first:
            self._load_optimizer()

        def picked(k: int) -> np.ndarray:
            return np.array(batch_rows(n, k, args.batch_size, fold_in(args.seed, phase)))

        title = f"{Path(sys.argv[0]).stem} {self.phase}"
        with tqdm(total=steps, initial=first, desc=title, disable=RANK != 0) as self._bar:
            for k in range(first, steps):
                if k == first or fresh and k % fresh.every == 0:
                    read = np.arange(n)  # row i of the phase is row read.searchsorted(i) of `rows`
                    if fresh:
                        begins = k - k % fresh.every  # the step before which they are made
                        self._place, ends = (phase, begins), min(begins + fresh.every, steps)
                        read = np.unique(np.concatenate([picked(j) for j in range(begins, ends)]))
                        rows = self._fresh(fresh, read, begins // fresh.every + 1)
                    self._stepping, rows = True, arrow.Rows(rows)
                    tokens = rows.tokens()
                self._started = time.time()
                batch, ids, lengths = self._batch(rows, tokens, read.searchsorted(picked(k)), spread)
                lr = learning_rate(k, steps, args.lr, args.warmup, args.lr_schedule)
                mine, last = self._micro_batches(batch), k + 1 == steps
                pause = last or bool(fresh) and (k + 1) % fresh.every == 0
                self._step = Step(batch, ids, lengths, mine, lr, k + 1, last, pause)
                self._left, self._terms = len(self._step.micro_batches), {}
                yield self._step
                if self._step:
                    raise RuntimeError("the loop over run.steps() must end with run.update()")
                if self.stopped:
                    break
        self._stepping, self._place = False, (self.phase, 0)
        if self.stopped:
            raise SystemExit(f"stopped after step {k + 1}; the same command goes on from there" if RANK == 0 else 1)

    def _fresh(self, fresh: Refresh, read: np.ndarray, number: int) -> Dataset:
        """The D of that number of a `Refresh`. A signal meanwhile ends the run at once: a checkpoint is there."""
        self._stepping = False
        if self._signal:
            self._stop()
        made = fresh.make(fresh.rows if len(read) == len(fresh.rows) else fresh.rows.select(read.tolist()), number)
        if len(made) != len(read):
            raise RuntimeError(f"a D of {len(made)} rows was made of {len(read)}")
        return made

    @staticmethod
    def _batch(
        rows: arrow.Rows, tokens: np.ndarray, picked: np.ndarray, spread: Callable[[dict], list[dict]] | None
    ) -> tuple[Sequence[dict], list[int], dict[str, np.ndarray]]:
        """The rows of a global batch, their ids and the lengths of their lists; by length, so that there is little
        padding in a micro-batch."""
        if spread is None:
            picked = picked[np.argsort(tokens[picked], kind="stable")]
            lengths = {name: found[picked] for name, found in rows.lengths.items()}
            return arrow.Picked(rows, picked.tolist()), rows.pick("id", picked), lengths
        batch = sorted((part for i in picked.tolist() for part in spread(rows[i])), key=length)
        lists = [name for name, value in batch[0].items() if isinstance(value, list)]
        lengths = {name: np.array([len(row[name]) for row in batch]) for name in lists}
        return batch, [row["id"] for row in batch], lengths

    def _micro_batches(self, batch: Sequence[dict]) -> list[list[dict]]:
        """This rank's share of a global batch. Ranks with fewer rows get some with empty sequences, so that all take
        part in every pass: a forward of a sharded model waits for all of them."""
        share, size = math.ceil(len(batch) / WORLD), self.args.micro_batch_size
        mine = [batch[i] for i in range(RANK, len(batch), WORLD)]
        if len(mine) < share:
            empty = {key: value if key in ("id", "x") else [] for key, value in batch[0].items()}
            mine += [empty] * (share - len(mine))
        return [mine[i : i + size] for i in range(0, share, size)]

    def backward(self, **terms: torch.Tensor) -> None:
        """Adds the gradients of the sum of the terms, each this rank's share of a global mean, for one micro-batch."""
        self._left -= 1
        if hasattr(self.model, "set_requires_gradient_sync"):  # a sharded model (FSDPModule)
            # Gradients add up on the rank, and are reduced once, with the step's last micro-batch. Also where that one
            # has no token to learn: the reduction is a collective, and must come in the same pass on every rank.
            self.model.set_requires_gradient_sync(self._left == 0)
        # FSDP averages gradients over the ranks, and each term is a share of a *sum* over them: hence WORLD. (It has a
        # set_gradient_divide_factor for this, which gloo does not know.)
        (sum(terms.values()) * WORLD).backward()
        for name, value in terms.items():
            self._terms[name] = self._terms.get(name, 0) + value.detach()

    def update(self, **also: float) -> None:
        """Clips the gradients, takes the optimiser's step at the schedule's rate, writes a line to the log (with what
        the stage has to say: also) and, where one is due, a checkpoint. Raises ValueError at a loss or gradient that is
        not finite, before the weights are touched; and at such weights, before they are kept or drawn with."""
        step, args = self._step, self.args
        norm = torch.nn.utils.clip_grad_norm_(self.params, args.clip or math.inf)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # of sharded gradients: a DTensor
        terms = self._agree(norm, step)
        for group in self.optimizer.param_groups:
            group["lr"] = step.lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        due = args.checkpoint_every and (step.pause or step.number % args.checkpoint_every == 0)
        if self.stopped or due or step.pause:
            self._check_weights()

        seconds = time.time() - self._started
        tokens = step.tokens("x") + step.tokens("y")
        record = {"loss": sum(terms.values()), **terms, "grad_norm": norm, "lr": step.lr}
        record |= {"tokens": tokens, "seconds": round(seconds, 4), **also}
        look = self.watch and (step.last or step.number % args.eval_every == 0)
        held = self.watch() if look else {}
        said = {"samples": self.samples()} if look and self.samples else {}
        self.total += 1
        record |= held
        self._write_log({"phase": self.phase, "step": step.number, **record, **said})
        if self._track:
            self._track(self.total, {"phase": self.phase, **record, **said})
        shown = {name: f"{record[name]:.3f}" for name in ("loss", *terms)}
        shown |= {name: f"{value:.3f}" for name, value in held.items()}
        self._bar.set_postfix(shown | {"tok/s": f"{tokens / seconds:.0f}"})
        self._bar.update()
        if self.stopped or due:
            after = {"phase": self.phase, "step": 0} if step.last else {"phase": self.phase - 1, "step": step.number}
            self._save_checkpoint(after)
        self._step = None

    def _agree(self, norm: float, step: Step) -> dict[str, float]:
        """The terms summed over the ranks. All learn here, in one collective, whether one of them got a signal, so that
        all stop after the same step, and which of them saw a loss that is not finite."""
        mine = [*map(float, self._terms.values())]
        bad = [float(rank == RANK and not math.isfinite(sum(mine))) for rank in range(WORLD)]
        stopped, *sums = all_sum(torch.tensor([float(self._signal), *bad, *mine], device=self.device)).tolist()
        self.stopped = stopped > 0
        bad, terms = sums[:WORLD], dict(zip(self._terms, sums[WORLD:], strict=True))
        if not math.isfinite(norm + sum(terms.values())):
            ranks = [rank for rank in range(WORLD) if bad[rank]] or range(WORLD)  # all, where only the gradient is bad
            where = "; ".join(f"rank {r}, rows {step.ids[r::WORLD]}" for r in ranks)
            self._give_up(f"loss {terms} or gradient norm {norm} is not finite ({where})")
        return terms

    def _check_weights(self) -> None:
        """A step may leave weights that are not finite. The next loss would show it, but what is kept or drawn before
        that would be lost."""
        mine = [p.detach().to_local() if hasattr(p, "to_local") else p.detach() for p in self.params]
        bad = [float(not p.isfinite().all()) for p in mine]
        if all_sum(torch.tensor(sum(bad), device=self.device)):
            lr = self._step.lr
            self._give_up(f"the weights are not finite after it, at a learning rate of {lr:g}: lower --lr")

    def _give_up(self, why: str) -> None:
        self._bar.close()  # so that the message has a line of its own
        kept = "the last checkpoint is kept" if self._checkpoints() else "there is no checkpoint"
        raise ValueError(f"step {self.total + 1}: {why}; {kept}")

    def _write_log(self, record: dict) -> None:
        if self._log:
            try:
                self._log.write(json.dumps(record).encode() + b"\n")
            except OSError as error:
                raise OSError(f"{self.out / 'log.jsonl'} cannot be written ({error.strerror})") from None

    @property
    def moved_on(self) -> bool:
        """Have the weights been trained beyond this place, as in a run that goes on?"""
        return self._place < (self.resume["phase"], self.resume["step"])

    def offline(
        self, name: str, make: Callable[[list[dict]], list[dict]] | None, rows: Dataset, **column: Callable
    ) -> Dataset:
        """The data set --out/name, by the current weights, of the rows with a column drawn and what make adds; see
        folders.offline.

        Raises ValueError where it is gone, and the weights that made it have moved on."""
        if self._signal:  # it came behind the last step of a phase
            self._stop()
        if self.moved_on and not (self.out / name).exists():
            raise ValueError(f"{self.out / name} is gone, and cannot be made again by weights that have moved on")
        return folders.offline(self.out / name, make, rows, self.model, self.tokenizer, **column)

    def finish(self) -> None:
        """Saves a Hugging Face folder and removes the checkpoints. config.json, moved in last, marks the end."""
        folders.save_model(self.model, self.tokenizer, self.out, self.args.save_dtype)
        barrier()
        if RANK == 0:
            shutil.rmtree(self.out / "checkpoints", ignore_errors=True)
        if self._untrack:
            self._untrack()
        print0(f"saved {self.out}")

    # ------------------------------------------------------------------------------------------ checkpoints
    def _save_checkpoint(self, where: dict[str, int]) -> None:
        """Model, optimiser and position, under a temporary name and then renamed; the last two are kept.

        Each rank leaves the checksums of its files. Where the disk is full, the older checkpoints stay and the run goes
        on."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint import state_dict as dcp_state

        folder = self.out / "checkpoints" / f"{where['phase']:03d}-{where['step']:08d}"
        partial = folder.with_name(folder.name + ".partial")
        if RANK == 0:
            for left in folder.parent.glob("*.partial"):
                shutil.rmtree(left, ignore_errors=True)
        barrier()
        # each rank's own pieces: nothing is gathered, and dcp.load cuts them anew for another number of ranks
        model, optimizer = dcp_state.get_state_dict(self.model, self.optimizer)
        model = self._kept(model)
        problem = ""
        try:
            dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=partial)
            if RANK == 0:
                write_json(partial / "state.json", {**where, "total": self.total, "ranks": WORLD})
            own = [f for f in partial.iterdir() if f.name.startswith(f"__{RANK}_") or not RANK and f.name[:2] != "__"]
            write_json(partial / f"checksums-{RANK}.json", {f.name: folders.checksum(f) for f in own})
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
        found = self._checkpoints()
        barrier()  # all have looked before any is set aside
        while found:
            self._from = found.pop()
            problem = damage(self._from)
            if not all_sum(torch.tensor(float(bool(problem)), device=self.device)):
                self.resume = json.loads((self._from / "state.json").read_text())
                self.total = self.resume["total"]
                self._load_weights()
                print0(f"goes on from {self._from} (step {self.total})")
                break
            before = f"goes back to {found[-1].name}" if found else "begins anew"
            print0(f"WARNING: checkpoint {self._from} is damaged ({problem or 'see the other ranks'}); {before}")
            if RANK == 0:
                aside = self._from.with_name(self._from.name + ".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                self._from.rename(aside)
        self._cut_log()

    def _load_weights(self) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint import state_dict as dcp_state

        model = self._kept(dcp_state.get_model_state_dict(self.model))  # this rank's pieces, to be read into
        dcp.load({"model": model}, checkpoint_id=self._from)
        options = dcp_state.StateDictOptions(strict=self.names is None)
        dcp_state.set_model_state_dict(self.model, model, options=options)

    def _kept(self, model: dict) -> dict:
        """What of the model's state dict a checkpoint holds."""
        return model if self.names is None else {name: model[name] for name in self.names}

    def _load_optimizer(self) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint import state_dict as dcp_state

        optimizer = dcp_state.get_optimizer_state_dict(self.model, self.optimizer)
        dcp.load({"optimizer": optimizer}, checkpoint_id=self._from)
        dcp_state.set_optimizer_state_dict(self.model, self.optimizer, optimizer)

    def _cut_log(self) -> None:
        """Drops the log lines of steps that will be done again. The others stay untouched: a kill cannot lose them."""
        if self._log:
            lines = (self.out / "log.jsonl").read_bytes().splitlines(keepends=True)[: self.total]
            self._log.truncate(sum(map(len, lines)))


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files, "" if nothing. Each rank reads its share of them."""
    try:
        ranks = json.loads((checkpoint / "state.json").read_text())["ranks"]
        sums: dict[str, int] = {}
        for rank in range(ranks):
            sums |= json.loads((checkpoint / f"checksums-{rank}.json").read_text())
        changed = [name for name in sorted(sums)[RANK::WORLD] if folders.checksum(checkpoint / name) != sums[name]]
    except (OSError, ValueError, KeyError) as error:
        return first_line(error)
    return f"{changed[0]} has changed" if changed else ""
