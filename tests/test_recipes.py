"""The recipes: two of them whole, on the toy task in its smallest form; all of them for what stops them at once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.sh") if path.name != "common.sh")
PAPER = {"table1", "table2", "table3", "table4", "table6", "table7", "table8", "figure2", "figure3", "figure4"}
OTHERS = {"bon"}  # of other papers
TINY = {"SMALL": "1", "BASE_STEPS": "2", "LIMIT": "32", "TEST_LIMIT": "4", "BATCH": "8", "SFT_EPOCHS": "1"}
TINY |= {"EPOCHS": "1", "EPOCHS_2": "1", "METHODS": "bash", "ALPACA_LIMIT": "2", "MAX_ANSWER": "4"}


def run(recipe: str, out: Path, **env: str) -> subprocess.CompletedProcess:
    flags = {"OUT": str(out), "PYTHON": sys.executable, **env}
    others = ("DATA", "MODEL", "SFT_MODEL", "METHODS", "SEEDS", "EXTRA", "SMALL")
    kept = {key: value for key, value in os.environ.items() if key not in others}
    command = ["bash", f"recipes/{recipe}"]
    return subprocess.run(command, cwd=ROOT, env={**kept, **flags}, capture_output=True, text=True)


def test_there_is_one_for_each_table_and_figure_and_all_parse():
    assert {name.removesuffix(".sh") for name in RECIPES} == PAPER | OTHERS
    for name in ["common.sh", *RECIPES]:
        subprocess.run(["bash", "-n", f"recipes/{name}"], cwd=ROOT, check=True)


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_says_what_it_takes(recipe):
    head = (ROOT / "recipes" / recipe).read_text().split('. "$(dirname')[0]
    settings = "Settings  " if recipe.removesuffix(".sh") in OTHERS else "Table 5  "
    for part in ("Model  ", "Data  ", settings, "Paper  ", "8 x A6000", "estimate", "Chosen here", "SMALL=1"):
        assert part in head


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes")


def test_the_small_run_of_table_3(out):
    done = run("table3.sh", out, **TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    table = (out / "table3" / "table.md").read_text()
    assert re.search(r"^\| sft \|.*\n\| bash \|", table, re.M) and "Temperature = 0.1" in table


def test_a_second_call_makes_nothing_new_and_other_values_are_refused(out):
    table = (out / "table3" / "table.md").read_text()
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    second = run("table3.sh", out, **TINY)
    assert second.returncode == 0, second.stdout + second.stderr
    assert (out / "table3" / "table.md").read_text() == table
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == made
    changed = run("table3.sh", out, **TINY, SFT_LR="1e-5")
    assert changed.returncode == 2 and "belongs to another run (--lr 0.0007 -> 1e-05)" in changed.stderr


def test_the_small_run_of_figure_3(out):
    """Its SFT of the whole set is the one that Table 3 trained: on the toy task the recipes share their models."""
    done = run("figure3.sh", out, **{**TINY, "METHODS": "sft"}, FRACTIONS="50 100")
    assert done.returncode == 0, done.stdout + done.stderr
    table = (out / "figure3" / "table.md").read_text()
    assert "## 50 % of the data" in table and "## 100 % of the data" in table
    whole = out / "toy" / "seed-1"  # equal steps, from half of the rows
    steps = [len((folder / "sft" / "log.jsonl").read_text().splitlines()) for folder in (whole, whole / "part-50")]
    assert steps[0] == steps[1] > 0
    assert len((whole / "part-50" / "rows.jsonl").read_text().splitlines()) == 16


def one_line(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_data_or_disk_space(recipe, tmp_path):
    for small in ("", "1"):
        one_line(run(recipe, tmp_path, SMALL=small, DATA="missing"), "DATA=missing: no such folder")
        one_line(run(recipe, tmp_path, SMALL=small, DATA=str(tmp_path)), f"DATA={tmp_path}: no ", ".jsonl")
        one_line(run(recipe, tmp_path, SMALL=small, GB="99999999"), "GB free, this recipe needs about 99999999")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("recipe", ["table1.sh", "table2.sh"])
def test_with_a_model_folder_that_is_not_there(recipe, tmp_path):
    one_line(run(recipe, tmp_path, SMALL="1", MODEL="./nowhere"), "--model ./nowhere: no such folder")


def test_with_a_model_folder_without_weights_and_rows_without_the_column(tmp_path):
    import tiny

    tiny.model("llama").config.save_pretrained(tmp_path / "empty")
    tiny.word_tokenizer().save_pretrained(tmp_path / "empty")
    one_line(run("table1.sh", tmp_path, SMALL="1", MODEL=str(tmp_path / "empty")), "no weights in this folder")
    for split in ("train", "test"):
        (tmp_path / "summarization").mkdir(exist_ok=True)
        (tmp_path / "summarization" / f"scitldr_a_{split}.jsonl").write_text('{"text": "a"}\n')
    one_line(run("table1.sh", tmp_path, SMALL="1", DATA=str(tmp_path)), "no column 'post'")


def test_the_hub_out_of_reach(tmp_path):
    done = run("table1.sh", tmp_path, GB="0", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    one_line(done, "--model EleutherAI/pythia-1b-deduped")
