"""Rows in one sequence (core/packed.py) against padded ones: the layout, the mask, losses and gradients, commands."""

import functools
import random

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint

import batches
import dpo
import generate
import rac_options
import sft
import tiny
from core import fsdp, packed
from test_data import gradients, joint
from test_preferences import base, run  # noqa: F401 (a fixture)
from test_training import log

PACK = [arch for arch in tiny.ARCHS if arch != "gpt2"]


def ready(arch, **kw):
    """A tiny model made ready, and its plain twin."""
    models = [tiny.model(arch, vocab=50, **kw) for _ in range(2)]
    assert packed.prepare(models[0]) == "" and packed.prepare(models[0]) == ""
    return models


def recompute(model):
    """--activation-checkpointing, as fsdp.load_model has it."""
    fsdp.in_training(model, lambda forward: functools.partial(checkpoint, forward, use_reentrant=False))


def trees(rng, lengths):
    """(prompts, segments) of these lengths: [(prompt, (segment, ...)), ...]."""
    some = lambda n: [rng.randrange(50) for _ in range(n)]  # noqa: E731
    return [some(n) for n, _ in lengths], [[some(n) for n in row] for _, row in lengths]


RAGGED = [(3, (5, 1)), (1, (0, 4)), (7, (2, 0)), (2, (6, 6)), (4, (1, 1))]
LONG = [(100, (60, 1)), (300, (0, 200)), (5, (129, 130)), (128, (129, 1)), (1, (2, 400))]


# ------------------------------------------------------------------------------------------------ layout and mask
def test_the_layout_of_the_docstring():
    model, _ = ready("llama")
    inputs, columns = packed.pack([[5, 6], [8]], [[[1, 2, 3], [4]], [[9, 9], []]], model)
    assert inputs["input_ids"].tolist() == [[5, 6, 1, 2, 8, 9]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]]
    assert columns == [[[1, 2, 3], [1]], [[4, 5], [4]]]
    assert inputs["cu_seq_lens_q"].tolist() == [0, 4, 6]
    seen = ["100000", "110000", "111000", "111100", "000010", "000011"]
    assert inputs["attention_mask"].shape == (1, 1, 6, 6)
    assert ["".join(str(int(k)) for k in q) for q in inputs["attention_mask"][0, 0]] == seen
    with pytest.raises(ValueError, match="--packed: a row has an empty prompt"):
        packed.pack([[5], []], [[[1]], [[2]]], model)


@pytest.mark.parametrize("arch", ["llama", "mistral"])  # mistral's window is 8
def test_a_token_sees_its_prompt_and_its_own_response_up_to_itself(arch):
    """Column by column: position, and the list of (row, segment, place) that it sees."""
    model, _ = ready(arch)
    prompts, segments = trees(random.Random(0), RAGGED)
    inputs, columns = packed.pack(prompts, segments, model)
    names = []  # of each column: row, segment (0 the prompt), place
    for b, (prompt, row) in enumerate(zip(prompts, segments, strict=True)):
        names += [(b, s, j) for s, part in enumerate([prompt, *(t[:-1] for t in row)]) for j in range(len(part))]
    place = {name: column for column, name in enumerate(names)}
    position = [j + (len(prompts[b]) if s else 0) for b, s, j in names]
    assert inputs["position_ids"].tolist() == [position]
    for q, (b, s, j) in enumerate(names):
        sees = {(b, 0, i) for i in range(j + 1 if s == 0 else len(prompts[b]))} | {(b, s, i) for i in range(j + 1)}
        sees = {place[name] for name in sees if arch == "llama" or position[q] - position[place[name]] < 8}
        assert set(inputs["attention_mask"][0, 0, q].nonzero().flatten().tolist()) == sees
    for b, (prompt, row) in enumerate(zip(prompts, segments, strict=True)):
        for s, tokens in enumerate(row):  # what predicts token j: the prompt's last, then the token before
            before = [(b, 0, len(prompt) - 1), *((b, s + 1, j) for j in range(len(tokens) - 1))]
            assert columns[b][s][: len(tokens)] == [place[name] for name in before[: len(tokens)]]


@pytest.mark.parametrize("arch", ["llama", "mistral"])
def test_the_block_mask_is_the_one_that_flex_finds_itself(arch, monkeypatch):
    """Over several blocks: no block with an entry is left out; without a window none is there for nothing. And its
    function, entry by entry, is the mask of the padded-free layout on a CPU."""
    model, _ = ready(arch)
    prompts, segments = trees(random.Random(1), LONG)
    dense = packed.pack(prompts, segments, model)[0]["attention_mask"][0, 0]
    monkeypatch.setattr(packed, "has_flex", lambda device: True)
    inputs, _ = packed.pack(prompts, segments, model)
    mask, size = inputs["attention_mask"], inputs["input_ids"].shape[1]
    assert size % packed.BLOCK == 0 and 0 <= size - len(dense) < packed.BLOCK
    column = torch.arange(size)
    whole = mask.mask_mod(0, 0, column[:, None], column[None])
    assert torch.equal(whole[: len(dense), : len(dense)], dense)
    assert not whole[len(dense) :, : len(dense)].any() and whole.diagonal().all()
    theirs = create_block_mask(mask.mask_mod, None, None, size, size, device="cpu")
    blocks, expected = mask.to_dense()[0, 0].bool(), theirs.to_dense()[0, 0].bool()
    assert not (expected & ~blocks).any() and expected.sum() < len(expected) ** 2 / 2
    assert arch == "mistral" or torch.equal(blocks, expected)
    back = torch.zeros_like(blocks)  # the same by key blocks, for the backward
    for k in range(len(blocks)):
        back[mask.q_indices[0, 0, k, : mask.q_num_blocks[0, 0, k]].long(), k] = True
    assert torch.equal(back, blocks)


# ------------------------------------------------------------------------------------------------ losses
def close(found, expected, model, plain):
    """Sums to 1e-5, gradients to 1e-5 of the largest entry of each weight's."""
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].tolist() == pytest.approx(expected[name].tolist(), rel=1e-5)
    for a, b in zip(gradients(model, found), gradients(plain, expected), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5 * float(b.abs().max()) + 1e-6)


@pytest.mark.parametrize("chunk", [2**26, 150])
@pytest.mark.parametrize("arch", PACK)
def test_losses_are_those_of_their_definition(arch, chunk, monkeypatch):
    """Rows of 1 to 19 tokens, without y, without z, without either; Mistral's window is shorter than its rows."""
    monkeypatch.setattr(batches, "CHUNK", chunk)
    model, plain = ready(arch)
    x, terms = joint(random.Random(4))
    close(batches.losses(model, x, terms), batches.losses_by_definition(plain, x, terms), model, plain)
    one = {"sft": terms["sft"]}  # no tree
    found, expected = batches.losses(model, x, one)["sft"], batches.losses_by_definition(plain, x, one)["sft"]
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("arch", ["gpt_neox", "mistral"])
def test_blocks_that_run_again_in_the_backward(arch):
    """The activations are made anew after the pass is over, from the same mask."""
    model, plain = ready(arch)
    recompute(model)
    x, terms = joint(random.Random(6))
    found = batches.losses(model, x, terms)
    generate.generate(model, x, max_new_tokens=3, eos_token_id=1)  # nor does it matter what was done meanwhile
    close(found, batches.losses_by_definition(plain, x, terms), model, plain)


def test_compiled_blocks():
    """--compile, in one graph for micro-batches of any size; there the mask alone parts the rows."""
    model, plain = ready("mistral", num_hidden_layers=1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fsdp.in_training(model, functools.partial(torch.compile, dynamic=True, fullgraph=True))
    for seed, times in ((6, 1), (7, 3)):
        x, terms = joint(random.Random(seed))
        x, terms = x * times, {name: (loss, *(rows * times for rows in of)) for name, (loss, *of) in terms.items()}
        found, expected = batches.losses(model, x, terms), batches.losses_by_definition(plain, x, terms)
        close(found, expected, model, plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("arch", PACK)
def test_by_flex_attention(arch, monkeypatch):
    """The path of a GPU, as far as a CPU can follow it: unfused, and without a backward."""
    model, plain = ready(arch)
    x, terms = joint(random.Random(5))
    monkeypatch.setattr(packed, "has_flex", lambda device: True)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        found, expected = batches.losses(model, x, terms), batches.losses_by_definition(plain, x, terms)
    for name in found:
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("arch", PACK)
def test_on_a_gpu(arch, again):
    """Fused, with gradients, in float32; several sizes, so that shapes change under the compiled kernel."""
    size = {"hidden_size": 128} | ({"head_dim": 32} if arch in ("qwen3", "gemma") else {})
    model, plain = (m.cuda() for m in ready(arch, **size))
    if again:
        recompute(model)
    for seed, times in ((5, 1), (6, 9), (7, 30)):
        x, terms = joint(random.Random(seed))
        x, terms = x * times, {name: (loss, *(rows * times for rows in of)) for name, (loss, *of) in terms.items()}
        found, expected = batches.losses(model, x, terms), batches.losses_by_definition(plain, x, terms)
        for name in found:
            assert float(found[name].detach()) == pytest.approx(float(expected[name].detach()), rel=1e-4)
        for a, b in zip(gradients(model, found), gradients(plain, expected), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-3 * float(b.abs().max()) + 1e-5)


@pytest.mark.parametrize("cut", [{}, {0: 2, 1: 0, 2: 0}])
def test_soft_labels_and_sums_by_row(cut):
    """RAC's distributions, where a row ends at its last correction; and DPO's sums of each row."""
    model, plain = ready("llama")
    rng, width = random.Random(7), 4
    x, y, z = trees(rng, [(3, ()), (9, ()), (1, ())])[0], [[3, 4], [], [5]], [[1, 2, 3, 4], [5, 6], [7]]
    rows = [{name: torch.randint(50, (len(t), width)).numpy() for name in ("top_ids", "top_logp")} for t in z]
    z = [tokens[: cut.get(i)] for i, tokens in enumerate(z)]
    z_bar = [[t + 1 for t in tokens] for tokens in z]
    args = type("Args", (), {"topk": width, "unmasked": False, "kl": "forward"})
    case = type("Run", (), {"args": args, "device": torch.device("cpu")})
    found, expected = (
        pass_(m, x, {"rac": rac_options.soft_term(case, rows, z, z_bar), "sft": (sft.sft_loss, y, y)})
        for pass_, m in ((batches.losses, model), (batches.losses_by_definition, plain))
    )
    found, expected = ({**sums, "bash": sums["sft"]} for sums in (found, expected))
    close(found, expected, model, plain)
    by_row = [dpo.log_probs(m, x, {"y": y, "z": z}) for m in (model, plain)]
    for name in ("y", "z"):
        assert by_row[0][name].tolist() == pytest.approx(by_row[1][name].tolist(), rel=1e-5)


def test_noise_on_embeddings_stays_with_its_example():
    """NEFTune's, which is put on by column; a row with nothing to learn takes no part."""
    sizes = [(2, 5), (9, 0), (4, 1), (1, 8)]
    rows = [{"id": i, "x": [i + 2] * a, "y": [i + 9] * b} for i, (a, b) in enumerate(sizes)]
    x, y = ([row[name] for row in rows] for name in ("x", "y"))
    sums = []
    for model in ready("llama"):
        for alpha in (5.0, 0):
            with sft.neftune(model, rows, alpha, 3), torch.no_grad():
                sums.append(float(batches.losses(model, x, {"sft": (sft.sft_loss, y, y)})["sft"]))
    noisy, plain, *expected = sums
    assert [noisy, plain] == pytest.approx(expected, rel=1e-5) and noisy != pytest.approx(plain, rel=1e-3)


# ------------------------------------------------------------------------------------------------ the rest of a run
def test_all_other_passes_are_bitwise_as_before(tmp_path):
    model, plain = ready("mistral")
    x, terms = joint(random.Random(8))
    b = batches.batch(x, terms["sft"][1])
    with torch.no_grad():
        assert torch.equal(batches.response_logits(model, b), batches.response_logits(plain, b))
    options = {"max_new_tokens": 12, "eos_token_id": 1, "seed": 2}
    assert generate.generate(model, x, **options) == generate.generate(plain, x, **options)
    y = [row or [3] for row in terms["sft"][1]]
    assert generate.mix(model, x, y, beta=0.5) == generate.mix(plain, x, y, beta=0.5)
    for name, m in (("a", model), ("b", plain)):
        m.save_pretrained(tmp_path / name)
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()


def test_a_model_that_cannot_keeps_its_padding():
    """Each with its reason, and nothing about it is changed."""
    flex = tiny.model("llama", attn_implementation="flex_attention")
    assert packed.prepare(flex) == "it needs sdpa attention, not flex_attention"  # which has no backward on a CPU
    for model, why in (
        (tiny.model("gpt2"), "gpt2 does not take flex_attention"),
        (tiny.model("llama", attn_implementation="eager"), "it needs sdpa attention, not eager"),
        (
            tiny.model("qwen2", use_sliding_window=True, max_window_layers=1, sliding_window=4),
            "the layers of qwen2 differ in what they see (full_attention, sliding_attention)",
        ),
    ):
        before = model.config._attn_implementation
        assert packed.prepare(model) == why
        assert model.config._attn_implementation == before and not hasattr(model, "packed")
        x, terms = joint(random.Random(9))
        found, expected = batches.losses(model, x, terms), batches.losses_by_definition(model, x, terms)
        for name in found:
            assert float(found[name].detach()) == pytest.approx(float(expected[name].detach()), rel=1e-5)


def test_heads_too_narrow_for_a_gpu(monkeypatch):
    monkeypatch.setattr(packed, "has_flex", lambda device: True)
    assert packed.prepare(tiny.model("llama")) == "flex_attention needs heads at least 16 wide, not 8"


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_as_a_command(base, tmp_path, monkeypatch, capsys, arch):  # noqa: F811
    """The same run with the flag and without; what it cannot pack it says, and is then bitwise without."""
    model = ["--model", base / arch, "--epochs", "1"]
    plain = run(monkeypatch, "rac", base, tmp_path / "plain", *model)
    capsys.readouterr()
    out = run(monkeypatch, "rac", base, tmp_path / "packed", *model, "--packed")
    said = [line for line in capsys.readouterr().err.splitlines() if "--packed" in line]
    fits = arch == "llama"
    reason = "not with this model (gpt2 does not take flex_attention); its rows are padded, as without the flag"
    assert said == ([] if fits else [f"--packed: {reason}"])
    for a, b in zip(log(plain), log(out), strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-5 if fits else 0)
    a, b = (load_file(folder / "model.safetensors") for folder in (plain, out))
    assert all(torch.allclose(a[name], b[name], rtol=0, atol=1e-3 if fits else 0) for name in a)
