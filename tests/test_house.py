"""The rules of the house: small files, no circle of imports, every arrow down, and one pattern for the loop."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = {path.stem: path for path in [*ROOT.glob("*.py"), *ROOT.glob("core/[!_]*.py"), *ROOT.glob("tools/[!_]*.py")]}
STAGES = ("sft", "scs", "bash", "rac", "spin", "dpo", "bon")
# From the ground up. A file imports from floors below its own, wherever in it the import stands.
FLOORS = (
    "packed",
    "noise kv_cache attend windows arrow ahead cut ranks flags batches rows reference latex verify verdicts",
    "decode_step",
    "generate answers chat cache track",
    "kinds data sums lora",
    "fsdp",
    "folders",
    "ddp_utils tables preferences toy engine_z",
    "evaluate corrections plots",
    "held_out",
    "stage rac_options bon_options",
    "sft dpo show judge controls room smollm2",
    "scs bash rac bon",
    "spin",
)
FLOOR = {name: i for i, floor in enumerate(FLOORS) for name in floor.split()}


def imported(path: Path) -> set[str]:
    """Files of the project that a file imports, anywhere in it; but not those that a script's own command needs (the
    body of main, which nobody imports)."""
    tree = ast.parse(path.read_text())
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "main" or isinstance(node, ast.If):
            continue  # generate.py's command stands above its decoder
        for part in ast.walk(node):
            if isinstance(part, ast.Import):
                names |= {alias.name for alias in part.names}
            if isinstance(part, ast.ImportFrom):
                names |= {part.module} | {f"{part.module}.{alias.name}" for alias in part.names}
    return {re.sub(r"^(core|tools)\.", "", name) for name in names} & FILES.keys()


def test_every_arrow_runs_down():
    assert FLOOR.keys() == FILES.keys()
    wrong = [f"{name} -> {other}" for name, path in FILES.items() for other in imported(path)
             if FLOOR[other] >= FLOOR[name]]  # fmt: skip
    assert not wrong


def test_the_foundation_stands_alone():
    """What lies in core/ imports nothing from outside of it."""
    core = {path.stem for path in ROOT.glob("core/[!_]*.py")}
    wrong = [f"core/{name}.py -> {other}" for name in core for other in imported(FILES[name]) - core]
    assert not wrong


def test_no_circle_through_imports_of_any_kind():
    """Those of main, too: a walk along all arrows never comes back."""
    names = re.compile(r"^\s*(?:from|import) (?:core import |core\.|tools\.)?(\w+)", re.M)
    arrows = {name: set(names.findall(path.read_text())) & FILES.keys() - {name} for name, path in FILES.items()}
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way, name])
        if name not in done:
            for other in arrows[name]:
                walk(other, (*way, name))
            done.add(name)

    for name in arrows:
        walk(name, ())


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_longer_than_a_sitting(name):
    limit = {"sft": 200, "scs": 200, "bash": 200, "rac": 200, "bon": 250}.get(name, 500)
    assert len(FILES[name].read_text().splitlines()) <= limit


@pytest.mark.parametrize("name", STAGES)
def test_the_step_is_in_sight(name):
    """Each loop of a stage goes over run.steps and ends with run.update (sft_phase, preference_phase serve others)."""
    text = FILES[name].read_text()
    loops = len(re.findall(r"for step in run\.steps\(", text))
    assert loops == text.count("run.update(") == text.count("run.backward(")
    assert loops or re.search(r"preference_phase\(run", text)


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 1800
    assert "![" in "\n".join(text.splitlines()[:30])


def test_links_resolve():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_tree_names_every_file():
    text = "".join((ROOT / page).read_text() for page in ("README.md", "docs/files.md"))
    assert not [path.name for path in FILES.values() if path.name not in text]
