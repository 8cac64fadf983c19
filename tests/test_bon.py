"""BoN: weights and losses against enumeration, brute force and autograd of the exact objective; and as a command."""

import inspect
import itertools
import json
import math
import random
import shutil
from decimal import Decimal, getcontext

import datasets
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import batches
import bon
import bon_options
import data
import ddp_utils
import evaluate
import generate
import sft
import stage
import tiny
import toy
from core import answers, arrow, fsdp, ranks, rows
from core.ranks import cli, fold_in
from test_preferences import log_p
from test_training import largest_difference, log
from tools import show

EOS = tiny.word_tokenizer().eos_token_id
STAGES = {"bon": bon, "sft": sft}
NS = (1, 2, 4, 16, 32)


# ------------------------------------------------------------------------------------------------ bandits
def bandit(seed=0, arms=5):
    """(theta, right, log pi) of a softmax bandit in float64: one token is the whole response."""
    theta = torch.randn(arms, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)
    return theta, torch.arange(arms) % 2 == 1, theta.log_softmax(0)


def grad(value, *params):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, params, retain_graph=True)])


def mean_over_draws(theta, logp, n, weigh):
    """E[1/n sum_i w_i s(z_i)] over all draws of n arms, exactly; w = weigh(draw)."""
    pi, total = logp.detach().exp(), 0.0
    scores = torch.stack([grad(one, theta) for one in logp])  # s(z), [arms, arms]
    for draw in itertools.product(range(len(pi)), repeat=n):
        w = torch.as_tensor(weigh(draw)).double()
        total = total + pi[list(draw)].prod() * (w[:, None] * scores[list(draw)]).mean(0)
    return total


@pytest.mark.parametrize("n, best_of", [(1, 1), (3, 1), (3, 2), (3, 3), (4, 2), (4, 3), (4, 4)])
def test_the_weights_are_unbiased(n, best_of):
    theta, right, logp = bandit()
    wrong = logp.exp()[~right].sum()
    found = mean_over_draws(theta, logp, n, lambda draw: bon.bon_weights(right[None, list(draw)], best_of)[0])
    assert torch.allclose(found, grad(1 - wrong**best_of, theta), atol=1e-7)


def brute(values, best_of, best):
    """n times the mean over all sets of N samples of: best(set) - best(set without i)."""
    n, found = len(values), []
    for i in range(n):
        sets = [some for some in itertools.combinations(range(n), best_of) if i in some]
        less = sum(best(some) - best(tuple(j for j in some if j != i)) for some in sets)
        found.append(n * less / math.comb(n, best_of))
    return found


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_the_weights_are_what_a_sample_adds_to_sets_of_n(n):
    rng = random.Random(n)
    for best_of in range(1, n + 1):
        for c in range(n + 1):
            right = [i < c for i in range(n)]
            rng.shuffle(right)
            expected = brute(right, best_of, lambda some: float(any(right[i] for i in some)))  # noqa: B023
            assert bon.bon_weights(torch.tensor([right]), best_of)[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_one_of_one_is_rejection_sampling_and_one_of_n_best_minus_second():
    right = torch.tensor([[True, False, True, False], [False] * 4, [False, True, False, False], [True] * 4])
    assert torch.equal(bon.bon_weights(right, 1), right.float())
    only = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0]])  # n where it is alone
    assert torch.equal(bon.bon_weights(right, 4), only.float())
    for best_of in (0, 5):
        with pytest.raises(ValueError, match=f"best_of must be in 1 ... n, not {best_of} of 4 samples"):
            bon.bon_weights(right, best_of)


def test_many_samples_do_not_overflow():
    right = torch.arange(1000)[None] < 3
    w = bon.bon_weights(right, 500)[0, 0].item()  # 500 C(997, 499) / C(999, 499)
    assert w == pytest.approx(500 * (500 * 499) / (999 * 998), rel=1e-6) and bon.bon_weights(~right, 500).sum() == 0


def pi_bon(logp, right, best_of):
    """Of the best of N samples, equal ones broken at random: by enumeration of all draws."""
    pi, found = logp.exp(), [0.0] * len(logp)
    for draw in itertools.product(range(len(pi)), repeat=best_of):
        best = [z for z in draw if right[z]] or list(draw)
        for z in best:
            found[z] = found[z] + pi[list(draw)].prod() / len(best)
    return torch.stack(found)


@pytest.mark.parametrize("best_of", NS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_closed_forms_of_the_paper(best_of, seed):
    """g E[s | right] is grad log J, if drawn from pi_bon grad J; s(y) - (1 - g) E[s | right] is grad log pi_bon(y)."""
    theta, right, logp = bandit(seed, arms=4)
    wrong = logp.exp()[~right].sum()
    g = bon_options.g(wrong.item(), best_of)
    s_right = grad((logp.exp().detach() * logp)[right].sum() / (1 - wrong).detach(), theta)  # E[s | right]
    assert torch.allclose(g * s_right, grad(torch.log(1 - wrong**best_of), theta), atol=1e-12)
    best = torch.where(right, logp.exp() * (1 - wrong**best_of) / (1 - wrong), 0)
    if best_of <= 4:
        assert torch.allclose(best[right], pi_bon(logp, right, best_of)[right])
    drawn = sum(g * best[y].detach() * grad(logp[y], theta) for y in right.nonzero()[:, 0])
    assert torch.allclose(drawn, grad(1 - wrong**best_of, theta), atol=1e-12)
    for y in right.nonzero()[:, 0]:
        expected = grad(torch.log(best[y]), theta)
        assert torch.allclose(grad(logp[y], theta) - (1 - g) * s_right, expected, atol=1e-12)


def test_g_at_its_ends():
    assert [bon_options.g(1.0, n) for n in NS] == [1] * 5
    assert [bon_options.g(0.0, n) for n in NS] == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("best_of", NS)
def test_the_papers_weights_through_the_loss(best_of):
    """Of samples that are spread just as pi is, so that c / n is exact: -bon_loss / n is grad log J, and so on."""
    draw = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])  # eighths
    theta = (torch.bincount(draw) / 8).double().log().requires_grad_()
    logp, right = theta.log_softmax(0), torch.tensor([False, True, False, True])
    wrong = logp.exp()[~right].sum()

    def through(weights):
        w = weights(right[draw][None], best_of)[0]
        total, n = bon.bon_loss(theta.expand(8, 1, 4), draw[:, None], w, torch.ones(8, 1))
        assert n == 8
        return grad(-total / 8, theta)

    assert torch.allclose(through(bon_options.rlb_weights), grad(torch.log(1 - wrong**best_of), theta), atol=1e-6)
    best = torch.log(1 - wrong**best_of) - torch.log(1 - wrong)  # log pi_bon(y) less log pi(y)
    assert torch.allclose(through(bon_options.bon_sft_weights), grad(best, theta), atol=1e-6)
    if best_of == 1:
        assert torch.allclose(8 * through(bon.bon_weights) / 8, grad(1 - wrong, theta), atol=1e-6)


# ------------------------------------------------------------------------------------------------ a verifier's score
@pytest.mark.parametrize("best_of", [1, 2, 3, 4])
def test_rank_weights_are_unbiased(best_of):
    """J: is the one with the highest score right; a score that is not the reward, with a tie (broken at random)."""
    theta, right, logp = bandit(3)
    score, n, j = [0.3, 0.1, 0.7, 0.3, 0.5], 4, 0.0
    for draw in itertools.product(range(5), repeat=best_of):
        top = max(score[z] for z in draw)
        best = [float(right[z]) for z in draw if score[z] == top]
        j = j + logp[list(draw)].sum().exp() * sum(best) / len(best)

    def weigh(draw):
        return bon_options.rank_weights([bool(right[z]) for z in draw], [score[z] for z in draw], best_of)

    assert torch.allclose(mean_over_draws(theta, logp, n, weigh), grad(j, theta), atol=1e-12)


def test_rank_weights_by_brute_force_and_where_the_score_is_the_reward():
    rng = random.Random(0)
    for n in (1, 2, 5, 6):
        right, score = [rng.random() < 0.5 for _ in range(n)], [rng.choice([0.1, 0.2, 0.3]) for _ in range(n)]

        def best(some):
            return float(right[max(some, key=lambda i: (score[i], -i))]) if some else 0.0  # noqa: B023

        for k in range(1, n + 1):
            assert bon_options.rank_weights(right, score, k) == pytest.approx(brute(right, k, best))
            plain = bon.bon_weights(torch.tensor([right]), k)[0].tolist()
            assert bon_options.rank_weights(right, [float(r) for r in right], k) == pytest.approx(plain)
            sets = [best(some) for some in itertools.combinations(range(n), k)]
            assert answers.best_of_k(right, score, k) == pytest.approx(sum(sets) / len(sets))
            assert answers.best_of_k(right, right, k) == pytest.approx(answers.pass_at_k(n, sum(right), k))
    with pytest.raises(ValueError, match="best-of-k needs 1 <= k <= n"):
        answers.best_of_k([True], [1.0], 2)


# ------------------------------------------------------------------------------------------------ the losses
def test_bon_loss():
    """Against a loop in float64; with weights of 1 it is sft_loss; and pasted elsewhere."""
    gen = torch.Generator().manual_seed(0)
    logits, z = torch.randn(4, 7, 11, generator=gen) * 4, torch.randint(11, (4, 7), generator=gen)
    mask, weight = torch.arange(7) < torch.tensor([7, 3, 1, 0])[:, None], torch.tensor([1.5, 0.0, -2.0, 9.0])
    loss, n = bon.bon_loss(logits, z, weight, mask)
    logp = logits.double().log_softmax(-1)
    expected = -sum(weight[b] * logp[b, j, z[b, j]] for b, j in mask.nonzero().tolist())
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(float(expected), rel=1e-6) and n == 11
    ones = bon.bon_loss(logits, z, torch.ones(4), mask)
    assert all(map(torch.equal, ones, sft.sft_loss(logits, z, mask)))
    scope = {"torch": torch, "F": F, "math": math}
    for function in (bon.bon_loss, bon.bon_weights, bon.dco_loss):
        exec("from __future__ import annotations\n" + inspect.getsource(function), scope)
    assert torch.equal(scope["bon_loss"](logits, z, weight, mask)[0], loss)
    assert torch.equal(scope["bon_weights"](mask, 2), bon.bon_weights(mask, 2))


@pytest.mark.parametrize("best_of", NS)
def test_dco_loss(best_of):
    """Value and gradient against 1000 digits, from pi = 1 - 1e-9 to e^-2000; N = 1 is the likelihood."""
    getcontext().prec = 1000
    logp = torch.tensor([-1e-9, -0.01, -0.5, -math.log(2), -3.0, -29.9, -30.1, -87.0, -2000.0], requires_grad=True)
    total, n = bon.dco_loss(logp, best_of)
    (slope,) = torch.autograd.grad(total, logp)
    values = [Decimal(v).exp() for v in logp.tolist()]
    expected = [-(1 - (1 - pi) ** best_of).ln() for pi in values]
    slopes = [-best_of * (1 - pi) ** (best_of - 1) * pi / (1 - (1 - pi) ** best_of) for pi in values]
    assert total.dtype == torch.float32 and n == len(logp)
    assert total.item() == pytest.approx(float(sum(expected)), rel=1e-6)
    assert slope.tolist() == pytest.approx([float(s) for s in slopes], rel=1e-5, abs=1e-8)
    one = torch.zeros(1, requires_grad=True)  # a probability that is rounded to 1
    assert torch.autograd.grad(bon.dco_loss(one, best_of)[0], one)[0].isfinite().all()
    assert bon.dco_loss(logp[:0], best_of)[0] == 0


@pytest.mark.parametrize("best_of", [1, 2, 5])
def test_the_gradient_of_a_model_is_that_of_the_exact_objective(best_of):
    """Responses of one token, so that J is known: bon_loss of every token, as often as it is drawn, with the mean of
    its weight over all draws of the others, n = 5."""
    model, x, n = tiny.model("llama"), [5, 6, 7], 5
    right = torch.arange(64) % 3 == 0
    logits = model(torch.tensor([x]), use_cache=False).logits[0, -1].double()
    p = logits.softmax(0)[~right].sum()
    exact = grad(1 - p**best_of, *model.parameters())
    mean = torch.zeros(64)
    for others in itertools.product([True, False], repeat=n - 1):
        chance = math.prod(1 - p.item() if r else p.item() for r in others)
        for own in (True, False):
            w = bon.bon_weights(torch.tensor([[own, *others]]), best_of)[0, 0]
            mean += torch.where(right == own, chance * w, 0)
    weight = logits.softmax(0).detach().float() * mean
    some = [{"id": 0, "x": x, "y": [], "z": [v], "weight": weight[v].item()} for v in range(64)]
    term = bon.bon_term(some, model.device)
    loss = batches.losses(model, [x] * 64, {"bon": term})["bon"]
    found = grad(-loss, *model.parameters())
    assert torch.allclose(found, exact.float(), atol=1e-5 * exact.abs().max())


# ------------------------------------------------------------------------------------------------ what a step reads
PROMPT = {"id": 3, "x": [5, 6], "y": [9, 1], "z": [[7, 1], [8], [7, 1], [9, 9, 1], [7]], "c": 3}
PROMPT |= {"right": [True, False, True, False, True], "weight": [1.5, 0.0, 1.5, 0.0, 1.5]}


def test_rows_of_a_prompt():
    one, two = bon.rows_of(PROMPT)
    assert one == {"id": 3, "x": [5, 6], "y": [9, 1], "z": [7, 1], "weight": pytest.approx(3 / 5), "drawn": 9 / 5}
    assert two == {"id": 3, "x": [5, 6], "y": [], "z": [7], "weight": pytest.approx(1.5 / 5), "drawn": 0}
    (none,) = bon.rows_of(PROMPT | {"weight": [0.0] * 5})
    assert none == {"id": 3, "x": [5, 6], "y": [9, 1], "z": [], "weight": 0.0, "drawn": 9 / 5}


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_step_reads_the_rows_of_its_prompts(tmp_path, monkeypatch, world_size):
    """From Arrow as from lists; by length, dealt to the ranks, with the counts of all of them on each."""
    rng, prompts = random.Random(0), []
    for i in range(11):
        z = [[rng.randrange(3) for _ in range(rng.randint(1, 3))] for _ in range(6)]
        weight = [float(rng.randrange(3)) * (i > 3) for _ in z]  # the first prompts have none
        prompts.append({"id": i, "x": [5] * rng.randint(1, 9), "y": [6, 1], "z": z, "weight": weight})
    flags = f"--model m --task toy --out {tmp_path} --batch-size 4 --micro-batch-size 2 --checkpoint-every 0"
    monkeypatch.setattr(ddp_utils, "WORLD", world_size)
    dealt: dict[int, list] = {}
    for rank in range(world_size):
        monkeypatch.setattr(ddp_utils, "RANK", rank)
        run = ddp_utils.Run.__new__(ddp_utils.Run)
        run.args, run.phase, run.stopped = stage.parser("").parse_args(flags.split()), 0, False
        run.resume, run.params = {"phase": 0, "step": 0}, [torch.nn.Parameter(torch.zeros(1))]
        for k, step in enumerate(run.steps(datasets.Dataset.from_list(prompts), 1, bon.rows_of)):
            picked = [prompts[i] for i in ddp_utils.batch_rows(11, k, 4, fold_in(0, 0))]
            batch = sorted((row for prompt in picked for row in bon.rows_of(prompt)), key=batches.length)
            assert step.rows == batch and step.ids == [row["id"] for row in batch]
            assert step.tokens("y") == 2 * len(picked)
            drawn = sum(len(z) for prompt in picked for z in prompt["z"]) / 6
            assert sum(row["drawn"] for row in step.rows) == pytest.approx(drawn)
            mine = [row for some in step.micro_batches for row in some]
            assert len(mine) == math.ceil(len(batch) / world_size) and max(map(len, step.micro_batches)) <= 2
            dealt.setdefault(k, []).extend(row for row in mine if row["weight"] != [])
            assert all(row["y"] == row["z"] == [] for row in mine if row["weight"] == [])  # an idle rank's
            run._step = None
            if rank == world_size - 1:
                assert sorted(map(str, dealt[k])) == sorted(map(str, batch))


def test_samples_are_checked_against_the_model():
    model, rows = tiny.model("llama", vocab=60, max_position_embeddings=20), []
    for i in range(50):
        rows.append({"id": i, "x": [5] * (1 + i % 5), "y": [7], "z": [[9] * (1 + (i + k) % 15) for k in range(30)]})
    whole = datasets.Dataset.from_list(rows)
    fsdp.check_rows(model, whole)  # more samples than positions, but none too long
    found = arrow.Rows(whole).columns["z"]
    assert found.longest.tolist() == [15] * 50 and found.lengths.tolist() == [30] * 50
    assert (found.innermost.least, found.innermost.largest) == (9, 9)
    for z, message in (([[9], [9] * 19], "row 41: x and y take up to 21"), ([[9], [60]], "row 41: .* token id 60")):
        changed = [row | ({"z": z} if row["id"] == 41 else {}) for row in rows]
        with pytest.raises(ValueError, match=message):
            fsdp.check_rows(model, datasets.Dataset.from_list(changed))


@pytest.mark.parametrize("share_prompt", [False, True])
@pytest.mark.parametrize("chunk", [2**26, 64 * 3])
def test_equal_samples_merged_are_those_not_merged(monkeypatch, share_prompt, chunk):
    """Also: an idle rank's row, whose lists are empty; and the loss of `losses` against plain forwards."""
    monkeypatch.setattr(batches, "CHUNK", chunk)
    model = tiny.model("llama")
    idle = {"id": 0, "x": [5], "y": [], "z": [], "weight": [], "drawn": []}
    shares = [w / 5 for w in PROMPT["weight"]]  # of the mean over 5 samples
    apart = [{"x": [5, 6], "y": [], "z": z, "weight": w} for z, w in zip(PROMPT["z"], shares)]
    apart[0]["y"] = PROMPT["y"]
    found = []
    for some in ([*bon.rows_of(PROMPT), idle], apart):
        x, y = [row["x"] for row in some], [row["y"] for row in some]
        terms = {"bon": bon.bon_term(some, model.device), "sft": (sft.sft_loss, y, y)}
        sums = batches.losses(model, x, terms, share_prompt)
        plain = batches.losses_by_definition(model, x, terms)
        assert float(plain["bon"]) == pytest.approx(float(sums["bon"]), rel=1e-5)
        found.append((sums["bon"], grad(sums["bon"] + sums["sft"], *model.parameters())))
    assert float(found[0][0]) == pytest.approx(float(found[1][0]), rel=1e-6)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-4)
    expected = -sum(w * log_p(model, [5, 6], z) for z, w in zip(PROMPT["z"], shares))
    assert float(found[0][0]) == pytest.approx(expected.item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------ the command
def text(rng, longest):
    return " ".join(str(rng.randrange(40)) for _ in range(rng.randint(1, longest)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer, rng = tiny.word_tokenizer(), random.Random(0)
    tiny.model("llama", vocab=len(tokenizer)).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    some = [{"prompt": text(rng, 6), "response": text(rng, 9)} for _ in range(9)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


@pytest.fixture(autouse=True)
def checker(monkeypatch):
    """So small a model writes no answers; about half of what it writes is right here."""
    monkeypatch.setitem(evaluate.CHECKS, "toy", (tiny.parity, answers.same))


def run(monkeypatch, stage, base, out, *flags, task="toy"):
    command = [f"{stage}.py", "--model", base / "llama", "--task", task, "--data", base / "train.jsonl", "--out", out]
    command += ["--batch-size", "4", "--lr", "1e-3", "--max-response", "12"]
    monkeypatch.setattr("sys.argv", [str(word) for word in [*command, *flags]])
    STAGES[stage].main()
    return out


def fails(monkeypatch, capsys, *args, **kw):
    """The one line that a failing command prints, with nothing long begun."""
    monkeypatch.setattr(ddp_utils.Run, "offline", None)
    monkeypatch.setattr(ddp_utils.Run, "steps", None)
    with pytest.raises(SystemExit) as stop:
        cli(lambda: run(monkeypatch, *args, **kw))
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed.strip().splitlines()[-1]


SIX = ("--n", "6", "--best-of", "2")


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """Two iterations, n = 6, N = 2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(evaluate.CHECKS, "toy", (tiny.parity, answers.same))
        return run(patch, "bon", base, tmp_path_factory.mktemp("bon") / "out", *SIX, "--iterations", "2")


def load(folder):
    return datasets.load_from_disk(str(folder))


def test_d_bon_is_drawn_checked_and_weighed(base, whole, tmp_path, monkeypatch):
    """Iteration 1 by --model, iteration 2 by what iteration 1 ends in."""
    first = run(monkeypatch, "bon", base, tmp_path / "first", *SIX)
    assert [r["loss"] for r in log(first)] == [r["loss"] for r in log(whole)][:3]
    tokenizer, given = fsdp.load_tokenizer(str(base / "llama")), data.load_rows("toy", str(base / "train.jsonl"))
    mixed = 0
    for iteration, folder in ((1, base / "llama"), (2, first)):
        d_bon, model = load(whole / f"D_bon_{iteration}"), fsdp.load_model(str(folder))
        assert set(d_bon.column_names) == {"id", "x", "y", "z", "answer", "right", "weight", "c"}
        seed = fold_in(0, iteration)
        z = generate.generate(model, d_bon["x"][:], n=6, max_new_tokens=12, eos_token_id=EOS, seed=seed)
        assert z == d_bon["z"][:]
        for row, source in zip(d_bon, given, strict=True):
            texts = [tokenizer.decode(own, skip_special_tokens=True) for own in row["z"]]
            right = [tiny.parity(one) == tiny.parity(source["response"]) for one in texts]
            assert (row["right"], row["c"]) == (right, sum(right))
            assert row["weight"] == bon.bon_weights(torch.tensor([right]), 2)[0].tolist()
            mixed += 0 < sum(right) < 6
        found = json.loads((whole / f"D_bon_{iteration}.json").read_text())
        assert found["pass@1"] == pytest.approx(sum(d_bon["c"]) / 54)
        assert found["rows_a_prompt"] == pytest.approx(sum(len(bon.rows_of(row)) for row in d_bon) / 9)
    assert mixed > 8


@pytest.mark.parametrize("best_of", [1, 2])
def test_a_step_by_its_definition(base, tmp_path, monkeypatch, best_of):
    """The first logged loss: the start model, one unpadded row at a time. N = 1 is rejection sampling: the right
    samples, each as often as it was drawn, weigh 1. The divisor is the tokens of all samples."""
    flags = ("--n", "6", "--best-of", best_of, "--batch-size", "9", "--max-steps", "1", "--sft-weight", "0.5")
    out = run(monkeypatch, "bon", base, tmp_path / "out", *flags)
    model, total, n, sft_total, sft_n = fsdp.load_model(str(base / "llama")), 0.0, 0, 0.0, 0
    for row in load(out / "D_bon_1"):
        for z, right in zip(row["z"], row["right"], strict=True):
            w = 2 * (6 - row["c"]) / 5 if best_of == 2 else 1
            total -= right * w * float(log_p(model, row["x"], z))
            n += len(z)
        sft_total -= float(log_p(model, row["x"], row["y"]))
        sft_n += len(row["y"])
    (line,) = log(out)
    assert line["bon"] == pytest.approx(total / n, rel=1e-4)
    assert line["sft"] == pytest.approx(0.5 * sft_total / sft_n, rel=1e-4)
    again = run(monkeypatch, "bon", base, tmp_path / "again", *flags, "--micro-batch-size", "3", "--share-prompt")
    assert log(again)[0]["loss"] == pytest.approx(line["loss"], rel=1e-5)
    assert largest_difference(out, again) < 1e-4


def test_pairs_round_trip_and_another_n(base, whole, tmp_path, monkeypatch):
    """A D_bon read in gives the run that made it; of other N, or other weights, the run that draws for itself."""
    pairs = ("--pairs", whole / "D_bon_1")
    again = run(monkeypatch, "bon", base, tmp_path / "again", *pairs)
    assert [r["loss"] for r in log(again)] == [r["loss"] for r in log(whole)][:3]
    for k, flags in enumerate((["--best-of", "4"], ["--best-of", "3", "--weights", "rlb"])):
        read = run(monkeypatch, "bon", base, tmp_path / f"read-{k}", *pairs, *flags)
        drawn = run(monkeypatch, "bon", base, tmp_path / f"drawn-{k}", "--n", "6", *flags)
        assert largest_difference(read, drawn) == 0 and largest_difference(read, again) > 0
        assert load(drawn / "D_bon_1")["z"][:] == load(whole / "D_bon_1")["z"][:]
    own = load(whole / "D_bon_1").select_columns(["x", "y", "z", "right", "weight"])  # as other programs may
    foreign = {"right": [[float(r) for r in row] for row in own["right"]], "answer": ["#### 7"] * len(own)}
    own = own.remove_columns("right").add_column("right", foreign["right"]).add_column("answer", foreign["answer"])
    own.save_to_disk(str(tmp_path / "own"))
    assert largest_difference(again, run(monkeypatch, "bon", base, tmp_path / "o", "--pairs", tmp_path / "own")) == 0
    assert "entropy" not in json.loads((tmp_path / "o" / "D_bon_1.json").read_text())


def test_bon_sft_as_a_step_is_its_gradient(base, tmp_path, monkeypatch):
    """Both halves over one divisor, though samples are longer or shorter than y: s(y) - (1 - g) E[s | right]."""
    flags = ("--n", "6", "--best-of", "3", "--weights", "sft", "--batch-size", "9", "--max-steps", "1")
    out = run(monkeypatch, "bon", base, tmp_path / "out", *flags)
    model, total, tokens = fsdp.load_model(str(base / "llama")), 0.0, 0
    for row in load(out / "D_bon_1"):
        good = [float(log_p(model, row["x"], z)) for z, right in zip(row["z"], row["right"]) if right]
        if good:
            total += (1 - bon_options.g(1 - len(good) / 6, 3)) * sum(good) / len(good)
        tokens += len(row["y"])
    assert log(out)[0]["bon"] == pytest.approx(total / tokens, rel=1e-4) and total


@pytest.mark.parametrize("step", [2, 5])
def test_an_interrupted_run_ends_in_the_same_weights(base, whole, tmp_path, monkeypatch, step):
    """Stopped in its first and in its second iteration; the same command goes on, and ends bitwise equal."""
    out, update = tmp_path / "out", ddp_utils.Run.update

    def stop(self, **also):
        self._signal = self.total + 1 == step
        return update(self, **also)

    monkeypatch.setattr(ddp_utils.Run, "update", stop)
    with pytest.raises(SystemExit, match="stopped after step 2"):
        run(monkeypatch, "bon", base, out, *SIX, "--iterations", "2")
    monkeypatch.setattr(ddp_utils.Run, "update", update)
    run(monkeypatch, "bon", base, out, *SIX, "--iterations", "2")
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, out))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [r["loss"] for r in log(out)] == [r["loss"] for r in log(whole)]


def test_dco_of_one_is_sft(base, tmp_path, monkeypatch):
    flags = ("--epochs", "2", "--micro-batch-size", "3")
    one = run(monkeypatch, "sft", base, tmp_path / "sft", *flags)
    two = run(monkeypatch, "bon", base, tmp_path / "dco", "--dco", "--best-of", "1", *flags)
    assert [r["loss"] for r in log(two)] == pytest.approx([r["loss"] for r in log(one)], rel=1e-5)
    assert largest_difference(one, two) < 1e-4
    four = run(monkeypatch, "bon", base, tmp_path / "four", "--dco", "--best-of", "4", *flags)
    assert log(four)[0]["loss"] < log(two)[0]["loss"] and not list(four.glob("D_bon*"))


# ------------------------------------------------------------------------------------------------ scores
def write_scores(path, d_bon, change=lambda score: score):
    lines = change([{"id": row["id"], "sample": k, "score": (7 * k + row["id"]) % 5 / 5} for row in d_bon
                    for k in range(len(row["z"]))])  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_scores_that_are_not_the_reward(base, whole, tmp_path, monkeypatch):
    """Weights by ranks, of the right ones; where the scores are the reward, the run is the plain one."""
    d_bon = load(whole / "D_bon_1")
    path = write_scores(tmp_path / "s.jsonl", d_bon)
    read = bon_options.read_d_bon(
        str(whole / "D_bon_1"), ("y", "y"), fsdp.load_tokenizer(str(base / "llama")), str(path), None, 3
    )
    differ = 0
    for row in read:
        scores = [(7 * k + row["id"]) % 5 / 5 for k in range(6)]
        w = bon_options.rank_weights(row["right"], scores, 3)
        assert row["weight"] == [max(own, 0.0) for own in w]
        assert all(own <= 0 for own, right in zip(w, row["right"]) if not right)
        assert all(own >= 0 for own, right in zip(w, row["right"]) if right)
        differ += min(w) < 0
    assert differ  # a wrong sample won
    right = [row["right"] for row in d_bon]
    same = write_scores(
        tmp_path / "same.jsonl", d_bon, lambda lines: [o | {"score": float(right[o["id"]][o["sample"]])} for o in lines]
    )
    one = run(
        monkeypatch, "bon", base, tmp_path / "one", "--pairs", whole / "D_bon_1", "--best-of", "2", "--score", same
    )
    assert [r["loss"] for r in log(one)] == pytest.approx([r["loss"] for r in log(whole)][:3], rel=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda lines: lines[1:], "no score for id 0, sample 0"),
        (lambda lines: [*lines, lines[0] | {"id": 99}], "scores for other rows: id 99, sample 0"),
        (lambda lines: [*lines, lines[0]], "row 54: a second score for id 0, sample 0"),
        (lambda lines: [lines[0] | {"score": None}, *lines[1:]], "row 0: the score None is not a finite number"),
        (lambda lines: [lines[0] | {"score": float("nan")}], "row 0: the score nan is not a finite number"),
        (lambda lines: [lines[0] | {"id": "a"}], "row 0: id and sample must be whole numbers, not 'a' and 0"),
        (lambda lines: [{"id": 0, "score": 1}], "row 0: no sample; each row has id, sample (from 0) and score"),
    ],
)
def test_scores_for_other_rows(whole, tmp_path, change, message):
    d_bon = load(whole / "D_bon_1")
    path = str(write_scores(tmp_path / "s.jsonl", d_bon, change))
    with pytest.raises(ValueError) as error:
        rows.read_scores(f"--score {path}", path, {row["id"]: 6 for row in d_bon})
    assert message in str(error.value)


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    "flags, message",
    [
        ("--best-of 32", "--best-of 32 is more than --n 16: N cannot be estimated from fewer samples"),
        ("--n 2", "--best-of 4 is more than --n 2"),
        ("--best-of 0", "argument --best-of: '0' is not a whole number of at least 1"),
        ("--score s.jsonl", "--score is for samples that are there: draw them with --epochs 0, then give --pairs"),
        ("--pairs D --score s.jsonl --weights rlb", "--score has weights of its own, --weights others: choose"),
        ("--dco --pairs D", "--dco draws nothing: it takes no --pairs, --z, --score, --weights or --iterations"),
        ("--dco --sft-weight 0.5", "--dco is one loss, of y alone: it takes no --temperature, --n, --sft-weight or"),
        ("--pairs D --score s.jsonl --iterations 2", "--iterations 2 draws others: give --iterations 1"),
        ("--pairs D --iterations 2", "--pairs has weights for an N of its own, and --iterations draws anew: give --"),
        ("--weights sft --sft-weight 0.5", "--weights sft is half of a gradient, y's the other half: it takes no"),
        ("--temperature 0", "--temperature 0 draws the same 16 times: the weights are for samples at 1"),
        ("--weights twosided", "invalid choice: 'twosided'"),
        ("--pairs missing", "--pairs missing: not a folder written by datasets' save_to_disk"),
    ],
)
def test_flags_that_do_not_fit(base, tmp_path, monkeypatch, capsys, flags, message):
    assert message in fails(monkeypatch, capsys, "bon", base, tmp_path / "out", *flags.split())


def test_a_task_without_a_checker_and_references_without_answers(base, tmp_path, monkeypatch, capsys):
    said = fails(monkeypatch, capsys, "bon", base, tmp_path / "out", task="tldr")
    assert "--task tldr has no checker of answers; there are gsm8k, math, sums, toy" in said
    monkeypatch.setitem(evaluate.CHECKS, "toy", (lambda text: None, answers.same))
    said = fails(monkeypatch, capsys, "bon", base, tmp_path / "out")
    assert "no response of the data holds an answer as --task toy writes it" in said


@pytest.mark.parametrize(
    "change, flags, message",
    [
        ({"right": None}, "", "no column right; there are "),
        ({"weight": None}, "", "no column weight; there are "),
        ({"weight": [math.nan] * 6}, "", "row 0: the weights are not all finite numbers"),
        ({"weight": [math.inf] * 6}, "", "row 0: the weights are not all finite numbers"),
        ({"weight": [1.0] * 5}, "", "row 0: 6 samples z, 6 of right, 5 of weight"),
        ({"right": [2] * 6}, "", "row 0: right must say of each sample true or false"),
        ({"z": [[]] * 6}, "", "row 0: z must be a list of samples, each a list of token ids, and not empty"),
        ({"z": [3] * 6}, "", "row 0: z must be a list of samples, each a list of token ids, and not empty"),
        ({"z": [[999]] * 6}, "", "--pairs {pairs}, row 0: x and y hold token id 999"),
        ({"right": True}, "", "row 0: z, right and weight must be lists, with an entry for each sample"),
        ({}, "--best-of 7", "row 0: 6 samples; --best-of 7 needs as many"),
        ({}, "--best-of 2 --score missing.jsonl", "--score missing.jsonl: no such file"),
        ({"id": 0}, "--best-of 2 --score missing.jsonl", "row 1: of id 0, as row 0: whose scores would be whose?"),
    ],
)  # fmt: skip
def test_pairs_that_do_not_fit(base, whole, tmp_path, monkeypatch, capsys, change, flags, message):
    d_bon = load(whole / "D_bon_1")
    for name, value in change.items():
        d_bon = d_bon.remove_columns(name)
        if value is not None:
            d_bon = d_bon.add_column(name, [value] * len(d_bon))
    d_bon.save_to_disk(str(tmp_path / "pairs"))
    words = ("--pairs", tmp_path / "pairs", *flags.split())
    said = fails(monkeypatch, capsys, "bon", base, tmp_path / "out", *words)
    assert message.format(pairs=tmp_path / "pairs") in said
    assert not (tmp_path / "out" / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------------ what is said
def d_bon_of(*rights, best_of=2):
    made = [{"id": i, "x": [5], "y": [6], "z": [[7]] * len(right), "right": [bool(r) for r in right], "c": sum(right),
             "answer": [str(k % 2) for k in range(len(right))],
             "weight": bon.bon_weights(torch.tensor([right]).bool(), best_of)[0].tolist()} for i, right in
            enumerate(rights)]  # fmt: skip
    return datasets.Dataset.from_list(made)


def test_what_a_d_bon_holds(tmp_path, capsys):
    found = bon_options.describe(d_bon_of([1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]), 2)
    expected = {"pass@1": 7 / 16, "pass@2": (1 / 2 + 0 + 1 + 5 / 6) / 4, "none_right": 1 / 4, "all_right": 1 / 4}
    expected |= {"with_a_weight": 1 / 2, "mean_weight": (2 + 2 * 2 * 2 / 3) / 16, "entropy": math.log(2)}
    expected |= {"weight_not_y": 1, "rows_a_prompt": 1}
    assert found == pytest.approx(expected)
    cases = {"none": [[0, 0, 0, 0]] * 3, "all": [[1, 1, 1, 1]] * 20 + [[1, 0, 0, 0]], "some": [[1, 0, 0, 0]] * 2}
    tok = tiny.word_tokenizer()
    for name, rights in cases.items():
        made = d_bon_of(*rights)
        bon_options.report(made, tok, "gsm8k", "unbiased", 2, tmp_path / f"{name}.json")
        said = capsys.readouterr().err
        assert ("nothing to learn but y" in said) == (name == "none")
        assert ("too few wrong in 95.2% (a smaller --best-of" in said) == (name == "all")
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["pass@1"] == pytest.approx(sum(map(sum, rights)) / 4 / len(rights)) and "pass@2" in found
        assert found["weight_not_y"] == (name != "none")  # z is [7] there, y is [6]
        bon_options.report(made, tok, "gsm8k", "rlb", None, tmp_path / f"{name}.json")  # of an N that is not known
        assert "smaller --best-of" not in capsys.readouterr().err
        assert "pass@4" in json.loads((tmp_path / f"{name}.json").read_text())


def test_right_answers_by_wrong_sums(tmp_path):
    """How much of the weight is on samples with an error in them: of the toy's own words, where that is known."""
    tok = toy.tokenizer()
    y = "amy has 25 . first buys 15 : 25 + 15 = 40 , again 25 + 15 = 40 . #### 40 <eos>"
    lucky = y.replace("+ 15 = 40 , again 25 + 15 = 40", "+ 15 = 39 , again 25 + 15 = 40")
    wrong = y.replace("40 .", "39 .").replace("#### 40", "#### 39")
    y, lucky, wrong = (tok(text)["input_ids"] for text in (y, lucky, wrong))
    row = {"id": 0, "x": y[:3], "y": y, "z": [y, lucky, wrong, lucky], "right": [True, True, False, True], "c": 3}
    d_bon = datasets.Dataset.from_list([row | {"weight": [1.0, 1.0, 0.0, 3.0]}])
    bon_options.report(d_bon, tok, "toy", "unbiased", None, tmp_path / "D.json")
    found = json.loads((tmp_path / "D.json").read_text())
    assert found["weight_not_y"] == found["weight_on_errors"] == 4 / 5 and found["rows_a_prompt"] == 2
    bon_options.report(d_bon, tok, "math", "unbiased", None, tmp_path / "D.json")
    assert "weight_on_errors" not in json.loads((tmp_path / "D.json").read_text())


def test_n_1_and_no_right_sample_at_all(base, tmp_path, monkeypatch, capsys):
    """The run goes on with y alone, and is plain SFT."""
    monkeypatch.setitem(evaluate.CHECKS, "toy", (tiny.parity, lambda a, b: False))
    out = run(monkeypatch, "bon", base, tmp_path / "out", "--n", "2", "--best-of", "1")
    assert "no sample of any prompt is right" in capsys.readouterr().err
    plain = run(monkeypatch, "sft", base, tmp_path / "sft", "--epochs", "1")
    assert largest_difference(out, plain) < 1e-6 and all(line["bon"] == 0 for line in log(out))


# ------------------------------------------------------------------------------------------------ evaluation
def evaluated(monkeypatch, base, out):
    words = ["run", "--model", base / "llama", "--task", "toy", "--data", base / "train.jsonl", "--out", out]
    words += ["--name", "m", "--temperatures", "0,1", "--generations", "4", "--k", "2", "--max-response", "12"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, words)])
    evaluate.main()
    return out


@pytest.fixture
def measured(base, tmp_path, monkeypatch):
    return evaluated(monkeypatch, base, tmp_path / "eval")


def best_of(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "best-of", *map(str, words)])
    cli(evaluate.main)


def test_best_of_n_by_a_score_and_the_plot(base, measured, tmp_path, monkeypatch, capsys):
    """By the reward itself best-of-N is pass@N; by another score it is no more; the table and the plot show it."""
    rows = load(measured / "generations-t1")
    results = json.loads((measured / "results.json").read_text())
    given = [json.loads(line)["response"] for line in (base / "train.jsonl").read_text().splitlines()]
    right = [[float(tiny.parity(own) == tiny.parity(true)) for own in row["text"]] for row, true in zip(rows, given)]
    path = write_scores(
        tmp_path / "s.jsonl", rows, lambda lines: [o | {"score": right[o["id"]][o["sample"]]} for o in lines]
    )
    best_of(monkeypatch, measured, "--scores", path, "--k", "2,4")
    found = json.loads((measured / "results.json").read_text())
    assert found["metrics"]["bon@2_t1"] == pytest.approx(results["metrics"]["pass@2_t1"])
    assert found["details"]["t1"]["best_of_n_by_score"] == pytest.approx(results["details"]["t1"]["pass@k"])
    best_of(monkeypatch, measured, "--scores", write_scores(tmp_path / "o.jsonl", rows))
    other = json.loads((measured / "results.json").read_text())
    assert other["metrics"]["bon@4_t1"] < found["metrics"]["bon@4_t1"]
    assert "bon@2_t1" not in other["metrics"]  # another verifier's
    assert other["details"]["t1"]["best_of_n_scores"]["scores"].endswith("o.jsonl")
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["evaluate.py", "table", str(measured / "results.json")])
    evaluate.main()
    assert "| bon@4, T = 1 (%) |" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    plot = ["show.py", "pass-at-k", str(measured / "results.json"), "--out", str(tmp_path / "plots"), "--temperature"]
    monkeypatch.setattr("sys.argv", [*plot, "1"])
    show.main()
    assert "<svg" in (tmp_path / "plots" / "pass-at-k.svg").read_text()
    monkeypatch.setattr("sys.argv", [*plot, "0"])
    with pytest.raises(SystemExit):
        cli(show.main)
    assert "no pass@k at t0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--temperature 0.5", "no results.json and generations-t0.5 of `evaluate.py run` in it"),
        ("--k 8", "--k 8 is more than the 4 generations"),
        ("--temperature 0", "scores for other rows: id 0, sample 1 (27 such)"),
    ],
)
def test_best_of_n_of_what_is_not_there(measured, tmp_path, monkeypatch, capsys, flags, message):
    path = write_scores(tmp_path / "s.jsonl", load(measured / "generations-t1"))
    with pytest.raises(SystemExit):
        best_of(monkeypatch, measured, "--scores", path, *flags.split())
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_best_of_n_of_data_that_has_changed(base, tmp_path, monkeypatch, capsys):
    shutil.copytree(base, tmp_path / "base")
    out = evaluated(monkeypatch, tmp_path / "base", tmp_path / "eval")
    path = write_scores(tmp_path / "s.jsonl", load(out / "generations-t1"))
    train, before = tmp_path / "base" / "train.jsonl", (out / "results.json").read_bytes()
    train.write_text("".join(train.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(SystemExit):
        best_of(monkeypatch, out, "--scores", path)
    assert "train.jsonl has changed since that run" in capsys.readouterr().err
    assert (out / "results.json").read_bytes() == before


def test_the_real_checkers_are_still_there():
    assert ranks.WORLD == 1 and set(evaluate.CHECKS) == {"toy", "sums", "gsm8k", "math"}
