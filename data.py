"""Datasets, the paper's prompts x and f(x, y), the one batch layout of this repository, and passes over it.

    examples, notes = data.examples("gsm8k", tokenizer, data="train.jsonl")     # rows of token ids: id, x, y, f
    batch = data.batch([row["x"] for row in rows], [row["y"] for row in rows])
    logits = data.response_logits(model, batch)                                 # [B, L, V], ready for any loss here
    sums = data.losses(model, x, {"sft": (sft_loss, y, y), "bash": (bash_loss, y_hat, y)})      # the same, for training

A task fixes the columns that are read, the templates of the paper's appendix A.1, the length limits and the hub name; a
local .jsonl, .json or .parquet file (or another hub set) with the same columns can stand in for the hub set.

Decisions that the paper leaves open
- Losses cover the response only; the prompt is never a target.
- Lengths are in tokens, EOS included. A TL;DR post is cut as in the OpenAI code (the end `TL;DR:` stays). In the other
  tasks a prompt is never cut: a row whose x, or whose f(x, y), is too long is left out, counted and reported.
- A response over its limit is cut, and carries no EOS then, so no model is taught to stop in mid-sentence. Counted.
- General QA takes the first turn of a dialogue, as SPIN does, unless --columns asks for each. Math trains with the
  paper's evaluation prompt, so that the model meets the same template in both.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

import toy

RAC_SYSTEM = (  # appendix A.1, word for word ("Your will" included)
    "You are a helpful assistant to answer user's question. Your will be given both a question and reference response. "
    "You need to give a new response to the question and contain the main content in the reference response."
)


# ---------------------------------------------------------------------------------------------- prompt templates
Turns = list[dict[str, str]]  # of a dialogue: {"role": …, "content": …}


def as_turns(prompt: str | Turns) -> Turns:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def chat(tokenizer, prompt: str | Turns, system: str = "") -> str:
    """A question, or a dialogue that ends with one, ready for the answer: through the tokenizer's own chat template,
    else in the Zephyr form of A.1. `system` follows the dialogue's own system text.

    >>> chat(tokenizer_without_template, "Why?")
    '<|system|>\\n</s>\\n<|user|>\\nWhy?</s>\\n<|assistant|>\\n'
    """
    turns = as_turns(prompt)
    if turns[0]["role"] == "system":
        system = f"{turns[0]['content']}\n\n{system}" if system else turns[0]["content"]
        turns = turns[1:]
    whole = [{"role": "system", "content": system}, *turns]
    if not tokenizer.chat_template:
        text = "".join(f"<|{turn['role']}|>\n{turn['content']}{tokenizer.eos_token}\n" for turn in whole)
        return f"{text}<|assistant|>\n"

    def render(messages: Turns) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    try:
        return render(whole)
    except Exception as error:  # jinja2's TemplateError: some templates (Gemma, Mistral-Instruct) know no system turn
        if type(error).__module__.split(".")[0] != "jinja2":
            raise
        return render([*as_turns(f"{system}\n\n{turns[0]['content']}".strip()), *turns[1:]])


def tldr_x(row: dict, tokenizer, limit: int) -> str:
    """The OpenAI TL;DR query. While it is too long the post is cut at its last newline, or loses a character."""
    title = "".join(f"{key.upper()}: {prefix}{row[key]}\n\n" for key, prefix in TLDR_HEAD.items() if row.get(key))
    post = row["prompt"]
    while True:
        text = f"{title}POST: {post}\n\nTL;DR:"
        over = len(tokenize(tokenizer, text)) - limit
        if over <= 0 or not post:
            return text
        newline = post.rfind("\n")
        post = post[:newline] if newline >= 0 else post[: -max(1, over // 4)]  # a character is at most 4 tokens


def tldr_f(row: dict, tokenizer, limit: int) -> str:
    """f(x, y) of A.1 for summarization. x is the post as the model sees it, cut where the query cuts it."""
    x = tldr_x(row, tokenizer, limit).removesuffix("\n\nTL;DR:")
    return (
        f"[POST]: {x}\n\n[REFERENCE SUMMARY]: {row['response'].strip()}\n\n"
        "Re-write a new summary of the post and cover the main content in the reference summary. TL;DR:"
    )


def qa_f(row: dict, tokenizer, limit: int) -> str:
    """f(x, y) of A.1 for general and math QA. Of a dialogue, the last user turn is the question."""
    *before, last = as_turns(row["prompt"])
    user = f"{last['content']}\nAnswer this question based on the following reference response: {row['response']}"
    return chat(tokenizer, [*before, *as_turns(user)], RAC_SYSTEM)


TLDR_HEAD = {"subreddit": "r/", "title": ""}  # the optional lines above the post, and what stands before their value


@dataclass(frozen=True)
class Task:
    """What one task reads and how it is prompted. The columns `prompt` and `response` may be mapped from others."""

    hub: tuple[str, ...]  # name (and configurations) on the hub
    splits: tuple[str, str]  # train and test
    prompt: str  # the column that holds the question (or the post)
    response: str  # the column that holds y
    max_prompt: int  # tokens of x
    max_response: int  # tokens of y, and of z
    x: Callable[[dict, object, int], str]
    f: Callable[[dict, object, int], str]
    before_response: str = ""  # text between prompt and response that belongs to the response


def math_x(row: dict, tokenizer, limit: int) -> str:
    return chat(tokenizer, f"{row['prompt']} Let's think step by step.")


MATH_CONFIGS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
    *("number_theory", "prealgebra", "precalculus"),
)
TASKS = {
    "toy": Task(
        (), ("train", "test"), "prompt", "response", 128, 96,
        before_response=" ", x=lambda row, tokenizer, limit: row["prompt"],
        f=lambda row, tokenizer, limit: toy.REFERENCE_TEMPLATE.format(x=row["prompt"], y=row["response"]),
    ),
    "tldr": Task(
        ("vwxyzjn/summarize_from_feedback_tldr_3_filtered",), ("train", "test"), "post", "summary", 512, 53,
        x=tldr_x, f=tldr_f, before_response=" ",
    ),
    "ultrachat": Task(
        ("HuggingFaceH4/ultrachat_200k",), ("train_sft", "test_sft"), "prompt", "messages", 1024, 1024,
        x=lambda row, tokenizer, limit: chat(tokenizer, row["prompt"]), f=qa_f,
    ),
    "gsm8k": Task(("openai/gsm8k", "main"), ("train", "test"), "question", "answer", 512, 512, x=math_x, f=qa_f),
    "math": Task(
        ("EleutherAI/hendrycks_math", *MATH_CONFIGS), ("train", "test"), "problem", "solution", 512, 1024,
        x=math_x, f=qa_f,
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- rows
def read(path: str) -> list[dict]:
    """The rows of a local .jsonl, .json (a list) or .parquet file. Raises ValueError naming file and line."""
    if path.endswith(".parquet"):
        try:
            return datasets.Dataset.from_parquet(path).to_list()
        except Exception as error:
            raise ValueError(f"{path}: not a readable parquet file, or without rows ({error})") from None
    try:
        with open(path, encoding="utf-8-sig") as file:
            if path.endswith(".json"):
                rows = json.load(file)
                if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
                    raise ValueError(f"{path}: a .json file must hold a list of objects")
                return rows
            rows = []
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    reason = getattr(error, "msg", error)
                    raise ValueError(f"{path}, line {number}: not valid JSON ({reason})") from None
                if not isinstance(rows[-1], dict):
                    raise ValueError(f"{path}, line {number}: must be an object with the columns of the task")
            return rows
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON (nested too deeply)") from None


def load_rows(
    task: str,
    path: str | None = None,
    split: str = "train",
    columns: str = "",
    limit: int = 0,
    need_response: bool = True,
) -> list[dict]:
    """A dict for each example, with at least `prompt` (text or a dialogue), `response`, `row` (its index in the source)
    and `id` (its own index: the same, unless a row gives several examples, see `pairs`).

    path: a local file, another hub set, or None for the task's own hub set. split: "train" or "test" (hub sets only).
    columns: e.g. "prompt=instruction+input,response=output" for files with other names; a + joins with a blank line.
    Raises ValueError (or OSError) with one line that names the file, row or column.
    """
    spec = TASKS[task]
    if path is None and not spec.hub:
        raise ValueError(f"--task {task} needs --data; `python toy.py data --out DIR` writes it")
    rows, source = source_rows(path, spec.hub, spec.splits[split == "test"])
    wanted = named(columns, prompt=spec.prompt, response=spec.response)
    used = {name for names in wanted.values() for name in names.split("+")}  # no template may read the response twice
    found = []
    for i in range(min(len(rows), limit or len(rows))):
        row, where = rows[i], f"{source}, row {i}"
        others = {name: value for name, value in row.items() if name not in used}
        for pair in pairs(task, row, wanted, where, need_response):
            found.append({**others, **pair, "id": len(found), "row": i})
    return found


def source_rows(path: str | None, hub: tuple[str, ...], split: str) -> tuple[list[dict] | datasets.Dataset, str]:
    """The rows of a local file, of another hub set, or (path None) of the hub set `hub`; and the source's name."""
    if path == "":
        raise ValueError("--data is empty: give a file or a hub set, or leave the flag out")
    if path and os.path.splitext(path)[1] in (".jsonl", ".json", ".parquet"):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"--data {path}: no such file")
        rows, source = read(path), path
    else:
        if path and os.path.exists(path):
            raise ValueError(f"--data {path}: must be a .jsonl, .json or .parquet file, or the name of a hub set")
        name, *configs = (path,) if path else hub
        source = name
        try:
            parts = [datasets.load_dataset(name, config, split=split) for config in configs or [None]]
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            what = f"--data {path}: no such file, and as a hub set it" if path else f"hub set {name} ({split})"
            raise ValueError(f"{what} could not be loaded: {reason}{'' if path else '; --data takes a file'}") from None
        rows = datasets.concatenate_datasets(parts)
    if not len(rows):
        raise ValueError(f"{source}: no rows")
    return rows, source


def named(columns: str, **wanted: str) -> dict[str, str]:
    """The column of each key, as --columns says, or by default."""
    for pair in filter(None, columns.split(",")):
        key, _, value = pair.partition("=")
        if key not in wanted or not value:
            raise ValueError(f"--columns {columns}: give it as {','.join(f'{name}=NAME' for name in wanted)}")
        wanted[key] = value
    return wanted


def pairs(task: str, row: dict, wanted: dict[str, str], where: str, need_response: bool) -> list[dict]:
    """`prompt` and `response` of a row: once, unless both are the same column and hold a dialogue.

    Then each assistant turn answers the turns before it: [user Why?, assistant So., user And?, assistant No.] gives So.
    to [Why?], and No. to [Why?, So., And?]. (Where none is needed, and a user turn is last, that is what to answer.)
    """
    name, other = wanted["prompt"], wanted["response"]
    if not isinstance(row.get(name), list):
        return [one_row(row, wanted, where, need_response)]
    if task != "ultrachat":
        raise ValueError(f"{where}: column {name!r} is list, not text; --task ultrachat takes a list of messages")
    turns = dialogue(row[name], f"{where}, {name}")
    asks = bool(turns) and turns[-1]["role"] == "user"
    if name == other and (need_response or not asks):
        answers = [k for k, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not answers:
            raise ValueError(f"{where}: column {name!r} has no assistant turn; remove the row")
        return [{"prompt": turns[:k], "response": turns[k]["content"]} for k in answers]
    if not asks:
        raise ValueError(f"{where}: column {name!r} must end with a user turn, as it is the prompt")
    if name == other:
        return [{"prompt": turns, "response": ""}]
    if len(turns) > 2 and isinstance(row.get(other), list):  # its first answer is to another question
        raise ValueError(f"{where}: column {other!r} is list, not text, and the prompt has several turns (--columns)")
    return [{"prompt": turns} | one_row(row, {"response": other}, where, need_response)]


def dialogue(messages: list, where: str) -> Turns:
    """A list of messages, checked: a system turn (an empty one is none), then user and assistant by turns."""
    turns: Turns = []
    for k, message in enumerate(messages):
        at = f"{where}[{k}]"
        if not (isinstance(message, dict) and {"role", "content"} <= message.keys()):
            raise ValueError(f"{at}: must be a message (role, content)")
        role, due = message["role"], "assistant" if turns and turns[-1]["role"] == "user" else "user"
        if role != due and (role != "system" or turns):
            raise ValueError(f"{at}: the role is {role!r}, but it is the {due}'s turn")
        if role != "system" or message["content"]:
            turns.append({"role": role, **one_row(message, {"content": "content"}, at)})
    return turns


def one_row(row: dict, wanted: dict[str, str], where: str, need_response: bool = True) -> dict[str, str]:
    """`prompt` and `response` of a row, checked. `where` names the row in errors."""
    texts = {}
    for key, names in wanted.items():
        parts = []
        for name in names.split("+"):
            if name not in row and key == "response" and not need_response:
                continue
            if name not in row:
                there = ", ".join(row) or "none"
                raise ValueError(f"{where}: no column {name!r} for the {key}; there are {there} (--columns)")
            value = row[name]
            if (key, name) == ("response", "messages") and isinstance(value, list):  # a dialogue: the first answer
                turns = [turn for turn in value if isinstance(turn, dict) and turn.get("role") == "assistant"]
                value = turns[0].get("content") if turns else ""
            if not isinstance(value, str):
                raise ValueError(f"{where}: column {name!r} is {type(value).__name__}, not text")
            try:
                value.encode()
            except UnicodeEncodeError as error:
                bad = f"column {name!r} is not text at character {error.start} (a lone surrogate)"
                raise ValueError(f"{where}: {bad}; remove the row") from None
            if value.strip():
                parts.append(value)
        texts[key] = "\n\n".join(parts)
        if not texts[key] and (key == "prompt" or need_response):
            raise ValueError(f"{where}: empty {key} (column {names!r}); remove the row")
    return texts


# ---------------------------------------------------------------------------------------------- token ids
def tokenize(tokenizer, text: str) -> list[int]:
    """Token ids, with exactly one BOS where the tokenizer would put one itself (a chat template may bring its own)."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos] and tokenizer("a")["input_ids"][:1] == [bos]:
        ids = [bos, *ids]
    return ids


def encode(tokenizer, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """x, and y ending in EOS. The two are cut apart after joint tokenisation where the border falls between tokens, so
    that y begins as it would in running text (SentencePiece puts a space before a text that stands alone)."""
    x = tokenize(tokenizer, prompt)
    both = tokenize(tokenizer, prompt + response)
    y = both[len(x) :] if both[: len(x)] == x else tokenizer(response, add_special_tokens=False)["input_ids"]
    return x, [*y, tokenizer.eos_token_id]


def examples(
    task: str,
    tokenizer,
    *,
    data: str | None = None,
    split: str = "train",
    columns: str = "",
    limit: int = 0,
    max_prompt: int = 0,
    max_response: int = 0,
    max_reference: int = 0,
    need_response: bool = True,
) -> tuple[datasets.Dataset, list[str]]:
    """Tokenised examples, and notes on what was cut or left out, for the caller to print.

    Returns a data set with columns id, x, y (ends in EOS unless cut), and, with max_reference > 0, f (the labelling
    prompt f(x, y)). limit keeps the first rows; a limit of 0 means the task's own. need_response=False takes rows with
    none, too (y is EOS alone then). Raises ValueError.
    """
    spec = TASKS[task]
    max_prompt, max_response = max_prompt or spec.max_prompt, max_response or spec.max_response
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token: a model could not learn to stop; set tokenizer.eos_token")
    rows = load_rows(task, data, split, columns, limit, need_response)
    kept, cut, long_x, long_f = [], 0, [], []
    for row in rows:
        response = spec.before_response + row["response"].strip()
        x, y = encode(tokenizer, spec.x(row, tokenizer, max_prompt), response)
        example = {"id": row["id"], "x": x, "y": y[:max_response]}
        if max_reference:
            example["f"] = tokenize(tokenizer, spec.f(row, tokenizer, max_prompt))
        if len(x) > max_prompt:
            long_x.append(row["row"])
        elif max_reference and len(example["f"]) > max_reference:
            long_f.append(row["row"])
        else:
            cut += len(y) > max_response
            kept.append({"id": row["id"]} | {k: np.asarray(v, np.int32) for k, v in example.items() if k != "id"})
    notes = [f"{len(kept)} examples of task {task} from {data or spec.hub[0]}"]
    if long_x:
        notes.append(f"{len(long_x)} rows left out: x over {max_prompt} tokens (--max-prompt), first: row {long_x[0]}")
    if long_f:
        over = f"f(x, y) over {max_reference} tokens (--max-reference)"
        notes.append(f"{len(long_f)} rows left out: {over}, first: row {long_f[0]}")
    if cut:
        notes.append(f"{cut} responses cut at {max_response} tokens (--max-response), without EOS")
    if not kept:
        raise ValueError(f"no example is left: {'; '.join(notes[1:])}")
    return datasets.Dataset.from_list(kept), notes


def load(
    args: argparse.Namespace, tokenizer, split: str = "train", need_response: bool = True
) -> tuple[datasets.Dataset, list[str]]:
    """`examples` with the flags of a command line."""
    names = ("data", "columns", "limit", "max_prompt", "max_response", "max_reference")
    chosen = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if chosen.get("max_reference") == 0:
        spec = TASKS[args.task]
        chosen["max_reference"] = (args.max_prompt or spec.max_prompt) + (args.max_response or spec.max_response) + 128
    return examples(args.task, tokenizer, split=split, need_response=need_response, **chosen)


# ---------------------------------------------------------------------------------------------- preferences
PREFERENCES = ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs")


def preference(row: dict, wanted: dict[str, str], where: str) -> dict[str, str]:
    """`prompt`, `chosen` and `rejected` of a row, as text; a blank side is "".

    Each may be text or a list of messages. Of a side's list the last turn is the answer, and what stands before it is
    the prompt: one user turn. Example: {"prompt": "Why?", "chosen": [{"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."}], "rejected": "No."} gives Why?, So. and No.
    """
    found: dict[str, str] = {}
    for side in ("chosen", "rejected"):
        columns = {"prompt": row.get(wanted["prompt"]), side: row.get(wanted[side])}
        if isinstance(columns[side], list) and len(columns[side]) > 1:
            columns["prompt"] = []  # the side brings its own
        turns: list[dict] = []
        for (key, value), role in zip(columns.items(), ("user", "assistant")):
            if value is None:
                there = ", ".join(name for name in row if row[name] is not None) or "none"
                raise ValueError(f"{where}: no {key} (column {wanted[key]!r}); there are {there} (--columns)")
            turns += value if isinstance(value, list) else [{"role": role, "content": value}]
        if not all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns):
            raise ValueError(f"{where}: {side} or its prompt holds a turn that is no message (role, content)")
        turns = [turn for turn in turns if turn["role"] != "system" or turn["content"]]
        if [turn["role"] for turn in turns] != ["user", "assistant"]:
            roles = ", ".join(str(turn["role"]) for turn in turns) or "none"
            raise ValueError(f"{where}: {side} must answer one user turn, and no system turn; its turns are {roles}")
        texts = {"prompt": turns[0]["content"], side: turns[1]["content"]}
        texts = one_row(texts, {key: key for key in texts}, where, need_response=False)
        if found.get("prompt", texts["prompt"]) != texts["prompt"]:
            raise ValueError(f"{where}: chosen and rejected answer different prompts")
        found |= texts
    return found


def load_preferences(args: argparse.Namespace, tokenizer) -> tuple[datasets.Dataset, list[str]]:
    """Tokenised pairs with the flags of dpo.py: columns id, x, y (the chosen response) and z (the rejected one), both
    cut to what --max-length leaves beside x; and notes on what was cut or left out. Raises ValueError."""
    spec, (hub, split) = TASKS[args.task], PREFERENCES
    rows, source = source_rows(args.data, (hub,), split if args.data in (None, hub) else "train")
    wanted = named(args.columns, prompt="prompt", chosen="chosen", rejected="rejected")
    most = min(args.max_prompt or spec.max_prompt, args.max_length - 1)
    kept, cut, long, empty, equal = [], 0, [], [], []
    for i in range(min(len(rows), args.limit or len(rows))):
        row = rows[i] | preference(rows[i], wanted, f"{source}, row {i}")
        y, z = (spec.before_response + row[side].strip() for side in ("chosen", "rejected"))
        x, y = encode(tokenizer, spec.x(row, tokenizer, most), y)
        _, z = encode(tokenizer, spec.x(row, tokenizer, most), z)
        room = min(args.max_response or spec.max_response, args.max_length - len(x))
        if not (row["chosen"] and row["rejected"]):
            empty.append(i)
        elif len(x) > most:
            long.append(i)
        elif y[:room] == z[:room]:  # as far as they are read
            equal.append(i)
        else:
            cut += (len(y) > room) + (len(z) > room)
            tokens = {"x": x, "y": y[:room], "z": z[:room]}
            kept.append({"id": i} | {name: np.asarray(ids, np.int32) for name, ids in tokens.items()})
    notes = [f"{len(kept)} pairs, templates of task {args.task}, from {source}"]
    whys = (f"x over {most} tokens (--max-prompt)", "chosen or rejected is empty", "chosen equals rejected")
    for why, ids in zip(whys, (long, empty, equal)):
        if ids:
            notes.append(f"{len(ids)} rows left out: {why}, first: row {ids[0]}")
    if cut:
        notes.append(f"{cut} responses cut (--max-length, --max-response), without EOS")
    if not kept:
        raise ValueError(f"no pair is left: {'; '.join(notes[1:])}")
    return datasets.Dataset.from_list(kept), notes


# ---------------------------------------------------------------------------------------------- batches
@dataclass
class Batch:
    """[ left-padded prompt | right-padded response ], without the last response token, which nothing follows."""

    input_ids: torch.Tensor  # [B, P + L - 1]
    attention_mask: torch.Tensor  # [B, P + L - 1]
    position_ids: torch.Tensor  # [B, P + L - 1]
    y: torch.Tensor  # [B, L]  the response, 0 where padded
    mask: torch.Tensor  # [B, L]  bool, True on the response's tokens


def pad_responses(responses: list[list[int]], device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids [B, L] and their bool mask [B, L], L >= 1. Masks come from lengths: pad may be EOS."""
    length = max(1, max(map(len, responses)))
    ids = torch.tensor([[*y, *[0] * (length - len(y))] for y in responses], dtype=torch.long, device=device)
    sizes = torch.tensor([len(y) for y in responses], device=device)
    return ids, torch.arange(length, device=device) < sizes[:, None]


def batch(prompts: list[list[int]], responses: list[list[int]], device: torch.device | str = "cpu") -> Batch:
    """Pads B prompts and responses (token ids) into the layout. An empty response gives a row without loss tokens.

    Example: x = [[5, 6, 7], [8]], y = [[1, 2], [3, 4]] gives
        input_ids      5 6 7 1      attention_mask 1 1 1 1      position_ids 0 1 2 3      y 1 2
                       0 0 8 3                     0 0 1 1                   0 0 0 1        3 4
    """
    width = max(map(len, prompts))
    y, mask = pad_responses(responses, device)
    x = torch.tensor([[*[0] * (width - len(x)), *x] for x in prompts], dtype=torch.long, device=device)
    sizes = torch.tensor([len(x) for x in prompts], device=device)
    x_mask = torch.arange(width, device=device) >= width - sizes[:, None]
    attention_mask = torch.cat([x_mask, mask], dim=1)[:, :-1].long()
    return Batch(
        input_ids=torch.cat([x, y], dim=1)[:, :-1],
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0),
        y=y,
        mask=mask,
    )


def response_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """logits [B, L, V]: logits[:, j] predicts response token j. One teacher-forced pass; the prompt gets no logits."""
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.y.shape[1],
    ).logits


# ---------------------------------------------------------------------------------------------- training passes
Rows = list[list[int]]  # token ids, one list a row
CHUNK = 2**26  # logits made at a time: 256 MB in float32


def losses(
    model: torch.nn.Module, x: Rows, terms: dict[str, tuple], share_prompt: bool = False
) -> dict[str, torch.Tensor]:
    """The sums of one or more losses over a micro-batch, from one forward pass: {name: float32 scalar}.

    x: B prompts. terms: {name: (loss, given, *targets)}, where given and targets are B rows of token ids. The model
    reads given after x, and loss(logits, *targets, mask) gets the logits that predict each of its tokens. (All losses
    may also return a vector of sums, each of the same length.)

    Equal to `loss(response_logits(model, batch(x, given)), *targets, mask)`, except for rounding, and cheaper:
    - one pass for all terms; rows with nothing given are left out (but one: other ranks wait for this one's pass);
    - [B, L, V] never exists: logits are made where there is a token to predict, CHUNK at a time (and once more for the
      backward, where it takes several chunks);
    - share_prompt: x is read once, followed by all terms' tokens, which do not see each other.
    Raises ValueError where share_prompt does not work with the model.
    """
    given = [term[1] for term in terms.values()]
    if share_prompt and len(given) > 1:  # a row of the pass: the (term, example) pairs that follow one prompt
        groups = [[(k, i) for k in range(len(given))] for i in range(len(x)) if any(rows[i] for rows in given)]
    else:
        groups = [[(k, i)] for k, rows in enumerate(given) for i in range(len(x)) if rows[i]]
    groups = groups or [[(0, 0)]]
    inputs, columns = pack([x[group[0][1]] for group in groups], [[given[k][i] for k, i in g] for g in groups], model)
    at: list[list[tuple[int, int]]] = [[] for _ in terms]  # of each term: row and column that predict each token
    order: list[list[int]] = [[] for _ in terms]  # ... and the examples that these belong to
    for b, group in enumerate(groups):
        for places, (k, i) in zip(columns, group, strict=True):
            at[k] += [(b, column) for column in places[: len(given[k][i])]]
            order[k].append(i)
    parts = []  # loss, [2, N] and the targets [N] of each term
    for (loss, _, *targets), places, examples in zip(terms.values(), at, order, strict=True):
        flat = [torch.tensor([token for i in examples for token in rows[i]], device=model.device) for rows in targets]
        parts.append((loss, torch.tensor(places, device=model.device).long().view(-1, 2).T, [t.long() for t in flat]))
    size = max(1, CHUNK // model.config.get_text_config().vocab_size)

    def sums(output: Callable[[torch.Tensor], torch.Tensor], source: torch.Tensor) -> torch.Tensor:
        """[terms], by logits = output(source[row, column])."""
        return torch.stack([in_chunks(loss, output, source[tuple(place)], t, size) for loss, place, t in parts])

    made = None
    if not getattr(model, "changes_logits", False):
        head = model.get_output_embeddings()
        plain = head.forward

        def forward(hidden: torch.Tensor) -> torch.Tensor:  # [B, S, d], at the door of the output matrix
            nonlocal made
            made = sums(plain, hidden)
            return made

        head.forward = forward
        try:
            model.changes_logits = model(**inputs, use_cache=False).logits is not made
        finally:
            del head.forward
    if model.changes_logits:  # as Gemma 2 does, which caps them: then only whole logits will do
        made = sums(lambda logits: logits, model(**inputs, use_cache=False).logits)
    return dict(zip(terms, made, strict=True))


def in_chunks(
    loss: Callable, output: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, targets: list, size: int
) -> torch.Tensor:
    """The sum of loss over tokens, hidden [N, d] and targets [N], with the logits of `size` of them at a time."""

    def one(hidden: torch.Tensor, *targets: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(targets[0])
        return loss(output(hidden)[None], *(target[None] for target in targets), mask[None])[0]

    if len(hidden) <= size:
        return one(hidden, *targets)
    again = functools.partial(checkpoint, one, use_reentrant=False, preserve_rng_state=False)
    return sum(again(*pieces) for pieces in zip(*(tensor.split(size) for tensor in (hidden, *targets)), strict=True))


def pack(
    prompts: Rows, segments: list[Rows], model: torch.nn.Module
) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
    """Each prompt followed by its segments, each of which sees the prompt and itself -> the model's inputs, and for
    each segment the columns that predict its tokens (the prompt's last, then its own; its last token is not read).

    Example: prompts [[5, 6], [8]] with segments [[1, 2], [3, 4, 7]] and [[9, 9], [2]] gives
        input_ids  5 6 1 3 4    position_ids  0 1 2 2 3    and a 4-D mask by which 1 does not see 3 and 4, and so on
                   0 8 9 0 0                  0 0 1 1 2    columns  [1, 2, ...] and [1, 3, 4, ...]
    """
    width = max(map(len, prompts))
    widths = [max(max(len(row[s]) for row in segments) - 1, 0) for s in range(len(segments[0]))]
    starts = [width + sum(widths[:s]) for s in range(len(widths) + 1)]
    ids, position, real = torch.zeros(3, len(prompts), starts[-1], dtype=torch.long)  # [B, S] each
    for b, (prompt, row) in enumerate(zip(prompts, segments, strict=True)):
        n = len(prompt)
        for start, tokens, first in [(width - n, prompt, 0), *((at, t[:-1], n) for at, t in zip(starts, row))]:
            place = slice(start, start + len(tokens))
            ids[b, place] = torch.tensor(tokens, dtype=torch.long)
            position[b, place] = torch.arange(first, first + len(tokens))
            real[b, place] = 1
    mask = real
    if len(widths) > 1:
        mask = mask_4d(real.bool(), position, starts, model)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
    # the column that predicts token j: the prompt's last for j = 0, then the segment's own
    columns = [[width - 1, *range(start, end)] for start, end in zip(starts, starts[1:])]
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}, columns


def mask_4d(real: torch.Tensor, position: torch.Tensor, starts: list[int], model: torch.nn.Module) -> torch.Tensor:
    """The mask [B, 1, S, S] of `pack`: a token sees its prompt, and its own segment up to itself."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["by its window"])
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(f"--share-prompt needs 4-D attention masks, which {config._attn_implementation} does not take")
    if len(kinds) > 1 or not kinds <= {"by its window", "full_attention", "sliding_attention"}:
        raise ValueError(f"--share-prompt: this model's layers differ in what they see ({', '.join(sorted(kinds))})")
    column = torch.arange(real.shape[1])
    segment = torch.bucketize(column, torch.tensor(starts[:-1]), right=True)  # [S], 0 in the prompt, then 1, 2, ...
    seen = (segment[None] == 0) | (segment[None] == segment[:, None])  # [S, S], query by key
    seen = (seen & (column[None] <= column[:, None])) & real[:, None]  # [B, S, S]
    window = getattr(config, "sliding_window", None)
    if window and kinds != {"full_attention"}:
        seen &= position[:, :, None] - position[:, None] < window
    seen |= torch.eye(len(column), dtype=torch.bool)  # padding must see something: itself
    if config._attn_implementation == "eager":  # there a mask is added to the scores
        return torch.zeros(seen.shape).masked_fill(~seen, -1e30)[:, None]
    return seen[:, None]
