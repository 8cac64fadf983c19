"""benchmarks/gpu.sh, the one call for a GPU: rehearsed on the CPU, as on a machine without the package datasets."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # at the end: there is a data.py in it, too


def call(out: Path, **env: str) -> subprocess.CompletedProcess:
    (out / "blocked").mkdir(parents=True)
    (out / "blocked" / "sitecustomize.py").write_text("import sys\nsys.modules['datasets'] = None\n")
    path = os.pathsep.join([str(out / "blocked"), os.environ["PYTHONPATH"]])
    env = {**os.environ, "SMALL": "tiny", "PYTHON": sys.executable, "PYTHONPATH": path, "OUT": str(out), **env}
    return subprocess.run(["bash", "benchmarks/gpu.sh"], cwd=ROOT, env=env, capture_output=True, text=True)


def test_every_part_runs_and_leaves_its_file(tmp_path):
    page = (ROOT / "docs" / "speed.md").read_text()
    done = call(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("equality", "joint", "decoding", "sft", "profile"):
        found = json.loads((tmp_path / f"{part}.json").read_text())
        assert found["about"]["whole"] and found["rows"], done.stdout
        failed = [row for row in found["rows"] if "failed" in row and row["name"] != "TRL"]
        assert not [row for row in failed if "needs peft" not in row["failed"]]
        assert all(row.get("ok", True) for row in found["rows"])
    assert "study: not run, MODEL names no folder" in done.stdout
    assert "| SCS step over BASH step, 1B, TL;DR lengths (paper 4.7) | ≤ 1.3 |" in done.stdout
    assert (ROOT / "docs" / "speed.md").read_text() == page  # a rehearsal leaves it alone
    assert {path.name for path in tmp_path.iterdir()} == {
        "blocked", "gpu.log", "equality.json", "joint.json", "decoding.json", "sft.json", "profile.json"
    }  # fmt: skip


def test_a_part_is_cut_at_its_limit_and_the_call_goes_on(tmp_path):
    done = call(tmp_path, PARTS="6 5", LIMIT_6="0.5")
    assert done.returncode == 0
    assert "== profile: cut after 0.5 s" in done.stdout and "== study: done" in done.stdout
    assert "there is no part 7" in call(tmp_path / "b", PARTS="7").stderr


def test_the_report_sets_what_was_measured_beside_the_targets(tmp_path, capsys):
    import gpu

    about = {"size": "full", "device": "a GPU", "whole": True}
    rows = {
        "joint": [
            {"name": "1B tldr: BASH training", "seconds": 2.0, "peak_gb": 40.0},
            {"name": "1B tldr: SCS", "seconds": 3.0},
            {"name": "1B tldr: SCS + SFT loss", "seconds": 4.0, "peak_gb": 42.0},
            {"name": "1B tldr: joint, one pass", "mfu": 0.39},
            {"name": "1B tldr: joint, packed", "mfu": 0.45},
        ],
        "decoding": [
            {"name": "varied lengths", "partial": True, "time_over_generate": {"generate": 1.0, "dynamic": 4.5}},
            {"name": "varied lengths", "failed": "cut"},
        ],
        "equality": [{"name": "a", "ok": True}, {"name": "b", "ok": False}],
    }
    for part, some in rows.items():
        (tmp_path / f"{part}.json").write_text(json.dumps({"about": {"part": part, **about}, "rows": some}))
    page = tmp_path / "speed.md"
    page.write_text(f"before\n{gpu.BEGIN}\nnot measured\n{gpu.END}\nafter\n")
    gpu.report([str(path) for path in sorted(tmp_path.glob("*.json"))], page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    for line in (
        "| model FLOPs utilisation of the joint step, 1B, 512/53 | ≥ 0.40 | 0.45 | reached |",
        "| decoding 1B, batch 64, prompts 500, varied lengths: speed over `model.generate` | ≥ 3 | 4.50 | reached |",
        "| SCS step over BASH step, 1B, TL;DR lengths (paper 4.7) | ≤ 1.3 | 1.50 | not reached |",
        "| peak memory of SCS with the SFT loss over BASH | ≤ 1.1 | 1.05 | reached |",
        "| SFT tokens a second over TRL's best | ≥ 1.2 | not measured |  |",
        "2 comparisons with the plain versions there, 1 not equal: b.",
    ):
        assert line in text
    assert "1 not equal: b." in capsys.readouterr().out


def test_model_flops_are_those_of_a_plain_count():
    import gpu

    config = gpu.new_config("neox", {"width": 8, "layers": 2, "heads": 2, "vocab": 10})
    rows = [{"x": [1] * 3, "y": [1] * 2, "y_hat": [1] * 2}]
    weights = 2 * (4 * 8 * 8 + 2 * 8 * 32)
    seen = sum(2 * (sum(range(1, 4)) - 1.5) + 2 * (2 * 3 + (1 + 2) - 1) for _ in range(1))  # half of the diagonal
    plain = 6 * weights * 10 + 6 * 8 * 10 * 4 + 12 * 2 * 8 * seen
    assert gpu.model_flops(config, rows, ("y", "y_hat"), shared=False) == plain
    once = 6 * weights * 7 + 6 * 8 * 10 * 4 + 12 * 2 * 8 * (seen - 4.5)
    assert gpu.model_flops(config, rows, ("y", "y_hat"), shared=True) == once
