"""How much memory one rank needs, measured against the formula of docs/scale.md.

    python benchmarks/memory.py            # 1, 2 and 4 processes on this machine; writes results/memory.json

With all weights trained, and with a LoRA adapter on all linear layers of the blocks. A GPT-NeoX of 91 million
parameters with random weights and hardly any activations (one row of 16 tokens), so that what is left is weights,
gradients, moments and what FSDP gathers. On a CPU, host and device memory are the same: resident memory (VmRSS, and its
peak VmHWM) of each process, less what the imports took.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MB = 1e6
RANK = 32  # of the adapter


def resident(key: str) -> float:
    """VmRSS or VmHWM of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def new_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(folder: str, rank: int) -> None:
    """One process: load, two training steps, one gathered forward. rank: of LoRA, 0: none. Prints a JSON line."""
    import torch
    from torch.distributed.fsdp import FSDPModule

    from core import fsdp, lora, ranks

    if rank:
        import peft  # noqa: F401    before the first look at what is resident
    ranks.init()
    start, found = resident("VmRSS"), {}
    new_peak()
    adapter = lora.Lora(rank, 2.0 * rank, None, 0, folder) if rank else None
    model = fsdp.load_model(folder, "bfloat16", adapter=adapter)  # sharded on a single process, too, but with LoRA
    found["loading, peak"] = resident("VmHWM") - start
    found["weights"] = resident("VmRSS") - start
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.ones(1, 16, dtype=torch.long)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        new_peak()
        model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
        found["training step, peak"] = resident("VmHWM") - start
        optimizer.step()
    found["weights, gradients, moments"] = resident("VmRSS") - start
    optimizer.zero_grad(set_to_none=True)
    new_peak()
    with fsdp.inference(model):
        model(input_ids=ids, use_cache=False)
    found["generation, peak"] = resident("VmHWM") - start
    assert isinstance(model, FSDPModule) == (not rank or ranks.WORLD > 1)
    everyone = [found] * ranks.WORLD
    if ranks.WORLD > 1:
        torch.distributed.all_gather_object(everyone, found)
    if ranks.RANK == 0:
        print(json.dumps(everyone))


def formula(ranks: int, parameters: int, root: int, block: int) -> dict[str, float]:
    """Bytes of one rank, in bfloat16 computation."""
    share = parameters / ranks
    return {
        "loading, peak": 4 * parameters + 4 * share,  # of the first rank; with a GPU the first term is host memory
        "weights": 4 * share,
        "weights, gradients, moments": 16 * share,
        # + in bfloat16: root, two blocks (one fetched ahead), a block's gradient, which is reduced in float32
        "training step, peak": 16 * share + 2 * (root + 2 * block) + (2 + 4) * block,
        "generation, peak": 12 * share + 2 * parameters,
    }


def formula_of_lora(ranks: int, parameters: int, root: int, block: int, adapter: int) -> dict[str, float]:
    """The same with an adapter: the weights in bfloat16, without gradient and moments; the adapter in float32."""
    share, own = parameters / ranks, adapter / ranks
    one = ranks == 1  # then nothing is gathered
    return {
        "loading, peak": (4 + 2) * parameters,  # the file's pages, float32 here, and what is made of them
        "weights": 2 * share + 4 * own,
        "weights, gradients, moments": 2 * share + 16 * own,
        "training step, peak": 2 * share + 16 * own + (0 if one else 2 * (root + 2 * block)),
        "generation, peak": 2 * share + 12 * own + (0 if one else 2 * parameters + 4 * adapter),
    }


def main() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sys.path.insert(0, str(ROOT / "tests"))
    import tiny

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        size = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
        model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=4096, **size))
        parameters = model.num_parameters()
        block = sum(p.numel() for p in model.gpt_neox.layers[0].parameters())
        linear = [m for m in model.gpt_neox.layers.modules() if hasattr(m, "in_features")]
        adapter = sum(RANK * (m.in_features + m.out_features) for m in linear)
        model.save_pretrained(folder)
        tiny.word_tokenizer().save_pretrained(folder)
        del model
        for rank, ranks in ((0, 1), (0, 2), (0, 4), (RANK, 1), (RANK, 2)):
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            # a fixed threshold, so that what is freed goes back to the system at once
            env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
            command += [__file__, folder, str(rank)]
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
            each = json.loads(done.stdout.splitlines()[-1])
            sizes = (ranks, parameters, parameters - 12 * block, block)
            expected = formula_of_lora(*sizes, adapter) if rank else formula(*sizes)
            for what, bytes_expected in expected.items():
                measured = each[0 if what == "loading, peak" else -1][what]  # rank 0 loads; the last rank for the rest
                row = {"ranks": ranks, "lora_rank": rank, "what": what, "formula_mb": bytes_expected / MB}
                rows.append(row | {"mb": measured / MB})
    print("| ranks | LoRA | what | formula (MB) | measured (MB) | difference |\n|---:|---:|---|---:|---:|---:|")
    for row in rows:
        more = row["mb"] - row["formula_mb"]
        what = f"{row['lora_rank']} | {row['what']}"
        print(f"| {row['ranks']} | {what} | {row['formula_mb']:.0f} | {row['mb']:.0f} | {more:+.0f} |")
    report = {"parameters": parameters, "block": block, "adapter": adapter, "dtype": "bfloat16", "rows": rows}
    (ROOT / "results" / "memory.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    measure(sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 1 else main()
