"""The toy task: problems, tokenizer, oracle labels, recovery, and every command on a tiny scale."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import sums
import toy

Y = (
    "amy has 25 . first buys 15 : 25 + 15 = 40 , again 25 + 15 = 40 . second gives 9 : 40 - 9 = 31 , again 40 - 9 = 31 "
    ". #### 31 <eos>"
).split()


def run(*args):
    done = subprocess.run([sys.executable, toy.__file__, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def with_words(y, **changes):
    """y with the words at some places changed: with_words(Y, _12="39")."""
    return [changes.get(f"_{j}", word) for j, word in enumerate(y)]


def test_problems_are_right_and_disjoint():
    sets = sums.splits(60, 50, 40, seed=3)
    prompts = [row["prompt"] for rows in sets.values() for row in rows]
    assert len(set(prompts)) == 150 and {split: len(rows) for split, rows in sets.items()} == {
        "train": 60,
        "valid": 50,
        "test": 40,
    }
    other = sums.splits(60, 50, 40, seed=4)
    assert sets == sums.splits(60, 50, 40, seed=3)
    assert sets["train"] != other["train"] and sets["valid"] == other["valid"] and sets["test"] == other["test"]
    for rows in sets.values():
        for row in rows:
            words = row["response"].split()
            state = int(words[2])
            for j, word in enumerate(words):
                if word == "=" and words[j - 4] == ":":
                    assert int(words[j - 3]) == state
                    state = sums.add(*words[j - 3 : j])
                    assert words[j + 1] == str(state) and words[j + 2 : j + 9] == [",", "again", *words[j - 3 : j + 2]]
            assert sums.answer(row["response"]) == str(state) and len(words) < 80


def test_tokenizer():
    tok, row = toy.tokenizer(), sums.problems(1, 0)[0]
    for text in row.values():
        ids = tok(text).input_ids
        assert tok.decode(ids) == text and toy.to_words(ids) == text.split() and tok.unk_token_id not in ids
    assert tok.decode(tok("amy <eos>").input_ids, skip_special_tokens=True).strip() == "amy"
    assert tok("never seen").input_ids == [tok.unk_token_id] * 2


def test_answer():
    assert sums.answer("a #### 31 <eos>") == "31" and sums.answer("#### <eos>") is None and sums.answer("31") is None


def test_oracle_agrees_with_y():
    rng = random.Random(0)
    for i in range(200):
        _, y = sums.problem(rng, (2, 15), (1, 4), arbitrary=i % 2 == 0)
        y = y + ["<eos>"]
        assert toy.oracle_labels(y, y) == y == toy.oracle_labels(y[:-1], y)
        ids = [toy.IDS[word] for word in y]
        assert sums.right_labels(toy.tokenizer(), ids, ids) == ids


def test_oracle_never_looks_ahead_and_takes_anything():
    rng = random.Random(1)
    for _ in range(300):
        _, y = sums.problem(rng)
        z = toy.flawed(y, rng)
        for _ in range(rng.randint(0, 4)):
            z[rng.randrange(len(z))] = rng.choice(toy.WORDS)
        labels, j = toy.oracle_labels(y, z), rng.randrange(len(z))
        assert len(labels) == len(z)
        other = z[:j] + [rng.choice(toy.WORDS) for _ in range(5)]
        assert toy.oracle_labels(y, other)[:j] == labels[:j]


def ids_of(words):
    return [toy.IDS[word] for word in words]


def test_label_quality():
    tok = toy.tokenizer()
    z = with_words(Y, _12="39")
    truth = toy.oracle_labels(Y, z)
    assert truth[12] == "40" and truth[:12] == Y[:12]
    assert sums.right_labels(tok, ids_of(Y), ids_of(z)) == ids_of(truth)
    right = sums.label_quality(tok, [ids_of(Y)], [ids_of(z)], [ids_of(truth)])
    assert right["precision"] == right["recall"] == 1 and right["wrong_early"] == 0 and right["n"] == len(z)
    early = sums.label_quality(tok, [ids_of(Y)], [ids_of(z)], [ids_of(with_words(z, _2="7"))])
    assert early["precision"] == 0 and early["wrong_early"] == 1 and early["unmasked"] == 1 / len(z)
    assert sums.label_quality(tok, [ids_of(Y)], [ids_of(z)], [ids_of(z)])["precision"] is None


def test_recovery():
    tok, y, seen = toy.tokenizer(), ids_of(Y), set()
    for seed in range(20):
        prefix = sums.inject_error(tok, y, seed)
        assert prefix == sums.inject_error(tok, y, seed)
        n = len(prefix)
        seen.add(n)
        assert toy.to_words(prefix)[-6] == ":" and toy.to_words(prefix)[-2] == "="
        assert prefix[:-1] == y[: n - 1] and prefix[-1] != y[n - 1]
        assert sums.recovery(tok, y, prefix, y[n:]) == {"restated": True, "final": True}
        assert sums.recovery(tok, y, prefix, y[-3:]) == {"restated": False, "final": True}
        assert sums.recovery(tok, y, prefix, []) == {"restated": False, "final": False}
    assert len(seen) == 2


def test_documents():
    rng = random.Random(2)
    for kind in ("sums", "plain", "reference"):
        for _ in range(50):
            tokens, targets = toy.document(kind, 4, rng)
            assert len(tokens) == len(targets) <= 250 and any(target >= 0 for target in targets)
            if kind == "plain":
                assert all(target in (token, -100) for token, target in zip(tokens[1:], targets))


def test_base_and_data_commands(tmp_path):
    for out in ("one", "two"):
        run("base", "--out", tmp_path / out, "--steps", 4)
    one, two = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two  # fixed, seeded steps
    model, tok = (auto.from_pretrained(tmp_path / "one") for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.vocab_size == len(tok) and model.config.eos_token_id == tok.eos_token_id
    run("data", "--out", tmp_path / "data", "--train", 5, "--valid", 4, "--test", 3)
    rows = [json.loads(line) for line in (tmp_path / "data/train.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and set(rows[0]) == {"prompt", "response"}
    wrong = [sys.executable, toy.__file__, "data", "--out", tmp_path / "large", "--operands", "2", "300"]
    told = subprocess.run(wrong, stderr=subprocess.PIPE, text=True).stderr
    assert "error: operands up to 300, 4 steps: must be at most 20" in told
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "data"}  # nothing is left of it


def test_problems_of_two_difficulties(tmp_path):
    easy, hard = ("--operands", 2, 5, "--steps", 1, 1), ("--hard-operands", 10, 20, "--hard-steps", 4, 4)
    sizes = ("--train", 40, "--valid", 4, "--test", 12)
    files = {}
    for seed in (0, 1):
        run("data", "--out", tmp_path / f"{seed}", "--seed", seed, *sizes, *easy, "--hard", 0.25, *hard)
        files[seed] = [(tmp_path / f"{seed}/{name}.jsonl").read_text() for name in ("train", "valid", "test")]
    assert files[0][1:] == files[1][1:] and files[0][0] != files[1][0]
    rows = [[json.loads(line) for line in text.splitlines()] for text in files[0]]
    assert [len(part) for part in rows] == [40, 4, 12]
    for part in rows:
        is_hard = [" fourth " in row["response"] for row in part]
        assert sum(is_hard) == len(part) / 4 and is_hard != sorted(is_hard)  # one order
        for row, four in zip(part, is_hard):
            operands = [int(n) for n in re.findall(r"[+-] ([0-9]+)", row["response"])]
            assert len(operands) == (8 if four else 2) and all(10 <= n <= 20 if four else 2 <= n <= 5 for n in operands)


def test_where_two_difficulties_overlap_no_problem_is_in_two_sets():
    same = {"operands": (2, 3), "n_steps": (1, 1)}
    sets = sums.splits(60, 30, 30, 0, 0.5, same, **same)
    prompts = [row["prompt"] for rows in sets.values() for row in rows]
    assert len(set(prompts)) == len(prompts) == 120


def test_preferences_command(tmp_path):
    ids, x = [toy.IDS[word] for word in Y], [toy.IDS[word] for word in Y[:4]]
    z = [toy.IDS[word] for word in with_words(Y, _12="39")]
    rows = {"id": [7, 8, 9], "x": [x] * 3, "y": [ids] * 3, "z": [z, ids, z[:9]], "z_bar": [z, ids, z[:9]]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "in")
    run("preferences", "--pairs", tmp_path / "in", "--out", tmp_path / "out")
    found = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    prompt, chosen = " ".join(Y[:4]), " ".join(Y).removesuffix(" <eos>")
    wrong = " ".join(with_words(Y, _12="39")).removesuffix(" <eos>")
    assert (
        found
        == [  # the row whose z is y is left out
            {"prompt": prompt, "chosen": chosen, "rejected": wrong},
            {"prompt": prompt, "chosen": chosen, "rejected": " ".join(wrong.split()[:9])},
        ]
    )


def test_bytes_command(tmp_path):
    rows = [{"source": ["a café costs", "ten euros"], "target": "so much", "n": 1}] * 30
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("bytes", "--out", tmp_path / "tiny", "--text", tmp_path / "text.jsonl", "--vocab", 300, "--width", 16)
    model, tok = (auto.from_pretrained(tmp_path / "tiny") for auto in (AutoModelForCausalLM, AutoTokenizer))
    text = "日本 naïve\n\n  two spaces <b> , 1.5"
    assert tok.decode(tok(text).input_ids) == text and tok.eos_token == "<eos>"
    assert model.config.vocab_size == len(tok) and model.config.max_position_embeddings == 2048
