"""generate(fixed=True), rows in slots of fixed shapes: the same tokens as rows that leave, which test_generate.py
compares with a loop without cache and with transformers."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from core import attend, decode_step, fsdp
from generate import generate
from test_generate import ragged
from tiny import ARCHS, model

torch.set_num_threads(1)
ARGS = {"max_new_tokens": 30, "eos_token_id": [3, 5, 8], "seed": 4}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """So that a test of some rows grows its buffers, changes its shapes, and draws past the end."""
    for name, value in {"GROW": 12, "CHECK": 3}.items():
        monkeypatch.setattr(decode_step, name, value)


@pytest.mark.parametrize("arch", ARCHS)
def test_same_tokens_as_rows_that_leave(arch):
    lm, prompts = model(arch), ragged(9, 24)
    for more in ({"temperature": 0}, {"n": 2, "batch_size": 5}, {"top_p": 0.7, "top_k": 20, "batch_size": 4}):
        args = {**ARGS, **more}
        assert generate(lm, prompts, fixed=True, **args) == generate(lm, prompts, fixed=False, **args), more


def test_layers_that_differ_in_what_they_see():
    lm, prompts = model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1), ragged(8, 24)
    assert {*lm.config.layer_types} == {"full_attention", "sliding_attention"}
    assert generate(lm, prompts, fixed=True, **ARGS) == generate(lm, prompts, fixed=False, **ARGS)


@pytest.mark.parametrize("check", [1, 7, 50])
def test_how_often_the_host_looks_changes_nothing(check, monkeypatch):
    lm, prompts, args = model("mistral"), ragged(7, 20), {**ARGS, "batch_size": 4, "n": 2}
    expected = generate(lm, prompts, fixed=False, **args)
    monkeypatch.setattr(decode_step, "CHECK", check)
    assert generate(lm, prompts, fixed=True, **args) == expected
    made = {}
    generate(lm, prompts, fixed=True, each=made.__setitem__, **args)
    assert [made[i] for i in range(7)] == expected


def test_ids_without_a_token_are_not_drawn():
    lm, prompts = model("llama"), ragged(6, 10)
    lm.absent = torch.tensor([*range(9, 60)])
    rows = generate(lm, prompts, fixed=True, **ARGS)
    assert rows == generate(lm, prompts, fixed=False, **ARGS)
    assert not {token for (row,) in rows for token in row} & {*range(9, 60)}


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_what_is_recorded_is_what_runs(top_p, monkeypatch):
    """With a stand-in for CUDA graphs: what is recorded does not run, and what is replayed runs on the buffers and
    shapes of its recording."""
    recorded = []

    def record(work, pool):
        rows = work.__self__
        shapes = (rows.rows, rows.room, [layer.keys.data_ptr() for layer in rows.cache.layers])
        lm(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)  # a recording passes the hooks that count
        recorded.append(shapes[:2])

        def replay():
            assert shapes == (rows.rows, rows.room, [layer.keys.data_ptr() for layer in rows.cache.layers])
            hooks, lm._forward_pre_hooks = lm._forward_pre_hooks, {}
            work()
            lm._forward_pre_hooks = hooks

        return replay, pool

    lm, prompts, stats, plain = model("gpt_neox"), ragged(14, 20), {}, {}
    args = {**ARGS, "batch_size": 5, "top_p": top_p, "fixed": True}
    expected = generate(lm, prompts, stats=plain, **args)
    monkeypatch.setattr(decode_step, "can_record", lambda device: True)
    monkeypatch.setattr(decode_step, "on_side_stream", lambda work: work())
    monkeypatch.setattr(decode_step, "record", record)
    assert generate(lm, prompts, stats=stats, **args) == expected
    assert stats == plain
    assert len(recorded) > 3

    def broken(work, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(decode_step, "record", broken)
    with pytest.warns(UserWarning, match="without CUDA graphs, which is slower: operation not permitted"):
        assert generate(lm, prompts, **args) == expected


KERNEL = """
import torch
from core import attend
device = "cuda" if torch.cuda.is_available() else "cpu"
for heads, h, d in ((2, 2, 16), (6, 2, 20), (3, 3, 300), (4, 1, 8)):
    keys, values = (torch.randn(5, h, 140, d, device=device)[:4, :, :135] for _ in range(2))
    query = torch.randn(4, 1, heads, d, device=device).transpose(1, 2)  # as models have it
    bounds = torch.tensor([[0, 0], [0, 17], [9, 134], [131, 132]], device=device)[:, None, None]
    expected, found = (f(query, keys, values, bounds, 0.3) for f in (attend.by_mask, attend.by_kernel))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
"""


def test_the_kernel_is_what_the_mask_says():
    pytest.importorskip("triton", reason="needs triton")
    env = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    subprocess.run([sys.executable, "-c", KERNEL], env=env, cwd=Path(__file__).parents[1], check=True)


def test_a_kernel_that_does_not_run_is_said_and_left(monkeypatch):
    def broken(*args):
        raise RuntimeError("out of resource: shared memory\nmore")

    lm, prompts = model("llama"), ragged(5, 12)
    expected = generate(lm, prompts, fixed=True, **ARGS)
    for name, value in {"KIND": "cpu", "usable": True, "by_kernel": broken}.items():
        monkeypatch.setattr(attend, name, value)
    with pytest.warns(UserWarning, match="without its kernel, which is slower: out of resource: shared memory$"):
        assert generate(lm, prompts, fixed=True, **ARGS) == expected
    with pytest.raises(ValueError, match="fixed=True: fixed shapes need Triton"):
        generate(lm, prompts, fixed=True, **ARGS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("arch", ARCHS)
def test_graphs_on_a_gpu(arch):
    lm, prompts = model(arch).cuda(), ragged(14, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for more in ({"temperature": 0}, {"n": 2}, {"top_p": 0.7}):
            args = {**ARGS, **more, "batch_size": 5}
            assert generate(lm, prompts, **args) == generate(lm, prompts, fixed=False, **args)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_under_fsdp(dtype):
    """Its hooks are passed by while its weights are whole, and are there again afterwards."""
    lm, prompts = model("llama"), ragged(8, 12)
    expected = generate(lm, prompts, fixed=False, **ARGS)
    try:
        lm = fsdp.shard(lm, dtype)
        with pytest.raises(ValueError, match="the model is sharded"):
            generate(lm, prompts, fixed=True, **ARGS)
        hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in lm.modules()]
        with fsdp.inference(lm):
            rows = generate(lm, prompts, fixed=True, **ARGS)
            leaving = generate(lm, prompts, fixed=False, **ARGS)
        if dtype == "float32":
            assert rows == leaving == expected
        else:  # the same but for rounding, as with another batch size
            assert sum(a[:3] == b[:3] for (a,), (b,) in zip(rows, leaving)) >= len(rows) - 1
        assert hooks == [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in lm.modules()]
        assert sum(map(sum, hooks)) > 2
        lm(input_ids=torch.tensor([prompts[0]]), use_cache=False).logits.sum().backward()
        assert all(p.grad is not None for p in lm.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_it_is_drawn_with_the_weights_of_the_moment():
    """Also where a forward without a backward has left what it gathered, and a step has changed the weights since."""
    lm, prompts = model("llama"), ragged(8, 12)
    try:
        lm = fsdp.shard(lm, "float32")
        optimizer = torch.optim.SGD(lm.parameters(), lr=3.0)
        ids = torch.tensor([prompts[-1]])
        lm(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
        with torch.no_grad():
            lm(input_ids=ids, use_cache=False)
        optimizer.step()
        with fsdp.inference(lm):
            rows = generate(lm, prompts, **ARGS)
        plain = model("llama")
        plain.load_state_dict({name: p.full_tensor() for name, p in lm.state_dict().items()})
        assert rows == generate(plain, prompts, **ARGS) != generate(model("llama"), prompts, **ARGS)
    finally:
        torch.distributed.destroy_process_group()


def test_what_it_does_not_know_is_said():
    lm = model("llama", attn_implementation="eager")
    with pytest.raises(ValueError, match="fixed=True: fixed shapes need sdpa attention, not eager"):
        generate(lm, [[1]], fixed=True, **ARGS)
    lm = model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ValueError, match="rotary angles change"):
        generate(lm, [[1]], fixed=True, **ARGS)
    lm.config.model_type = "other"
    with pytest.raises(ValueError, match="not checked for other"):
        generate(lm, [[1]], fixed=True, **ARGS)
