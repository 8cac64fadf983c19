"""The flags that people reach for: schedule, AdamW's own, the saved dtype, the attention; against their formulas."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import data
import ddp_utils
import stage
from core import fsdp, ranks
from sft import sft_loss
from test_stages import base, fails, run
from test_training import largest_difference, log

__all__ = ["base"]  # pytest finds fixtures by name


# ------------------------------------------------------------------------------------------------ schedule
@pytest.mark.parametrize("steps, warmup", [(100, 0.1), (7, 0.5), (1, 0.0), (5, 1.0)])
def test_schedules(steps, warmup):
    """The same warm-up; then 1 + cos, a line, or nothing, over what is left of the steps."""
    warm = math.ceil(warmup * steps)
    of = {
        "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
        "linear": lambda done: 1 - done,
        "constant": lambda done: 1.0,
    }
    for name, shape in of.items():
        for k in range(steps):
            expected = 3.0 * (k + 1) / warm if k < warm else 3.0 * shape((k - warm) / max(1, steps - warm))
            assert ddp_utils.learning_rate(k, steps, 3.0, warmup, name) == pytest.approx(expected, rel=1e-12)
    assert ddp_utils.learning_rate(steps // 2, steps, 3.0, warmup) == ddp_utils.learning_rate(
        steps // 2, steps, 3.0, warmup, "cosine"
    )


# ------------------------------------------------------------------------------------------------ AdamW
def by_hand(base, steps, lr, betas, eps, decay, schedule):
    """SFT with Adam written out: moments, their correction, decay of what has two dimensions or more."""
    model, tokenizer = fsdp.load_model(str(base / "model")), fsdp.load_tokenizer(str(base / "model"))
    rows = data.examples("ultrachat", tokenizer, data=str(base / "train.jsonl"), columns="response=response",
                         max_response=12)[0].to_list()  # fmt: skip
    params = [*model.parameters()]
    m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
    for k in range(steps):
        total = n = 0
        for i in ddp_utils.batch_rows(len(rows), k, 4, ranks.fold_in(0, 0)):
            x, y = rows[i]["x"], rows[i]["y"]
            logits = model(torch.tensor([x + y]), use_cache=False).logits[:, len(x) - 1 : -1]
            loss, count = sft_loss(logits, torch.tensor([y]), torch.ones(1, len(y)))
            total, n = total + loss, n + count
        grads = torch.autograd.grad(total / n, params)
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        grads = [g * min(1.0, float(1.0 / (norm + 1e-6))) for g in grads]  # --clip 1
        rate = ddp_utils.learning_rate(k, steps, lr, 0.1, schedule)
        with torch.no_grad():
            for p, g, m_p, v_p in zip(params, grads, m, v):
                p *= 1 - rate * decay * (p.ndim >= 2)
                m_p.mul_(betas[0]).add_(g, alpha=1 - betas[0])
                v_p.mul_(betas[1]).add_(g**2, alpha=1 - betas[1])
                unbiased = (v_p / (1 - betas[1] ** (k + 1))).sqrt()
                p -= rate * m_p / (1 - betas[0] ** (k + 1)) / (unbiased + eps)
    return dict(model.named_parameters())


@pytest.mark.parametrize("betas, eps, decay, schedule", [
    ((0.9, 0.999), 1e-8, 0.0, "cosine"),
    ((0.5, 0.8), 1e-3, 0.3, "linear"),
    ((0.0, 0.99), 1e-5, 0.0, "constant"),
])  # fmt: skip
def test_adamw_by_its_formula(base, tmp_path, monkeypatch, betas, eps, decay, schedule):
    flags = ["--epochs", "2", "--adam-betas", *betas, "--adam-eps", eps, "--weight-decay", decay]
    out = run(monkeypatch, "sft", base, tmp_path / "out", *map(str, flags), "--lr-schedule", schedule)
    found = load_file(out / "model.safetensors")
    expected = by_hand(base, len(log(out)), 1e-3, betas, eps, decay, schedule)
    start = load_file(base / "model" / "model.safetensors")
    for name, value in found.items():
        moved = (start[name] - value).abs().max()
        assert (expected[name] - value).abs().max() < max(2e-6, 0.01 * float(moved)), name


def test_the_defaults_are_what_was(base, tmp_path, monkeypatch):
    """Named or not, bitwise; and one group of parameters, as checkpoints from before have it."""
    flags = "--weight-decay 0 --adam-betas 0.9 0.999 --adam-eps 1e-8 --lr-schedule cosine --save-dtype float32"
    plain = run(monkeypatch, "bash", base, tmp_path / "plain")
    named = run(monkeypatch, "bash", base, tmp_path / "named", *flags.split(), "--attn-implementation", "sdpa")
    assert largest_difference(plain, named) == 0
    args = stage.parser("").parse_args("--model m --task toy --out o".split())
    params = [torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))]
    own = ddp_utils.adamw(params, args)
    old = torch.optim.AdamW(params, lr=5e-6, weight_decay=0.0, fused=True)
    assert own.state_dict() == old.state_dict()


def test_a_run_with_two_groups_goes_on_bitwise(base, tmp_path, monkeypatch):
    """--weight-decay: the checkpoint has the moments of both groups."""
    flags = ["--epochs", "2", "--weight-decay", "0.1", "--checkpoint-every", "3"]
    whole = run(monkeypatch, "sft", base, tmp_path / "whole", *flags)
    plain, calls = ddp_utils.Run.update, []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def update(self, **also):
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt
            plain(self, **also)

        patch.setattr(ddp_utils.Run, "update", update)
        run(patch, "sft", base, tmp_path / "out", *flags)
    assert largest_difference(whole, run(monkeypatch, "sft", base, tmp_path / "out", *flags)) == 0


# ------------------------------------------------------------------------------------------------ the model
def test_save_dtype(base, tmp_path, monkeypatch):
    """The float32 weights, rounded; the folder says so, loads anywhere, and is trained on in float32."""
    exact = run(monkeypatch, "sft", base, tmp_path / "exact")
    out = run(monkeypatch, "sft", base, tmp_path / "out", "--save-dtype", "bfloat16")
    a, b = (load_file(folder / "model.safetensors") for folder in (exact, out))
    assert a.keys() == b.keys() and all(torch.equal(a[name].bfloat16(), b[name]) for name in a)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    assert fsdp.load_model(str(out)).dtype == torch.float32
    assert log(run(monkeypatch, "sft", base, tmp_path / "more", model=out))[-1]["loss"] > 0


def test_attention(base, tmp_path, monkeypatch):
    """eager and sdpa are one function: the same weights but for rounding, and eager is what ran."""
    seen, load = [], fsdp.load_model

    def watched(*args, **kw):
        seen.append(load(*args, **kw))
        return seen[-1]

    monkeypatch.setattr(fsdp, "load_model", watched)
    found = [
        run(monkeypatch, "bash", base, tmp_path / name, "--attn-implementation", name) for name in ("eager", "sdpa")
    ]
    assert [model.config._attn_implementation for model in seen] == ["eager", "sdpa"]
    assert 0 < largest_difference(*found) < 1e-3


@pytest.mark.parametrize("flags, message", [
    ("--adam-betas 0.9 1", "argument --adam-betas: '1' is not below 1"),
    ("--adam-betas 0.9", "argument --adam-betas: expected 2 arguments"),
    ("--adam-eps -1", "argument --adam-eps: '-1' is not a number of at least 0"),
    ("--weight-decay x", "argument --weight-decay: 'x' is not a number of at least 0"),
    ("--lr-schedule step", "argument --lr-schedule: invalid choice: 'step'"),
    ("--save-dtype float16", "argument --save-dtype: invalid choice: 'float16'"),
    ("--attn-implementation flash_attention_2", "flash_attention_2 computes in 16 bits: give --dtype bfloat16 with it"),
    ("--attn-implementation slow", "could not be loaded"),
])  # fmt: skip
def test_bad_values_are_one_line(base, tmp_path, monkeypatch, capsys, flags, message):
    assert message in fails(monkeypatch, capsys, "sft", base, tmp_path / "o", *flags.split())
