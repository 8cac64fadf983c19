"""Best-of-N-aware fine-tuning (BoN): for a model that will be sampled N times and filtered by a verifier.

    torchrun --nproc-per-node 8 bon.py --model runs/sft --task math --out runs/bon --n 16 --best-of 4
    python bon.py --model runs/sft --task gsm8k --data train.jsonl --out runs/rft --best-of 1       # rejection sampling
    python bon.py ... --pairs runs/bon/D_bon_1 --best-of 8                  # the same samples, weighed for another N
    python bon.py ... --dco --best-of 4                                     # DCO: no samples

The problem is that of Chow et al. (Inference-Aware Fine-Tuning for Best-of-N Sampling, arXiv 2412.15287): SFT raises
pass@1, and may lower the chance that one of N samples is right. Let p(x) be the chance that one sample is wrong, and
s(z) = grad log pi(z|x). The verifier is the checker of answers, so the best of N is right with probability J:

    J = E_x[1 - p(x)^N]      grad J = E_x[N p^(N-1) (1 - p) E[s(z) | z is right]]                    by the chain rule
    w_i = N C(n - c, N - 1) / C(n - 1, N - 1) where z_i is right, else 0                      PKPO 2505.15201, Eq. 33
    E[1/n sum_i w_i s(z_i)] = grad J          n >= N samples of a prompt, c of them right: no bias

C(n - c, N - 1) / C(n - 1, N - 1) is the share of draws of N - 1 others that are all wrong: a right sample counts where
it is needed, so hard prompts weigh more. N = 1 is rejection-sampling fine-tuning; N = n learns from a sample only where
no other one is right (best minus second best, 2503.19595). An example with n = 4, N = 2:

    x = 3 + 4 =      y = 7 . EOS           z_1 = 7 . EOS    right    2 C(2, 1) / C(3, 1) = 4/3
                                           z_2 = 8 . EOS    wrong    0
                                           z_3 = 7 . EOS    right    4/3, read with z_1 as one row of 8/3 / n
                                           z_4 = 9 EOS      wrong    0

Each iteration writes D_bon to OUT/D_bon_1, ... (a `datasets` folder, a row a prompt: id, x, y, and lists of the n
samples z, of their answers, right, weight; and c); --pairs reads one. --epochs 0 only draws. bon_options.py has what is
off by default: the paper's own weights, and those for a verifier's score that is not the reward (--weights, --score).

Departures and decisions
- Chow et al. draw in every step; here samples are drawn offline, once an iteration, and J_SFT of y is learnt beside
  them (--sft-weight). The unbiased weights are PKPO's: the paper's factor with p estimated from the same n samples
  is biased (5.1 times too large at p = .3 with n = 16, N = 8).
- The sum over prompts of 1/n sum_i w_i log pi(z_i|x) is divided by the tokens of a sample, in the mean over a prompt's
  n and summed over prompts; a wrong one adds 0 and still counts, as a masked token in Eq. 7. So where little is right
  little is learnt beside y. J_SFT is a mean over the tokens of y.
- A batch is --batch-size prompts, each with all its right samples, equal ones once; J_SFT counts y once a prompt. The
  rows of a pass (--micro-batch-size) are different samples.
- Weights are for samples of the model itself: --temperature 1, and no top-k. Not built: see docs/bon.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

import bon_options
import data
import engine_z
import generate
import stage
from batches import losses
from core.chat import ends, response_text
from core.flags import count, group, number, positive
from core.ranks import cli, fold_in
from data import Dataset
from ddp_utils import Run
from dpo import log_probs
from evaluate import CHECKS
from sft import sft_loss, sft_phase


def bon_weights(right: torch.Tensor, best_of: int) -> torch.Tensor:
    """w_i = N C(n - c, N - 1) / C(n - 1, N - 1) where z_i is right, else 0; N = best_of, and c of n samples are right.

    right: bool [B, n], n samples of each prompt. Returns float32 [B, n]: mean_i w_i s(z_i) has the mean grad(1 - p^N).
    """
    n = right.shape[1]
    if not 1 <= best_of <= n:
        raise ValueError(f"best_of must be in 1 ... n, not {best_of} of {n} samples")
    w = [best_of * math.comb(n - c, best_of - 1) / math.comb(n - 1, best_of - 1) for c in range(1, n + 1)]  # exact
    table = torch.tensor([0.0, *w], dtype=torch.float32, device=right.device)  # [n + 1], by c
    return right * table[right.sum(dim=1)][:, None]


# The body is that of sft_loss, with a weight for each response.
def bon_loss(
    logits: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """-sum_b w_b sum_j log p(z_b^j | x, z_b^{<j}) and the number of tokens, those of weight 0 included.

    logits: [B, L, V] given z^{<j}, already shifted. z, mask: [B, L]. weight: [B]. Returns float32 scalars.
    """
    nll = F.cross_entropy(logits.float().flatten(0, 1), z.flatten(), reduction="none").view_as(z)  # [B, L]
    return (weight.float()[:, None] * nll)[mask.bool()].sum(), mask.sum().float()


def dco_loss(policy_y: torch.Tensor, best_of: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-sum log(1 - (1 - pi(y|x))^N): direct coverage optimisation (2502.07154), y the one right answer; N = 1 is Eq. 1.

    policy_y: log pi(y|x) [B], summed over y's tokens. Returns (loss_sum, n_responses), float32 scalars.
    """
    logp = policy_y.double().clamp(max=-1e-12)  # pi = 1 has nothing to learn
    small = logp < -30  # there J = N pi, and 1 - pi is 1
    own = logp.where(~small, torch.full_like(logp, -1.0))
    log_j = torch.log(-torch.expm1(best_of * torch.log(-torch.expm1(own))))
    loss = -torch.where(small, logp + math.log(best_of), log_j)
    return loss.sum().float(), logp.new_tensor(len(logp)).float()


# ---------------------------------------------------------------------------------------------- D_bon
def weights(args, best_of: int, right: list[bool]) -> list[float]:
    """The weights of one prompt's samples, as --weights says."""
    of = {"unbiased": bon_weights, "rlb": bon_options.rlb_weights, "sft": bon_options.bon_sft_weights}[args.weights]
    return of(torch.tensor([right]), best_of)[0].tolist()


def make_d_bon(run: Run, examples: Dataset, iteration: int, best_of: int, references: dict[int, str]) -> Dataset:
    """D_bon = {(x, y, z_1 ... z_n)}, drawn by the current model, checked against the reference, and weighed."""
    args = run.args
    find, equal = CHECKS[args.task]

    def draw(rows: dict[str, Sequence], each: Callable[[int, list], None]) -> list:
        if args.z and iteration == 1:
            return engine_z.draw(args, run.tokenizer, rows, each)
        return generate.generate(
            run.model, rows["x"], ids=rows["id"], n=args.n, each=each,
            max_new_tokens=args.max_response or data.TASKS[args.task].max_response,
            batch_size=args.generation_batch_size, eos_token_id=ends(run.tokenizer),
            temperature=args.temperature, seed=fold_in(args.seed, iteration),
        )  # fmt: skip

    def make(rows: list[dict]) -> list[dict]:
        made = []
        for row in rows:
            answers = [find(response_text(run.tokenizer, own)) for own in row["z"]]
            right = [bool(equal(answer, find(references[row["id"]]))) for answer in answers]
            found = {"answer": [answer or "" for answer in answers], "right": right, "c": sum(right)}
            kept = {name: row[name] for name in ("id", "x", "y", "z")}
            made.append(kept | {"weight": weights(args, best_of, right), **found})
        return made

    return run.offline(f"D_bon_{iteration}", make, examples, z=draw)


def rows_of(prompt: dict) -> list[dict]:
    """What a step reads of a row of D_bon: each sample of a weight in a row of its own, equal ones as one, with their
    share w / n of the mean over n samples; and y once, beside the first. `drawn` there: the tokens of a sample, in the
    mean over all n."""
    weight: dict[tuple[int, ...], float] = {}
    n = len(prompt["z"])
    for z, w in zip(prompt["z"], prompt["weight"], strict=True):
        weight[tuple(z)] = weight.get(tuple(z), 0.0) + w / n
    kept = {z: w for z, w in weight.items() if w} or {(): 0.0}
    shared = {"id": prompt["id"], "x": prompt["x"], "y": [], "drawn": 0.0}
    rows = [shared | {"z": [*z], "weight": w} for z, w in kept.items()]
    rows[0] |= {"y": prompt["y"], "drawn": sum(map(len, prompt["z"])) / n}
    return rows


def bon_term(rows: list[dict], device: torch.device) -> tuple:
    """The term of `losses` for bon_loss. Rows lie there in one, so each token is given as a response of its own."""
    weight = torch.tensor([row["weight"] or 0.0 for row in rows], device=device)  # [B]; [] keeps an idle rank in step
    z = [row["z"] for row in rows]

    def loss(logits: torch.Tensor, z: torch.Tensor, row: torch.Tensor, mask: torch.Tensor) -> tuple:
        return bon_loss(logits.flatten(0, 1)[:, None], z.view(-1, 1), weight[row.flatten()], mask.view(-1, 1))

    return loss, z, z, [[b] * len(own) for b, own in enumerate(z)]


# ---------------------------------------------------------------------------------------------- the stage
def dco_phase(run: Run, examples: Dataset, best_of: int) -> None:
    """DCO alone, on y. Divided by the tokens of y, so that N = 1 is sft.py."""
    for step in run.steps(examples, run.args.epochs):
        n = step.tokens("y")  # of the global batch
        for rows in step.micro_batches:
            x, y = ([row[name] for row in rows] for name in ("x", "y"))
            real = [i for i, own in enumerate(y) if own]  # the others only keep an idle rank in step
            run.backward(dco=dco_loss(log_probs(run.model, x, {"y": y})["y"][real], best_of)[0] / n)
        run.update()


def main() -> None:
    p = stage.parser(__doc__)
    paper, machine = group(p, "the paper's"), group(p, "machine")
    paper.add_argument("--n", type=positive, default=bon_options.SAMPLES, help="samples drawn for each prompt")
    paper.add_argument("--best-of", type=positive, help="N (4; with --pairs, its weights unless given)")
    paper.add_argument("--iterations", type=count, default=1)
    paper.add_argument("--epochs-per-iteration", "--epochs", dest="epochs", type=number(0), default=1)
    paper.add_argument("--sft-epochs", type=number(0), default=0, help="epochs of Eq. 1 alone first")
    paper.add_argument("--sft-weight", type=number(0), default=1.0, help="of J_SFT beside J")
    paper.add_argument("--temperature", type=number(0), default=1.0, help="of the draw of z")
    paper.add_argument("--dco", action="store_true", help="DCO on y instead: no samples")
    engine_z.add_flag(p)
    group(p, "data").add_argument("--pairs", help="a D_bon to use in the first iteration instead of making one")
    machine.add_argument("--share-prompt", action="store_true", help="y and a prompt's first z read x once")
    machine.add_argument("--generation-batch-size", type=positive, default=64, help="rows of one rank")
    bon_options.add_flags(p)
    args = p.parse_args()
    best_of = args.best_of or 4
    bon_options.check_flags(args, best_of)
    stage.check_pairs(p, args, "n", "temperature")
    if args.dco:
        run, examples = stage.start(args, data.load)
        sft_phase(run, examples, args.sft_epochs)
        dco_phase(run, examples, best_of)
        return run.finish()

    references = bon_options.references(args)
    max_response = args.max_response or data.TASKS[args.task].max_response
    read = bon_options.reader(args, partial(weights, args, best_of), best_of)
    load = engine_z.loading(args, data.load)
    run, examples, pairs = stage.start_with_pairs(args, load, ("y", "y"), max_response, read)
    sft_phase(run, examples, args.sft_epochs)
    weight = {"bon": 1.0, "sft": args.sft_weight}
    for iteration in range(1, args.iterations + 1):
        d_bon = pairs if pairs and iteration == 1 else make_d_bon(run, examples, iteration, best_of, references)
        # else the weights say for which N they are
        known = args.best_of or args.score or args.weights != "unbiased" or not (pairs and iteration == 1)
        path = run.out / f"D_bon_{iteration}.json"
        bon_options.report(d_bon, run.tokenizer, args.task, args.weights, best_of if known else None, path)
        for step in run.steps(d_bon, args.epochs, rows_of):  # a batch of prompts: rows of y and their right z
            n = {"bon": sum(row["drawn"] for row in step.rows), "sft": step.tokens("y")}  # of the global batch
            if args.weights == "sft":  # both terms are of one gradient
                n["bon"] = n["sft"]
            for rows in step.micro_batches:  # this rank's share
                x, y = ([row[name] for row in rows] for name in ("x", "y"))
                terms = {"bon": bon_term(rows, run.device)}
                if args.sft_weight:
                    terms["sft"] = (sft_loss, y, y)
                sums = losses(run.model, x, terms, args.share_prompt)
                run.backward(**{name: weight[name] * total / n[name] for name, total in sums.items()})
            run.update()
    run.finish()


if __name__ == "__main__":
    cli(main)
