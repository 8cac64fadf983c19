"""Every command that run.sh and the recipes give, small and at the paper's size, is one that its script takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import bash
import bon
import bon_options
import dpo
import evaluate
import folders
import generate
import rac
import scs
import sft
import spin
import stage

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.sh") if path.name != "common.sh")
SCRIPTS = {f"{module.__name__}.py": module for module in (sft, scs, bash, rac, spin, dpo, bon, evaluate, generate)}
STUB = r"""#!/usr/bin/env bash
# in the place of Python: notes what it is called with, and leaves what the script would
printf '%s\n' "$(printf '%s\x1f' "$@")" >> "$LOG" # in one write: jobs run side by side
last=${*: -1} out='' before=''
for word in "$@"; do
    [ "$before" = --out ] && out=$word
    before=$word
done
rows() { mkdir -p "$(dirname "$1")"; for i in 1 2 3; do echo '{"prompt": "a", "response": "b"}'; done > "$1"; }
case $1 in
    -) cat > /dev/null; case $last in *=*) ;; *.jsonl) rows "$last" ;; esac ;; # NAME=FILE is one to read
    -c) echo "$LOG" ;;
    toy.py) mkdir -p "$out"; for split in train valid test; do rows "$out/$split.jsonl"; done ;;
    generate.py) rows "$out" ;;
    evaluate.py)
        case $2 in
            table) mkdir -p "$(dirname "$out")"; echo > "$out.md" ;;
            run) mkdir -p "$out"; echo '{}' > "$out/results.json" ;;
            alpaca) rows "$out" ;;
        esac ;;
    [a-z]*.py) mkdir -p "$out" && rows "$out/log.jsonl" ;;
esac
"""


class Started(Exception):
    """A command got as far as its work."""


@pytest.fixture
def taken(tmp_path, monkeypatch):
    """Runs a shell script with the stub, and gives each command to its script, which must take it. -> how many."""
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def start(*_: object, **__: object) -> None:
        raise Started

    begins = {stage: ("start", "start_with_pairs"), evaluate: ("open_out", "claim_file"), folders: ("claim_file",)}
    for module, names in begins.items():
        for name in names:
            monkeypatch.setattr(module, name, start)
    monkeypatch.setattr(evaluate, "optional", lambda *_: None)
    monkeypatch.setattr(bon_options, "references", lambda _: {})

    def call(*words: str, **env: str) -> int:
        others = ("DATA", "MODEL", "SFT_MODEL", "METHODS", "SEEDS", "EXTRA", "SMALL", "QUICK", "TRAIN", "TEST")
        kept = {key: value for key, value in os.environ.items() if key not in others}
        kept |= {"PYTHON": str(stub), "LOG": str(tmp_path / "log"), "OUT": str(tmp_path / "out"), "GB": "0"}
        done = subprocess.run(["bash", *words], cwd=ROOT, env=kept | env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        commands = [line.split("\x1f")[:-1] for line in (tmp_path / "log").read_text().splitlines()]
        commands = [words for words in commands if words and words[0] in SCRIPTS and words[1] != "table"]
        for command in commands:
            monkeypatch.setattr(sys, "argv", command)
            with pytest.raises(Started):
                SCRIPTS[command[0]].main()
        return len(commands)

    return call


@pytest.mark.parametrize("small", ["1", ""])
@pytest.mark.parametrize("recipe", RECIPES)
def test_of_the_recipes(taken, recipe, small):
    before = {*ROOT.iterdir()}
    assert taken(f"recipes/{recipe}", SMALL=small, SEEDS="1 2") > 1 or recipe == "table8.sh"
    assert not [path for path in {*ROOT.iterdir()} - before if "=" in path.name]  # all that is made lies in OUT


@pytest.mark.parametrize("task", ["toy", "real"])
def test_of_run_sh(taken, task):
    more = "neftune spin rac-2 rac-2-start rac-topk rac-reverse rac-first rac-plausible rac-unmasked rac-wrong"
    methods = f"sft-more sft-compute scs bash rac rac-oracle bash-noise bash-anywhere {more} bon-1 bon-4 dco"
    methods += " dpo" * (task == "toy")
    assert taken("run.sh", task, METHODS=methods, SEEDS="1 2", JOBS="2") > 80


def test_each_seed_has_preferences_of_its_own(taken, tmp_path):
    taken("recipes/table4.sh", SMALL="1", SEEDS="1 2")
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("dpo.py")]
    assert lines and all(("seed-2/preferences" in line) == ("/seed-2/" in line.split("--out")[1]) for line in lines)


def test_other_problems_in_one_folder_are_refused(taken, tmp_path):
    taken("run.sh", METHODS="sft-more", TRAIN="50")
    told = "has the problems of --train 50 .*, not of --train 60 .*: choose another OUT"
    with pytest.raises(AssertionError, match=told):
        taken("run.sh", METHODS="sft-more", TRAIN="60")


def test_a_failed_job_is_noticed(taken, tmp_path):
    """Also where several end at one time: no table is made."""
    stub = tmp_path / "python"
    stub.write_text(STUB.replace("evaluate.py)\n", "evaluate.py)\n[[ $* != *'--name bash'* ]] || exit 1\n", 1))
    with pytest.raises(AssertionError, match="bash failed, see"):
        taken("run.sh", METHODS="sft-more bash scs", JOBS="4")
    assert "\x1ftable\x1f" not in (tmp_path / "log").read_text()


def test_benchmarks_show_their_help():
    """Their imports and defaults hold."""
    script = """
import runpy, sys
sys.path.insert(0, "benchmarks")
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, path
"""
    paths = [str(path) for path in (ROOT / "benchmarks").glob("*.py") if "ArgumentParser" in path.read_text()]
    done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("usage: ") >= 7
