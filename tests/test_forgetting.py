"""What docs/evaluate.md says of lm-evaluation-harness: it reads a saved folder as it is, through its chat template."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from core import fsdp
from test_stages import base, run

__all__ = ["base"]  # pytest finds fixtures by name
ROOT = Path(__file__).parent.parent
TASK = """task: own
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "how many {{question}} ?"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}]
"""


def test_the_harness_reads_a_saved_folder(base, tmp_path, monkeypatch):
    """The command of the page, on a task of its own, offline: its log-likelihoods are the model's, behind the chat
    template, and its accuracy follows from them."""
    pytest.importorskip("lm_eval", reason="pip install lm-eval (not in requirements.txt: it brings many packages)")
    tokenizer = tiny.word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}so {{ m.content }} {% endfor %}now "
    tiny.model("llama", vocab=len(tokenizer)).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    run(monkeypatch, "sft", base, tmp_path / "runs/rac", model=tmp_path / "start")
    rows = [{"question": f"{a} + 7", "choices": [str(a), str(a + 1), "eggs 3"], "label": a % 3} for a in range(9)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(TASK)
    page = (ROOT / "docs/evaluate.md").read_text()
    (command,) = re.findall(r"^lm_eval (.*?--output_path \S+)", page, re.M | re.S)
    words = re.sub(r"--tasks \S+", "--tasks own --include_path . --device cpu --log_samples", command)
    words = words.replace(",dtype=bfloat16", "").replace("\\\n", " ").split()
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *words], cwd=tmp_path, capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (samples,) = tmp_path.rglob("samples_own_*.jsonl")
    (results,) = tmp_path.rglob("results_*.json")
    model, right = fsdp.load_model(str(tmp_path / "runs/rac")), 0
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        row, own = sample["doc"], []
        x = tokenizer(f"so how many {row['question']} ? now", add_special_tokens=False)["input_ids"]
        for choice in row["choices"]:
            y = tokenizer(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logp = model(torch.tensor([x + y]), use_cache=False).logits[0, len(x) - 1 : -1].log_softmax(-1)
            own.append(float(logp[range(len(y)), y].sum()))
        told = [float(found[0][0]) for found in sample["resps"]]
        assert told == pytest.approx(own, abs=1e-3)
        right += own.index(max(own)) == row["label"]
    assert json.loads(results.read_text())["results"]["own"]["acc,none"] == pytest.approx(right / 9)
