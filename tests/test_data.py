"""Templates word for word, truncation, the one layout against plain forwards, and what bad rows are told."""

import json
import random

import pytest
import torch

import batches
import data
import tiny
from core.rows import source_rows


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.word_tokenizer()


def byte_tokenizer(**special):
    """One token a byte: every text is its own token sequence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture(scope="module")
def bytes_():
    return byte_tokenizer(eos_token="</s>")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ------------------------------------------------------------------------------------------------ templates
QA = {"prompt": "Why?", "response": "Because."}
RAC_CHAT = (
    "<|system|>\nYou are a helpful assistant to answer user's question. Your will be given both a question and "
    "reference response. You need to give a new response to the question and contain the main content in the "
    "reference response.</s>\n<|user|>\nWhy?\nAnswer this question based on the following reference response: "
    "Because.</s>\n<|assistant|>\n"
)


@pytest.mark.parametrize(
    "task, x",
    [
        ("ultrachat", "<|system|>\n</s>\n<|user|>\nWhy?</s>\n<|assistant|>\n"),
        ("gsm8k", "<|system|>\n</s>\n<|user|>\nWhy? Let's think step by step.</s>\n<|assistant|>\n"),
        ("math", "<|system|>\n</s>\n<|user|>\nWhy? Let's think step by step.</s>\n<|assistant|>\n"),
    ],
)
def test_qa_templates(bytes_, task, x):
    assert data.TASKS[task].x(QA, bytes_, 999) == x
    assert data.TASKS[task].f(QA, bytes_, 999) == RAC_CHAT


def test_summarization_templates(bytes_):
    row = {"subreddit": "pets", "title": "My cat", "prompt": "It sleeps.\nA lot.", "response": "Sleepy cat."}
    x = "SUBREDDIT: r/pets\n\nTITLE: My cat\n\nPOST: It sleeps.\nA lot."
    assert data.tldr_x(row, bytes_, 999) == x + "\n\nTL;DR:"
    assert data.tldr_f(row, bytes_, 999) == (
        f"[POST]: {x}\n\n[REFERENCE SUMMARY]: Sleepy cat.\n\n"
        "Re-write a new summary of the post and cover the main content in the reference summary. TL;DR:"
    )
    assert data.tldr_x({"prompt": "p", "title": None}, bytes_, 999) == "POST: p\n\nTL;DR:"


def test_the_tokenizers_own_chat_template_is_used_with_one_bos_and_a_system_turn_it_lacks_is_folded_in():
    own = byte_tokenizer(eos_token="</s>", bos_token="<s>")
    own.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    text = data.chat(own, "Why?", "Be brief.")
    assert text == "<s>[system]Be brief.[user]Why?[assistant]"
    assert data.tokenize(own, text).count(own.bos_token_id) == 1
    own.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    )
    assert data.chat(own, "Why?", "Be brief.") == "[user]Be brief.\n\nWhy?[assistant]"
    assert data.chat(own, "Why?") == "[user]Why?[assistant]"


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}{{ raise_exception('no system') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
)
REFERENCE = "\nAnswer this question based on the following reference response: "


def turns(*texts, system=None):
    """A dialogue of these texts, the user's first."""
    roles = [] if system is None else [{"role": "system", "content": system}]
    return roles + [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]


def test_a_dialogue_goes_whole_through_the_tokenizers_own_template():
    own, ultrachat = byte_tokenizer(eos_token="<|im_end|>"), data.TASKS["ultrachat"]
    own.chat_template = CHATML

    def render(messages):
        return own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    row = {"prompt": turns("Why?", "So.", "And?", system="Be brief."), "response": "No."}
    assert ultrachat.x(row, own, 999) == render(row["prompt"])
    f = turns("Why?", "So.", f"And?{REFERENCE}No.", system=f"Be brief.\n\n{data.RAC_SYSTEM}")
    assert ultrachat.f(row, own, 999) == render(f)
    row = {"prompt": turns("Why?", "So.", "And?"), "response": "No."}
    assert ultrachat.x(row, own, 999) == render(turns("Why?", "So.", "And?", system=""))  # as for one question
    f = turns("Why?", "So.", f"And?{REFERENCE}No.", system=data.RAC_SYSTEM)
    assert ultrachat.f(row, own, 999) == render(f)
    assert row["prompt"] == turns("Why?", "So.", "And?")  # untouched


def test_a_dialogue_without_a_template_and_with_one_that_knows_no_system_turn(bytes_):
    row = {"prompt": turns("Why?", "So.", "And?", system="Be brief."), "response": "No."}
    middle = "</s>\n<|user|>\nWhy?</s>\n<|assistant|>\nSo.</s>\n<|user|>\nAnd?"
    f = f"<|system|>\nBe brief.\n\n{data.RAC_SYSTEM}{middle}{REFERENCE}No.</s>\n<|assistant|>\n"
    assert data.chat(bytes_, row["prompt"]) == f"<|system|>\nBe brief.{middle}</s>\n<|assistant|>\n"
    assert data.chat(bytes_, row["prompt"][1:]) == f"<|system|>\n{middle}</s>\n<|assistant|>\n"
    assert data.qa_f(row, bytes_, 999) == f
    own = byte_tokenizer(eos_token="</s>")
    own.chat_template = NO_SYSTEM
    rest = "Why?[assistant]So.[user]And?"
    assert data.chat(own, row["prompt"]) == f"[user]Be brief.\n\n{rest}[assistant]"
    assert data.chat(own, row["prompt"][1:]) == f"[user]{rest}[assistant]"
    system = f"Be brief.\n\n{data.RAC_SYSTEM}"
    assert data.qa_f(row, own, 999) == f"[user]{system}\n\n{rest}{REFERENCE}No.[assistant]"


def test_a_template_that_leaves_the_system_text_out():
    """Phi-3-mini's did, without a word: the text goes into the user's turn, as with a template that refuses it."""
    row = {"prompt": turns("Why?", system="Be brief."), "response": "No."}
    silent, refuses = byte_tokenizer(eos_token="</s>"), byte_tokenizer(eos_token="</s>")
    turn = "{% if m.role == 'user' %}[user]{{ m.content }}{% endif %}"
    silent.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}[assistant]"
    refuses.chat_template = NO_SYSTEM
    assert data.chat(silent, "Why?") == "[user]Why?[assistant]"
    assert data.chat(silent, row["prompt"]) == "[user]Be brief.\n\nWhy?[assistant]"
    assert data.qa_f(row, silent, 999) == data.qa_f(row, refuses, 999)


@pytest.mark.parametrize("template", [None, CHATML, NO_SYSTEM])
def test_a_dialogue_of_one_turn_is_that_question(template):
    own = byte_tokenizer(eos_token="</s>")
    own.chat_template = template
    for system in ("", "Be brief."):
        assert data.chat(own, turns("Why?"), system) == data.chat(own, "Why?", system)
    assert data.chat(own, turns("Why?", system="Be brief.")) == data.chat(own, "Why?", "Be brief.")
    assert data.qa_f(QA | {"prompt": turns("Why?")}, own, 999) == data.qa_f(QA, own, 999)


def test_bos_is_added_once_where_the_tokenizer_adds_it():
    from tokenizers.processors import TemplateProcessing

    own = byte_tokenizer(eos_token="</s>", bos_token="<s>")
    own.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", own.bos_token_id)])
    assert data.tokenize(own, "hi")[0] == own.bos_token_id
    assert data.tokenize(own, "<s>hi").count(own.bos_token_id) == 1
    x, y = data.encode(own, "hi", "yes")
    assert y == own("yes", add_special_tokens=False)["input_ids"] + [own.eos_token_id]


# ------------------------------------------------------------------------------------------------ lengths
@pytest.mark.parametrize("newlines", [True, False])
def test_a_long_post_is_cut_as_in_the_source_and_never_its_end(bytes_, newlines):
    rng = random.Random(0)
    lines = ["".join(rng.choices("abc é", k=rng.randint(5, 40))) for _ in range(30)]
    post = ("\n" if newlines else " ").join(lines)

    def slow(post, limit):  # the rule, one cut at a time
        while len(data.tokenize(bytes_, f"POST: {post}\n\nTL;DR:")) > limit:
            post = post[: post.rindex("\n")] if "\n" in post else post[:-1]
        return f"POST: {post}\n\nTL;DR:"

    for limit in (60, 200, 333, 5000):
        text = data.tldr_x({"prompt": post}, bytes_, limit)
        assert text == slow(post, limit)
        assert text.endswith("\n\nTL;DR:") and len(data.tokenize(bytes_, text)) <= limit


def test_long_rows_are_left_out_or_cut_and_counted(tokenizer, tmp_path):
    rows = [
        {"prompt": "how many eggs", "response": "3 4 5 6 7 8"},
        {"prompt": "how " * 9, "response": "3"},
        {"prompt": "how many", "response": "3"},
    ]
    path = write(tmp_path / "d.jsonl", rows)
    found, notes = data.examples("toy", tokenizer, data=path, max_prompt=5, max_response=4, max_reference=8)
    assert list(found["id"]) == [2]  # row 0: f(x, y) too long; row 1: x too long
    assert any("1 rows left out: x over 5" in note and "row 1" in note for note in notes)
    assert any("1 rows left out: f(x, y) over 8" in note and "row 0" in note for note in notes)
    found, notes = data.examples("toy", tokenizer, data=path, max_prompt=5, max_response=4)
    assert [len(y) for y in found["y"]] == [4, 2]
    assert found["y"][0][-1] != tokenizer.eos_token_id and found["y"][1][-1] == tokenizer.eos_token_id
    assert any("1 responses cut at 4" in note for note in notes)


def test_f_holds_the_whole_reference(tokenizer, tmp_path):
    path = write(tmp_path / "d.jsonl", [{"prompt": "how many eggs ?", "response": "amy has 3 eggs"}])
    found, _ = data.examples("toy", tokenizer, data=path, max_reference=99)
    y, f = found["y"][0][:-1], found["f"][0]
    assert any(f[i : i + len(y)] == y for i in range(len(f)))


def test_columns_can_be_mapped_and_joined(tokenizer, tmp_path):
    rows = [{"instruction": "how", "input": "many", "output": "3"}, {"instruction": "how", "input": "", "output": "4"}]
    path = write(tmp_path / "d.jsonl", rows)
    found = data.load_rows("ultrachat", path, columns="prompt=instruction+input,response=output")
    assert [(row["prompt"], row["response"]) for row in found] == [("how\n\nmany", "3"), ("how", "4")]


def test_words_that_the_tokenizer_does_not_know_are_said(tokenizer, tmp_path):
    rows = [{"prompt": "3", "response": text} for text in ("4", "four hundred", "5", "6 and six")]
    _, notes = data.examples("toy", tokenizer, data=write(tmp_path / "d.jsonl", rows))
    told = f"WARNING: 2 rows hold words that the tokenizer does not know ({tokenizer.unk_token}), first: row 1"
    assert [note for note in notes if "know" in note] == [told]


def test_a_dialogue_gives_its_first_answer(tmp_path):
    roles = ["user", "assistant", "user", "assistant"]
    turns = [{"role": role, "content": text} for role, text in zip(roles, "qarb")]
    path = write(tmp_path / "d.jsonl", [{"prompt": "q", "messages": turns}])
    assert data.load_rows("ultrachat", path)[0]["response"] == "a"


BOTH = "prompt=messages,response=messages"


def test_each_assistant_turn_is_an_example(bytes_, tmp_path):
    dialogues = [turns(*"qarb", system="s"), turns(*"hi"), turns(*"uvwxy", system="")]  # "" is none; y has no answer
    path = write(tmp_path / "d.jsonl", [{"messages": dialogue, "source": "web"} for dialogue in dialogues])
    rows = data.load_rows("ultrachat", path, columns=BOTH)
    expected = [(turns("q", system="s"), "a", 0), (turns(*"qar", system="s"), "b", 0), (turns("h"), "i", 1)]
    expected += [(turns("u"), "v", 2), (turns(*"uvw"), "x", 2)]
    assert [(row["prompt"], row["response"], row["row"]) for row in rows] == expected
    assert [row["id"] for row in rows] == [0, 1, 2, 3, 4] and {row["source"] for row in rows} == {"web"}
    assert data.load_rows("ultrachat", path, columns=BOTH, limit=2) == rows[:3]  # rows of the file
    found, notes = data.examples("ultrachat", bytes_, data=path, columns=BOTH, max_reference=999)
    assert list(found["id"]) == [0, 1, 2, 3, 4] and notes == [f"5 examples of task ultrachat from {path}"]
    for example, row in zip(found, rows, strict=True):
        assert bytes_.decode(example["x"]) == data.chat(bytes_, row["prompt"])
        assert bytes_.decode(example["y"]) == row["response"] + "</s>"
        assert bytes_.decode(example["f"]) == data.qa_f(row, bytes_, 999)


def test_a_long_dialogue_is_left_out_from_the_turn_at_which_it_is_too_long(bytes_, tmp_path):
    dialogues = [turns(*"hi"), turns("q", "a", "r" * 99, "b", "t", "c"), turns(*"hi")]
    path = write(tmp_path / "d.jsonl", [{"messages": dialogue} for dialogue in dialogues])
    found, notes = data.examples("ultrachat", bytes_, data=path, columns=BOTH, max_prompt=90)
    assert list(found["id"]) == [0, 1, 4]
    assert notes[1:] == ["2 rows left out: x over 90 tokens (--max-prompt), first: row 1"]


def test_a_prompt_may_be_a_dialogue(bytes_, tmp_path):
    import datasets

    rows = [{"prompt": turns(*"qar", system="s"), "response": "b"}, {"prompt": turns("h"), "response": "i"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    for path in (write(tmp_path / "d.jsonl", rows), str(tmp_path / "d.parquet")):
        found = data.load_rows("ultrachat", path, columns="response=response")
        assert found == [row | {"id": i, "row": i} for i, row in enumerate(rows)]
        found = data.load_rows("ultrachat", path, columns="response=answer", need_response=False)
        assert [(row["prompt"], row["response"]) for row in found] == [(row["prompt"], "") for row in rows]
    path = write(tmp_path / "first.jsonl", [{"prompt": turns("q", system="s"), "messages": turns(*"qarb")}])
    assert data.load_rows("ultrachat", path)[0]["response"] == "a"


def test_without_responses_a_last_user_turn_is_what_to_answer(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"messages": turns(*"qar")}, {"messages": turns(*"hi")}])
    found = data.load_rows("ultrachat", path, columns="prompt=messages", need_response=False)
    assert [(row["prompt"], row["response"]) for row in found] == [(turns(*"qar"), ""), (turns("h"), "i")]


def test_the_response_is_not_read_into_the_prompt_by_another_way(bytes_, tmp_path):
    path = write(tmp_path / "d.jsonl", [{"post": "unused", "article": "A.", "title": "T", "subreddit": "s"}])
    (row,) = data.load_rows("tldr", path, columns="prompt=article,response=title")
    assert data.tldr_x(row, bytes_, 99) == "SUBREDDIT: r/s\n\nPOST: A.\n\nTL;DR:" and row["response"] == "T"


def test_prompts_without_responses_can_be_read(tokenizer, tmp_path):
    path = write(tmp_path / "d.jsonl", [{"prompt": "how many"}, {"prompt": "how", "response": ""}])
    found, _ = data.examples("toy", tokenizer, data=path, need_response=False)
    assert found["y"][:] == [[tokenizer.eos_token_id]] * 2


def test_the_first_word_of_y_survives_unknown_words(tokenizer, tmp_path):
    path = write(tmp_path / "d.jsonl", [{"prompt": "how zzz", "response": "3 4"}])
    found, _ = data.examples("toy", tokenizer, data=path)
    assert found["y"][0] == tokenizer("3 4")["input_ids"] + [tokenizer.eos_token_id]


def test_json_and_parquet_files_read_like_jsonl(tmp_path):
    import datasets

    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(3)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    paths = [write(tmp_path / "d.jsonl", rows), str(tmp_path / "d.json"), str(tmp_path / "d.parquet")]
    a, b, c = (data.load_rows("gsm8k", path) for path in paths)
    assert a == b == c and a[1]["prompt"] == "q1" and a[1]["id"] == 1


def test_the_first_rows_of_a_set_of_several_parts_are_of_all_of_them(monkeypatch):
    """MATH has seven, one a subject, of very different size."""
    import datasets

    sizes = {"algebra": 8, "geometry": 2, "prealgebra": 4}

    def load(name, config, split):
        return datasets.Dataset.from_list([{"part": config, "row": j} for j in range(sizes[config])])

    monkeypatch.setattr(datasets, "load_dataset", load)
    found, source = source_rows(None, ("math", *sizes), "test")
    found = found.to_list()
    assert source == "math" and len(found) == 14
    for name, size in sizes.items():
        assert [row["row"] for row in found if row["part"] == name] == [*range(size)]
        assert sum(row["part"] == name for row in found[:7]) == size / 2


# ------------------------------------------------------------------------------------------------ the layout
@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_batched_response_logits_equal_plain_forwards(arch):
    """Left padding, right padding, positions and the kept logits against one unpadded row at a time."""
    model, rng = tiny.model(arch, vocab=50), random.Random(1)
    x = [[rng.randrange(50) for _ in range(n)] for n in (1, 9, 4, 13)]
    y = [[rng.randrange(50) for _ in range(n)] for n in (6, 1, 11, 0)]
    b = batches.batch(x, y)
    logits = batches.response_logits(model, b)
    assert logits.shape == (4, 11, 50) and b.mask.sum() == 18
    for i in range(4):
        plain = model(torch.tensor([x[i] + y[i]]), use_cache=False).logits[0, len(x[i]) - 1 : -1]
        assert torch.allclose(logits[i, : len(y[i])], plain[: len(y[i])], atol=1e-5)


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_gradients_of_a_padded_batch_are_those_of_its_rows(arch):
    from sft import sft_loss

    rng = random.Random(2)
    x = [[rng.randrange(50) for _ in range(n)] for n in (2, 9, 5)]
    y = [[rng.randrange(50) for _ in range(n)] for n in (6, 1, 0)]

    def gradients(rows):
        model = tiny.model(arch, vocab=50)
        for some in rows:
            b = batches.batch([x[i] for i in some], [y[i] for i in some])
            sft_loss(batches.response_logits(model, b), b.y, b.mask)[0].backward()
        return [p.grad for p in model.parameters()]

    for together, apart in zip(gradients([[0, 1, 2]]), gradients([[0], [1]]), strict=True):
        assert torch.allclose(together, apart, atol=2e-5) and together.isfinite().all()


def test_pad_may_equal_eos_and_the_example_in_the_docstring():
    b = batches.batch([[5, 6, 7], [8]], [[1, 2], [3, 4]])
    assert b.input_ids.tolist() == [[5, 6, 7, 1], [0, 0, 8, 3]]
    assert b.attention_mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert b.position_ids.tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert b.y.tolist() == [[1, 2], [3, 4]] and b.mask.all()
    b = batches.batch([[0, 0], [7]], [[0, 0, 0], [0]])  # token 0 is the id that pads: masks come from lengths
    assert b.mask.sum(1).tolist() == [3, 1] and b.attention_mask.sum(1).tolist() == [4, 2]


# ------------------------------------------------------------------------------------------------ training passes
def joint(rng, vocab=50):
    """Prompts and the three terms of SFT, BASH and RAC on them; rows of very different length, some empty."""
    from bash import bash_loss
    from rac import rac_loss
    from sft import sft_loss

    def rows(*lengths):
        return [[rng.randrange(vocab) for _ in range(n)] for n in lengths]

    x, y, z = rows(2, 19, 5, 1), rows(6, 1, 0, 13), rows(9, 0, 0, 1)
    terms = {"sft": (sft_loss, y, y), "bash": (bash_loss, rows(6, 1, 0, 13), y)}
    return x, terms | {"rac": (rac_loss, z, z, rows(9, 0, 0, 1))}


def by_definition(model, x, terms):
    """Each term in a pass of its own, from whole logits."""
    found = {}
    for name, (loss, given, *targets) in terms.items():
        b = batches.batch(x, given)
        padded = [batches.pad_responses(target)[0] for target in targets]
        found[name] = loss(batches.response_logits(model, b), *padded, b.mask)[0]
    return found


def gradients(model, found):
    (found["sft"] + 2 * found["bash"] + 3 * found["rac"]).backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    return grads


@pytest.mark.parametrize("share_prompt", [False, True])
@pytest.mark.parametrize("attention, chunk", [("sdpa", 2**26), ("sdpa", 150), ("eager", 2**26)])
@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_losses_in_one_pass_are_those_of_their_definitions(arch, attention, share_prompt, chunk, monkeypatch):
    """Values and gradients, with chunks of 3 tokens, too; Mistral's window is shorter than its rows."""
    monkeypatch.setattr(batches, "CHUNK", chunk)
    model = tiny.model(arch, vocab=50, attn_implementation=attention)
    x, terms = joint(random.Random(4))
    expected, found = by_definition(model, x, terms), batches.losses(model, x, terms, share_prompt)
    assert found.keys() == expected.keys() and not model.changes_logits
    for name in found:
        assert float(found[name].detach()) == pytest.approx(float(expected[name].detach()), rel=1e-5)
    for a, b in zip(gradients(model, found), gradients(model, expected), strict=True):
        assert torch.allclose(a, b, atol=2e-5 * float(b.abs().max()) + 1e-6)


def gemma_2():
    """A small one; it caps its logits after the output matrix."""
    from transformers import AutoConfig, AutoModelForCausalLM

    size = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    config = AutoConfig.for_model("gemma2", vocab_size=50, intermediate_size=48, **size, initializer_range=1.0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def test_a_model_that_changes_its_logits_makes_them_itself():
    """Of the tokens that are predicted, and of no others."""
    model, made = gemma_2(), []
    x, terms = joint(random.Random(5))
    expected, tokens = by_definition(model, x, terms), sum(len(y) for _, given, *_ in terms.values() for y in given)
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: made.append(out.shape))
    for _ in range(2):
        found = batches.losses(model, x, terms)
        assert model.changes_logits and made[-1] == (1, tokens, 50)
        for name in found:
            assert float(found[name].detach()) == pytest.approx(float(expected[name].detach()), rel=1e-5)
        grads, plain = gradients(model, found), gradients(model, by_definition(model, x, terms))
        assert all(torch.allclose(a, b, atol=2e-5 * float(b.abs().max()) + 1e-6) for a, b in zip(grads, plain))
    with pytest.raises(ValueError, match="--share-prompt: this model's layers differ in what they see"):
        batches.losses(model, x, terms, share_prompt=True)


@pytest.mark.parametrize("chunk", [2**26, 150])
@pytest.mark.parametrize("arch", [*tiny.ARCHS, "gemma2"])
def test_what_is_read_at_each_token(arch, chunk, monkeypatch):
    """Against a forward of each row alone: an arg max, and the chance of another token; 3 tokens at a time, too."""
    monkeypatch.setattr(batches, "CHUNK", chunk)
    model, rng = tiny.model(arch, vocab=50) if arch in tiny.ARCHS else gemma_2(), random.Random(6)
    lengths = (3, 17, 1, 8, 2), (6, 1, 13, 0, 4), (6, 1, 13, 0, 4)
    x, y, other = ([[rng.randrange(50) for _ in range(n)] for n in row] for row in lengths)

    def read(logits, target):
        assert len(logits) == len(target) <= chunk // 50
        return logits.argmax(-1), logits.log_softmax(-1).gather(-1, target[:, None])

    found = dict(batches.by_token(model, x, y, read, other, batch_size=2))
    assert sorted(found) == [0, 1, 2, 3, 4]
    for i, (best, chance) in found.items():
        plain = model(torch.tensor([x[i] + y[i]]), use_cache=False).logits[0, len(x[i]) - 1 : -1].detach()  # [L, V]
        assert best.tolist() == plain.argmax(-1).tolist() and chance.shape == (len(y[i]), 1)
        assert torch.allclose(chance[:, 0], plain.log_softmax(-1)[range(len(y[i])), other[i]], atol=1e-5)
    assert all(len(best) == 0 for _, (best, _) in batches.by_token(model, x, [[]] * 5, read, [[]] * 5))


def test_share_prompt_needs_a_mask_of_four_dimensions():
    model = tiny.model("llama", vocab=50)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="--share-prompt needs 4-D attention masks, which flash_attention_2"):
        batches.losses(model, *joint(random.Random(5)), share_prompt=True)


def test_rows_with_nothing_to_learn_give_zero_and_a_gradient_of_zero():
    from sft import sft_loss

    model = tiny.model("llama", vocab=50)
    found = batches.losses(model, [[1, 2], [3]], {"sft": (sft_loss, [[], []], [[], []])})
    assert float(found["sft"].detach()) == 0
    found["sft"].backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_float32_logits_of_a_whole_batch_are_never_made(monkeypatch):
    """The output matrix is applied to chunks of the response's tokens, and to no other."""
    from sft import sft_loss

    model, seen = tiny.model("gpt_neox", vocab=50), []
    monkeypatch.setattr(batches, "CHUNK", 50 * 4)
    linear = type(model.get_output_embeddings()).forward
    monkeypatch.setattr(
        type(model.get_output_embeddings()), "forward", lambda s, h: seen.append(h.shape) or linear(s, h)
    )
    y = [[1] * 7, [2] * 3]
    batches.losses(model, [[1] * 20, [3] * 5], {"sft": (sft_loss, y, y)})
    heads = [shape[0] for shape in seen if len(shape) == 2 and shape[1] == 32]
    assert heads[-3:] == [4, 4, 2]


# ------------------------------------------------------------------------------------------------ bad input
GOOD = '{"prompt": "a", "response": "b"}\n'
BAD = [
    (GOOD + "{oops\n", "line 2: not valid JSON"),
    (GOOD + "[1]\n", "line 2: must be an object"),
    (GOOD + '{"prompt": "a"}\n', "row 1: no column 'response'"),
    (GOOD + '{"prompt": "a", "response": ""}\n', "row 1: empty response"),
    (GOOD + '{"prompt": " ", "response": "b"}\n', "row 1: empty prompt"),
    (GOOD + '{"prompt": "a", "response": 3}\n', "row 1: column 'response' is int, not text"),
    (GOOD + '{"prompt": "a", "response": ["b"]}\n', "row 1: column 'response' is list, not text"),
    (GOOD + '{"prompt": "a", "response": null}\n', "row 1: column 'response' is NoneType, not text"),
    ("", "no rows"),
]


@pytest.mark.parametrize("text, message", BAD, ids=[message for _, message in BAD])
def test_bad_rows_are_named(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        data.load_rows("toy", str(path))
    assert message in str(error.value) and "bad.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_other_bad_input(tmp_path, tokenizer, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such file"):
        data.load_rows("toy", str(tmp_path / "missing.jsonl"))
    with pytest.raises(ValueError, match="must be a .jsonl"):
        data.load_rows("toy", str(tmp_path))
    with pytest.raises(ValueError, match="needs --data"):
        data.load_rows("toy")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        data.load_rows("toy", str(tmp_path / "latin.jsonl"))
    (tmp_path / "d.json").write_text('{"prompt": "a"}')
    (tmp_path / "d.parquet").write_text("nothing of the kind")
    with pytest.raises(ValueError, match="d.parquet: not a readable parquet file"):
        data.load_rows("toy", str(tmp_path / "d.parquet"))
    turns = write(tmp_path / "turns.jsonl", [{"prompt": "q", "messages": ["a"]}])
    with pytest.raises(ValueError, match="row 0: empty response"):
        data.load_rows("ultrachat", turns)
    with pytest.raises(ValueError, match="list of objects"):
        data.load_rows("toy", str(tmp_path / "d.json"))
    good = write(tmp_path / "good.jsonl", [{"prompt": "how", "response": "3"}])
    with pytest.raises(ValueError, match="prompt=NAME"):
        data.load_rows("toy", good, columns="x=prompt")
    with pytest.raises(ValueError, match="no EOS token"):
        data.examples("toy", byte_tokenizer(), data=good)
    with pytest.raises(ValueError, match="no example is left: 1 rows left out: x over 1 tokens"):
        long = write(tmp_path / "long.jsonl", [{"prompt": "a b c", "response": "d"}])
        data.examples("toy", tokenizer, data=long, max_prompt=1)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="could not be loaded"):
        data.load_rows("gsm8k", "nobody/no-such-set")


# ------------------------------------------------------------------------------------------------ --reference-template
def plain_f(tokenizer, tmp_path, task, rows, template, **kw):
    """Decoded f(x, y) of the rows, with a template of one's own."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, notes = data.examples(task, tokenizer, data=str(path), max_reference=600, reference_template=template, **kw)
    return [tokenizer.decode(ids) for ids in found["f"]], notes


def test_a_template_that_is_the_papers_gives_the_papers(tmp_path):
    """Written down as a template, f(x, y) of A.1 is token for token what the tasks build; dialogues included."""
    tokenizer = byte_tokenizer(eos_token="</s>")
    qa = "{x}\nAnswer this question based on the following reference response: {y}"
    tldr = (
        "[POST]: {x}\n\n[REFERENCE SUMMARY]: {y}\n\n"
        "Re-write a new summary of the post and cover the main content in the reference summary. TL;DR:"
    )
    turns = [{"role": "system", "content": "Be"}, *(
        {"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c {y} ?"))
    )]  # fmt: skip
    cases = [
        ("gsm8k", [{"question": "a {x} \\1", "answer": "{x} {y} #### 3"}], {"system": data.RAC_SYSTEM, "user": qa}),
        ("ultrachat", [{"prompt": turns, "messages": "So {x}"}], {"system": data.RAC_SYSTEM, "user": qa}),
        ("tldr", [{"post": "so it goes", "summary": " It {y} ", "title": "t"}], {"system": "", "user": tldr}),
        ("toy", [{"prompt": "3 4", "response": "7"}], {"system": "", "user": data.TOY_REFERENCE}),
    ]
    for task, rows, template in cases:
        found, papers = (plain_f(tokenizer, tmp_path, task, rows, own) for own in (template, None))
        assert found == papers and len(found[0]) == 1, task
    own = {"system": "", "user": "{y} <- {x} {z} {{y}}"}
    (text,), _ = plain_f(tokenizer, tmp_path, "toy", [{"prompt": "{y}", "response": "{x}"}], own)
    assert text == "{x} <- {y} {z} {{x}}"  # in one pass


def test_a_template_over_the_limit_is_counted(tmp_path):
    rows = [{"prompt": "3", "response": "4"}, {"prompt": "3" * 60, "response": "4"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = {"system": "", "user": "{x}, {x}: {y}"}
    of = {"data": str(path), "max_reference": 100, "reference_template": template}
    found, notes = data.examples("toy", byte_tokenizer(eos_token="</s>"), **of)
    assert found["id"][:] == [0] and "1 rows left out: f(x, y) over 100 tokens (--max-reference), first: row 1" in notes


@pytest.mark.parametrize("name, text, task, message", [
    ("t.txt", "{x} only", "gsm8k", "there is no {y} in it: the labels would not know the reference"),
    ("t.txt", "{y} only", "gsm8k", "there is no {x} in it"),
    ("t.txt", "", "gsm8k", "there is no {y} in it"),
    ("t.txt", b"\xff{x}{y}", "gsm8k", "not UTF-8 text (byte 0)"),
    ("t.json", "{", "gsm8k", "not valid JSON"),
    ("t.json", "[]", "gsm8k", "must hold an object of texts, system and user"),
    ("t.json", '{"user": 3}', "gsm8k", "must hold an object of texts, system and user"),
    ("t.json", '{"user": "{x} {y}", "assistant": "so"}', "gsm8k", "'assistant' is no part of a template"),
    ("t.json", '{"system": "{x} {y}"}', "gsm8k", "the user's turn is empty"),
    ("t.json", '{"system": "s", "user": "{x} {y}"}', "tldr", "this --task has no turns, and no system text"),
    (None, "", "tldr", "no such file"),
])  # fmt: skip
def test_bad_templates_are_one_line(tmp_path, monkeypatch, capsys, name, text, task, message):
    import rac
    from core import ranks

    if name:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    words = f"rac.py --model m --task {task} --out {tmp_path}/o --reference-template {tmp_path}/{name}"
    monkeypatch.setattr("sys.argv", words.split())
    with pytest.raises(SystemExit):
        ranks.cli(rac.main)
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"rac.py: error: --reference-template {tmp_path}/{name}: ") and message in line
    assert "\n" not in line
