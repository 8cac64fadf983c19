"""generate.py, Eq. 2: against transformers' own decoder, a loop without cache, and exact enumeration."""

import itertools
import random

import pytest
import torch
from transformers.cache_utils import Cache

from core.kv_cache import Columns, join, keep_rows
from core.noise import draw, gumbel, noise_keys
from generate import generate
from tiny import ARCHS, model

torch.set_num_threads(1)
V = 64


def ragged(count: int, longest: int, seed: int = 0, vocab: int = V) -> list[list[int]]:
    """Prompts of 1 … longest tokens, token 0 (the pad id inside the decoder) among them."""
    rng = random.Random(seed)
    lengths = [1, longest, *(rng.randint(1, longest) for _ in range(count - 2))]
    return [[rng.randrange(vocab) for _ in range(length)] for length in lengths]


def next_logits(lm, tokens: list[int]) -> torch.Tensor:
    """p(.|tokens) with no cache, no padding, no batch."""
    with torch.no_grad():
        return lm(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]


def chi_square_ok(counts: torch.Tensor, p: torch.Tensor) -> bool:
    """Pearson's statistic over the cells that expect 5 or more, and one of all others, within 5 standard deviations."""
    expected, total = p * counts.sum(), counts.sum()
    big = expected >= 5
    counts = torch.cat([counts[big], (total - counts[big].sum())[None]])
    expected = torch.cat([expected[big], (total - expected[big].sum()).clamp(min=1e-9)[None]])
    if expected[-1] < 5:  # what is left is too rare for the statistic: bound it by itself
        assert counts[-1] <= 25
        counts, expected = counts[:-1], expected[:-1]
    free = len(counts) - 1
    return ((counts - expected) ** 2 / expected).sum() <= free + 5 * (2 * free) ** 0.5


# -------------------------------------------------------------------------------------------------- greedy, per row EOS


@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_equals_transformers_and_a_loop_without_cache(arch):
    lm, prompts, new = model(arch), ragged(6, 24), 16
    loop = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(new):
            tokens.append(int(next_logits(lm, tokens).argmax()))
        loop.append(tokens[len(prompt) :])
    eos = [loop[0][9], loop[3][4]]  # ids that some rows do draw: rows stop at different steps
    cut = [row[: min([row.index(e) + 1 for e in eos if e in row], default=new)] for row in loop]
    assert len({len(row) for row in cut}) > 1

    def ours(eos_token_id):
        return generate(lm, prompts, max_new_tokens=new, eos_token_id=eos_token_id, temperature=0)

    assert ours(None) == [[row] for row in loop]
    assert ours(eos) == [[row] for row in cut]
    assert ours(eos[0]) == [[row[: row.index(eos[0]) + 1] if eos[0] in row else row] for row in loop]

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    theirs = lm.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=eos, pad_token_id=0
    )
    theirs = [row[: len(ref)] for row, ref in zip(theirs[:, width:].tolist(), cut)]
    assert theirs == cut


# ------------------------------------------------------------------------------------------ what must not change a draw


@pytest.mark.parametrize("arch", ARCHS)
def test_batch_size_order_and_company_change_nothing(arch):
    lm, prompts = model(arch), ragged(7, 24)
    args = {"max_new_tokens": 12, "eos_token_id": [3, 5, 8], "n": 2, "seed": 4}
    whole = generate(lm, prompts, **args)
    assert len({len(s) for row in whole for s in row}) > 1
    for batch_size in (1, 3, 5):  # 3 and 5 part the samples of a prompt
        assert generate(lm, prompts, batch_size=batch_size, **args) == whole
    order = [4, 0, 6, 2, 5, 1, 3]
    assert generate(lm, [prompts[i] for i in order], ids=order, **args) == [whole[i] for i in order]
    assert generate(lm, prompts[1::2], ids=[1, 3, 5], **args) == whole[1::2]  # as one rank of two
    fewer = generate(lm, prompts, **{**args, "n": 1})
    assert fewer == [row[:1] for row in whole]
    longer = generate(lm, prompts, **{**args, "max_new_tokens": 20})
    assert all(b[: len(a)] == a for x, y in zip(whole, longer) for a, b in zip(x, y))


def test_samples_differ_by_sample_id_and_seed_and_repeat():
    lm, prompts = model("llama"), [[7, 8, 9]] * 4  # equal prompts, distinct ids
    args = {"max_new_tokens": 12, "eos_token_id": None, "n": 3}
    first = generate(lm, prompts, **args)
    assert first == generate(lm, prompts, **args)
    assert len({tuple(s) for row in first for s in row}) == 12
    other = generate(lm, prompts, seed=1, **args)
    assert not {tuple(s) for row in first for s in row} & {tuple(s) for row in other for s in row}
    assert generate(lm, prompts, ids=[5] * 4, **args)[0] == generate(lm, prompts, ids=[5] * 4, **args)[3]
    assert generate(lm, prompts, seed=-1, ids=[-3, 2**62, 0, 1], **args) != first  # any int will do


def test_greedy_samples_are_equal_and_nothing_is_asked_for():
    lm = model("gpt2")
    a, b = generate(lm, [[5, 6]], max_new_tokens=5, eos_token_id=None, temperature=0, n=2)[0]
    assert a == b and len(a) == 5
    assert generate(lm, [[5], [6]], max_new_tokens=0, eos_token_id=None, n=2) == [[[], []], [[], []]]
    assert generate(lm, [], max_new_tokens=4, eos_token_id=None) == []


def test_prefill_is_shared_and_finished_rows_leave():
    lm, stats = model("gpt_neox"), {}
    generate(lm, [[1] * 20], max_new_tokens=4, eos_token_id=None, n=8, stats=stats)
    assert stats == {"forwards": 4, "columns": 20 + 3 * 8}
    prompts, eos, stats = ragged(8, 10), [3, 5, 8], {}
    out = generate(lm, prompts, max_new_tokens=30, eos_token_id=eos, stats=stats)
    prefill = 8 * max(map(len, prompts))  # then every token but the last of its row is fed once, and nothing else
    assert stats["columns"] == prefill + sum(len(row) - 1 for (row,) in out)


def test_waiting_prompts_take_the_place_of_finished_ones():
    lm, prompts, eos, stats, refilled = model("mistral"), ragged(24, 20), [3, 5, 8], {}, {}
    args = {"max_new_tokens": 30, "eos_token_id": eos}
    whole = generate(lm, prompts, **args)
    for b in range(0, 24, 4):
        generate(lm, sorted(prompts, key=len)[b : b + 4], **args, stats=stats)
    assert generate(lm, prompts, batch_size=4, **args, stats=refilled) == whole
    assert refilled["forwards"] < stats["forwards"]


@pytest.mark.parametrize("n", [1, 3])
def test_each_prompt_is_handed_over_once_and_as_soon_as_it_is_finished(n):
    lm, prompts, at, made = model("llama"), ragged(40, 20), [], {}
    args = {"max_new_tokens": 30, "eos_token_id": [3, 5, 8], "n": n, "batch_size": 4 * n}
    hook = lm.register_forward_pre_hook(lambda *_: at.append(len(made)))

    def each(i, samples):
        assert i not in made
        made[i] = samples

    assert generate(lm, prompts, each=each, **args) == []
    hook.remove()
    assert [made[i] for i in range(40)] == generate(lm, prompts, **args)
    assert 0 < at[len(at) // 2] < 40  # some were handed over while others were still to be decoded
    made.clear()
    generate(lm, prompts[:3], each=each, **args | {"max_new_tokens": 0})
    assert made == {i: [[]] * n for i in range(3)}


# ------------------------------------------------------------------------------------------------------------ the cache


@pytest.mark.parametrize("arch", ["gpt_neox", "mistral", "llama"])
@pytest.mark.parametrize("free", [0, 1, 5])
def test_where_the_buffers_grow_changes_nothing(arch, free, monkeypatch):
    lm, prompts = model(arch), ragged(12, 20)
    args = {"max_new_tokens": 30, "eos_token_id": [3, 5, 8], "n": 2}
    whole = generate(lm, prompts, **args)
    monkeypatch.setattr("core.kv_cache.FREE", free)  # grown at every token, at every second one, …
    assert generate(lm, prompts, **args) == whole
    assert generate(lm, prompts, batch_size=5, **args) == whole


def test_more_tokens_than_a_buffer_has_free_columns():
    lm, prompt = model("mistral"), [4, 5, 6]
    tokens = list(prompt)
    for _ in range(150):
        tokens.append(int(next_logits(lm, tokens).argmax()))
    assert generate(lm, [prompt], max_new_tokens=150, eos_token_id=None, temperature=0) == [[tokens[3:]]]


def test_rows_leave_and_join_in_place():
    def states(rows, columns):  # keys and values of two layers
        return [tuple(torch.randn(rows, 2, columns, 4) for _ in range(2)) for _ in range(2)]

    def update(cache, new):
        return [cache.update(*kv, layer_idx=i) for i, kv in enumerate(new)]

    def same(cache, expected):
        return all(torch.equal(a, b) for layer, kv in zip(cache.layers, expected) for a, b in zip(layer.used(), kv))

    torch.manual_seed(0)
    cache, other = (Cache(layer_class_to_replicate=Columns) for _ in range(2))
    first, more, late, last = states(6, 7), states(6, 1), states(2, 3), states(6, 80)
    update(cache, first)
    where = [layer.keys.data_ptr() for layer in cache.layers]
    expected = [tuple(torch.cat(pair, 2) for pair in zip(*kvs)) for kvs in zip(first, more)]
    assert all(torch.equal(a, b) for kv, ref in zip(update(cache, more), expected) for a, b in zip(kv, ref))
    order = keep_rows(cache, [0, 2, 4, 5], torch.tensor([4, 9, 5, 9, 3, 2]))  # 4 and 5 need places among the first four
    assert sorted(order) == [0, 2, 4, 5] and order[0] == 0 and order[2] == 2  # 0 and 2 stay where they are
    expected = [tuple(t[order][:, :, -5:] for t in kv) for kv in expected]
    assert same(cache, expected) and cache.get_seq_length() == 5
    update(other, late)
    join(cache, other)
    padded = [tuple(torch.cat([t.new_zeros(2, 2, 2, 4), t], 2) for t in kv) for kv in late]
    expected = [tuple(torch.cat(pair) for pair in zip(*kvs)) for kvs in zip(expected, padded)]
    assert same(cache, expected)
    assert [layer.keys.data_ptr() for layer in cache.layers] == where  # nothing was allocated since the first update
    update(cache, last)  # more than there is room for
    assert same(cache, [tuple(torch.cat(pair, 2) for pair in zip(*kvs)) for kvs in zip(expected, last)])
    assert keep_rows(cache, [], torch.ones(6)) == [] and cache.layers[0].used()[0].numel() == 0


def test_the_model_is_left_as_it_was():
    lm = model("llama").train()
    getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)()  # by transformers' version
    lm.model.layers[1].eval()
    reference = generate(model("llama"), [[5, 6, 7]], max_new_tokens=8, eos_token_id=None)
    assert generate(lm, [[5, 6, 7]], max_new_tokens=8, eos_token_id=None) == reference
    assert lm.training and lm.model.layers[0].training and not lm.model.layers[1].training
    assert not lm._forward_pre_hooks and torch.is_grad_enabled()
    with pytest.raises(IndexError):
        generate(lm, [[V + 5]], max_new_tokens=2, eos_token_id=None)
    assert lm.training and not lm._forward_pre_hooks and torch.is_grad_enabled()


# ----------------------------------------------------------------------------------------------------- the distribution


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_frequencies_against_enumeration(temperature):
    lm, prompt, count = model("gpt_neox", vocab=5, initializer_range=0.4), [4, 1], 6000
    p = torch.zeros(5, 5, 5)
    for a, b in itertools.product(range(5), range(5)):
        after = [next_logits(lm, context) / temperature for context in (prompt, prompt + [a], prompt + [a, b])]
        p[a, b] = after[0].softmax(-1)[a] * after[1].softmax(-1)[b] * after[2].softmax(-1)
    assert torch.allclose(p.sum(), torch.tensor(1.0)) and p.max() < 0.5
    rows = generate(
        lm, [prompt], max_new_tokens=3, eos_token_id=None, n=count, temperature=temperature, batch_size=1000
    )[0]
    counts = torch.zeros(5, 5, 5)
    counts.index_put_(tuple(torch.tensor(rows).T), torch.ones(count), accumulate=True)
    assert chi_square_ok(counts.flatten(), p.flatten())


def nucleus(logits: torch.Tensor, temperature: float, top_p: float, top_k: int) -> torch.Tensor:
    """The cut distribution, by sorting: [V] -> [V]."""
    p = (logits.double() / temperature).softmax(-1)
    order = p.argsort(descending=True)
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    above = p[order].cumsum(-1) - p[order]
    p[order[above >= top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "top_p,top_k", [(1.0, 0), (0.9, 0), (0.5, 0), (1e-6, 0), (1.0, 7), (0.8, 7), (1.0, 1), (0.9, 99)]
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_top_p_and_top_k(temperature, top_p, top_k):
    torch.manual_seed(0)
    logits, count = torch.randn(20) * 1.5, 20000
    p = nucleus(logits, temperature, top_p, top_k if top_k < 20 else 0)
    keys = noise_keys(0, [0], [0], count)[0]
    counts = draw(logits.expand(count, -1), keys, temperature, top_p, top_k).bincount(minlength=20)
    assert counts[p == 0].sum() == 0  # the support is exact
    assert (counts[p > 1e-3] > 0).all()
    assert chi_square_ok(counts[p > 0].float(), p[p > 0].float()) if (p > 0).sum() > 1 else True


def test_top_p_of_a_row_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    logits, keys = torch.randn(40, 100) * 3, noise_keys(1, [0], [0], 40)[0]
    together = draw(logits, keys, 1.0, 0.4, 20)
    assert together.tolist() == [int(draw(logits[i : i + 1], keys[i : i + 1], 1.0, 0.4, 20)) for i in range(40)]


def test_extreme_logits_and_low_precision():
    keys = noise_keys(0, [0], [0], 4)[0]
    logits = torch.tensor([[0.0, -torch.inf, 3e38, 1.0]]).expand(4, -1)
    for temperature in (0, 1e-30, 1.0, 100.0):
        assert draw(logits, keys, temperature, 0.9).tolist() == [2] * 4
    assert 1 not in draw(torch.tensor([[0.0, -torch.inf, 0.0]]).expand(4, -1), keys, 1.0)
    half = torch.randn(4, 50).bfloat16()
    assert torch.equal(draw(half, keys, 1.0), draw(half.float(), keys, 1.0))


# ------------------------------------------------------------------------------------------------------------ the noise


def test_noise_is_finite_even_at_the_ends_of_its_range():
    for word in (0, -1, 1, 2**31, 2**63 - 1, -(2**63)):
        assert gumbel(torch.tensor([word]), 50000).isfinite().all()
    u = torch.tensor([0, 1, 2**31 - 1]).float().add_(0.5).mul_(2.0**-31 * (1 - 2.0**-24))  # as in `gumbel`
    g = -(-(-u).log1p()).log()
    assert g.isfinite().all() and g[0] > 21 and -3 < g[2] < -2


def test_noise_is_gumbel_and_uniform_over_every_axis():
    keys = torch.cat([noise_keys(0, list(range(100)), [s] * 100, 10) for s in (-1, 0, 1)])  # [300, 10]
    u = (-(-gumbel(keys.flatten(), 2000)).exp()).exp().view(300, 10, 2000)  # exp(-exp(-g)) is uniform

    def uniform(x, bins=64):
        counts = torch.histc(x, bins, 0, 1)
        return ((counts - x.numel() / bins) ** 2).sum() / (x.numel() / bins)  # mean bins - 1, variance 2 (bins - 1)

    assert abs(uniform(u.flatten()) - 63) < 5 * 126**0.5
    for axis in range(3):  # per example, per position, per vocabulary entry
        sums = torch.stack([uniform(x.flatten()) for x in u.movedim(axis, 0)[:200]])
        assert abs(sums.mean() - 63) < 5 * (126 / len(sums)) ** 0.5
        assert sums.max() < 63 + 6 * 126**0.5


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("lag", [1, 2, 8])
def test_neighbours_are_independent(axis, lag):
    """Pairs of neighbours (example, position, vocabulary entry) on an 8 × 8 grid, and their upper tails."""
    u = (-(-gumbel(noise_keys(0, list(range(100)), [0] * 100, 20).flatten(), 500)).exp()).exp().view(100, 20, 500)
    a, b = u.narrow(axis, 0, u.shape[axis] - lag).flatten(), u.narrow(axis, lag, u.shape[axis] - lag).flatten()
    counts = ((a * 8).long().clamp(max=7) * 8 + (b * 8).long().clamp(max=7)).bincount(minlength=64).float()
    expected = len(a) / 64
    assert abs(((counts - expected) ** 2).sum() / expected - 63) < 5 * 126**0.5
    tail = ((a > 0.99) & (b > 0.99)).sum()
    assert abs(tail - len(a) * 1e-4) < 5 * (len(a) * 1e-4) ** 0.5


def test_keys_do_not_collide_and_differ_by_each_part():
    ids = list(range(200))
    keys = torch.cat([noise_keys(seed, ids, [s] * 200, 50).flatten() for seed in (0, 1) for s in (-1, 0, 1)])
    assert len(keys.unique()) == len(keys) == 60000
    assert torch.equal(noise_keys(3, [7, 8], [0, 0], 5)[1], noise_keys(3, [8], [0], 9)[0, :5])
    bits = (keys[:, None] >> torch.arange(64) & 1).float().mean(0)  # [64]
    assert (bits - 0.5).abs().max() < 5 * 0.5 / 60000**0.5
    assert noise_keys(0, [1], [0], 1).tolist() == [[GOLDEN_KEY]]  # the noise of a seed stays what it is, over releases


GOLDEN_KEY = 3909277451026864844


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_noise_is_the_same_on_the_gpu():
    keys = noise_keys(0, list(range(50)), [0] * 50, 20).flatten()
    here, there = gumbel(keys, 5000), gumbel(keys.cuda(), 5000).cpu()
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)
    logits = torch.randn(1000, 5000)
    assert (draw(logits, keys, 1.0) == draw(logits.cuda(), keys.cuda(), 1.0).cpu()).float().mean() > 0.999


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "bad,message",
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": torch.tensor([[1, 2], [3, 4]])}, r"must be lists of token ids, .*: input_ids.tolist\(\)"),
        ({"ids": [1]}, "2 prompts but 1 ids"),
        ({"temperature": -0.1}, "temperature must be at least 0, not -0.1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], not 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], not 1.1"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"n": 0}, "n at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_new_tokens": -1}, "max_new_tokens at least 0"),
        ({"max_new_tokens": 255}, r"prompt 1: 2 \+ 255 tokens exceed the model's 256 positions"),
    ],
)
def test_bad_input_is_one_clear_line(bad, message):
    args = {"prompts": [[1], [2, 3]], "max_new_tokens": 4, "eos_token_id": None, **bad}
    with pytest.raises(ValueError, match=message) as error:
        generate(model("gpt2"), args.pop("prompts"), **args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fixed", [False, True])
def test_nan_behind_the_prompt_is_an_error(fixed):
    """One token's embedding is broken: the prompts do not hold it, what is drawn does."""
    lm = model("llama")
    prompt = [1, 2, 3]
    drawn = generate(lm, [prompt], max_new_tokens=4, eos_token_id=None, temperature=0)[0][0]
    assert drawn[0] not in prompt
    broken = lm.get_input_embeddings().weight.detach().clone()  # not tied to the output matrix
    broken[drawn[0]] = float("nan")
    lm.get_input_embeddings().weight = torch.nn.Parameter(broken)
    options = {"max_new_tokens": 4, "eos_token_id": None, "temperature": 0, "fixed": fixed}
    with pytest.raises(ValueError, match="the model's logits are NaN"):
        generate(lm, [prompt], **options)
    if not fixed:  # there the last token is never read
        assert len(generate(lm, [prompt], **(options | {"max_new_tokens": 1}))[0][0]) == 1


def test_an_end_may_be_any_integer():
    import numpy as np

    lm = model("llama")
    one, two = (generate(lm, [[1, 2, 3]], max_new_tokens=12, eos_token_id=end) for end in (5, np.int64(5)))
    assert one == two
    with pytest.raises(ValueError, match="temperature must be at least 0, not nan"):
        generate(lm, [[1, 2, 3]], max_new_tokens=2, eos_token_id=5, temperature=float("nan"))
