"""generate.mix, Eq. 4: against a plain loop and exact enumeration, and its two fast methods against its definition."""

import itertools
import random

import pytest
import torch

from core.noise import draw, noise_keys
from core.windows import Windows, windows_of
from generate import REDRAW, coins, generate, mix
from test_generate import V, chi_square_ok, next_logits, ragged
from tiny import ARCHS, model

torch.set_num_threads(1)
METHODS = ("token", "parallel", "segment")


def pairs(longest: int = 30, vocab: int = V):
    """Prompts of 1 … 20 tokens; responses of very different lengths, the empty one and that of one token among them."""
    rng = random.Random(1)
    lengths = [0, 1, longest, 2, *(rng.randint(3, longest // 2) for _ in range(3))]
    return ragged(len(lengths), 20, vocab=vocab), [[rng.randrange(vocab) for _ in range(length)] for length in lengths]


def plain(lm, prompt, y, *, beta, temperature, seed, example):
    """Eq. 4 for one row, with nothing but the model: no cache, no padding, no batch."""
    g, keys = list(y), noise_keys(seed, [example], [0], len(y))
    for j in coins(seed, example, len(y), beta):
        g[j] = int(draw(next_logits(lm, prompt + g[:j])[None], keys[:, j], temperature))
    return g


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("arch", ARCHS)
def test_three_methods_draw_the_same_tokens(arch, temperature):
    """… and those of the plain loop; for every β and batch size, with the window of Mistral (8) far exceeded."""
    lm, (prompts, ys) = model(arch), pairs()
    for beta in (0, 0.05, 0.2, 0.5, 1):
        args = {"beta": beta, "temperature": temperature, "seed": 5}
        reference = [plain(lm, x, y, example=i, **args) for i, (x, y) in enumerate(zip(prompts, ys))]
        assert [len(g) for g in reference] == [len(y) for y in ys]
        assert (reference == ys) == (beta == 0)
        for method, batch_size in itertools.product(METHODS, (3, 64) if 0 < beta < 1 else (3,)):
            assert mix(lm, prompts, ys, method=method, batch_size=batch_size, **args) == reference, (beta, method)
        assert mix(lm, prompts, ys, batch_size=1, **args) == reference  # auto


@pytest.mark.parametrize("method", METHODS)
def test_order_ids_and_company_change_nothing(method):
    lm, (prompts, ys) = model("gpt_neox"), pairs()
    args = {"beta": 0.4, "seed": 2, "method": method}
    whole, order = mix(lm, prompts, ys, **args), [4, 0, 6, 2, 5, 1, 3]
    assert mix(lm, [prompts[i] for i in order], [ys[i] for i in order], ids=order, **args) == [whole[i] for i in order]
    assert mix(lm, prompts[1::2], ys[1::2], ids=[1, 3, 5], **args) == whole[1::2]
    assert mix(lm, prompts, ys, **{**args, "seed": 3}) != whole
    assert ys == pairs()[1]  # the responses given are left alone
    shorter = mix(lm, prompts, [y[:10] for y in ys], **args)  # by causality, and because noise belongs to a position
    assert shorter == [g[:10] for g in whole]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_frequencies_against_enumeration(method, beta):
    """p(g) is the product of β p(g^j | x, g^{<j}) + (1 - β) 1(g^j = y^j) over j."""
    lm, x, y, count = model("llama", vocab=5, initializer_range=0.4), [4, 1], [2, 0, 3], 4000
    p = torch.ones(5, 5, 5)
    for g in itertools.product(range(5), repeat=3):
        for j in range(3):
            p_z = next_logits(lm, x + list(g[:j])).softmax(-1)[g[j]]
            p[g] *= beta * p_z + (1 - beta) * (g[j] == y[j])
    assert torch.allclose(p.sum(), torch.tensor(1.0))
    rows = mix(lm, [x] * count, [y] * count, beta=beta, method=method, batch_size=1000)
    counts = torch.zeros(5, 5, 5)
    counts.index_put_(tuple(torch.tensor(rows).T), torch.ones(count), accumulate=True)
    assert chi_square_ok(counts.flatten(), p.flatten())


def test_coins_are_bernoulli_and_independent_of_the_noise():
    drawn = torch.zeros(400, 100)
    for i in range(400):
        drawn[i, coins(0, i, 100, 0.2)] = 1
    assert abs(drawn.mean() - 0.2) < 5 * (0.16 / 40000) ** 0.5
    for a, b in ((drawn[:, 1:], drawn[:, :-1]), (drawn[1:], drawn[:-1])):
        assert abs((a * b).mean() - 0.04) < 5 * (0.04 / a.numel()) ** 0.5
    z = draw(torch.zeros(40000, 10), noise_keys(0, list(range(400)), [0] * 400, 100).flatten(), 1.0)
    counts = z[drawn.flatten().bool()].bincount(minlength=10).float()
    assert chi_square_ok(counts, torch.full((10,), 0.1))
    assert set(coins(0, 3, 100, 0.1)) < set(coins(0, 3, 100, 0.2)) < set(range(100)) == set(coins(0, 3, 100, 1))


def test_beta_one_is_plain_sampling_and_eos_is_a_token():
    lm, (prompts, ys) = model("qwen2"), pairs()
    length = max(map(len, ys))
    z = generate(lm, prompts, max_new_tokens=length, eos_token_id=None, seed=9)
    expected = [row[: len(y)] for (row,), y in zip(z, ys)]
    eos = expected[2][length // 2]  # drawn in the middle
    lm.config.eos_token_id = lm.generation_config.eos_token_id = eos
    for method in METHODS:
        assert mix(lm, prompts, ys, beta=1, seed=9, method=method) == expected


def test_temperature_zero_is_argmax():
    lm, (prompts, ys) = model("llama"), pairs()
    greedy = generate(lm, prompts, max_new_tokens=40, eos_token_id=None, temperature=0)
    expected = [g[: len(y)] for (g,), y in zip(greedy, ys)]
    for method in METHODS:
        assert mix(lm, prompts, ys, beta=1, temperature=0, method=method) == expected


def test_what_the_methods_cost():
    lm, (prompts, ys) = model("llama"), pairs()
    stats = {}
    assert mix(lm, prompts, ys, beta=0, stats=stats) == ys and stats.get("forwards", 0) == 0
    assert mix(lm, prompts[:1], [[]], beta=1, stats=stats) == [[]] and stats.get("forwards", 0) == 0
    drawn = [coins(0, i, len(y), 0.2) for i, y in enumerate(ys)]
    cost = {method: {} for method in METHODS}
    for method in METHODS:
        mix(lm, prompts, ys, beta=0.2, method=method, stats=cost[method])
    forwards = {method: cost[method]["forwards"] for method in METHODS}
    assert forwards["token"] == 1 + max(row[-1] for row in drawn if row)
    assert forwards["segment"] == max(map(len, drawn))
    assert forwards["parallel"] <= forwards["segment"] < forwards["token"]
    width = max(len(prompts[i]) for i in range(len(ys)) if drawn[i])  # later passes are shorter, and of fewer rows
    whole = sum(map(bool, drawn)) * (width + max(row[-1] for row in drawn if row))
    assert cost["parallel"]["columns"] < forwards["parallel"] * whole


def watch(lm) -> tuple[list[dict], torch.utils.hooks.RemovableHandle]:
    """The ids, mask and positions of every forward from now on, and the hook that takes them down."""
    seen: list[dict] = []

    def note(module, args, kwargs):
        seen.append({key: kwargs[key].clone() for key in ("input_ids", "attention_mask", "position_ids")})

    return seen, lm.register_forward_pre_hook(note, with_kwargs=True)


@pytest.mark.parametrize("method", METHODS)
def test_the_prompt_is_fed_once_and_passes_go_on_from_what_is_settled(method):
    lm, (prompts, ys) = model("gpt_neox"), pairs(60)
    seen, hook = watch(lm)
    (g,) = mix(lm, prompts[2:3], ys[2:3], beta=0.3, ids=[7], method=method)
    hook.remove()
    prompt, last = prompts[2], coins(0, 7, 60, 0.3)[-1]
    first = [int(inputs["position_ids"][0, 0]) for inputs in seen]  # where each forward begins
    assert first[0] == 0 and all(position >= len(prompt) for position in first[1:])
    assert first == sorted(set(first)) and len(first) > 2
    whole = prompt + g
    for at, inputs in zip(first, seen):
        assert inputs["input_ids"][0, 0] == whole[at]  # it begins with a token that is final …
        assert inputs["attention_mask"].sum() == at + inputs["input_ids"].shape[1]  # … behind all that are
    for inputs, after in zip(seen, [*first[1:], len(prompt) + last]):  # and is right about all before the next begins
        at = int(inputs["position_ids"][0, 0])
        assert inputs["input_ids"][0, : after - at].tolist() == whole[at:after]
    changed = [
        next((i for i, token in enumerate(inputs["input_ids"][0].tolist()) if token != whole[at + i]), None)
        for at, inputs in zip(first, seen)
    ]
    if method != "parallel":
        assert set(changed) == {None}  # they feed nothing in vain
    else:  # a pass begins at the first token that the pass before had not right, or behind its window
        for at, inputs, wrong, after in zip(first, seen, changed, first[1:]):
            assert after == at + (inputs["input_ids"].shape[1] if wrong is None else wrong)


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_are_done_leave_and_rows_without_a_coin_never_come(method):
    lm, (prompts, ys) = model("qwen2"), pairs()
    drawn = [coins(0, i, len(y), 0.3) for i, y in enumerate(ys)]
    seen, hook = watch(lm)
    mix(lm, prompts, ys, beta=0.3, method=method)
    hook.remove()
    rows = [len(inputs["input_ids"]) for inputs in seen]
    assert rows[0] == sum(map(bool, drawn)) < len(ys)
    assert rows == sorted(rows, reverse=True) and rows[-1] < rows[0]
    if method == "token":
        assert rows[1:] == [sum(bool(row) and row[-1] > j for row in drawn) for j in range(len(rows) - 1)]


@pytest.mark.parametrize("method", METHODS)
def test_noise_is_drawn_at_the_drawn_positions_only(method, monkeypatch):
    lm, (prompts, ys), used = model("llama"), pairs(), []
    monkeypatch.setattr(
        "generate.draw", lambda logits, keys, *rest: used.extend(keys.tolist()) or draw(logits, keys, *rest)
    )
    mix(lm, prompts, ys, beta=0.3, seed=4, method=method)
    keys = {int(noise_keys(4, [i], [0], len(y))[0, j]) for i, y in enumerate(ys) for j in coins(4, i, len(y), 0.3)}
    assert set(used) == keys
    assert method == "parallel" or len(used) == len(keys)  # once each; a pass of "parallel" draws them again


@pytest.mark.parametrize("beta", [0.2, 0.5])
def test_an_eos_in_the_middle_and_rows_of_very_different_length(beta):
    lm = model("mistral", vocab=8)  # so few tokens that EOS (1) is drawn again and again
    rng = random.Random(3)
    ys = [[rng.randrange(8) for _ in range(length)] for length in (200, 1, 3, 90, 2, 40)]
    prompts = [[rng.randrange(8) for _ in range(length)] for length in (1, 50, 7, 2, 30, 1)]
    reference = [
        plain(lm, x, y, beta=beta, temperature=1.0, seed=0, example=i) for i, (x, y) in enumerate(zip(prompts, ys))
    ]
    assert any(1 in g[:-1] and g[j] == 1 for i, g in enumerate(reference) for j in coins(0, i, len(g), beta))
    for method in METHODS:
        assert mix(lm, prompts, ys, beta=beta, method=method) == reference


@pytest.mark.parametrize("arch", ["mistral", "gpt2"])
@pytest.mark.parametrize("redraw", [0, 1, 8, 10**6])
def test_the_window_of_a_parallel_pass_changes_nothing(arch, redraw, monkeypatch):
    lm, (prompts, ys) = model(arch), pairs()
    reference = mix(lm, prompts, ys, beta=0.3, method="token")
    monkeypatch.setitem(REDRAW, "cpu", redraw)  # windows of one token up to the whole response
    assert mix(lm, prompts, ys, beta=0.3, method="parallel") == reference


@pytest.mark.parametrize("arch", ["gpt_neox", "mistral"])
def test_windows_by_measured_cost_change_nothing(arch, monkeypatch):
    lm, (prompts, ys) = model(arch), pairs()
    reference = mix(lm, prompts, ys, beta=0.3, method="token")
    monkeypatch.delitem(REDRAW, "cpu")
    for batch_size in (64, 2, 1):
        assert mix(lm, prompts, ys, beta=0.3, method="parallel", batch_size=batch_size) == reference
    seen = windows_of(lm)
    assert 2 <= len(seen.seconds) and 0 < seen.changes <= seen.settled


@pytest.mark.parametrize("h", [0.02, 0.2])
@pytest.mark.parametrize("flat", [0, 500, 20000])
def test_the_window_is_near_the_best(h, flat):
    """Passes that cost `flat` + tokens, over 16 rows of which a column changes with probability h."""
    seen, rng, rows = Windows(), random.Random(0), 16

    def cost(tokens):
        return (flat + tokens) * 1e-6

    def rate(w):
        return (1 - (1 - h) ** w) / h / cost(rows * w)

    w = 64
    for _ in range(150):
        first = [next((j for j in range(1, w + 1) if rng.random() < h), None) for _ in range(rows)]
        seen.saw(rows * w, cost(rows * w), sum(j or w for j in first), sum(j is not None for j in first))
        w = seen.choose(rows)
    assert rate(w) > 0.85 * max(rate(2**k) for k in range(13))


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_was(method):
    lm, (prompts, ys) = model("gpt_neox", hidden_dropout=0.5).train(), pairs()
    assert mix(lm, prompts, ys, beta=0.5, method=method) == mix(lm.eval(), prompts, ys, beta=0.5, method=method)
    lm.train()
    mix(lm, prompts, ys, beta=0.5, method=method)
    assert lm.training and torch.is_grad_enabled()
    assert not lm._forward_pre_hooks and not lm.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize(
    "bad,message",
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"responses": [[1]]}, "2 prompts but 1 responses"),
        ({"ids": [1, 2, 3]}, "2 prompts but 3 ids"),
        ({"beta": -0.1}, r"beta must be in \[0, 1\], not -0.1"),
        ({"beta": 1.5}, r"beta must be in \[0, 1\], not 1.5"),
        ({"beta": float("nan")}, r"beta must be in \[0, 1\], not nan"),
        ({"temperature": -1}, "temperature must be at least 0, not -1"),
        ({"method": "fast"}, "method must be one of auto, token, parallel, segment, not 'fast'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"responses": [[1], [2] * 255]}, r"prompt 1: 2 \+ 255 tokens exceed the model's 256 positions"),
    ],
)
def test_bad_input_is_one_clear_line(bad, message):
    args = {"prompts": [[1], [2, 3]], "responses": [[4], [5]], "beta": 0.2, **bad}
    with pytest.raises(ValueError, match=message) as error:
        mix(model("gpt2"), args.pop("prompts"), args.pop("responses"), **args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", METHODS)
def test_each_row_is_handed_over_once(method):
    lm, (prompts, ys), made = model("gpt_neox"), pairs(), {}
    args = {"beta": 0.3, "seed": 2, "method": method, "batch_size": 2}

    def each(i, g):
        assert i not in made
        made[i] = g

    assert mix(lm, prompts, ys, each=each, **args) == []
    assert [made[i] for i in range(len(ys))] == mix(lm, prompts, ys, **args)


@pytest.mark.parametrize("method", ["token", "parallel", "segment"])
def test_a_model_that_computes_nan_is_an_error(method):
    lm = model("llama")
    torch.nn.init.constant_(lm.model.layers[-1].mlp.down_proj.weight, float("nan"))
    with pytest.raises(ValueError, match="the model's logits are NaN"):
        mix(lm, [[1, 2, 3]], [[4, 5, 6, 7]], beta=0.5, method=method)
