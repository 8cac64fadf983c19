"""The loop's machinery: schedule, data order, exact normalisation, ranks, interruption; real processes."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file

import ddp_utils
import folders
import tiny
from core import arrow, fsdp, ranks

HERE = Path(__file__).parent
STAGES = ("sft", "scs", "bash", "rac")
FLAGS = ["--task", "toy", "--lr", "1e-3", "--clip", "0.5", "--max-prompt", "40", "--max-response", "24"]


def runner(ranks=0):
    """The words before a script's name: torchrun's where ranks > 0."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *(words if ranks else [])]


def launch(*command, ranks=0, check=True, **env):
    """Runs a script of the repository, under torchrun where ranks > 0."""
    done = subprocess.run(
        [*runner(ranks), *map(str, command)], cwd=HERE.parent, capture_output=True, text=True, env={**os.environ, **env}
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def largest_difference(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a ragged data set and a tiny model of each architecture."""
    folder = tmp_path_factory.mktemp("world")
    words = [w for w in tiny.WORDS if w.isdigit()]
    rng = torch.Generator().manual_seed(0)
    with open(folder / "train.jsonl", "w") as file:
        for _ in range(13):
            a, b = (int(torch.randint(1, 20, (), generator=rng)) for _ in range(2))
            text = [words[int(i)] for i in torch.randint(len(words), (a + b,), generator=rng)]
            file.write(json.dumps({"prompt": " ".join(text[:a]), "response": " ".join(text[a:])}) + "\n")
    tokenizer = tiny.word_tokenizer()
    for arch in tiny.ARCHS:
        tiny.model(arch, vocab=len(tokenizer) + 3).save_pretrained(folder / arch)
        tokenizer.save_pretrained(folder / arch)
    return folder


# ------------------------------------------------------------------------------------------------ small parts
def test_learning_rate():
    rate = [ddp_utils.learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
    assert rate[:10] == pytest.approx([2.0 * (i + 1) / 10 for i in range(10)])
    assert rate[10:] == pytest.approx([1 + math.cos(math.pi * i / 90) for i in range(90)])
    assert ddp_utils.learning_rate(0, 100, 2.0, 0.0) == 2.0 and ddp_utils.learning_rate(0, 1, 2.0, 0.1) == 2.0


@pytest.mark.parametrize("n, size", [(10, 3), (12, 4), (2, 8), (1, 1)])
def test_every_epoch_is_a_permutation(n, size):
    per_epoch = math.ceil(n / size)
    batches = [ddp_utils.batch_rows(n, step, size, seed=1) for step in range(3 * per_epoch)]
    epochs = [sum(batches[e * per_epoch : (e + 1) * per_epoch], []) for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 10 or epochs[0] != epochs[1]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("soft", [False, True])
def test_a_step_is_its_definition(tmp_path, monkeypatch, world_size, soft):
    """Rows of the batch by length, dealt to the ranks; each rank makes its own alone, and counts the tokens of all."""
    from datasets import Dataset

    import batches
    import stage

    rng, rows = random.Random(0), []
    for i in range(23):
        x, z = ([rng.randrange(60) for _ in range(rng.randint(1, 9))] for _ in range(2))
        rows.append({"id": 7 * i, "x": x, "y": z[::-1], "z": z, "y_logp": i / 7})
        if soft:
            top = np.array([[t, t + 1] for t in z], np.int32)
            rows[-1] |= {"top_ids": top, "top_logp": -top.astype(np.float32) / 3}
    arrow.write(tmp_path / "rows.arrow", [arrow.table(rows[:9]), arrow.table(rows[9:])])
    data = Dataset.from_file(str(tmp_path / "rows.arrow"))
    plain = data.to_list()
    flags = f"--model m --task toy --out {tmp_path} --batch-size 8 --micro-batch-size 2 --checkpoint-every 0"
    args = stage.parser("").parse_args(flags.split())
    monkeypatch.setattr(ddp_utils, "WORLD", world_size)
    for rank in range(world_size):
        monkeypatch.setattr(ddp_utils, "RANK", rank)
        run = ddp_utils.Run.__new__(ddp_utils.Run)
        run.args, run.phase, run.resume, run.stopped = args, 0, {"phase": 0, "step": 0}, False
        run.params = [torch.nn.Parameter(torch.zeros(1))]
        for k, step in enumerate(run.steps(data, 2)):
            picked = ddp_utils.batch_rows(23, k, 8, ranks.fold_in(args.seed, 0))
            batch = sorted((plain[i] for i in picked), key=batches.length)
            share = math.ceil(len(batch) / world_size)
            mine = batch[rank::world_size]
            empty = {key: value if key in ("id", "x") else [] for key, value in batch[0].items()}
            mine += [empty] * (share - len(mine))
            made = [row for some in step.micro_batches for row in some]
            as_lists = [{key: v.tolist() if isinstance(v, np.ndarray) else v for key, v in row.items()} for row in made]
            assert as_lists == mine and [len(some) for some in step.micro_batches][0] == 2
            assert step.ids == [row["id"] for row in batch]
            for name in ("x", "y", "z"):
                assert step.tokens(name) == sum(len(row[name]) for row in batch)
            run._step = None


def test_fold_in_gives_distinct_seeds():
    assert len({ranks.fold_in(a, b, c) for a in range(10) for b in range(10) for c in range(10)}) == 1000


# ------------------------------------------------------------------------------------------------ exactness
@pytest.fixture(scope="session")
def everyone(world):
    """All stages on all architectures, by one process and by two ranks, with different micro-batches."""
    archs = ",".join(tiny.ARCHS)
    launch(HERE / "all_stages.py", world, "one", archs, "--micro-batch-size", 5)
    launch(HERE / "all_stages.py", world, "two", archs, "--micro-batch-size", 2, ranks=2)
    return world


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_two_ranks_equal_one(everyone, arch, stage):
    """Losses to 1e-5, weights after several AdamW steps to 1e-4; ragged batches, the last one with an idle rank."""
    one, two = everyone / f"one-{arch}-{stage}", everyone / f"two-{arch}-{stage}"
    assert len(log(one)) == len(log(two)) >= 4
    for a, b in zip(log(one), log(two), strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-5)
    assert largest_difference(one, two) < 1e-4


@pytest.mark.parametrize("arch", tiny.ARCHS)
@pytest.mark.parametrize("stage, name", [("bash", "D_s_1"), ("rac", "D_r_1")])
def test_generated_data_do_not_depend_on_the_number_of_ranks(everyone, arch, stage, name):
    one, two = (load_from_disk(everyone / f"{run}-{arch}-{stage}" / name).to_list() for run in ("one", "two"))
    assert one == two


def test_the_loss_is_that_of_the_global_batch(everyone):
    """The first logged loss against the definition: one unpadded row at a time, float64, divided once."""
    import data

    folder = everyone / "llama"
    rows, _ = data.examples("toy", fsdp.load_tokenizer(str(folder)), data=str(everyone / "train.jsonl"))
    model = fsdp.load_model(str(folder)).double()
    picked = ddp_utils.batch_rows(len(rows), 0, 6, ranks.fold_in(0, 0))
    total = n = 0
    for row in (rows[i] for i in picked):
        log_p = model(torch.tensor([row["x"] + row["y"]]), use_cache=False).logits.log_softmax(-1)[0]
        for j, token in enumerate(row["y"]):
            total -= float(log_p[len(row["x"]) + j - 1, token].detach())
            n += 1
    assert log(everyone / "two-llama-sft")[0]["loss"] == pytest.approx(total / n, rel=1e-5)


def test_saved_folders_are_ordinary(everyone):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for run in ("one", "two"):
        folder = everyone / f"{run}-llama-rac"
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == torch.float32
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # tied as before
        assert AutoTokenizer.from_pretrained(folder).eos_token == "<eos>"
        assert not (folder / "checkpoints").exists()
        assert json.loads((folder / "args.json").read_text())["task"] == "ultrachat"


# ------------------------------------------------------------------------------------------------ shapes of a run
SHAPES = {
    "hybrid": (4, "llama,gpt2", ["--shard", "2", "--activation-checkpointing"]),
    "replicas": (2, "qwen2", ["--shard", "1"]),
    "lock-step": (2, "llama,mistral", ["--lock-step"]),
    "share-prompt": (2, "gpt_neox,mistral", ["--share-prompt"]),
    "packed": (2, "mistral", ["--packed", "--activation-checkpointing"]),
}


@pytest.fixture(scope="module", params=SHAPES)
def shaped(request, everyone):
    ranks, archs, flags = SHAPES[request.param]
    launch(HERE / "all_stages.py", everyone, request.param, archs, "--micro-batch-size", 2, *flags, ranks=ranks)
    return request.param, archs.split(",")


def test_other_shapes_equal_one_process(everyone, shaped):
    """Hybrid sharding, whole replicas, recomputed activations, lock-step generation: the same as one process."""
    name, archs = shaped
    for arch in archs:
        for stage in STAGES:
            one, other = everyone / f"one-{arch}-{stage}", everyone / f"{name}-{arch}-{stage}"
            for a, b in zip(log(one), log(other), strict=True):
                assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-5)
            assert largest_difference(one, other) < 1e-4
            for made in one.glob("D_*_1"):
                assert load_from_disk(made).to_list() == load_from_disk(other / made.name).to_list()


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    """A short run of SFT, as a command line and as a folder."""
    words = ["sft.py", "--model", world / "llama", "--data", world / "train.jsonl", *FLAGS, "--batch-size", 4]
    out = tmp_path_factory.mktemp("plain") / "out"
    launch(*words, "--out", out)
    return words, out


def test_compiled_blocks_learn_the_same(plain, tmp_path):
    words, out = plain
    launch(*words, "--out", tmp_path / "out", "--compile", "--activation-checkpointing")
    for a, b in zip(log(out), log(tmp_path / "out"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.parametrize("ranks", [0, 2])
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(plain, tmp_path, ranks):
    words, out = plain
    launch(*words, "--out", tmp_path / "out", "--dtype", "bfloat16", ranks=ranks)
    assert {str(tensor.dtype) for tensor in weights(tmp_path / "out").values()} == {"torch.float32"}
    for a, b in zip(log(out), log(tmp_path / "out"), strict=True):
        assert a["loss"] != b["loss"] and a["loss"] == pytest.approx(b["loss"], rel=2e-2)


def test_a_shard_that_does_not_divide(plain, tmp_path):
    done = launch(*plain[0], "--out", tmp_path / "out", "--shard", 2, check=False)
    assert done.returncode == 2 and "--shard 2 does not divide the 1 processes" in done.stderr


# ------------------------------------------------------------------------------------------------ interruption
@pytest.mark.parametrize("ranks", [0, 2])
def test_an_interrupted_run_ends_in_the_same_weights(world, tmp_path, ranks):
    """SIGTERM in the middle of the second iteration of BASH; the same command goes on and ends bitwise equal."""
    command = ["bash.py", "--model", world / "llama", "--data", world / "train.jsonl", *FLAGS, "--batch-size", 4]
    command += ["--iterations", 2, "--epochs", 15, "--checkpoint-every", 13, "--sft-epochs", 1]
    launch(*command, "--out", tmp_path / "whole", ranks=ranks)
    out = tmp_path / "cut"
    command_line = [*runner(ranks), *map(str, command), "--out", str(out)]
    process = subprocess.Popen(command_line, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (out / "D_s_2").exists():
        time.sleep(0.02)
        assert process.poll() is None, process.stdout.read().decode()[-3000:]
    process.send_signal(signal.SIGTERM)
    printed = process.communicate()[0].decode()
    assert process.returncode != 0 and not (out / "model.safetensors").exists()
    assert ranks or "the same command goes on from there" in printed
    assert "Traceback" not in printed or ranks
    resumed = launch(*command, "--out", out, ranks=ranks)
    assert "goes on from" in resumed.stderr
    assert largest_difference(tmp_path / "whole", out) == 0
    keys = ("phase", "step", "loss", "grad_norm", "lr")
    assert [[r[k] for k in keys] for r in log(out)] == [[r[k] for k in keys] for r in log(tmp_path / "whole")]
    assert "already done" in launch(*command, "--out", out, ranks=ranks).stderr


def test_offline_generation_keeps_finished_chunks(tmp_path):
    """A crash loses the chunk at hand and nothing else."""
    from datasets import Dataset

    rows, seen = Dataset.from_list([{"id": i} for i in range(10)]), []

    def make(some, crash=True):
        seen.append([row["id"] for row in some])
        if crash and len(seen) == 3:
            raise KeyboardInterrupt
        return [{"id": row["id"], "z": [row["id"]]} for row in some]

    model, tokenizer = tiny.model("llama"), tiny.word_tokenizer()
    with pytest.raises(KeyboardInterrupt):
        folders.offline(tmp_path / "D", make, rows, model, tokenizer, chunk=3)
    done = folders.offline(tmp_path / "D", lambda some: make(some, crash=False), rows, model, tokenizer, chunk=3)
    assert seen == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [6, 7, 8], [9]]
    assert [row["z"] for row in done] == [[i] for i in range(10)]
    again = folders.offline(tmp_path / "D", None, rows, model, tokenizer)  # finished: read, not made
    assert again.to_list() == done.to_list()
