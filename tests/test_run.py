"""run.sh from nothing to the table, and again: the second call makes nothing new."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("run") / "out"


def run(out, **env):
    flags = {"QUICK": "1", "OUT": str(out), "PYTHON": sys.executable, "METHODS": "sft-more rac bon-4", **env}
    return subprocess.run(["bash", "run.sh"], cwd=ROOT, env={**os.environ, **flags}, capture_output=True, text=True)


def test_the_whole_path_and_a_second_call(out):
    first = run(out)
    assert first.returncode == 0, first.stderr[-2000:]
    for name in ("sft", "sft-more", "rac", "bon-4"):
        assert f"\n| {name} |" in first.stdout
        assert (out / "seed-1" / name / "model.safetensors").exists()
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    second = run(out)
    assert second.returncode == 0, second.stderr[-2000:]
    assert second.stdout[second.stdout.index("| Method") :] == first.stdout[first.stdout.index("| Method") :]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == made


@pytest.mark.parametrize(
    "flag, words",
    [
        ({"METHODS": "magic"}, "METHODS has no method magic"),
        ({"SPLIT": "dev"}, "SPLIT is test or valid"),
        ({"E": "x"}, "E is a number of epochs, not x"),
    ],
)
def test_what_run_sh_does_not_know_is_named(out, flag, words):
    done = run(out, **flag)
    assert done.returncode != 0 and words in done.stdout + done.stderr
