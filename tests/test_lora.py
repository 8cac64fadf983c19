"""LoRA: against weights merged by hand, as commands, on two ranks, resumed; folders of adapters; bad input."""

import functools
import json
import random
import sys
from argparse import Namespace
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file

import batches
import data
import ddp_utils
import evaluate
import generate
import held_out
import lora_runs
import rac
import sft
import stage
import tiny
from core import fsdp, kinds, lora
from core.ranks import cli
from sft import sft_loss
from test_faults import same_log
from test_training import HERE, largest_difference, launch, log, weights

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
ARCHS = ("llama", "gpt_neox", "gpt2", "mistral", "qwen2")
RANK, ALPHA = 3, 5.0
LORA = ("--lora-rank", RANK, "--lora-alpha", ALPHA)
SCALE = ALPHA / RANK


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with tiny models and ragged rows."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer, rng = tiny.word_tokenizer(), random.Random(0)
    for arch in ARCHS:
        tiny.model(arch, vocab=len(tokenizer)).save_pretrained(folder / arch)
        tokenizer.save_pretrained(folder / arch)
    for name in ("train", "held", "pairs"):
        sides = ("chosen", "rejected") if name == "pairs" else ("response",)
        rows = [
            {side: " ".join(str(rng.randrange(40)) for _ in range(rng.randint(2, 9))) for side in ("prompt", *sides)}
            for _ in range(9)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(stage_name, base, out, *flags, arch="llama"):
    command = [f"{stage_name}.py", "--model", base / arch, "--task", "toy", "--data", base / "train.jsonl"]
    command += ["--out", out, "--batch-size", 4, "--lr", "1e-2", "--max-prompt", 40, "--max-response", 12]
    return [str(word) for word in [*command, *LORA, *flags]]


def run(monkeypatch, *args, **kw):
    """Runs a stage's main in this process, as its command line would."""
    command = words(*args, **kw)
    monkeypatch.setattr("sys.argv", command)
    lora_runs.stage(command)
    return Path(args[2])


def with_adapter(folder, dtype="float32", targets=None, seed=0):
    """A model with an adapter whose B is not 0, as load_model makes it."""
    model = fsdp.load_model(str(folder), dtype, adapter=lora.Lora(RANK, ALPHA, targets, seed, str(folder)))
    generator = torch.Generator().manual_seed(1)
    for layer in lora.layers(model).values():
        layer.lora_B["default"].weight.data.normal_(0, 0.3, generator=generator)
    return model


def by_hand(model, plain):
    """The plain model's weights with W + alpha/r B A in the place of W, and the leaves A and B, by autograd."""
    leaves, state = {}, {name: p.detach() for name, p in plain.named_parameters()}
    for name, layer in lora.layers(model).items():
        for part in ("lora_A", "lora_B"):
            leaves[f"{name}.{part}"] = getattr(layer, part)["default"].weight.detach().clone().requires_grad_()
        more = SCALE * leaves[f"{name}.lora_B"] @ leaves[f"{name}.lora_A"]
        conv = type(plain.get_submodule(name)).__name__ == "Conv1D"
        state[f"{name}.weight"] = state[f"{name}.weight"] + (more.T if conv else more)
    return leaves, state


class Merged(torch.nn.Module):
    """A plain model, computed with other weights."""

    def __init__(self, plain, state):
        super().__init__()
        self.plain, self.state, self.config, self.device = plain, state, plain.config, plain.device

    def forward(self, **inputs):
        return torch.func.functional_call(self.plain, self.state, kwargs=inputs)


# ------------------------------------------------------------------------------------------------ the definition
X = [[5, 6, 7], [8], [9, 10]]
Y = [[11, 12, 13, 1], [14, 1], [15, 16, 1]]
Z = [[11, 20, 13], [21, 22, 1], [23, 1]]


@pytest.mark.parametrize("arch", ARCHS)
def test_loss_and_gradients_equal_those_of_merged_weights(base, arch):
    """losses on the model with an adapter, against W + alpha/r B A written out; W has no gradient."""
    model, plain = with_adapter(base / arch), fsdp.load_model(str(base / arch))
    leaves, state = by_hand(model, plain)
    terms = {"sft": (sft_loss, Y, Y), "bash": (sft_loss, Z, Z)}
    got = batches.losses(model, X, terms)
    want = batches.losses_by_definition(Merged(plain, state), X, terms)
    for name in terms:
        assert got[name].item() == pytest.approx(want[name].item(), rel=1e-5)
    sum(got.values()).backward()
    sum(want.values()).backward()
    linear = [m for b in fsdp.blocks(plain) for m in b.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    assert len(leaves) == 2 * len(linear) > 0
    for name, leaf in leaves.items():
        layer, _, part = name.rpartition(".")
        grad = getattr(lora.layers(model)[layer], part)["default"].weight.grad
        assert grad.dtype == torch.float32 and float(leaf.grad.abs().max()) > 1e-3
        assert torch.allclose(grad, leaf.grad, rtol=1e-4, atol=1e-5), name
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.grad is not None} == {"default"}


@pytest.mark.parametrize("arch", ARCHS)
def test_it_starts_as_the_model_it_stands_on(base, arch):
    """B is 0, so that the logits are bitwise the base's; and A is another with another seed."""
    plain, ids = fsdp.load_model(str(base / arch)), torch.tensor([[5, 6, 7, 8]])
    a, b = (fsdp.load_model(str(base / arch), adapter=lora.Lora(RANK, ALPHA, None, s, "x")) for s in (0, 1))
    with torch.no_grad():
        assert torch.equal(a(ids).logits, plain(ids).logits)
    one, two = ([layer.lora_A["default"].weight for layer in lora.layers(m).values()] for m in (a, b))
    assert not any(torch.equal(*pair) for pair in zip(one, two, strict=True))
    assert not torch.equal(one[0], one[1][:, : one[0].shape[1]])
    assert all(0.5 < w.abs().max().item() * w.shape[1] ** 0.5 <= 1 for w in one)  # as nn.Linear draws


def test_targets_are_names_or_ends_of_names(base):
    found = lora.layers(with_adapter(base / "gpt2", targets="attn.c_proj, c_fc"))
    assert sorted(found) == sorted(f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_proj", "mlp.c_fc"))
    model = tiny.model("llama")
    model.o_proj = torch.nn.Linear(8, 8)  # the same name, but not in a block
    lora.add(model, fsdp.blocks(model), lora.Lora(RANK, ALPHA, "o_proj,q_proj", 0, "x"), torch.float32)
    assert sorted(name.split(".")[-1] for name in lora.layers(model)) == ["o_proj", "o_proj", "q_proj", "q_proj"]
    assert type(model.o_proj) is torch.nn.Linear


def test_bfloat16_keeps_float32_adapters_and_a_base_of_two_bytes(base):
    model = with_adapter(base / "llama", "bfloat16")
    kept = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kept == {(True, torch.float32), (False, torch.bfloat16)}
    rope = [buffer.dtype for name, buffer in model.named_buffers() if "inv_freq" in name]
    assert set(rope) == {torch.float32}
    exact = with_adapter(base / "llama")
    got, want = (batches.losses(m, X, {"sft": (sft_loss, Y, Y)})["sft"] for m in (model, exact))
    assert got.dtype == torch.float32 and got != want and float(got) == pytest.approx(float(want), rel=2e-2)
    got.backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("arch", ("llama", "gpt2"))
def test_the_decoder_writes_what_the_merged_model_writes(base, arch):
    """Greedy, drawn and mixed tokens, all with the cache; and switched off, those of the base."""
    model, plain = with_adapter(base / arch), fsdp.load_model(str(base / arch))
    merged, start = fsdp.load_model(str(base / arch)), fsdp.load_model(str(base / arch))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    lora.taken_out(model, state)
    merged.load_state_dict(state)
    with lora.switched_off(model):
        off = [draws(model) for _ in range(2)]
    assert off[0] == off[1] == draws(start) == draws(plain)
    assert draws(model) == draws(merged) != draws(start)


def draws(model):
    options = {"max_new_tokens": 8, "eos_token_id": 1, "batch_size": 2}
    with fsdp.inference(model):
        drawn = [generate.generate(model, X, temperature=t, n=2, seed=3, **options) for t in (0, 1)]
        return drawn, generate.mix(model, X, Y, beta=0.5, seed=3)


# ------------------------------------------------------------------------------------------------ commands
@pytest.mark.parametrize("arch", ("llama", "gpt2", "gpt_neox"))
def test_the_folder_holds_merged_weights_and_the_adapter_beside_them(base, tmp_path, monkeypatch, arch):
    """Against peft's own model of base and adapter; what LoRA did not touch is bitwise the base's."""
    from transformers import AutoModelForCausalLM

    seen = {}
    finish = ddp_utils.Run.finish

    def look(run):
        with torch.no_grad():
            seen["logits"] = run.model(torch.tensor([[5, 6, 7, 8]])).logits
        finish(run)

    monkeypatch.setattr(ddp_utils.Run, "finish", look)
    before = {file.name: file.read_bytes() for file in (base / arch).iterdir()}
    out = run(monkeypatch, "sft", base, tmp_path / "out", arch=arch)
    assert {file.name: file.read_bytes() for file in (base / arch).iterdir()} == before
    whole = AutoModelForCausalLM.from_pretrained(out)
    plain = AutoModelForCausalLM.from_pretrained(base / arch)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base / arch), out / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(whole(ids).logits, seen["logits"], atol=1e-4)
        assert torch.allclose(theirs(ids).logits, seen["logits"], atol=1e-4)
        assert float((whole(ids).logits - plain(ids).logits).abs().max()) > 1e-2
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    touched = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] + ".weight" for name in adapter}
    a, b = weights(out), weights(base / arch)
    assert a.keys() == b.keys() and {t.dtype for t in a.values()} == {torch.float32}
    assert {name for name in a if not torch.equal(a[name], b[name])} == touched
    assert not any("lora" in name for name in a)
    args, config = (json.loads((out / name).read_text()) for name in ("args.json", "adapter/adapter_config.json"))
    assert (args["lora_rank"], args["lora_alpha"], args["lora_targets"]) == (RANK, ALPHA, None)
    assert config["base_model_name_or_path"] == str(base / arch) and config["inference_mode"]
    assert config["target_modules"] == sorted(config["target_modules"])


def test_all_weights_of_a_merged_adapter_can_learn(base, tmp_path, monkeypatch):
    adapter = run(monkeypatch, "sft", base, tmp_path / "a", "--max-steps", 1) / "adapter"
    assert all(p.requires_grad for p in fsdp.load_model(str(adapter)).parameters())


def test_off_it_leaves_no_trace(base, tmp_path, monkeypatch):
    """A run begun without the flags, by an earlier version, goes on."""
    monkeypatch.setattr(sys.modules[__name__], "LORA", ())
    out = run(monkeypatch, "sft", base, tmp_path / "out", "--max-steps", 1)
    args = json.loads((out / "args.json").read_text())
    lacking = {key: value for key, value in args.items() if not key.startswith("lora_")}
    assert {args[key] for key in args.keys() - lacking.keys()} == {None}
    (out / "args.json").write_text(json.dumps(lacking))
    (out / "config.json").unlink()
    run(monkeypatch, "sft", base, out, "--max-steps", 1)
    assert (out / "config.json").exists() and not (out / "adapter").exists()


def test_held_out_rows_are_measured_with_the_adapter(base, tmp_path, monkeypatch):
    """The last line's figures are those of the saved folder."""
    flags = ("--eval-every", 1, "--eval-data", base / "held.jsonl")
    out = run(monkeypatch, "sft", base, tmp_path / "out", *flags)
    args = stage.parser("").parse_args(words("sft", base, out, *flags)[1:])
    saved = Namespace(model=fsdp.load_model(str(out)), tokenizer=fsdp.load_tokenizer(str(out)), device="cpu", args=args)
    *rows, _ = data.held_out(args, saved.tokenizer)
    found, held = held_out.watch(saved, *rows)(), [name for name in log(out)[-1] if name.startswith("held_")]
    assert len(held) > 1 and log(out)[0]["held_nll"] != log(out)[-1]["held_nll"]
    for name in held:
        assert log(out)[-1][name] == pytest.approx(found[name], rel=1e-4, abs=1e-6)


def test_labels_of_the_start_come_from_the_model_without_its_adapter(base, tmp_path, monkeypatch):
    """D_r's z is the trained model's, its labels are those of --model; no second model is loaded."""
    loaded, load = [], fsdp.load_model
    monkeypatch.setattr(fsdp, "load_model", lambda *args, **kw: loaded.append(args) or load(*args, **kw))
    flags = ("--labels-from", "start", "--sft-epochs", 8, "--epochs", 1, "--iterations", 2)
    out = run(monkeypatch, "rac", base, tmp_path / "out", *flags)
    assert len(loaded) == 1
    start, end = load(str(base / "llama")), load(str(out))
    tokenizer = fsdp.load_tokenizer(str(out))
    args = rac_args(base, out)
    f = {row["id"]: row["f"] for row in data.load(args, tokenizer)[0]}
    d_r = datasets.load_from_disk(str(out / "D_r_1"))
    shown, z = [f[i] for i in d_r["id"]], [*d_r["z"]]
    assert rac.rac_labels(start, shown, z) == [*d_r["z_bar"]] != rac.rac_labels(end, shown, z)
    assert (out / "D_z_2").exists() and (out / "D_r_2").exists()


def rac_args(base, out):
    p = stage.parser("")
    p.add_argument("--max-reference", type=int, default=0)
    return p.parse_args(words("rac", base, out)[1:])


# ------------------------------------------------------------------------------------------------ ranks
RAC = ("--max-reference", 120, "--labels", "topk", "--topk", 5, "--labels-from", "start", "--sft-epochs", 1)
SLOW = ("--lr", "1e-4", "--epochs", 2)  # AdamW steps by about lr where a gradient is rounding noise
RUNS = {
    "sft": ("sft", "gpt2", SLOW),
    "bash": ("bash", "llama", (*SLOW, "--iterations", 2)),
    "scs": ("scs", "qwen2", SLOW),
    "rac": ("rac", "gpt_neox", (*SLOW, *RAC)),
    "spin": ("spin", "llama", (*SLOW, "--beta", 0.5)),
    "dpo": ("dpo", "gpt2", (*SLOW, "--beta", 0.5, "--data", "{base}/pairs.jsonl")),
    "bon": ("bon", "llama", (*SLOW, "--n", 4, "--best-of", 2)),
    "adapter": ("sft", "adapter", SLOW),
    "bfloat16": ("bash", "llama", (*SLOW, "--dtype", "bfloat16")),
    "whole": ("bash", "llama", ("--sft-epochs", 1, "--dtype", "bfloat16")),
    "cut": ("bash", "llama", ("--sft-epochs", 1, "--dtype", "bfloat16")),
}


def command_of(name, base, out, *more):
    script, arch, flags = RUNS[name]
    return words(script, base, out / name, *[str(f).format(base=base) for f in flags], *more, arch=arch)


@pytest.fixture(scope="module")
def two(base, tmp_path_factory):
    """All of RUNS on two ranks, with small micro-batches and recomputed activations, one of them packed."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base / "llama"), config)
    theirs.save_pretrained(base / "adapter")
    folder = tmp_path_factory.mktemp("two")
    flags = ("--micro-batch-size", 1, "--activation-checkpointing")
    more = {name: [*flags, "--packed"] if name == "bash" else flags for name in RUNS}
    (folder / "runs.json").write_text(json.dumps([command_of(name, base, folder, *more[name]) for name in RUNS]))
    launch(HERE / "lora_runs.py", folder / "runs.json", ranks=2)
    return folder


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("whole", "cut")])
def test_two_ranks_equal_one(base, two, tmp_path, monkeypatch, name):
    """Losses, merged weights and the adapter; in bfloat16, whose shards hold two dtypes, about the same losses."""
    monkeypatch.setitem(evaluate.CHECKS, "toy", (tiny.parity, evaluate.same))
    lora_runs.stage(command_of(name, base, tmp_path))
    one, other, start = tmp_path / name, two / name, base / RUNS[name][1]
    close = {"rel": 2e-2} if name == "bfloat16" else {"rel": 1e-4, "abs": 1e-6}
    assert len(log(one)) == len(log(other)) >= 3
    for a, b in zip(log(one), log(other), strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), **close)
    a, b = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys() and {w.dtype for w in a.values()} == {torch.float32}
    for key in a:  # A from the same seed, and both have moved
        assert float((a[key] - b[key]).abs().max()) < (2e-3 if name == "bfloat16" else 1e-4)
    assert largest_difference(one, other) < (2e-3 if name == "bfloat16" else 1e-4)
    if name == "bfloat16":  # frozen: bitwise the base's, as bfloat16 has them
        rounded = {name: w.bfloat16().float() for name, w in weights(start).items() if "proj" not in name}
        assert all(json.loads((f / "config.json").read_text())["dtype"] == "float32" for f in (one, other))
        assert rounded and all(
            torch.equal(w, weights(folder)[n]) for folder in (one, other) for n, w in rounded.items()
        )


def test_two_ranks_are_interrupted_and_go_on(two):
    """One of the ranks is told to stop; the same command goes on, and all is bitwise the same."""
    assert largest_difference(two / "whole", two / "cut") == 0 and same_log(two / "whole", two / "cut")
    a, b = ((two / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert a == b and len(log(two / "cut")) == 6


def test_compiled_blocks_learn_the_same(base, tmp_path, monkeypatch):
    """As traced by torch.compile; what its compiler then makes of it is not ours."""
    plain = run(monkeypatch, "sft", base, tmp_path / "plain")
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    out = run(monkeypatch, "sft", base, tmp_path / "out", "--compile", "--activation-checkpointing")
    assert graphs and [a["loss"] for a in log(plain)] == pytest.approx([a["loss"] for a in log(out)], rel=1e-5)
    assert largest_difference(plain, out) < 1e-4


# ------------------------------------------------------------------------------------------------ interruption
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_an_interrupted_run_ends_in_the_same_weights(base, tmp_path, monkeypatch, dtype):
    """Stopped in the second phase; its checkpoint holds the adapter and its moments alone."""
    from torch.distributed.checkpoint import FileSystemReader

    flags = ("--sft-epochs", 1, "--iterations", 2, "--dtype", dtype)
    whole = run(monkeypatch, "bash", base, tmp_path / "whole", *flags)
    kept = {}

    def read(run):  # before it goes on
        for checkpoint in (run.out / "checkpoints").glob("*-*"):
            kept.update(FileSystemReader(checkpoint).read_metadata().state_dict_metadata)
        load(run)

    load = ddp_utils.Run._load_checkpoint
    monkeypatch.setattr(ddp_utils.Run, "_load_checkpoint", read)
    cut = run(monkeypatch, "bash", base, tmp_path / "cut", *flags)
    assert all(".lora_A." in name or ".lora_B." in name for name in kept if ".param_groups." not in name)
    assert sum(name.startswith("model.model.layers") for name in kept) == 2 * 2 * 7  # A and B of 7 layers in 2 blocks
    assert largest_difference(whole, cut) == 0 and same_log(whole, cut) and len(log(cut)) == 9
    a, b = ((folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (whole, cut))
    assert a == b and not (cut / "checkpoints").exists()


# ------------------------------------------------------------------------------------------------ an adapter as --model
def test_the_folder_of_an_adapter_is_a_model(base, tmp_path, monkeypatch, capsys):
    """Its base with the adapter merged: the model that the run wrote. An adapter on it names it as its base."""
    first = run(monkeypatch, "sft", base, tmp_path / "first")
    adapter, ids = str(first / "adapter"), torch.tensor([[5, 6, 7, 8]])
    capsys.readouterr()
    model = fsdp.load_model(adapter)
    said = f"--model {adapter}: an adapter; {adapter} is merged into {base / 'llama'}"
    assert said in capsys.readouterr().err.splitlines()
    assert not lora.layers(model) and type(model) is type(fsdp.load_model(str(first)))
    assert fsdp.load_tokenizer(adapter).get_vocab() == tiny.word_tokenizer().get_vocab()
    monkeypatch.setattr("sys.argv", [word.replace(str(base / "llama"), adapter)
                                     for word in words("sft", base, tmp_path / "second")])  # fmt: skip
    sft.main()
    args = json.loads((tmp_path / "second" / "args.json").read_text())
    assert "CRC-32" in args[f"what {base / 'llama'} holds"]
    nested = fsdp.load_model(str(tmp_path / "second" / "adapter"))
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, fsdp.load_model(str(first))(ids).logits, atol=1e-4)
        want = fsdp.load_model(str(tmp_path / "second"))(ids).logits
        assert torch.allclose(nested(ids).logits, want, atol=1e-4)
        assert float((want - model(ids).logits).abs().max()) > 1e-2
    assert kinds.bases(str(tmp_path / "second" / "adapter"))[1:] == [adapter, str(base / "llama")]


def test_adapters_of_other_makers_are_merged_by_their_own_rules(base, tmp_path):
    """peft's rank-stabilised scale and patterns of ranks."""
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(
        r=2, use_rslora=True, rank_pattern={"q_proj": 4}, target_modules=["q_proj", "up_proj"],
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base / "llama"), config)
    theirs.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        found = fsdp.load_model(str(tmp_path / "adapter"))(ids).logits
        assert torch.allclose(found, theirs.eval()(ids).logits, atol=1e-4)


# ------------------------------------------------------------------------------------------------ bad input
def fails(monkeypatch, capsys, *args, **kw):
    """The one line that a failing command prints."""
    with pytest.raises(SystemExit) as stop:
        cli(lambda: run(monkeypatch, *args, **kw))
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in printed
    return printed.strip().splitlines()[-1]


WRONG = {
    ("--lora-targets", "nose"): "no linear layer of the blocks is called 'nose'; there are q_proj, k_proj, v_proj, ",
    ("--lora-targets", "lm_head"): "no linear layer of the blocks is called 'lm_head'",
    ("--lora-targets", "q_proj,,v_proj"): "no linear layer of the blocks is called ''",
    ("--lora-targets", "mlp"): "no linear layer of the blocks is called 'mlp'",
    ("--lora-rank", "33"): "--lora-rank 33: the layers that it is for have at most rank 32; lower it",
    ("--lora-rank", "0"): "--lora-alpha and --lora-targets are for --lora-rank, which is 0",
    ("--lora-rank", "-1"): "argument --lora-rank: '-1' is not a whole number of at least 0",
    ("--lora-alpha", "nan"): "argument --lora-alpha: 'nan' is not a number of at least 0",
}


@pytest.mark.parametrize("flags", WRONG)
def test_bad_flags(base, tmp_path, monkeypatch, capsys, flags):
    said = fails(monkeypatch, capsys, "sft", base, tmp_path / "out", *flags)
    assert said.startswith("sft.py: error: ") and WRONG[flags] in said


def test_a_run_with_another_rank_is_another_run(base, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "sft", base, tmp_path / "out", "--max-steps", 1)
    said = fails(monkeypatch, capsys, "sft", base, tmp_path / "out", "--max-steps", 1, "--lora-rank", 2)
    assert "--lora-rank 3 -> 2" in said


def test_without_peft(base, tmp_path, monkeypatch, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x"}))
    monkeypatch.setitem(sys.modules, "peft", None)
    said = fails(monkeypatch, capsys, "sft", base, tmp_path / "out")
    assert "sft.py: error: --lora-rank: this needs peft" in said and said.endswith("pip install peft")
    with pytest.raises(OSError, match="--model .*: an adapter; this needs peft .*: pip install peft"):
        fsdp.load_tokenizer(str(tmp_path / "adapter"))


def test_bad_folders(base, tmp_path):
    good = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(base / "llama")}
    folder = tmp_path / "adapter"
    folder.mkdir()

    def refused(load, **change):
        (folder / "adapter_config.json").write_text(json.dumps(good | change))
        with pytest.raises(OSError) as error:
            load(str(folder))
        assert str(error.value).startswith(f"--model {folder}: ") and "\n" not in str(error.value)
        return str(error.value)

    for load in (fsdp.load_tokenizer, fsdp.load_model):
        gone = refused(load, base_model_name_or_path=str(tmp_path / "gone"))
        assert f"an adapter whose base {tmp_path / 'gone'} cannot be had" in gone
        assert "cannot be had" in refused(load, base_model_name_or_path="no/such-model")
        assert "names no base" in refused(load, base_model_name_or_path=None)
        assert "names the adapter itself as its base" in refused(load, base_model_name_or_path=str(folder))
    assert "the adapter does not fit its base" in refused(fsdp.load_model)  # there are no weights
    assert "the adapter does not fit its base" in refused(fsdp.load_model, target_modules=["nose"])
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(OSError, match="an adapter"):
        fsdp.load_tokenizer(str(folder))
