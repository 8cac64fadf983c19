"""The losses against loops over tokens in float64, and as what they are sold as: functions that can be pasted."""

import inspect

import pytest
import torch

import batches
import tiny
from bash import bash_loss
from rac import rac_loss
from scs import scs_loss
from sft import sft_loss

B, L, V = 4, 7, 11
LOSSES = {"sft": sft_loss, "scs": scs_loss, "bash": bash_loss}


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(B, L, V, generator=g) * 4
    y, z = torch.randint(V, (2, B, L), generator=g)
    z_bar = torch.where(torch.rand(B, L, generator=g) < 0.5, z, torch.randint(V, (B, L), generator=g))
    mask = torch.arange(L) < torch.tensor([7, 3, 1, 0])[:, None]  # the last row has nothing to learn
    return logits, y, z, z_bar, mask


def loop(logits, targets, mask):
    """-sum log p(target), in float64, one token at a time; and the number of tokens."""
    total, n = 0.0, 0
    for b in range(B):
        for j in range(L):
            if mask[b, j]:
                row = logits[b, j].double()
                total -= float(row[targets[b, j]] - torch.logsumexp(row, 0))
                n += 1
    return total, n


@pytest.mark.parametrize("name", LOSSES)
def test_likelihood_losses(case, name):
    logits, y, _, _, mask = case
    loss, n = LOSSES[name](logits, y, mask)
    expected, count = loop(logits, y, mask)
    assert loss.dtype == torch.float32 and n == count
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_rac_loss_masks_agreement_in_the_sum_and_not_in_the_count(case):
    logits, _, z, z_bar, mask = case
    differ = mask & (z != z_bar)
    assert 0 < differ.sum() < mask.sum()  # the case tells the three apart
    loss, n = rac_loss(logits, z, z_bar, mask)  # Eq. 7
    assert float(loss) == pytest.approx(loop(logits, z_bar, differ)[0], rel=1e-6)
    assert n == mask.sum()
    loss, n = rac_loss(logits, z, z_bar, mask, masked=False)  # Eq. 6
    assert float(loss) == pytest.approx(loop(logits, z_bar, mask)[0], rel=1e-6)
    assert n == mask.sum()


def test_rac_gradient_is_zero_exactly_where_labels_agree(case):
    logits, _, z, z_bar, mask = case
    logits.requires_grad_()
    rac_loss(logits, z, z_bar, mask)[0].backward()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, mask & (z != z_bar))


@pytest.mark.parametrize("masked", [True, False])
def test_what_the_mask_of_eq_7_makes_of_the_target(masked):
    """Where z ~ p and the labels are spread as q given the same prefix, Eq. 6 has its minimum at q, Eq. 7 at the
    normalised q (1 - p): of a model with p = q, and two possible tokens, that makes 1/2 and 1/2."""
    for q in ([7, 2, 1], [9, 1, 0]):  # in tenths; p = q
        seen = [(z, c) for z in range(3) for c in range(3) for _ in range(q[z] * q[c])]
        z, z_bar = torch.tensor(seen).T[:, :, None]  # [100, 1]
        target = torch.tensor(q).double() / 10
        target = target * (1 - target) if masked else target
        logits = (target / target.sum()).clamp(min=1e-30).log().requires_grad_()
        loss, n = rac_loss(logits.expand(100, 1, 3), z, z_bar, torch.ones(100, 1), masked)
        (grad,) = torch.autograd.grad(loss / n, logits)
        assert grad.abs().max() < 1e-7
    assert not masked or logits.softmax(0).tolist() == pytest.approx([0.5, 0.5, 0])


@pytest.mark.parametrize("mask_type", [torch.bool, torch.long, torch.float32])
def test_mask_of_any_type(case, mask_type):
    logits, y, z, z_bar, mask = case
    assert torch.equal(sft_loss(logits, y, mask)[0], sft_loss(logits, y, mask.to(mask_type))[0])
    assert torch.equal(rac_loss(logits, z, z_bar, mask)[0], rac_loss(logits, z, z_bar, mask.to(mask_type))[0])


def test_nothing_to_learn_is_zero_with_zero_gradient_even_where_padding_is_not_finite(case):
    logits, y, z, z_bar, _ = case
    logits[0, 0] = float("nan")  # padding columns of a model may hold anything
    logits.requires_grad_()
    nothing = torch.zeros(B, L, dtype=torch.bool)
    for loss, n in (sft_loss(logits, y, nothing), rac_loss(logits, z, z_bar, nothing)):
        assert loss == 0 and n == 0
        (grad,) = torch.autograd.grad(loss, logits)
        assert torch.equal(grad[1:], torch.zeros_like(grad[1:]))


def test_bf16_logits_are_summed_in_float32(case):
    logits, y, z, z_bar, mask = case
    low = logits.bfloat16()
    assert torch.equal(sft_loss(low, y, mask)[0], sft_loss(low.float(), y, mask)[0])
    assert torch.equal(rac_loss(low, z, z_bar, mask)[0], rac_loss(low.float(), z, z_bar, mask)[0])


@pytest.mark.parametrize("loss", [sft_loss, scs_loss, bash_loss, rac_loss])
def test_a_loss_can_be_pasted_elsewhere(case, loss):
    """Its source alone, with torch and F in scope, is the whole of it."""
    logits, y, z, z_bar, mask = case
    scope = {"torch": torch, "F": torch.nn.functional}
    exec("from __future__ import annotations\n" + inspect.getsource(loss), scope)
    inputs = (logits, z, z_bar, mask) if loss is rac_loss else (logits, y, mask)
    assert torch.equal(scope[loss.__name__](*inputs)[0], loss(*inputs)[0])


def test_a_prompt_that_is_empty_is_an_error():
    with pytest.raises(ValueError, match="prompt 1 of a batch is empty"):
        batches.batch([[1], []], [[2], [3]])
    with pytest.raises(ValueError, match="prompt 0 of a batch is empty"):
        batches.pack([[], [4]], [[[1], [2]], [[3], [2]]], tiny.model("llama"))


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_head_with_a_forward_of_its_own_keeps_it(arch):
    lm = tiny.model(arch)
    head, calls = lm.get_output_embeddings(), []
    plain = head.forward
    head.forward = lambda hidden: calls.append(1) or plain(hidden)
    own, x, y = head.forward, [[1, 2], [3]], [[4, 5], [6]]
    found = batches.losses(lm, x, {"sft": (sft_loss, y, y)})["sft"]
    assert head.forward is own and calls
    assert torch.allclose(found, batches.losses_by_definition(lm, x, {"sft": (sft_loss, y, y)})["sft"])
