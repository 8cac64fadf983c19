"""The one batch layout of this repository, and the passes over it.

    b = batch(x, y, device)                         # [ left-padded prompt | right-padded response ]
    logits = response_logits(model, b)              # [B, L, V], ready for any loss here
    loss_sum, n = sft_loss(logits, b.y, b.mask)
    sums = losses(model, x, {"sft": (sft_loss, y, y), "bash": (bash_loss, y_hat, y)})   # the same sums, for training
    labels = by_token(model, f, z, lambda logits: [logits.argmax(-1)])                  # at each token of each response

Prompts are padded on the left, so that all responses start in one column: what predicts them is the logits' last L
columns (`logits_to_keep`), and the prompt gets none. Attention mask and position ids are always passed, and come from
lengths: a pad id that is also EOS, or a word of the text, does no harm.

`losses` is the fast path, `losses_by_definition` what it computes; tests compare the two. With --packed its pass has no
padding: core/packed.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from core import packed

Rows = list[list[int]]  # token ids, one list a row


def length(row: dict) -> int:
    """Tokens in all of a row's sequences."""
    return sum(len(value) for value in row.values() if isinstance(value, list))


# ---------------------------------------------------------------------------------------------- batches
@dataclass
class Batch:
    """[ left-padded prompt | right-padded response ], without the last response token, which nothing follows."""

    input_ids: torch.Tensor  # [B, P + L - 1]
    attention_mask: torch.Tensor  # [B, P + L - 1]
    position_ids: torch.Tensor  # [B, P + L - 1]
    y: torch.Tensor  # [B, L]  the response, 0 where padded
    mask: torch.Tensor  # [B, L]  bool, True on the response's tokens


def pad_responses(responses: list[list[int]], device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids [B, L] and their bool mask [B, L], L >= 1. Masks come from lengths: pad may be EOS."""
    length = max(1, max(map(len, responses)))
    ids = torch.tensor([[*y, *[0] * (length - len(y))] for y in responses], dtype=torch.long, device=device)
    sizes = torch.tensor([len(y) for y in responses], device=device)
    return ids, torch.arange(length, device=device) < sizes[:, None]


def width_of(prompts: Rows) -> int:
    """Of the longest. Raises ValueError where one is empty: padding would predict the first token behind it."""
    if not all(prompts):
        raise ValueError(f"prompt {list(map(len, prompts)).index(0)} of a batch is empty")
    return max(map(len, prompts))


def batch(prompts: list[list[int]], responses: list[list[int]], device: torch.device | str = "cpu") -> Batch:
    """Pads B prompts and responses (token ids) into the layout. An empty response gives a row without loss tokens.

    Example: x = [[5, 6, 7], [8]], y = [[1, 2], [3, 4]] gives
        input_ids      5 6 7 1      attention_mask 1 1 1 1      position_ids 0 1 2 3      y 1 2
                       0 0 8 3                     0 0 1 1                   0 0 0 1        3 4
    Raises ValueError where a prompt is empty: nothing would predict what follows it.
    """
    width = width_of(prompts)
    y, mask = pad_responses(responses, device)
    x = torch.tensor([[*[0] * (width - len(x)), *x] for x in prompts], dtype=torch.long, device=device)
    sizes = torch.tensor([len(x) for x in prompts], device=device)
    x_mask = torch.arange(width, device=device) >= width - sizes[:, None]
    attention_mask = torch.cat([x_mask, mask], dim=1)[:, :-1].long()
    return Batch(
        input_ids=torch.cat([x, y], dim=1)[:, :-1],
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0),
        y=y,
        mask=mask,
    )


def response_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """logits [B, L, V]: logits[:, j] predicts response token j. One teacher-forced pass; the prompt gets no logits."""
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.y.shape[1],
    ).logits


# ---------------------------------------------------------------------------------------------- passes over a batch
CHUNK = 2**26  # logits made at a time: 256 MB in float32


def losses_by_definition(model: torch.nn.Module, x: Rows, terms: dict[str, tuple]) -> dict[str, torch.Tensor]:
    """What `losses` computes, plainly: a forward pass for each term, with the logits of whole responses."""
    sums = {}
    for name, (loss, given, *targets) in terms.items():
        b = batch(x, given, model.device)
        targets = [pad_responses(rows, model.device)[0] for rows in targets]  # [B, L] each
        sums[name] = loss(response_logits(model, b), *targets, b.mask)[0]
    return sums


def losses(
    model: torch.nn.Module, x: Rows, terms: dict[str, tuple], share_prompt: bool = False
) -> dict[str, torch.Tensor]:
    """The sums of one or more losses over a micro-batch, from one forward pass: {name: float32 scalar}.

    x: B prompts. terms: {name: (loss, given, *targets)}, where given and targets are B rows of token ids. The model
    reads given after x, and loss(logits, *targets, mask) gets the logits that predict each of its tokens. (All losses
    may also return a vector of sums, each of the same length.)

    Equal to `losses_by_definition`, except for rounding, and cheaper:
    - one pass for all terms; rows with nothing given are left out (but one: other ranks wait for this one's pass);
    - [B, L, V] never exists: logits are made where there is a token to predict, CHUNK at a time (and once more for the
      backward, where it takes several chunks);
    - share_prompt: x is read once, followed by all terms' tokens, which do not see each other;
    - of a model that `packed.prepare` made ready: so, too, and all rows in one sequence, without padding.
    Raises ValueError where share_prompt does not work with the model.
    """
    inputs, parts = lay_out(model, x, terms, share_prompt)

    def sums(output: Callable[[torch.Tensor], torch.Tensor], hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        each = zip(parts, hidden, strict=True)
        return torch.stack([in_chunks(loss, output, h, targets, chunk(model)) for (loss, _, targets), h in each])

    made = in_place_of_logits(model, inputs, [place for _, place, _ in parts], sums)
    return dict(zip(terms, made, strict=True))


@torch.no_grad()
def by_token(
    model: torch.nn.Module, x: Rows, given: Rows, read: Callable[..., Sequence[torch.Tensor]], *targets: Rows,
    batch_size: int = 8,
) -> Iterator[tuple[int, Sequence[torch.Tensor]]]:  # fmt: skip
    """What `read` finds at each response token, teacher-forced: (i, its tensors [L_i, ...]) of the i-th response.

    read(logits, *targets) gets the logits [N, V] of p(. | x, given^{<j}) of N tokens, CHUNK at a time ([B, L, V] never
    exists), and N ids of each of the targets. It returns tensors [N, ...]. batch_size: responses of a pass, those of
    like length together, so that they come in another order. Their tensors are on the CPU.
    """

    def passed(x: Rows, given: Rows, *targets: Rows) -> list[torch.Tensor]:
        """What read returns, over all tokens of some responses."""
        inputs, [(_, place, ids)] = lay_out(model, x, {"": (None, given, *targets)}, False)
        found: list[torch.Tensor] = []

        def make(output: Callable[[torch.Tensor], torch.Tensor], hidden: Sequence[torch.Tensor]) -> torch.Tensor:
            pieces = zip(*(tensor.split(chunk(model)) for tensor in (*hidden, *ids)), strict=True)
            found[:] = map(torch.cat, zip(*(read(output(h), *those) for h, *those in pieces), strict=True))
            return found[0]

        in_place_of_logits(model, inputs, [place], make)
        return [tensor.cpu() for tensor in found]

    order = sorted(range(len(x)), key=lambda i: len(x[i]) + len(given[i]))  # little padding in a batch
    for some in (order[start : start + batch_size] for start in range(0, len(order), batch_size)):
        found = passed(*([rows[i] for i in some] for rows in (x, given, *targets)))
        lengths = [len(given[i]) for i in some]
        yield from zip(some, zip(*(tensor.split(lengths) for tensor in found), strict=True), strict=True)


def nll_by_token(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor]:
    """-log p(target), float32 [N], for `by_token`. logits: [N, V]. target: [N]."""
    return (F.cross_entropy(logits.float(), target, reduction="none"),)


def chunk(model: torch.nn.Module) -> int:
    """Of how many tokens the logits are made at a time."""
    return max(1, CHUNK // model.config.get_text_config().vocab_size)


def in_place_of_logits(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], places: list[torch.Tensor],
    make: Callable[[Callable[[torch.Tensor], torch.Tensor], Sequence[torch.Tensor]], torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """make(output, hidden) from one pass of the model. output(h) is the logits [N, V] of h [N, d]; hidden, for each of
    the places (row and column of N tokens, [2, N]), what the output matrix reads there."""
    # make is called inside of the model's forward, in the place of its output matrix, and what it gives is handed on as
    # if it were the logits. A plainer way, hidden = model.base_model(...) and then logits = head(hidden[at]), is not as
    # good: under FSDP2 only a call of the whole model gathers the head's weights; and a model that changes its logits
    # behind the head (Gemma 2 caps them, Granite and Cohere scale them) would be read wrongly without a word. Here that
    # is seen: what comes out of the model is then not what the head gave.
    made, head = None, model.get_output_embeddings()
    if not getattr(model, "changes_logits", False):
        plain, its_own = head.forward, head.__dict__.get("forward")  # one that somebody has put there before

        def forward(hidden: torch.Tensor) -> torch.Tensor:  # [B, S, d], at the door of the output matrix
            nonlocal made
            made = make(plain, [hidden[tuple(place)] for place in places])
            return made

        head.forward = forward
        try:
            model.changes_logits = model(**inputs, use_cache=False).logits is not made
        finally:
            del head.forward
            if its_own:
                head.forward = its_own
    if model.changes_logits:  # then the model has to make them, of all places at once
        made = None  # and with it the pass in vain
        at = torch.cat(places, dim=1)
        hook = head.register_forward_pre_hook(lambda _, args: (args[0][tuple(at)][None],))  # [1, N, d]
        try:
            logits = model(**inputs, use_cache=False).logits[0]  # [N, V]
        finally:
            hook.remove()
        made = make(lambda logits: logits, logits.split([place.shape[1] for place in places]))
    return made


def lay_out(
    model: torch.nn.Module, x: Rows, terms: dict[str, tuple], share_prompt: bool
) -> tuple[dict[str, torch.Tensor], list[tuple[Callable, torch.Tensor, list[torch.Tensor]]]]:
    """The model's inputs for the one pass of `losses`; and for each term its loss, where in the pass its N tokens are
    predicted (row and column, [2, N]), and its targets, [N] each."""
    given = [term[1] for term in terms.values()]
    one = getattr(model, "packed", False)  # one sequence
    if (share_prompt or one) and len(given) > 1:  # a row of the pass: the (term, example) pairs that follow one prompt
        groups = [[(k, i) for k in range(len(given))] for i in range(len(x)) if any(rows[i] for rows in given)]
    else:
        groups = [[(k, i)] for k, rows in enumerate(given) for i in range(len(x)) if rows[i]]
    groups = groups or [[(0, 0)]]
    layout = packed.pack if one else pack
    inputs, columns = layout([x[group[0][1]] for group in groups], [[given[k][i] for k, i in g] for g in groups], model)
    at: list[list[tuple[int, int]]] = [[] for _ in terms]  # of each term: row and column that predict each token
    order: list[list[int]] = [[] for _ in terms]  # ... and the examples that these belong to
    for b, (group, row) in enumerate(zip(groups, columns, strict=True)):
        for places, (k, i) in zip(row, group, strict=True):
            at[k] += [(0 if one else b, column) for column in places[: len(given[k][i])]]
            order[k].append(i)
    parts = []
    for (loss, _, *targets), places, examples in zip(terms.values(), at, order, strict=True):
        flat = [torch.tensor([token for i in examples for token in rows[i]], device=model.device) for rows in targets]
        parts.append((loss, torch.tensor(places, device=model.device).long().view(-1, 2).T, [t.long() for t in flat]))
    return inputs, parts


def in_chunks(
    loss: Callable, output: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, targets: list, size: int
) -> torch.Tensor:
    """The sum of loss over tokens, hidden [N, d] and targets [N], with the logits of `size` of them at a time."""

    def one(hidden: torch.Tensor, *targets: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(targets[0])
        return loss(output(hidden)[None], *(target[None] for target in targets), mask[None])[0]

    if len(hidden) <= size:
        return one(hidden, *targets)
    again = functools.partial(checkpoint, one, use_reentrant=False, preserve_rng_state=False)
    return sum(again(*pieces) for pieces in zip(*(tensor.split(size) for tensor in (hidden, *targets)), strict=True))


def pack(
    prompts: Rows, segments: list[Rows], model: torch.nn.Module
) -> tuple[dict[str, torch.Tensor], list[list[list[int]]]]:
    """Each prompt followed by its segments, each of which sees the prompt and itself -> the model's inputs; and for
    each segment of each prompt (here the same for all) the columns that predict its tokens: the prompt's last, then its
    own, of which the last token is not read.

    Example: prompts [[5, 6], [8]] with segments [[1, 2], [3, 4, 7]] and [[9, 9], [2]] gives
        input_ids  5 6 1 3 4    position_ids  0 1 2 2 3    and a 4-D mask by which 1 does not see 3 and 4, and so on
                   0 8 9 0 0                  0 0 1 1 2    columns  [1, 2, ...] and [1, 3, 4, ...]
    Raises ValueError where a prompt is empty.
    """
    width = width_of(prompts)
    widths = [max(max(len(row[s]) for row in segments) - 1, 0) for s in range(len(segments[0]))]
    starts = [width + sum(widths[:s]) for s in range(len(widths) + 1)]
    ids, position, real = torch.zeros(3, len(prompts), starts[-1], dtype=torch.long)  # [B, S] each
    for b, (prompt, row) in enumerate(zip(prompts, segments, strict=True)):
        n = len(prompt)
        for start, tokens, first in [(width - n, prompt, 0), *((at, t[:-1], n) for at, t in zip(starts, row))]:
            place = slice(start, start + len(tokens))
            ids[b, place] = torch.tensor(tokens, dtype=torch.long)
            position[b, place] = torch.arange(first, first + len(tokens))
            real[b, place] = 1
    mask = real
    if len(widths) > 1:
        mask = mask_4d(real.bool(), position, starts, model)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
    # the column that predicts token j: the prompt's last for j = 0, then the segment's own
    columns = [[width - 1, *range(start, end)] for start, end in zip(starts, starts[1:])]
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}, [columns] * len(prompts)


def check_share_prompt(model: torch.nn.Module) -> None:
    """Raises ValueError where share_prompt does not work with the model."""
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(f"--share-prompt needs 4-D attention masks, which {config._attn_implementation} does not take")
    if kinds := packed.uneven(config):
        raise ValueError(f"--share-prompt: this model's layers differ in what they see ({kinds})")


def mask_4d(real: torch.Tensor, position: torch.Tensor, starts: list[int], model: torch.nn.Module) -> torch.Tensor:
    """The mask [B, 1, S, S] of `pack`: a token sees its prompt, and its own segment up to itself."""
    check_share_prompt(model)
    config = model.config.get_text_config()
    column = torch.arange(real.shape[1])
    segment = torch.bucketize(column, torch.tensor(starts[:-1]), right=True)  # [S], 0 in the prompt, then 1, 2, ...
    seen = (segment[None] == 0) | (segment[None] == segment[:, None])  # [S, S], query by key
    seen = (seen & (column[None] <= column[:, None])) & real[:, None]  # [B, S, S]
    if window := packed.window_of(config):
        seen &= position[:, :, None] - position[:, None] < window
    seen |= torch.eye(len(column), dtype=torch.bool)  # padding must see something: itself
    if config._attn_implementation == "eager":  # there a mask is added to the scores
        return torch.zeros(seen.shape).masked_fill(~seen, -1e30)[:, None]
    return seen[:, None]
