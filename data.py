"""Tasks and templates: rows of text become examples of token ids.

    examples, notes = data.examples("gsm8k", tokenizer, data="train.jsonl")     # columns id, x, y and, for RAC, f

    x = 3 + 4 =      y = 7 <eos>      f(x, y) = "... question: 3 + 4 = ... reference response: 7 ..."

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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from core.ahead import Ahead
from core.cache import Said, hash_of_functions, hash_of_source, hash_of_tokenizer, tokenised
from core.chat import MARK, Remarks, as_turns, chat, ends, shield, token_ids, without_opening
from core.cut import cut
from core.reference import fill
from core.rows import named, numbered, optional_texts, pairs, source_rows

if TYPE_CHECKING:
    import datasets

Dataset: TypeAlias = "datasets.Dataset"  # by its name, for annotations: that library takes a second to import

RAC_SYSTEM = (  # appendix A.1, word for word ("Your will" included)
    "You are a helpful assistant to answer user's question. Your will be given both a question and reference response. "
    "You need to give a new response to the question and contain the main content in the reference response."
)
TOY_REFERENCE = "reference : {y} question : {x}"  # f(x, y) of the toy task, whose words are few


# ---------------------------------------------------------------------------------------------- prompt templates
def tldr_x(row: dict, tokenizer, limit: int) -> str:
    """The OpenAI TL;DR query. While it is too long the post is cut at its last newline, or loses a character."""
    title = "".join(f"{key.upper()}: {prefix}{row[key]}\n\n" for key, prefix in TLDR_HEAD.items() if row.get(key))

    def query(post: str) -> str:
        return f"{title}POST: {post}\n\nTL;DR:"

    def over(post: str) -> int:
        return len(tokenize(tokenizer, query(post))) - limit

    def small(pieces: list[str], first: bool) -> list[int]:
        texts = [query(piece) if first else f"{piece}\n\nTL;DR:" for piece in pieces]
        if any(MARK in text for text in texts):
            return [len(token_ids(tokenizer, text)) for text in texts]
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]

    return query(cut(row["prompt"], over, small, limit, len(query(""))))


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


def own_f(template: dict[str, str], task: str, row: dict, tokenizer, limit: int) -> str:
    """f(x, y) by --reference-template, in the place of the task's own: through the chat template where that one is."""
    if TASKS[task].f is qa_f:
        *before, last = as_turns(row["prompt"])
        system, user = (fill(template[part], last["content"], row["response"]) for part in ("system", "user"))
        return chat(tokenizer, [*before, *as_turns(user)], system)
    x = tldr_x(row, tokenizer, limit).removesuffix("\n\nTL;DR:") if TASKS[task].f is tldr_f else row["prompt"]
    return fill(template["user"], x, row["response"].strip())


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
    optional: tuple[str, ...] = ()  # columns that x and f(x, y) take in where a row has them


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
        f=lambda row, tokenizer, limit: TOY_REFERENCE.format(x=row["prompt"], y=row["response"]),
    ),
    "tldr": Task(
        ("vwxyzjn/summarize_from_feedback_tldr_3_filtered",), ("train", "test"), "post", "summary", 512, 53,
        x=tldr_x, f=tldr_f, before_response=" ", optional=tuple(TLDR_HEAD),
    ),
    "ultrachat": Task(
        ("HuggingFaceH4/ultrachat_200k",), ("train_sft", "test_sft"), "prompt", "messages", 1024, 1024,
        x=lambda row, tokenizer, limit: chat(tokenizer, row["prompt"]), f=qa_f,
    ),
    "sums": Task((), ("train", "test"), "prompt", "response", 256, 256, x=math_x, f=qa_f),
    "gsm8k": Task(("openai/gsm8k", "main"), ("train", "test"), "question", "answer", 512, 512, x=math_x, f=qa_f),
    "math": Task(
        ("EleutherAI/hendrycks_math", *MATH_CONFIGS), ("train", "test"), "problem", "solution", 512, 1024,
        x=math_x, f=qa_f,
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- rows
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
    return list(each_row(task, *opened(task, path, split), columns, limit, need_response))


def opened(task: str, path: str | None, split: str) -> tuple[Iterable[dict], str]:
    """The source's rows, not yet read, and its name."""
    spec = TASKS[task]
    if path is None and not spec.hub:
        raise ValueError(f"--task {task} needs --data; `python toy.py data --out DIR` writes it")
    return source_rows(path, spec.hub, spec.splits[split == "test"])


def each_row(
    task: str, rows: Iterable[dict], source: str, columns: str, limit: int, need_response: bool
) -> Iterator[dict]:
    """Those of `load_rows`, one at a time."""
    spec, n = TASKS[task], 0
    wanted = named(columns, prompt=spec.prompt, response=spec.response)
    used = {name for names in wanted.values() for name in names.split("+")}  # no template may read the response twice
    for i, row in numbered(rows, source, limit):
        others = {name: value for name, value in row.items() if name not in used}
        others |= optional_texts(others, spec.optional, f"{source}, row {i}")
        for pair in pairs(task, row, wanted, f"{source}, row {i}", need_response):
            yield {**others, **pair, "id": n, "row": i}
            n += 1


# ---------------------------------------------------------------------------------------------- token ids
def tokenize(tokenizer, text: str) -> list[int]:
    """Token ids, with exactly one BOS where the tokenizer would put one itself (a chat template may bring its own)."""
    ids = token_ids(tokenizer, text)
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos] and tokenizer("a")["input_ids"][:1] == [bos]:
        ids = [bos, *ids]
    return ids


def encode(tokenizer, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """x, and y with the token that ends it (chat.ends). The two are cut apart after joint tokenisation where the border
    falls between tokens, so that y begins as it would in running text (SentencePiece puts a space before a text that
    stands alone). Special tokens are tokens in the prompt, where a template has put them (chat.shield marks those of
    data), and text in the response. A <think> at the end of the prompt is not opened again."""
    response = shield(tokenizer, without_opening(prompt, response))
    x = tokenize(tokenizer, prompt)
    return x, [*behind(tokenizer, prompt, x, response), ends(tokenizer)[0]]


def behind(tokenizer, prompt: str, x: list[int], text: str) -> list[int]:
    """The ids of a text behind a prompt, whose own are x: without x where both, read together, begin with it."""
    both = tokenize(tokenizer, prompt + text)
    return both[len(x) :] if both[: len(x)] == x else token_ids(tokenizer, text)


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
    reference_template: dict[str, str] | None = None,
) -> tuple[Dataset, list[str]]:
    """Tokenised examples, and notes on what was cut or left out, for the caller to print.

    Returns a data set with columns id, x, y (it ends as chat.ends says unless cut), and, with max_reference > 0, f (the
    labelling prompt f(x, y), by the task's template or by reference_template, {"system", "user"}). limit keeps the
    first rows; a limit of 0 means the task's own. need_response=False takes rows with none, too (y is its end alone
    then). The examples are made once, and kept (`core.cache`).
    Raises ValueError.
    """
    spec = TASKS[task]
    max_prompt, max_response = max_prompt or spec.max_prompt, max_response or spec.max_response
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token: a model could not learn to stop; set tokenizer.eos_token")
    rows, source = opened(task, data, split)
    f_of = partial(own_f, reference_template, task) if reference_template else spec.f
    whys = {"x": f"x over {max_prompt} tokens (--max-prompt)"}
    whys["f"] = f"f(x, y) over {max_reference} tokens (--max-reference)"

    def convert(tokenizer: Ahead, some: list[dict], said: Said) -> list[dict]:
        remarks = Remarks(tokenizer, said.remarks)
        some = [remarks.read(row, ("prompt", "response", *spec.optional)) for row in some]
        texts = tokenizer.each(lambda row: spec.x(row, tokenizer, max_prompt), some)
        texts = [(x, spec.before_response + row["response"].strip()) for x, row in zip(texts, some)]
        for row, text in zip(some, texts):
            remarks.answered(row, *text)
        found, references = tokenizer.each(lambda text: encode(tokenizer, *text), texts), [[]] * len(some)
        if max_reference:
            texts = tokenizer.each(lambda row: f_of(row, tokenizer, max_prompt), some)
            references = tokenizer.each(lambda text: tokenize(tokenizer, text), texts)
        kept = []
        for row, (x, y), f in zip(some, found, references):
            if len(x) > max_prompt:
                said.left_out("x", row["row"])
            elif max_reference and len(f) > max_reference:
                said.left_out("f", row["row"])
            else:
                said.cut += len(y) > max_response
                remarks.tokens(row, x + y)
                kept.append({"id": row["id"], "x": x, "y": y[:max_response]} | ({"f": f} if max_reference else {}))
        return kept

    flags = (columns, limit, need_response, max_prompt, max_response, max_reference)
    flags += (reference_template,) if reference_template else ()
    writes_f = (own_f, fill) if reference_template else (spec.f,)
    code = hash_of_functions(convert, pairs, chat, cut, spec.x, *writes_f)
    of_task = (task, spec.prompt, spec.response, spec.before_response)
    key = (code, *of_task, *flags, hash_of_source(rows, source), hash_of_tokenizer(tokenizer), ends(tokenizer))
    found, said = tokenised(key, tokenizer, each_row(task, rows, source, columns, limit, need_response), convert)
    notes = [f"{said.kept} examples of task {task} from {source}", *said.why(whys)]
    if said.cut:
        notes.append(f"{said.cut} responses cut at {max_response} tokens (--max-response), without EOS")
    if not said.kept:
        raise ValueError(f"no example is left: {'; '.join(notes[1:])}")
    return found, notes + Remarks(tokenizer, said.remarks).notes(uses_template=spec.f is qa_f)


def load(
    args: argparse.Namespace, tokenizer, split: str = "train", need_response: bool = True
) -> tuple[Dataset, list[str]]:
    """`examples` with the flags of a command line."""
    names = ("data", "columns", "limit", "max_prompt", "max_response", "max_reference", "reference_template")
    chosen = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if chosen.get("max_reference") == 0:
        spec = TASKS[args.task]
        chosen["max_reference"] = (args.max_prompt or spec.max_prompt) + (args.max_response or spec.max_response) + 128
    return examples(args.task, tokenizer, split=split, need_response=need_response, **chosen)


def held_out(args: argparse.Namespace, tokenizer, f: bool = False) -> tuple[Dataset, dict[int, str], list[str]]:
    """The rows of --eval-data as `examples`, with f(x, y) if asked for and the stage has it; the texts of their
    responses, by id; and notes on what was cut or left out. (dpo.py's --columns name three columns of its pairs; here
    the prompt's holds.) Raises ValueError."""
    if args.data and not args.eval_data:
        raise ValueError("--eval-every needs --eval-data: held-out rows, as --data has its training rows from a file")
    flags = {name: value for name, value in vars(args).items() if f or name != "max_reference"}
    columns = [part for part in args.columns.split(",") if part.split("=")[0].strip() not in ("chosen", "rejected")]
    flags |= {"data": args.eval_data, "limit": args.eval_rows, "columns": ",".join(columns)}
    of = argparse.Namespace(**flags)
    try:
        found, notes = load(of, tokenizer, "test")
        rows = load_rows(args.task, of.data, "test", of.columns, of.limit)
    except (ValueError, OSError) as error:
        raise ValueError(f"--eval-every: {str(error).replace('--data', '--eval-data')}") from None
    return found, {row["id"]: row["response"] for row in rows}, notes
