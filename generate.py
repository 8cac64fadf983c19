"""The one decoder: sampling with a KV cache (Eq. 2), and the mixed draw of scheduled sampling (Eq. 4).

    from generate import generate, mix
    z = generate(model, prompts, max_new_tokens=64, eos_token_id=eos, temperature=1.0)     # z ~ p(.|x)          Eq. 2
    y_hat = mix(model, prompts, responses, beta=0.2)                                       # y^j, or z^j w.p. β  Eq. 4

    torchrun --nproc-per-node 8 generate.py --model runs/rac --task gsm8k --out answers.jsonl --temperature 0.1 --n 3

Prompts and responses are lists of token ids; `model` is any causal LM of transformers (checked: GPT-NeoX, Llama,
Mistral with its sliding window, GPT-2, Qwen2, Qwen3, Gemma), on any device and in any dtype. Needs torch,
transformers and core/.

**One layout.** Prompts are padded on the left, so that all responses start in one column. The attention mask and the
position ids are always passed, and come from lengths: a pad id that is also EOS, or a word of the prompt, does no
harm.

        columns    0    1    2    3  |  4    5    6            key/value cache: columns 0 … 3, then one more each step
        row 0     pad  pad  x^1  x^2 | y^1  y^2  y^3           mask       0 0 1 1 1 1 1
        row 1     x^1  x^2  x^3  x^4 | y^1                     positions  0 0 0 1 2 3 4

(On a GPU `generate` holds its rows in buffers of fixed shapes instead, each from column 0 on: core/decode_step.py.)

**Noise that belongs to the token, not to the run.** A draw is argmax(logits + T · Gumbel), and the Gumbel noise of a
token is a hash of (seed, example id, sample, position, vocabulary entry). So batch size, order, padding, number of
ranks and method do not change what is drawn, and a run can be repeated, or split, at will. (As far as the logits
themselves do not depend on the shape of the batch: in float32 that is rounding, in bfloat16 it changes a token now
and then.)

**Why Eq. 4 need not be slow.** The paper's Remark 1 has scheduled sampling draw one token after the other. But once
the coin (β) and the noise of every position are fixed, the mixed sequence g is a deterministic function of itself:
g^j is y^j, or the argmax given g^{<j}. Its fixed point is the sequential draw, and a few teacher-forced passes find
it, begun at g = y ("parallel"). Or, since gold tokens are known beforehand, a forward can take in all of them up to
the next drawn position ("segment"). Both give, in float32, the very tokens of the definition ("token").
    Parallel Scheduled Sampling (Duckworth et al. 2019, arXiv 1906.04331) draws afresh in each pass and so only
    approximates Eq. 4; fixed noise across passes is from Wiggers & Hoogeboom (2020, arXiv 2002.09928), for plain
    sampling.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from core.decode_step import Fixed, Leaving, decoding, feed, fixed_shapes, forward, pad, prefill, right_aligned
from core.kv_cache import Columns, close_gaps, keep_rows
from core.noise import draw, noise_keys
from core.windows import windows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rows = list[list[int]]  # token ids, one list a row

# ------------------------------------------------------------------------------------------------ plain sampling: Eq. 2

REFILL = 0.75  # waiting prompts join once this share of the batch, or less, is still being decoded


def generate(
    model: PreTrainedModel,
    prompts: Rows,
    *,
    max_new_tokens: int,
    eos_token_id: int | list[int] | None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    n: int = 1,
    seed: int = 0,
    ids: list[int] | None = None,
    batch_size: int = 64,
    stats: dict | None = None,
    each: Callable[[int, Rows], None] | None = None,
    fixed: bool | None = None,
) -> list[Rows]:
    """z ~ p(.|x), token by token (Eq. 2): n samples for each prompt.

    prompts         lists of token ids, none empty; any sequence, which may make them when asked
    eos_token_id    one id or several that end a sample (kept as its last token), or None: always max_new_tokens tokens
    temperature     0 is greedy; then `n` samples are n times the same
    top_p, top_k    1.0 and 0 are off; with both, the top k are cut first
    ids             one int per prompt: whose noise it is (default: its index). A split of the prompts over ranks that
                    hands their indices along draws what one process draws
    batch_size      how many samples are decoded at once (memory and speed, not the result)
    stats           a dict that receives "forwards" and "columns" (tokens fed, padding included)
    each            called with a prompt's index and its samples as soon as these are finished; nothing is returned then
    fixed           rows in buffers of fixed shapes, on a GPU as a CUDA graph; by default so on a GPU, where the model
                    allows it (see core/decode_step.py). The tokens are the same

    Returns, in the order of the prompts, a list of n lists of token ids for each. Raises ValueError on bad input.
    """
    ids = check(model, prompts, [max_new_tokens] * len(prompts), ids, temperature, batch_size)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {top_p}")
    if top_k < 0 or n < 1:
        raise ValueError(f"top_k must be at least 0 and n at least 1, not {top_k} and {n}")
    eos = {*eos_token_id} if isinstance(eos_token_id, Iterable) else {eos_token_id} - {None}
    out: list[Rows] = [[] for _ in range(0 if each else len(prompts))]
    each = each or out.__setitem__
    lengths = [len(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -lengths[i])  # like lengths together, the largest first
    waiting = deque((i, sample) for i in order for sample in range(n))
    if not max_new_tokens:
        waiting.clear()
        for i in order:
            each(i, [[] for _ in range(n)])
    samples: dict[int, dict[int, list[int]]] = {}  # of the prompts that are not finished, those that are

    def pick(logits: Tensor, keys: Tensor) -> Tensor:
        return draw(logits, keys, temperature, top_p, top_k)

    stats = {} if stats is None else stats
    with decoding(model, stats) as device:
        ends = torch.tensor(sorted(eos), dtype=torch.int64, device=device)
        if fixed_shapes(model, device, fixed):
            looks = temperature > 0 and top_p < 1  # the nucleus is a loop that looks at what it drew
            rows = Fixed(model, pick, ends, max_new_tokens, min(batch_size, len(waiting)), looks, stats)
        else:
            rows = Leaving(model, pick, ends, max_new_tokens)
        while waiting or rows.names:
            if waiting and len(rows.names) <= batch_size * REFILL:  # there is room for rows that wait
                new = [waiting.popleft() for _ in range(min(len(waiting), batch_size - len(rows.names)))]
                texts = {i: prompts[i] for i, _ in new}
                keys = noise_keys(seed, [ids[i] for i, _ in new], [s for _, s in new], max_new_tokens).to(device)
                rows.admit(new, [texts[i] for i, _ in new], keys)
            for (i, sample), tokens in rows.advance():
                found = samples.setdefault(i, {})
                found[sample] = tokens
                if len(found) == n:
                    each(i, [tokens for _, tokens in sorted(samples.pop(i).items())])
    return out


# -------------------------------------------------------------------------------------------------------- mixing: Eq. 4


def mix(
    model: PreTrainedModel,
    prompts: Rows,
    responses: Rows,
    *,
    beta: float,
    temperature: float = 1.0,
    seed: int = 0,
    ids: list[int] | None = None,
    batch_size: int = 64,
    method: str = "auto",
    stats: dict | None = None,
    each: Callable[[int, list[int]], None] | None = None,
) -> Rows:
    """g^j = z^j ~ p(.|x, g^{<j}) with probability β, else y^j (Eq. 4): each g is as long as its response y.

    An EOS drawn in the middle is a token like any other: Eq. 4 goes on to the end of y, and so does this.
    temperature=0 takes z^j = argmax. β = 0 returns y and costs no forward; β = 1 is plain sampling over y's length, and
    draws what `generate` draws as its first sample. `ids`, `batch_size`, `stats`, `each` as in `generate`; "forwards"
    are the passes of "parallel", over all batches.
    method: "token" (the definition), "parallel", "segment" (see the top of this file), or "auto".
    """
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], not {beta}")
    if method not in (*METHODS, "auto"):
        raise ValueError(f"method must be one of auto, {', '.join(METHODS)}, not {method!r}")
    ids = check(model, prompts, [len(y) for y in responses], ids, temperature, batch_size)
    out: Rows = [[] for _ in range(0 if each else len(prompts))]
    each = each or out.__setitem__
    # per row: the positions j with g^j = z^j (arrays: there may be many rows)
    drawn = [array("i", coins(seed, i, len(y), beta)) for i, y in zip(ids, responses)]
    lengths = [len(prompt) for prompt in prompts]
    todo = [i for i, positions in enumerate(drawn) if positions]
    todo.sort(key=lambda i: (-drawn[i][-1], -lengths[i]))
    for i, positions in enumerate(drawn):
        if not positions:
            each(i, list(responses[i]))  # y already
    with decoding(model, stats) as device:
        for batch in (todo[b : b + batch_size] for b in range(0, len(todo), batch_size)):
            keys = noise_keys(seed, [ids[i] for i in batch], [0] * len(batch), drawn[batch[0]][-1] + 1).to(device)
            run = METHODS[choose(beta) if method == "auto" else method]
            x, g, positions = ([list(rows[i]) for i in batch] for rows in (prompts, responses, drawn))
            run(model, x, g, positions, keys, temperature)
            for i, row in zip(batch, g):
                each(i, row)
    return out


def coins(seed: int, example: int, length: int, beta: float) -> list[int]:
    """The positions of a response that Eq. 4 draws: each with probability β, by (seed, example, position)."""
    coin = noise_keys(seed, [example], [-1], length)[0] >> 11 & (2**53 - 1)  # [length], 53 uniform bits
    return (coin.double() * 2.0**-53 < beta).nonzero()[:, 0].tolist()


# The three methods take a batch of prompts and g = y (lists), the positions `drawn` of each row (at least one; the row
# with the latest comes first), and keys [B, 1 + latest drawn position]; they write into g.


def mix_token(model: PreTrainedModel, prompts: Rows, g: Rows, drawn: Rows, keys: Tensor, temperature: float) -> None:
    """Eq. 4 as it is written: one position after the other, with the KV cache."""
    logits, length, cache = prefill(model, prompts, keys.device)  # [B, V], p(.|x)
    for j in range(keys.shape[1]):
        at = [row for row in range(len(logits)) if j in drawn[row]]
        z = draw(logits[at], keys[at, j], temperature).tolist()
        for row, token in zip(at, z):
            g[row][j] = token  # g^j = z^j; elsewhere it stays y^j
        live = [row for row in range(len(logits)) if drawn[row][-1] > j]  # past its last drawn position a row is done
        if not live:
            return
        length = length[keep_rows(cache, live, length)]  # the first so many: nothing is moved
        logits = feed(model, torch.tensor([g[row][j] for row in live], device=keys.device), length, cache)
        length = length + 1


def mix_parallel(model: PreTrainedModel, prompts: Rows, g: Rows, drawn: Rows, keys: Tensor, temperature: float) -> None:
    """Eq. 4 as a fixed point: redraw all positions of a window at once from the g at hand, until none changes.

    What comes before a row's first change, and the changed token itself, is final: it was drawn from a final prefix (by
    induction). So the row's next window begins there, on the keys and values cached so far, and a row is done when the
    window has passed its last drawn position. A longer window means fewer passes, but more tokens fed in vain.
    """
    rows, device = list(range(len(g))), keys.device
    seq = [x + y for x, y in zip(prompts, g)]
    todo = [[len(x) + j for j in positions] for x, positions in zip(prompts, drawn)]  # the drawn positions of `seq`
    share = sum(map(len, drawn)) / sum(positions[-1] + 1 for positions in drawn)  # about β
    done = [0] * len(g)  # how many tokens of `seq` are final and cached
    cache, mask = Cache(layer_class_to_replicate=Columns), torch.zeros(len(g), 0, dtype=torch.int64, device=device)
    seen = windows_of(model)
    while rows:
        began = time.perf_counter()
        if device.type in REDRAW or not seen.seconds:
            window = 1 + int(REDRAW.get(device.type, 1024) / (share * len(rows)))
        else:
            window = seen.choose(len(rows))
        end = [min(max(done[row], len(prompts[row])) + window, todo[row][-1]) for row in rows]  # feed seq[done : end]
        ids, fed = pad([seq[row][done[row] : e] for row, e in zip(rows, end)], device, left=False)  # [B, Q]
        mask = torch.cat([mask, fed], 1)  # [B, S]
        spots = [(b, p) for b, row in enumerate(rows) for p in todo[row] if done[row] < p <= end[b]]  # N positions
        index = [(b, p - 1 - done[rows[b]], rows[b], p - len(prompts[rows[b]])) for b, p in spots]  # p - 1 predicts p
        at_row, at_column, key_row, j = torch.tensor(index, dtype=torch.int64, device=device).view(-1, 4).T  # [N] each
        at = torch.zeros_like(ids, dtype=torch.bool)  # [B, Q]
        at[at_row, at_column] = True
        logits = forward(model, ids, mask, cache, at)  # [N, V], p(.|x, g^{<j}) for the g at hand
        parts = zip(logits.split(256), keys[key_row, j].split(256))  # the noise of all N at once would be large
        z = torch.cat([draw(*part, temperature) for part in parts]).tolist()  # [N]
        changed = set()
        for (b, p), token in zip(spots, z):
            if seq[rows[b]][p] != token:
                seq[rows[b]][p] = token
                end[b] = min(end[b], p)  # the row's first change
                changed.add(b)
        good = torch.tensor([e - done[row] for row, e in zip(rows, end)], device=device)  # [B], columns that are final
        mask[:, -ids.shape[1] :] = torch.arange(ids.shape[1], device=device) < good[:, None]
        settled = sum(e - max(done[row], len(prompts[row])) for row, e in zip(rows, end))
        for row, e in zip(rows, end):
            done[row] = e
        seen.saw(ids.numel(), time.perf_counter() - began, settled, len(changed))
        live = [b for b, row in enumerate(rows) if done[row] < todo[row][-1]]
        rows = [rows[b] for b in live]
        if rows:
            mask = close_gaps(cache, mask, live)
    for row, (x, tokens) in enumerate(zip(prompts, seq)):
        g[row][:] = tokens[len(x) :]


def mix_segment(model: PreTrainedModel, prompts: Rows, g: Rows, drawn: Rows, keys: Tensor, temperature: float) -> None:
    """Eq. 4 with a forward per drawn position: of the token drawn last and the gold run up to the next one."""
    rows, device = list(range(len(g))), keys.device
    logits, length, cache = prefill(model, [x + row[: at[0]] for x, row, at in zip(prompts, g, drawn)], device)
    mask = right_aligned(length, cache.get_seq_length())  # [B, S]
    for k in range(max(map(len, drawn))):  # the k-th drawn position of every row at once
        z = draw(logits, keys[rows, [drawn[row][k] for row in rows]], temperature)  # [B]
        for row, token in zip(rows, z.tolist()):
            g[row][drawn[row][k]] = token
        live = [b for b, row in enumerate(rows) if len(drawn[row]) > k + 1]
        if not live:
            break
        if len(live) < len(rows) or k:  # rows leave, and the gaps of the forward before are closed
            mask = close_gaps(cache, mask, live)
            rows = [rows[b] for b in live]
        ids, fed = pad([g[row][drawn[row][k] : drawn[row][k + 1]] for row in rows], device, left=False)  # [B, Q]
        mask = torch.cat([mask, fed], 1)  # [B, S]
        at = fed.cumsum(-1).eq(fed.sum(-1, keepdim=True)) & fed.bool()  # [B, Q], the last token of each row
        logits = forward(model, ids, mask, cache, at)  # [B, V]


METHODS = {"token": mix_token, "parallel": mix_parallel, "segment": mix_segment}
# How many positions a pass of mix_parallel redraws, over all rows: with more there are fewer passes, of more tokens.
# cpu: the best of 16 … 192, or near it, for the model of benchmarks/mixing.py on one core. A window of so many tokens
# behind the last one redrawn, in place of the last final one, was slower. On a device that is not named, windows are
# chosen by what passes cost there (core/windows.py), after a first one of 1024.
REDRAW = {"cpu": 32}


def choose(beta: float) -> str:
    """The method of "auto". In results/mixing.json, at 128 tokens, "parallel" takes 0.13 of the time of "token" at
    β = 0.05, 0.23 at 0.2, 0.6 at 0.5 in batches of 1, and 0.5, 0.7 and 1.0 in batches of 16; "segment" is behind it, or
    within its noise. With a larger β ever more positions wait for the one before them."""
    return "parallel" if beta <= 0.6 else "token"


# --------------------------------------------------------------------------------------------------------------- checks


def check(
    model: PreTrainedModel,
    prompts: Rows,
    lengths: list[int],
    ids: list[int] | None,
    temperature: float,
    batch_size: int,
) -> list[int]:
    """Raises a ValueError of one line on bad input; returns the ids, by default the indices."""
    ids = list(range(len(prompts))) if ids is None else list(ids)
    if len(ids) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(ids)} ids")
    if not temperature >= 0:  # NaN, too
        raise ValueError(f"temperature must be at least 0, not {temperature}")
    if batch_size < 1 or min(lengths, default=0) < 0:
        raise ValueError("batch_size must be at least 1 and max_new_tokens at least 0")
    limit = getattr(model.config, "max_position_embeddings", None)
    for i, (prompt, length) in enumerate(zip(prompts, lengths)):
        if isinstance(prompt, Tensor):
            raise ValueError("prompts must be lists of token ids, without padding, not tensors: input_ids.tolist()")
        if not prompt:
            raise ValueError(
                f"prompt {ids[i]} is empty; a model without a BOS token still needs one token to begin from"
            )
        if limit and len(prompt) + length > limit:
            raise ValueError(f"prompt {ids[i]}: {len(prompt)} + {length} tokens exceed the model's {limit} positions")
    return ids


# ---------------------------------------------------------------------------------------------------------- the command


def main() -> None:
    import json
    from pathlib import Path

    import data  # of the command alone: who copies the decoder leaves this function behind
    import engine_z
    from core.chat import ends
    from core.flags import count, data_flags, group, new_parser, number, positive
    from core.fsdp import check_fits, load_tokenizer, model_of
    from core.ranks import RANK, init, print0
    from folders import claim_file, offline

    p = new_parser(__doc__)
    data_flags(p, sorted(data.TASKS))
    group(p, "data").add_argument("--split", choices=["train", "test"], default="test", help="of a hub set")
    g = p.add_argument_group("what is drawn")
    g.add_argument("--out", required=True, help="a .jsonl file: id, prompt, reference, responses, ... a line")
    g.add_argument("--n", type=positive, default=1, help="samples for each prompt")
    g.add_argument("--temperature", type=number(0), default=1.0, help="0 is greedy")
    g.add_argument("--top-p", type=number(1e-6, 1), default=1.0)
    g.add_argument("--top-k", type=count, default=0)
    g.add_argument("--seed", type=count, default=0)
    group(p, "machine").add_argument("--batch-size", type=positive, default=64, help="rows decoded at once by one rank")
    args = p.parse_args()
    init()
    out, begin = claim_file(args)
    tokenizer = load_tokenizer(args.model)
    examples, notes = data.load(args, tokenizer, args.split, need_response=False)
    for note in notes:
        print0(note)
    model = model_of(args, tokenizer)
    options = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "n", "seed", "batch_size")}
    options["max_new_tokens"] = args.max_response or data.TASKS[args.task].max_response
    tokens = max(map(len, examples["x"])) + options["max_new_tokens"]
    check_fits(model, tokens, max(map(max, examples["x"])), "prompt and response")
    begin()

    def draw(rows: dict, each: Callable[[int, Rows], None]) -> list[Rows]:
        return generate(model, rows["x"], ids=rows["id"], eos_token_id=ends(tokenizer), each=each, **options)

    given = {}
    if RANK == 0:  # whole, where x and y are cut
        rows = data.load_rows(args.task, args.data, args.split, args.columns, args.limit, need_response=False)
        given = {row["id"]: row for row in rows}
    made = offline(out.with_name(out.name + ".data"), None, examples, model, tokenizer, z=draw)
    if RANK == 0:
        partial = out.with_name(out.name + ".partial")
        by = engine_z.drawn_by(json.loads(Path(args.out + ".args.json").read_text()), tokenizer)
        with open(partial, "w", encoding="utf-8") as file:
            for row in made:
                line = engine_z.line(row, given[row["id"]]["response"], tokenizer, by)
                if args.task == "tldr":
                    line["post"] = given[row["id"]]["prompt"]  # for tools/judge.py
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        partial.rename(out)
    print0(f"{len(made)} prompts, {args.n} responses each: {out}")


if __name__ == "__main__":
    from core.ranks import cli

    cli(main)
