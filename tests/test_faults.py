"""Faults that a long run meets: killed ranks and nodes, damaged checkpoints, a full disk, two runs in one folder.

Real processes. Asked of each: no hang, one clear line, nothing lost that was on disk, the same result in the end.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import load_from_disk

import ddp_utils
import kill_chain
import tiny
from test_training import FLAGS, HERE, free_port, largest_difference, launch, log, runner, world

__all__ = ["world"]  # pytest finds fixtures by name


def command(world, out, *flags, stage="sft", arch="llama"):
    """A run of 12 steps with a checkpoint after every third."""
    words = [f"{stage}.py", "--model", world / arch, "--data", world / "train.jsonl", *FLAGS, "--out", out]
    return [str(word) for word in [*words, "--batch-size", 4, "--epochs", 3, "--checkpoint-every", 3, *flags]]


def start(words, ranks=0, **kw):
    """The same as `launch`, but it goes on in the background."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*runner(ranks), *words], cwd=HERE.parent, **pipes, **kw)


def wait_until(condition, process, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.time() < deadline, "waited in vain"
        time.sleep(0.01)


def same_log(a, b):
    return [row["loss"] for row in log(a)] == [row["loss"] for row in log(b)]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "sft"
    launch(*command(world, out))
    return out


# ------------------------------------------------------------------------------------------------ killed processes
@pytest.mark.parametrize("before, after", [(0, 2), (2, 0)])
def test_resuming_at_another_number_of_ranks(world, whole, tmp_path, before, after):
    """The same losses to 1e-5."""
    process = start(command(world, tmp_path / "out"), before)
    wait_until(lambda: list((tmp_path / "out").glob("checkpoints/*-00000006")), process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert 6 <= len(log(tmp_path / "out")) < 12
    assert "goes on from" in launch(*command(world, tmp_path / "out"), ranks=after).stderr
    for a, b in zip(log(whole), log(tmp_path / "out"), strict=True):
        assert (a["step"], a["lr"]) == (b["step"], b["lr"]) and a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_twenty_kills_change_nothing(world, tmp_path):
    """SIGKILL at 20 random moments of SFT -> BASH -> RAC -> BoN, two ranks: the same weights and data in the end."""
    done = launch(HERE / "kill_chain.py", world, tmp_path / "out", 20)
    found = json.loads(done.stdout)
    assert sum(found["kills"].values()) == 20
    for chain in range(1, found["chains"] + 1):
        for stage in kill_chain.STAGES:
            kept, killed = tmp_path / "out" / "whole" / stage, tmp_path / "out" / f"chain-{chain}" / stage
            assert largest_difference(kept, killed) == 0 and same_log(kept, killed)
            made = sorted(path.name for path in kept.iterdir())
            assert made == sorted(path.name for path in killed.iterdir())  # nothing is left behind
            for name in made:
                if name.startswith("D_") and (kept / name).is_dir():
                    assert load_from_disk(kept / name).to_list() == load_from_disk(killed / name).to_list()


def ranks_of(process):
    """Process ids of the ranks, the children of torchrun."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def test_a_killed_rank_ends_the_other(world, tmp_path):
    out = tmp_path / "out"
    process = start(command(world, out, "--epochs", 300), ranks=2)
    wait_until(lambda: list(out.glob("checkpoints/*-00000009")), process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    process.communicate(timeout=60)  # it ends, and within a minute
    assert process.returncode != 0 and not (out / "config.json").exists()
    assert list(out.glob("checkpoints/*-*"))


@pytest.mark.parametrize("fault", [None, "kill"])
def test_two_nodes(world, whole, tmp_path, fault):
    """Two torchrun agents with a c10d rendezvous, one rank each. A rank killed on one node ends the other node, too."""
    words = command(world, tmp_path / "out", *(["--epochs", "300"] if fault else []))
    where = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test"]
    where += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    agent = [sys.executable, "-m", "torch.distributed.run", *where, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    agents = [subprocess.Popen(agent, cwd=HERE.parent, **pipes) for _ in range(2)]
    if fault:
        wait_until(lambda: list((tmp_path / "out").glob("checkpoints/*-00000009")), agents[0])
        os.kill(ranks_of(agents[1])[0], signal.SIGKILL)
    printed = [process.communicate(timeout=60)[0] for process in agents]
    assert all((process.returncode != 0) == bool(fault) for process in agents), printed
    if not fault:
        assert largest_difference(whole, tmp_path / "out") < 1e-4
        assert [row["loss"] for row in log(tmp_path / "out")] == pytest.approx(
            [r["loss"] for r in log(whole)], rel=1e-5
        )


def test_a_rank_that_diverges_is_named(world, tmp_path):
    """A model with a row of embeddings that is not finite: step, rank and rows are told, the checkpoint is kept."""
    tokenizer, model = tiny.word_tokenizer(), tiny.model("gpt_neox", vocab=len(tiny.word_tokenizer()))
    model.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids("amy")] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": "3 4", "response": "amy" if i == 5 else "7"} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["sft.py", "--model", tmp_path / "model", "--task", "toy", "--data", tmp_path / "train.jsonl", "--out"]
    words += [tmp_path / "out", "--batch-size", 2, "--epochs", 1, "--checkpoint-every", 1, "--lr", "0"]
    done = launch(*words, ranks=2, check=False)
    line = next(line for line in done.stderr.splitlines() if "not finite" in line)
    steps = len(log(tmp_path / "out"))
    assert f"sft.py: error: step {steps + 1}: loss" in line and "rows [5]" in line and "rank" in line
    assert not steps or len(list((tmp_path / "out" / "checkpoints").iterdir())) == min(2, steps)


# ------------------------------------------------------------------------------------------------ damaged files
def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def distcp(folder):
    return next(folder.glob("*.distcp"))


DAMAGE = {
    "truncated": lambda folder: truncate(distcp(folder)),
    "flipped": lambda folder: flip_a_bit(distcp(folder)),
    "gone": lambda folder: distcp(folder).unlink(),
    "metadata": lambda folder: truncate(folder / ".metadata"),
    "position": lambda folder: truncate(folder / "state.json"),
    "checksums": lambda folder: (folder / "checksums-0.json").unlink(),
}


@pytest.fixture(scope="module")
def cut(world, tmp_path_factory):
    """A run killed with two checkpoints."""
    out = tmp_path_factory.mktemp("cut") / "sft"
    process = start(command(world, out))
    wait_until(lambda: list(out.glob("checkpoints/*-00000006")), process)
    process.kill()
    process.communicate()
    return out, *sorted(path.name for path in (out / "checkpoints").iterdir() if not path.suffix)


def test_a_checkpoint_claims_its_folder(cut, world, tmp_path):
    """Though the log has been lost: another command does not go on from it."""
    shutil.copytree(cut[0], tmp_path / "out")
    (tmp_path / "out" / "log.jsonl").write_bytes(b"")
    done = launch(*command(world, tmp_path / "out", "--seed", 7), check=False)
    assert done.returncode == 2 and "belongs to another run (--seed 0 -> 7)" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("fault", DAMAGE)
def test_damage_is_seen(cut, tmp_path, fault):
    out, _, newer = cut
    folder = tmp_path / newer
    shutil.copytree(out / "checkpoints" / newer, folder)
    assert not ddp_utils.damage(folder)
    DAMAGE[fault](folder)
    assert ddp_utils.damage(folder)


@pytest.mark.parametrize("faults, ranks", [(["truncated"], 0), (["flipped"], 2), (["gone", "flipped"], 0)])
def test_a_damaged_checkpoint_is_not_used(world, whole, cut, tmp_path, faults, ranks):
    """Back to the checkpoint before, or to the beginning, and the same weights in the end."""
    run, older, newer = cut
    out = tmp_path / "out"
    shutil.copytree(run, out)
    for folder, fault in zip((newer, older), faults, strict=False):
        DAMAGE[fault](out / "checkpoints" / folder)
    printed = launch(*command(world, out), ranks=ranks).stderr
    assert f"{newer} is damaged" in printed
    assert ("begins anew" if len(faults) == 2 else f"goes back to {older}") in printed
    assert largest_difference(whole, out) == 0 if not ranks else largest_difference(whole, out) < 1e-4
    assert ranks or same_log(whole, out)
    assert not (out / "checkpoints").exists()


# ------------------------------------------------------------------------------------------------ full disks
def test_a_checkpoint_that_does_not_fit_the_disk(world, whole, tmp_path):
    """A disk with room for the log and no checkpoint: the run goes on and says so; the model does not fit either."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system; test_a_file_size_limit does not")
    try:
        done = launch(*command(world, tmp_path / "out"), check=False)
        lines = [line for line in done.stderr.splitlines() if "No space left" in line]
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "WARNING: no checkpoint at step 3" in lines[0] and "the run goes on" in lines[0]
        assert "the model cannot be written" in lines[-1]
        assert len(log(tmp_path / "out")) == 12 and not (tmp_path / "out" / "config.json").exists()
        subprocess.run(["mount", "-o", "remount,size=32m", tmp_path], check=True)  # room was made
        launch(*command(world, tmp_path / "out"))
        assert largest_difference(whole, tmp_path / "out") == 0
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_file_size_limit(world, whole, tmp_path):
    """The second checkpoint is too large for a quota on one of two ranks: the first stays and is gone on from."""
    out = tmp_path / "out"
    process = start(command(world, out), ranks=2)
    wait_until(lambda: list(out.glob("checkpoints/*-00000003")), process)
    rank = ranks_of(process)[1]
    resource.prlimit(rank, resource.RLIMIT_FSIZE, (1000, 1000))
    printed = process.communicate(timeout=120)[0]
    assert "WARNING: no checkpoint at step" in printed and "File too large" in printed
    assert process.returncode == 0 and largest_difference(whole, out) < 1e-4  # rank 0 could write the model


def test_a_disk_that_fills_while_rank_0_gathers(world, tmp_path):
    """D_s does not fit, first its drawn column: one line in all from two ranks; the same command then goes on."""
    words, parts = command(world, tmp_path / "out", stage="bash"), tmp_path / "out" / "D_s_1.parts"
    for where, name, left in (("folders", "in_order", "drawn/*.arrow"), ("arrow", "save", "drawn.arrow")):
        full = tmp_path / f"{name}.py"
        full.write_text(
            f"""import runpy, sys
sys.path.insert(0, {str(HERE.parent)!r})
import folders
from core import arrow
def no_space(*_): raise OSError(28, "No space left on device")
{where}.{name} = no_space
sys.argv[0] = {str(HERE.parent / "bash.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
        )
        done = launch(full, *words[1:], ranks=2, check=False)
        assert done.returncode and done.stderr.count("No space left on device") == 1
        assert 'Traceback (most recent call last):\n  File "' + str(HERE.parent) not in done.stderr
        assert list(parts.glob(left))
    launch(*words)
    launch(*command(world, tmp_path / "whole", stage="bash"))
    assert largest_difference(tmp_path / "whole", tmp_path / "out") == 0


# ------------------------------------------------------------------------------------------------ two runs
def test_the_second_run_into_one_folder_is_refused(world, tmp_path):
    out = tmp_path / "out"
    process = start(command(world, out, "--epochs", "300"))
    wait_until(lambda: (out / "log.jsonl").exists(), process)
    done = launch(*command(world, out, "--epochs", "300"), check=False)
    assert done.returncode == 2 and f"--out {out}: another run is writing there" in done.stderr
    process.kill()
    process.communicate()
