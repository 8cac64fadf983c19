"""What a mistake is told: malformed input ends in one line that names the flag, file, row or column at fault, with exit
status 2, before any training or generation begins, and no model is written."""

import json
import random
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import safetensors.torch
from transformers import AutoConfig, AutoModelForMaskedLM

import bash
import bon
import ddp_utils
import evaluate
import folders
import generate
import rac
import scs
import sft
import spin
import sums
import tiny
import toy
from core import ranks
from core.rows import write_json
from tools import controls

MODULES = {"sft": sft, "scs": scs, "bash": bash, "rac": rac, "generate": generate, "evaluate": evaluate, "toy": toy}
MODULES |= {"controls": controls, "bon": bon, "spin": spin}
READ = "--model model --task ultrachat --data train.jsonl --columns response=response --max-response 12 "
GIVEN = {stage: READ + "--out out --batch-size 4 " for stage in ("sft", "scs", "bash", "rac", "bon", "spin")} | {
    "generate": READ + "--out out/z.jsonl ",
    "evaluate run": f"run {READ} --out out --name bash ",
    "evaluate table": "table ",
    "toy data": "data --out out ",
    "toy base": "base --out out ",
    "toy bytes": "bytes --out out --text train.jsonl ",
    "toy preferences": "preferences --out out --pairs D_r ",
    "controls oracle": "oracle --model model --out out ",
    "controls noise": "noise --model model --out out ",
}
GOOD = {"prompt": "3 + 4 =", "response": "7 ."}


# ------------------------------------------------------------------------------------------------ what is wrong
def rows(*changes: dict) -> str:
    """A .jsonl file: a good row, and one more for each change of it (None removes a column)."""
    made = [GOOD] + [{key: value for key, value in (GOOD | change).items() if value is not None} for change in changes]
    return "".join(json.dumps(row) + "\n" for row in made)


def steps(*parts: Callable[[], object]) -> Callable[[], object]:
    return lambda: [part() for part in parts]


def file(name: str, content: str | bytes) -> Callable[[], object]:
    write = content if isinstance(content, bytes) else content.encode()
    return lambda: (Path(name).parent.mkdir(parents=True, exist_ok=True), Path(name).write_bytes(write))


def cut(name: str, size: int = 60) -> Callable[[], object]:
    """Leaves the first bytes of a file, as an interrupted copy does."""
    return lambda: Path(name).write_bytes(Path(name).read_bytes()[:size])


def remove(*names: str) -> Callable[[], object]:
    return lambda: [Path(name).unlink() for name in names]


def edit(name: str, **change: object) -> Callable[[], object]:
    """Changes keys of a JSON file."""
    return lambda: Path(name).write_text(json.dumps(json.loads(Path(name).read_text()) | change))


def data(message: str, content: str | bytes, name: str = "d.jsonl", flags: str = "", command: str = "sft") -> tuple:
    """The case of a --data file with this content."""
    return command, f"--data {name} {flags}", message, file(name, content)


def messages(message: str, value: object, columns: str = "response=messages", **kw: str) -> tuple:
    """The case of a dialogue."""
    row = {"prompt": "3", "messages": value, "response": "4"}
    return data(message, json.dumps(row), flags=f"--columns {columns} {kw.pop('flags', '')}", **kw)


def said(*roles: str, **last: object) -> list[dict]:
    """A dialogue of these roles. `last` changes the last turn."""
    turns = [{"role": role, "content": "3"} for role in roles]
    return [*turns[:-1], turns[-1] | last]


def parquet(**columns: list) -> Callable[[], object]:
    return lambda: datasets.Dataset.from_dict(columns).to_parquet("d.parquet")


def model(**kw: object) -> Callable[[], object]:
    """Another model beside the tokenizer."""
    return lambda: tiny.model("llama", **{"vocab": len(tiny.word_tokenizer()), **kw}).save_pretrained("model")


def weights(change: Callable[[dict], object]) -> Callable[[], object]:
    """The model with changed weights."""
    path = "model/model.safetensors"

    def prepare() -> None:
        tensors = safetensors.torch.load_file(path)
        change(tensors)
        safetensors.torch.save_file(tensors, path, {"format": "pt"})

    return prepare


NAN = weights(lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))


def bert() -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", vocab_size=200, **size)).save_pretrained("model")


def no_eos() -> None:
    tokenizer = tiny.word_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained("model")


def pairs(**change: object) -> Callable[[], object]:
    """D_r with a change of its first row."""

    def prepare() -> None:
        first, *others = datasets.load_from_disk("D_r").to_list()
        shutil.rmtree("D_r")
        datasets.Dataset.from_list([first | change, *others]).save_to_disk("D_r")

    return prepare


def other_pairs(change: Callable[[datasets.Dataset], object]) -> Callable[[], object]:
    """Another data set in the folder made."""
    return lambda: change(datasets.load_from_disk("D_r")).save_to_disk("made")


def result(path: str, **change: object) -> Callable[[], object]:
    """A results.json, for the table."""
    kind = {"name": "sft", "seed": 0, "n": 3, "metrics": {"nll_y": 1.0}, "task": "toy", "test_set": "0", "beta": 0.2}
    return file(path, json.dumps(kind | {"generations": 3, "max_response": 9} | change))


def evaluated(flags: str) -> Callable[[], object]:
    """The folder e of an evaluation that had these args.json."""
    return steps(file("e/args.json", flags), file("e/results.json", ""))


LOG = file("run/log.jsonl", "{}")
BOTH = "prompt=messages,response=messages"
LEAST_0, LEAST_1 = "is not a whole number of at least 0", "is not a whole number of at least 1"
CASES = [
    # flags; "only" leaves out the good ones
    ("sft", "only --task toy --data train.jsonl --out out", "arguments are required: --model"),
    ("sft", "only --model model --task toy --data train.jsonl", "arguments are required: --out"),
    ("sft", "only --model model --data train.jsonl --out out", "arguments are required: --task"),
    ("sft", "--lr", "argument --lr: expected one argument"),
    ("sft", "--lr nan", "argument --lr: 'nan' is not a number of at least 0"),
    ("sft", "--lr inf", "argument --lr: 'inf' is not a number of at least 0"),
    ("sft", "--lr=-1e-5", "argument --lr: '-1e-5' is not a number of at least 0"),
    ("sft", "--lr 5,5e-6", "argument --lr: '5,5e-6' is not a number of at least 0"),
    ("sft", "--epochs two", "argument --epochs: 'two' is not a number of at least 0"),
    ("sft", "--warmup 10", "argument --warmup: '10' is not a number in [0, 1]"),
    ("sft", "--clip -0.1", "argument --clip: '-0.1' is not a number of at least 0"),
    ("sft", "--adam-eps 0", "argument --adam-eps: '0' is not above 0"),
    ("sft", "--batch-size 0", f"argument --batch-size: '0' {LEAST_1}"),
    ("sft", "--batch-size 1" + "0" * 400, LEAST_1),
    ("sft", "--batch-size ''", f"argument --batch-size: '' {LEAST_1}"),
    ("sft", "--micro-batch-size -3", f"argument --micro-batch-size: '-3' {LEAST_1}"),
    ("sft", "--max-steps 2.5", f"argument --max-steps: '2.5' {LEAST_0}"),
    ("sft", "--limit 1e3", f"argument --limit: '1e3' {LEAST_0}"),
    ("sft", "--seed -1", f"argument --seed: '-1' {LEAST_0}"),
    ("sft", "--seed 0x1f", f"argument --seed: '0x1f' {LEAST_0}"),
    ("sft", "--checkpoint-every -1", f"argument --checkpoint-every: '-1' {LEAST_0}"),
    ("sft", "--dtype float16", "argument --dtype: invalid choice: 'float16'"),
    ("sft", "--task Toy", "argument --task: invalid choice: 'Toy'"),
    ("sft", "--batch 4", "unrecognized arguments: --batch 4"),
    ("sft", "--beta 0.2", "unrecognized arguments: --beta 0.2"),
    ("sft", "more", "unrecognized arguments: more"),
    ("sft", "--eval-data held.jsonl", "--eval-data is measured every so many steps, and --eval-every does not say how"),
    ("sft", "--model ''", "--model is empty"),
    ("sft", "--data ''", "--data is empty"),
    ("sft", "--out ''", "--out is empty"),
    ("sft", "--columns response", "--columns response: give it as prompt=NAME,response=NAME"),
    ("sft", "--columns response=", "--columns response=: give it as prompt=NAME,response=NAME"),
    ("sft", "--columns answer=response", "--columns answer=response: give it as prompt=NAME"),
    ("sft", "--columns prompt=prompt+,response=response", "row 0: no column '' for the prompt"),
    ("sft", "--columns prompt=question,response=response", "row 0: no column 'question' for the prompt"),
    ("sft", "--task tldr", "row 0: no column 'post' for the prompt; there are prompt, response"),
    ("sft", "--max-prompt 1", "3 rows left out: x over 1 tokens (--max-prompt), first: row 0"),
    ("scs", "--beta 1.01", "argument --beta: '1.01' is not a number in [0, 1]"),
    ("scs", "--generation-batch-size 0", f"argument --generation-batch-size: '0' {LEAST_1}"),
    ("scs", "--pairs D_r", "unrecognized arguments: --pairs"),
    ("bash", "--beta nan", "argument --beta: 'nan' is not a number in [0, 1]"),
    ("bash", "--iterations 1.0", f"argument --iterations: '1.0' {LEAST_0}"),
    ("bash", "--sft-weight -1", "argument --sft-weight: '-1' is not a number of at least 0"),
    ("rac", "--sft-epochs inf", "argument --sft-epochs: 'inf' is not a number of at least 0"),
    ("rac", "--unmasked yes", "unrecognized arguments: yes"),
    ("rac", "--max-reference 5", "f(x, y) over 5 tokens (--max-reference), first: row 0"),
    ("rac", "--max-response 300", "the model has 256 positions: lower --max-prompt or --max-response"),
    # --data
    ("sft", "--data missing.jsonl", "--data missing.jsonl: no such file"),
    ("sft", "--data ./missing", "--data ./missing: no such file, and as a hub set it could not be loaded"),
    ("sft", "--data d.csv", "--data d.csv: no such file, and as a hub set it could not be loaded"),
    ("sft", "--data model", "--data model: must be a .jsonl, .json or .parquet file"),
    ("sft", "--data d.jsonl", "--data d.jsonl: no such file", lambda: Path("d.jsonl").mkdir()),
    data("--data d.csv: must be a .jsonl, .json or .parquet file", "prompt,response\n3,4\n", "d.csv"),
    data("--data D.JSONL: must be a .jsonl", rows(), "D.JSONL"),
    data("d.jsonl: no rows", ""),
    data("d.jsonl: no rows", "\n  \n\t\n"),
    data("d.json: no rows", "[]", "d.json"),
    data("d.json, line 1: not valid JSON", "", "d.json"),
    data("d.json, line 2: not valid JSON", f"[{json.dumps(GOOD)},\n]", "d.json"),
    data("d.json: a .json file must hold a list of objects", '{"prompt": ["3"], "response": ["4"]}', "d.json"),
    data("d.json: a .json file must hold a list of objects", '["3", "4"]', "d.json"),
    data("d.json, line 2: not valid JSON (Extra data)", rows({}), "d.json"),
    data("d.json: not valid JSON (nested too deeply)", "[" * 100000, "d.json"),
    data("d.json: not valid JSON (Exceeds the limit", f'[{{"prompt": {"1" * 5000}}}]', "d.json"),
    data("row 1: column 'response' has U+FDD1 at character 2, which is no character", rows({"response": "7 \ufdd1"})),
    data("d.jsonl: not valid JSON (nested too deeply)", "[" * 100000),
    data("d.jsonl, line 1: not valid JSON", json.dumps([GOOD], indent=1)),
    data("d.jsonl, line 1: must be an object", json.dumps([GOOD])),
    data("d.jsonl, line 3: not valid JSON", rows({}) + '{"prompt": "3",\n'),
    data("d.jsonl, line 4: must be an object", rows({}) + "\n3\n"),
    data("d.jsonl, line 3: must be an object", rows({}) + "null\n"),
    data("d.jsonl, line 1: not valid JSON (Exceeds the limit", f'{{"n": {"9" * 5000}}}'),
    data("d.jsonl, line 1: not valid JSON", "{'prompt': '3', 'response': '4'}\n"),
    data("d.jsonl, line 1: not valid JSON", bytes(100)),
    data("d.jsonl: not UTF-8 text (byte 128)", bytes(range(256))),
    data("d.jsonl: not UTF-8 text (byte 0); save it as UTF-8", rows().encode("utf-16")),
    data("d.jsonl: not UTF-8 text (byte 15)", '{"prompt": "café"}'.encode("latin-1")),
    data("d.parquet: not a readable parquet file", "", "d.parquet"),
    ("sft", "--data d.parquet", "d.parquet: not a readable", steps(parquet(prompt=["3"]), cut("d.parquet"))),
    ("sft", "--data d.parquet", "d.parquet: not a readable parquet file, or without rows", parquet(prompt=[])),
    ("sft", "--data d.parquet", "row 0: no column 'prompt' for the prompt; there are a, b", parquet(a=["3"], b=["4"])),
    ("sft", "--data d.parquet", "row 0: column 'response' is int", parquet(prompt=["3"], response=[4])),
    ("sft", "--data d.parquet", "row 1: column 'response' is None", parquet(prompt=["3"] * 2, response=["4", None])),
    data("d.jsonl, row 1: column 'response' is int, not text", rows({"response": 7})),
    data("d.jsonl, row 1: column 'response' is bool, not text", rows({"response": True})),
    data("d.jsonl, row 1: column 'response' is list, not text", rows({"response": ["7"]})),
    data("d.jsonl, row 1: column 'response' is dict, not text", rows({"response": {"text": "7"}})),
    data("d.jsonl, row 0: column 'response' is NoneType, not text", '{"prompt": "3", "response": null}'),
    data("d.jsonl, row 1: empty response (column 'response'); remove the row", rows({"response": ""})),
    data("d.jsonl, row 1: empty response (column 'response')", rows({"response": " \n\u3000"})),
    data("d.jsonl, row 1: empty prompt (column 'prompt'); remove the row", rows({"prompt": ""})),
    data("d.jsonl, row 1: no column 'response' for the response; there are prompt", rows({"response": None})),
    data("d.jsonl, row 1: no column 'prompt' for the prompt; there are response, q", rows({"prompt": None, "q": "3"})),
    data("d.jsonl, row 0: no column 'prompt' for the prompt; there are none", "{}\n"),
    data("d.jsonl, row 1: column 'prompt' is not text at character 2", rows({"prompt": "3 \ud800"})),
    data("d.jsonl, row 1: column 'response' is not text at character 0", rows({"response": "\udfff"})),
    data("no example is left: 1 rows left out", json.dumps(GOOD | {"prompt": "3 " * 2000})),
    data("the model has 256 positions: lower --max-prompt", rows({"prompt": "3 " * 300})),
    messages("row 0: empty response (column 'messages')", []),
    messages("row 0: empty response (column 'messages')", [{"role": "user", "content": "3"}]),
    messages("row 0: empty response (column 'messages')", ["3", [{"role": "assistant", "content": "4"}]]),
    messages("row 0: column 'messages' is int, not text", [{"role": "assistant", "content": 4}]),
    messages("row 0: column 'messages' is NoneType, not text", [{"role": "assistant"}]),
    messages("row 0: column 'messages' is dict, not text", {"role": "assistant", "content": "4"}),
    # dialogues as the prompt
    messages("d.jsonl, row 0: column 'messages' has no assistant turn; remove the row", said("user"), BOTH),
    messages("row 0: column 'messages' has no assistant turn", [], BOTH),
    messages("row 0, messages[1]: must be a message (role, content)", [*said("user"), "4"], BOTH),
    messages("row 0, messages[1]: must be a message (role, content)", [*said("user"), {"role": "assistant"}], BOTH),
    messages("row 0, messages[0]: must be a message (role, content)", [None], "prompt=messages,response=response"),
    messages("row 0, messages[0]: the role is 'assistant', but it is the user's turn", said("assistant"), BOTH),
    messages("row 0, messages[1]: the role is 'user', but it is the assistant's turn", said("user", "user"), BOTH),
    messages("row 0, messages[2]: the role is 'system', but", said("user", "assistant", "system"), BOTH),
    messages("row 0, messages[1]: the role is 'system', but", said("system", "system", content=""), BOTH),
    messages("row 0, messages[1]: the role is 'tool\\n', but", said("user", "tool\n"), BOTH),
    messages("row 0, messages[1]: the role is None, but", said("user", "user", role=None), BOTH),
    messages("row 0, messages[1]: empty content", said("user", "assistant", content=" \n"), BOTH),
    messages("row 0, messages[0]: empty content", said("system", content=" "), BOTH),
    messages("row 0, messages[1]: column 'content' is NoneType", said("user", "assistant", content=None), BOTH),
    messages("row 0, messages[0]: column 'content' is list, not text", said("user", content=["3"]), BOTH),
    messages("row 0, messages[0]: column 'content' is not text at character 0", said("user", content="\udfff"), BOTH),
    messages("must end with a user turn", said("user", "assistant"), "prompt=messages,response=response"),
    messages("row 0: column 'messages' must end with a user turn", [], "prompt=messages,response=response"),
    messages("row 0: column 'messages' has no assistant turn", [], "prompt=messages", command="generate"),
    messages("row 0: no column 'answer' for the response", said("user"), "prompt=messages,response=answer"),
    messages("column 'messages' is list, not text", said("assistant"), "prompt=prompt+messages,response=response"),
    messages("is list, not text; --task ultrachat takes a list", said("user", "assistant"), BOTH, flags="--task gsm8k"),
    messages("is list, not text; --task ultrachat takes a list", said("user"), BOTH, flags="--task tldr"),
    data("row 1: column 'prompt' is list, not text; --task", rows({"prompt": said("user")}), flags="--task toy"),
    data("row 1, prompt[1]: the role is 'user'", rows({"prompt": said("user", "user")})),
    data("column 'prompt' must end with a user turn", rows({"prompt": said("user", "assistant")}), command="generate"),
    data(
        "row 0: column 'messages' is list, not text, and the prompt has several turns (--columns)",
        json.dumps({"prompt": said("user", "assistant", "user"), "messages": said("user", "assistant")}),
        flags="--columns response=messages",
    ),
    # --model
    ("sft", "--model missing", "--model missing: no such folder here, and from the hub no tokenizer could be loaded"),
    ("sft", "--model ./missing", "--model ./missing: no such folder"),
    ("sft", "--model train.jsonl", "--model train.jsonl: no such folder"),
    ("sft", "--model empty", "--model empty: not a model's folder", lambda: Path("empty").mkdir()),
    ("sft", "", "--model model: no tokenizer", remove("model/tokenizer.json", "model/tokenizer_config.json")),
    ("sft", "", "--model model: no tokenizer could be loaded", cut("model/tokenizer.json")),
    ("sft", "", "--model model: no tokenizer could be loaded", file("model/tokenizer.json", "{}")),
    ("sft", "", "set tokenizer.eos_token", no_eos),
    ("sft", "", "'model/config.json' is not a valid JSON file", cut("model/config.json")),
    ("sft", "", "--model model: ", file("model/config.json", "[]")),
    ("sft", "", "Should have a `model_type` key in its config.json", file("model/config.json", "{}")),
    ("sft", "", "model type `unheard`", file("model/config.json", '{"model_type": "unheard"}')),
    ("sft", "", "T5Config", lambda: AutoConfig.for_model("t5").save_pretrained("model")),
    ("sft", "", "bert is a masked language model; a causal one is needed", bert),
    ("sft", "", "--model model: could not be loaded (Error no file named", remove("model/model.safetensors")),
    ("sft", "", "--model model: could not be loaded", cut("model/model.safetensors", 4)),
    ("sft", "", "--model model: could not be loaded", cut("model/model.safetensors", 9000)),
    ("sft", "", "--model model: could not be loaded", file("model/model.safetensors", "version https://git-lfs")),
    ("sft", "", "--model model: could not be loaded", edit("model/config.json", vocab_size=-1)),
    ("sft", "", "weights are missing or not of the shape in config.json", edit("model/config.json", vocab_size=90)),
    ("sft", "", "9 weights are missing or not", edit("model/config.json", num_hidden_layers=3)),
    ("sft", "", ": model.layers.1.mlp.up_proj.weight)", weights(lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))),
    ("rac", "", "weights are missing or not of the shape", weights(lambda t: t.clear())),
    ("rac", "", "the model's logits are NaN", NAN),
    ("generate", "", "the model's logits are NaN", NAN),
    ("evaluate run", "--temperatures 1", "the model's logits are NaN", NAN),
    ("evaluate run", "", "the model's logits are NaN", NAN),
    ("evaluate run", "--beta 0", "--model model: the loss of rows 0 to 2 is not finite", NAN),
    ("sft", "", "vocabulary ends at 29: model and tokenizer do not belong together", model(vocab=30)),
    ("generate", "", "vocabulary ends at 29: model and tokenizer do not belong together", model(vocab=30)),
    ("sft", "", "the model has 8 positions", model(max_position_embeddings=8)),
    # --out
    ("sft", "--out train.jsonl", "--out train.jsonl cannot be written (File exists)"),
    ("sft", "--out train.jsonl/deep/out", "--out train.jsonl/deep/out cannot be written (Not a directory)"),
    ("sft", "--out " + "a" * 300, "cannot be written (File name too long)"),
    ("sft", "--out model", "--out model holds a model or results that this command did not make"),
    ("sft", "--out run", "args.json is broken", steps(file("run/args.json", "{"), file("run/log.jsonl", "{}\n"))),
    ("sft", "--out run", "args.json is broken", steps(file("run/args.json", "3"), file("run/config.json", "{}"))),
    ("sft", "--out run", "--lr 0.1 -> 5e-06", steps(file("run/args.json", '{"lr": 0.1}'), LOG)),
    ("bash", "--out run", "did not make", file("run/D_s_1/dataset_info.json", "{}")),
    ("evaluate run", "--out e", "did not make", file("e/generations-t0/state.json", "{}")),
    ("scs", "--out run", "(script bash.py -> scs.py)", steps(file("run/args.json", '{"script": "bash.py"}'), LOG)),
    ("sft", "--out run", "what --data holds 9 ->", steps(file("run/args.json", '{"what --data holds": 9}'), LOG)),
    ("evaluate run", "--out model", "--out model holds a model"),
    ("evaluate run", "--out train.jsonl", "--out train.jsonl cannot be written (File exists)"),
    ("evaluate run", "--out ''", "--out is empty"),
    ("evaluate run", "--out e", "args.json is broken", evaluated("[")),
    ("evaluate run", "--out e", "args.json is broken", evaluated("3")),
    ("evaluate run", "--out e", "--beta 1 -> 0.2", evaluated('{"beta": 1}')),
    ("generate", "--out train.jsonl", "--out train.jsonl exists already"),
    ("generate", "--out train.jsonl/z", "--out train.jsonl/z cannot be written"),
    ("generate", "", "are left from a call with other flags", file("out/z.jsonl.args.json", "{}")),
    ("generate", "", "are left from a call with other flags", file("out/z.jsonl.args.json", "{")),
    ("generate", "--out out/z[1].jsonl", "are left from a call with other", file("out/z[1].jsonl.data.parts/0", "")),
    ("toy data", "--out train.jsonl", "--out train.jsonl exists already"),
    ("toy data", "--out train.jsonl/data", "Not a directory: 'train.jsonl/data"),
    # --pairs
    ("rac", "--kl reverse", "--topk and --kl are for --labels topk"),
    ("rac", "--topk 4", "--topk and --kl are for --labels topk"),
    ("bash", "--pairs D_s --iterations 0 --sft-epochs 1", "--pairs is for an iteration, and there is none"),
    ("rac", "--z z.jsonl --iterations 0", "--z is for an iteration, and there is none (--iterations 0)"),
    ("bash", "--pairs D_s --beta 0.5", "--pairs brings data that are made: it takes no --beta"),
    ("rac", "--pairs D_r --labels-from start", "--pairs brings data that are made: it takes no --labels-from"),
    ("rac", "--pairs D_r --temperature 0", "--pairs brings data that are made: it takes no --temperature"),
    ("rac", "--pairs D_r --max-reference 90", "--pairs brings data that are made: it takes no --max-reference"),
    ("bon", "--pairs D_bon --n 4", "--pairs brings data that are made: it takes no --n"),
    ("bon", "--pairs D_bon --temperature 0.3", "--pairs brings data that are made: it takes no --temperature"),
    ("rac", "--z z.jsonl --temperature 0.3", "--z brings z that are drawn: it takes no --temperature"),
    ("spin", "--z z.jsonl --temperature 0.3", "--z brings z that are drawn: it takes no --temperature"),
    ("spin", "--z z.jsonl --iterations 0", "--z is for an iteration, and there is none (--iterations 0)"),
    ("bon", "--dco --n 4", "--dco is one loss, of y alone: it takes no --temperature, --n, --sft-weight or"),
    ("bash", "--pairs ''", "not a folder written by datasets' save_to_disk"),
    ("bash", "--pairs missing --sft-epochs 1", "--pairs missing: not a folder written by datasets' save_to_disk"),
    ("rac", "--pairs train.jsonl --sft-epochs 1", "--pairs train.jsonl: not a folder written by"),
    ("rac", "--pairs made", "made: not a folder", other_pairs(lambda rows: datasets.DatasetDict(train=rows))),
    ("rac", "--pairs made", "made: cannot be read, or has no rows", other_pairs(lambda rows: rows.select([]))),
    ("bash", "--pairs D_r", "--pairs D_r: no column y_hat; there are id, x, y, z, z_bar"),
    ("rac", "--pairs D_r", "--pairs D_r, row 0: z has 2 tokens, z_bar has 4", pairs(z=[3, 4])),
    ("rac", "--pairs D_r", "--pairs D_r, row 0: z has ids from -1 to 3", pairs(z=[-1, 3])),
    ("rac", "--pairs D_r", "--pairs D_r, row 0: y has ids from 3 to 1000000", pairs(y=[3, 10**6])),
    ("rac", "--pairs D_r", "--pairs D_r, row 0: x must be a list of token ids, and not empty", pairs(x=[])),
    ("rac", "--pairs D_r", "--pairs D_r, row 0: x must be a list of token ids", pairs(x=[None])),
    ("rac", "--pairs D_r", "take up to 304 tokens, the model has 256 positions: leave the row out", pairs(x=[5] * 300)),
    ("rac", "--pairs D_r", "D_r: was made with another tokenizer", file("D_r/source.json", '{"tokenizer": "0"}')),
    ("rac", "--pairs D_r --data missing --sft-epochs 1", "--data missing: no such file"),
    ("rac", "--pairs D_r", "--pairs D_r: cannot be read", file("D_r/source.json", "{")),
    ("rac", "--pairs D_r", "--pairs D_r: cannot be read", file("D_r/source.json", "[]")),
    ("rac", "--pairs D_r", "--pairs D_r: cannot be read", cut("D_r/data-00000-of-00001.arrow", 200)),
    ("rac", "--pairs D_r", "--pairs D_r: cannot be read", cut("D_r/data-00000-of-00001.arrow", 0)),
    ("rac", "--pairs D_r", "--pairs D_r: cannot be read", remove("D_r/data-00000-of-00001.arrow")),
    ("rac", "--pairs D_r", "--pairs D_r: cannot be read", cut("D_r/state.json", 5)),
    # evaluate.py
    ("evaluate run", "only", "arguments are required: command"),
    ("evaluate run", "only evaluate", "invalid choice: 'evaluate' (choose from 'run', 'best-of', 'alpaca', 'table')"),
    ("evaluate run", "--name ''", "--name is empty"),
    ("evaluate run", "--temperature 1", "unrecognized arguments: --temperature 1"),
    ("evaluate run", "--temperatures '0;1'", "argument --temperatures: '0;1' is not a number of at least 0"),
    ("evaluate run", "--temperatures 0,nan", "argument --temperatures: 'nan' is not a number of at least 0"),
    ("evaluate run", "--temperatures 0,-1", "argument --temperatures: '-1' is not a number of at least 0"),
    ("evaluate run", "--generations 0", f"argument --generations: '0' {LEAST_1}"),
    ("evaluate run", "--split valid", "argument --split: invalid choice: 'valid'"),
    ("evaluate run", "--max-response 400 --temperatures 0", "the model has 256 positions"),
    ("evaluate run", "--task toy --columns prompt=prompt", "no response of the data holds an answer as --task toy"),
    data("row 1: no column 'response' for the response", rows({"response": None}), command="evaluate run"),
    ("evaluate table", "", "arguments are required: results"),
    ("evaluate table", "missing.json", "missing.json: no such file; the --out of `evaluate.py run` has a results.json"),
    ("evaluate table", "model", "Is a directory: 'model'"),
    *(
        ("evaluate table", "a", "a: not a results.json of `evaluate.py run`", file("a", content))
        for content in ("", "{", "[]", "3", b"\xff\xfe", '{"runs": []}', '{"runs": 3}', '{"runs": [3]}')
    ),
    *(
        ("evaluate table", "a", "a: not a results.json of `evaluate.py run`", result("a", **change))
        for change in (
            {"metrics": [1]}, {"metrics": {"nll_y": "low"}}, {"metrics": {"nll_y": None}}, {"seed": [1]},
            {"name": 3}, {"name": ["sft"]}, {"beta": "high"},
        )
    ),
    ("evaluate table", "a a", "a and a: both are sft, seed 0", result("a")),
    ("evaluate table", "a b", "b has test_set 1, a has 0", steps(result("a"), result("b", test_set="1", seed=1))),
    ("evaluate table", "a b", "b has dtype x, a has y", steps(result("a", dtype="y"), result("b", dtype="x", seed=1))),
    ("evaluate table", "a b", "nll_g, nll_y", steps(result("a"), result("b", metrics={"nll_g": 1}, seed=1))),
    ("evaluate table", "a --baseline sft-more", "--baseline sft-more: no such name; there are sft", result("a")),
    ("evaluate table", "a --base sft", "unrecognized arguments: --base sft", result("a")),
    # generate.py
    ("generate", "--n 0", f"argument --n: '0' {LEAST_1}"),
    ("generate", "--top-p 0", "argument --top-p: '0' is not a number in"),
    ("generate", "--top-p 1.1", "argument --top-p: '1.1' is not a number in"),
    ("generate", "--top-k -1", f"argument --top-k: '-1' {LEAST_0}"),
    ("generate", "--temperature -1", "argument --temperature: '-1' is not a number of at least 0"),
    ("generate", "--max-response 250", "the model has 256 positions"),
    data("d.jsonl, row 1: empty prompt (column 'prompt'); remove the row", rows({"prompt": " "}), command="generate"),
    data("d.jsonl, row 1: column 'response' is int, not text", rows({"response": 3}), command="generate"),
    # toy.py
    ("toy data", "only", "arguments are required: command"),
    ("toy data", "only data", "arguments are required: --out"),
    ("toy data", "only dat --out out", "invalid choice: 'dat'"),
    ("toy data", "--tra 3", "unrecognized arguments: --tra 3"),
    ("toy data", "--train -1", f"argument --train: '-1' {LEAST_1}"),
    ("toy data", "--test 0", f"argument --test: '0' {LEAST_1}"),
    ("toy data", "--operands 9 2", "--operands 9 2: give the smaller number first"),
    ("toy data", "--hard 0.5 --hard-steps 4 3", "--hard-steps 4 3: give the smaller number first"),
    ("toy data", "--hard-steps 1 2", "--hard is the share of harder problems"),
    ("toy data", "--hard 0.5", "--hard-operands and --hard-steps say how hard"),
    ("toy data", "--seed -1", "argument --seed: '-1' is not a whole number in"),
    ("toy data", "--seed 99999999999999999999", "argument --seed: '99999999999999999999' is not a whole number in"),
    ("toy base", "--steps 0", f"argument --steps: '0' {LEAST_1}"),
    ("toy bytes", "--vocab 100", "argument --vocab: '100' is not a whole number of at least 257"),
    ("toy bytes", "--layers -1", f"argument --layers: '-1' {LEAST_1}"),
    ("toy bytes", "--width 0", "argument --width: '0' is not a whole number of at least 16"),
    ("toy bytes", "--width 100", "--width 100: must be a multiple of 16"),
    ("toy bytes", "--text missing.jsonl", "No such file or directory: 'missing.jsonl'"),
    ("toy bytes", "--text d.jsonl", "d.jsonl, line 2: not valid JSON", file("d.jsonl", rows() + "{\n")),
    ("toy bytes", "--text d.jsonl", "d.jsonl, line 1: must be an object", file("d.jsonl", "3\n")),
    ("toy bytes", "--text d.jsonl", "d.jsonl: not UTF-8 text", file("d.jsonl", b"\xff\xfe")),
    ("toy preferences", "--pairs missing", "--pairs missing: not a folder written by"),
    ("toy preferences", "--pairs D_s", "--pairs D_s: no column z, z_bar; there are id, x, y, y_hat"),
    ("toy preferences", "", "--pairs D_r: was made with another tokenizer"),
    ("toy preferences", "", "--pairs D_r, row 0: y has ids from -9 to 3", steps(pairs(y=[3, -9]))),
    ("toy preferences", "", "--pairs D_r, row 0: y must be a list of token ids, and not empty", pairs(y=[])),
    ("controls oracle", "missing", "error: missing: not a folder written by"),
    ("controls oracle", "D_s", "D_s: no column z, z_bar; there are id, x, y, y_hat"),
    ("controls oracle", "D_r", "row 0: y is no response of toy or sums"),
    ("controls noise", "D_r", "D_r: no column y_hat; there are id, x, y, z, z_bar"),
    ("controls noise", "D_s --out D_r", "--out D_r exists already"),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------ what is said
@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What a case starts from: model/, train.jsonl, D_s/ and D_r/."""
    folder, rng, tokenizer = tmp_path_factory.mktemp("base"), random.Random(0), tiny.word_tokenizer()
    tiny.model("llama", vocab=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "train.jsonl").write_text(rows({}, {"response": "5 5 5"}))
    ids = [[rng.randrange(3, 40) for _ in range(4)] for _ in range(3)]
    for name, columns in {"D_s": ("x", "y", "y_hat"), "D_r": ("x", "y", "z", "z_bar")}.items():
        made = [{"id": i} | dict.fromkeys(columns, x) for i, x in enumerate(ids)]
        datasets.Dataset.from_list(made).save_to_disk(folder / name)
        write_json(folder / name / "source.json", {"tokenizer": folders.fingerprint(tokenizer)})
    return folder


def run(base, tmp_path, monkeypatch, command: str, flags: str, prepare: Callable[[], object] | None = None) -> None:
    """Runs a command in this process, in a copy of base that `prepare` has changed, as its command line would."""
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if prepare:
        prepare()
    words = flags[5:] if flags.startswith("only") else GIVEN[command] + flags
    name = command.split()[0]
    monkeypatch.setattr("sys.argv", [f"{name}.py", *shlex.split(words)])
    ranks.cli(MODULES[name].main)


LONG = (ddp_utils.Run, "steps"), (folders, "offline"), (toy, "train_base"), (sums, "problems")


def long_work(*_, **__):
    raise AssertionError("long work has begun")


@pytest.mark.parametrize("case", CASES, ids=[f"{i}: {case[0]} {case[1][:50]}" for i, case in enumerate(CASES)])
def test_a_mistake_is_one_line(base, tmp_path, monkeypatch, capsys, case):
    command, flags, message, *prepare = case
    made = {}

    def prepared() -> None:
        for part in prepare:
            part()
        made.update({path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")})
        for place, name in LONG if NAN not in prepare else ():
            monkeypatch.setattr(place, name, long_work)
        capsys.readouterr()

    with pytest.raises(SystemExit) as stop:
        run(base, tmp_path, monkeypatch, command, flags, prepared)
    assert stop.value.code == 2
    *before, line = capsys.readouterr().err.splitlines()
    assert message in line and ".py" in line and "error: " in line
    usage = bool(before) and before[0].startswith("usage: ")  # argparse's own, where a flag is at fault
    before = [said for said in before if "does not know" not in said]  # the toy's tokenizer knows few words
    assert usage or len(before) <= 2 or NAN in prepare  # else how many examples there are, and what a batch is
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == made
    assert not any(path.stat().st_size for path in tmp_path.rglob("results.json"))
    assert not [*tmp_path.rglob("*.partial")]


WORKS = {
    "byte order mark": file("train.jsonl", b"\xef\xbb\xbf" + rows({}).encode()),
    "blank lines, CRLF": file("train.jsonl", rows({}).replace("\n", "\r\n\r\n")),
    "one row far too long": file("train.jsonl", rows({"prompt": "3 " * 500_000})),
    "NUL, equal rows": file("train.jsonl", rows({"response": "7 \x00 8"}) * 2),
    "more columns in some rows": file("train.jsonl", rows({"source": 3}, {"meta": {"a": [None]}})),
    "a tokenizer without pad": lambda: tiny.word_tokenizer(pad=None).save_pretrained("model"),
}


def test_generate_answers_a_dialogue(base, tmp_path, monkeypatch):
    row = {"messages": said("system", "user", "assistant", "user", content="5")}
    prepare = file("train.jsonl", json.dumps(row))
    run(base, tmp_path, monkeypatch, "generate", "--columns prompt=messages --max-response 3", prepare)
    made = json.loads((tmp_path / "out" / "z.jsonl").read_text())
    tokenizer = tiny.word_tokenizer()
    assert made["prompt"] == tokenizer.decode(tokenizer(rac.data.chat(tokenizer, row["messages"]))["input_ids"])
    assert made["id"] == 0 and made["reference"] == "" and len(made["responses"]) == 1


def test_pairs_that_never_end_are_warned_of(base, tmp_path, monkeypatch, capsys):
    told = "WARNING: no y of --pairs ends with what ends a response (<eos>)"
    run(base, tmp_path, monkeypatch, "rac", "--pairs D_r --epochs 0", steps())
    assert told in capsys.readouterr().err
    one_ends = other_pairs(lambda rows: rows.map(lambda row, i: {"y": [5, 1 if i == 2 else 5]}, with_indices=True))
    run(base, tmp_path, monkeypatch, "rac", "--pairs made --epochs 0 --out ended", one_ends)
    assert told not in capsys.readouterr().err


@pytest.mark.parametrize("name", WORKS)
def test_what_is_no_mistake(base, tmp_path, monkeypatch, capsys, name):
    run(base, tmp_path, monkeypatch, "sft", "--max-steps 1", WORKS[name])
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert ("1 rows left out: x over 1024 tokens" in capsys.readouterr().err) == ("too long" in name)
