"""The embedded default: a synthetic maths task and the tiny base model for it, built from nothing in minutes.

    python toy.py base   --out out/base [--seed 0]             # train the base model: an ordinary Hugging Face folder
    python toy.py data   --out out/data [--train 500]          # train.jsonl, valid.jsonl, test.jsonl (prompt, response)
    python toy.py oracle --pairs out/D_r --out out/D_r_oracle  # the same D_r with the right labels: the control row
    python toy.py bytes  --out out/tiny --text train.jsonl     # a random small model + byte-level tokenizer, for real text

The task: keep count over three or four steps. One word is one token, and so is one integer 0..40.

    x   amy has 25 eggs . amy buys 15 . bob finds 3 . amy gives 9 . how many eggs does amy have ?
    y   amy has 25 . buys 15 : 25 + 15 = 40 , now 40 . gives 9 : 40 - 9 = 31 , now 31 . #### 31 <eos>

Errors fall after `=`, and whoever copies them after `now` carries them to the end: this is the exposure gap in small.

What the base is taught, openly: (1) to copy from a reference, (2) the task with the operands 2..9 (the task itself has
2..15, so fine-tuning has something to teach), (3) to continue f(x, y) (`REFERENCE_TEMPLATE`) after a prefix that holds
errors, with `oracle_labels` as targets. RAC needs (3), and it does not emerge by itself in half a million parameters.
In (3) the results are arbitrary numbers, so that it teaches how to read a reference and no arithmetic.
"""

import argparse
import json
import os
import random
import re

import torch
import torch.nn.functional as F
from tqdm import tqdm

REFERENCE_TEMPLATE = "reference : {y} question : {x}"
NAMES = "amy bob cat dan eve fay gus hal ida joe kim leo mia ned".split()
THINGS = "eggs books coins cups pens hats cards shells stamps apples keys toys nuts balls".split()
GAINS = "buys wins finds gets picks earns takes makes".split()
LOSSES = "gives sells loses drops eats sends breaks spends".split()
TOP = 40  # the largest number
NUMBERS = [str(i) for i in range(TOP + 1)]
WORDS = "<pad> <eos> <unk> . , : ? = + - #### has now how many does have reference question".split()
WORDS += NAMES + THINGS + GAINS + LOSSES + NUMBERS
IDS = {word: i for i, word in enumerate(WORDS)}


# The task


def response(name: str, start: int, steps: list[tuple[str, int, int]]) -> list[str]:
    """y as tokens; steps are (verb, operand, result)."""
    words, state = [name, "has", str(start), "."], start
    for verb, operand, result in steps:
        sign = "+" if verb in GAINS else "-"
        words += f"{verb} {operand} : {state} {sign} {operand} = {result} , now {result} .".split()
        state = result
    return words + ["####", str(state)]


def problem(rng: random.Random, operands=(2, 15), n_steps=(3, 4), arbitrary=False) -> tuple[list[str], list[str]]:
    """(x, y) as tokens. `arbitrary` draws the results at random: an answer that can be read but not calculated."""
    name, other = rng.sample(NAMES, 2)
    thing, k = rng.choice(THINGS), rng.randint(*n_steps)
    verbs, state = rng.sample(GAINS + LOSSES, k + 1), rng.randint(0, TOP)  # distinct: a verb names its step
    start, steps = state, []
    for i in range(k):
        operand = rng.randint(*operands)
        if arbitrary:
            state = rng.randint(0, TOP)
        else:  # a step that would leave 0..TOP gets a verb of the other sign
            sign = 1 if verbs[i] in GAINS else -1
            if not 0 <= state + sign * operand <= TOP:
                sign = -sign
                unused = [v for v in (GAINS if sign > 0 else LOSSES) if v not in verbs]
                verbs[i] = rng.choice(unused)
            state += sign * operand
        steps.append((verbs[i], operand, state))
    sentences = [f"{name} {verb} {operand} ." for verb, operand, _ in steps]
    if rng.random() < 0.5:  # a sentence about somebody else, to be left out
        sentences.insert(rng.randint(0, k), f"{other} {verbs[k]} {rng.randint(*operands)} .")
    x = f"{name} has {start} {thing} . {' '.join(sentences)} how many {thing} does {name} have ?"
    return x.split(), response(name, start, steps)


def problems(n: int, seed: int | str, operands=(2, 15), n_steps=(3, 4), exclude=()) -> list[dict]:
    """n different problems, as {"prompt": x, "response": y}; none whose prompt is in `exclude`."""
    rng, rows, seen = random.Random(f"problems {seed}"), [], set(exclude)
    while len(rows) < n:
        x, y = (" ".join(words) for words in problem(rng, operands, n_steps))
        if x not in seen:
            rows.append({"prompt": x, "response": y})
            seen.add(x)
    return rows


def splits(train=500, valid=300, test=400, seed=0) -> dict[str, list[dict]]:
    """The three sets, disjoint by prompt. Settings are chosen on valid, tables are made on test."""
    out, seen = {}, set()
    for split, n in (("test", test), ("valid", valid), ("train", train)):
        out[split] = problems(n, f"{split} {seed}", exclude=seen)
        seen |= {row["prompt"] for row in out[split]}
    return out


def answer(text: str) -> str | None:
    """The value after the first `####`, or None."""
    found = re.search(r"####\s*(-?\d+)", text)
    return found.group(1) if found else None


def tokenizer():
    """One word, one token. No BOS is put before a text; every response ends with <eos>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<eos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def words(tokens: list) -> list[str]:
    """Token ids or token strings -> token strings."""
    return [WORDS[t] if isinstance(t, int) else t for t in tokens]


# The right labels


MODE = os.environ.get("TOY_MODE", "B")


def oracle_labels(y: list, z: list) -> list:
    """What a perfect corrector that has read y writes at each position of z, given z^{<j}. Ids in, ids out (or strings).
    """
    as_ids = bool(z) and isinstance(z[0], int)
    y, z = words(y), words(z)
    y = y if y[-1] == "<eos>" else y + ["<eos>"]
    parts = [[]]  # y cut after each `.`: its opening, its steps, its end
    for word in y:
        parts[-1].append(word)
        if word == ".":
            parts.append([])
    place = {part[0]: i for i, part in enumerate(parts)}
    labels, last, part, sentence = [], -1, None, []
    value = None  # C
    for word in z:
        if not sentence:  # a sentence begins: y's next one
            label = parts[min(last + 1, len(parts) - 1)][0]
            last = place.get(word, last)
            part = parts[last] if word in place else None
        else:
            k = len(sentence)
            label = part[k] if part and k < len(part) else word
            if MODE in "BC" and sentence[-1] == "=" and part and sentence != part[:k]:
                a, sign, b = sentence[-4:-1]
                c = int(a) + int(b) if sign == "+" else int(a) - int(b)
                label = str(c) if 0 <= c <= TOP else word
            if MODE == "C" and part and sentence != part[:k] and sentence[-1] == "now":
                a, sign, b = sentence[3:6]
                c = int(a) + int(b) if sign == "+" else int(a) - int(b)
                label = str(c) if 0 <= c <= TOP else word
            if MODE == "C" and part and k == 3 and sentence[-1] == ":" and value is not None:
                label = value
            if MODE == "C" and sentence[-1] == "####":
                label = value
            if part and word != label and not (word in NUMBERS and label in NUMBERS):
                part = None  # another form than y's: nothing right can be said before the next sentence
            if sentence[-1] in ("now", "has"):
                value = word
        labels.append(label)
        sentence = [] if word == "." else sentence + [word]
    return [IDS[label] for label in labels] if as_ids else labels


def corrupt(y: list[str], x: list[str], rng: random.Random, rate: float) -> list[str]:
    """A z such as a weak model writes: wrong numbers that are carried on, a sentence left out, told twice or invented."""
    z, wrong, sentence = [], {}, []
    parts = [p.split() + ["."] for p in " ".join(y).split(" .")]
    parts[-1].pop()
    if rng.random() < 0.3:
        i = rng.randrange(1, len(parts) - 1)
        how = rng.randrange(3)
        if how == 0 and len(parts) > 3:
            parts.pop(i)
        elif how == 1:
            parts.insert(i, parts[rng.randrange(1, len(parts) - 1)])
        else:
            extra = parts[i][:]
            extra[0] = rng.choice([v for v in GAINS + LOSSES if v not in y])
            parts.insert(i + rng.randrange(2), extra)
    state = None
    for part in parts:
        for k, word in enumerate(part):
            if word in NUMBERS:
                new = word
                if k > 0 and part[k - 1] in ("now", "####") or k > 1 and part[k - 1] == ":":
                    new = state if state is not None and rng.random() < 0.8 else word  # copies its own last value
                elif z and z[-1] == "=" and int(z[-2]) >= 0:
                    c = int(z[-4]) + int(z[-2]) * (1 if z[-3] == "+" else -1)
                    if z[-4:] != part[k - 4 : k] and 0 <= c <= TOP and rng.random() < 0.7:
                        new = str(c)
                if rng.random() < rate:
                    new = rng.choice(NUMBERS)
                if k > 0 and part[k - 1] in ("now", "has", "="):
                    state = new
                z.append(new)
            else:
                z.append(word)
    return z


# The base model


def document(rng: random.Random, kind: str, top: int) -> tuple[list[int], list[int]]:
    """(tokens, targets), both of one length, targets[j] for the token after tokens[j], -100 where nothing is learnt."""
    if kind == "copy":
        y = rng.sample(WORDS[3:], rng.randint(4, 16))
        x = rng.sample(WORDS[3:], rng.randint(2, 8))
        z = labels = y + ["<eos>"]
    elif kind == "plain":
        x, z = problem(rng, (2, 9), (1, top))
        z = labels = z + ["<eos>"]
        y = None
    else:
        x, y = problem(rng, (2, 15), (1, top), arbitrary=True) if rng.random() < 0.7 else problem(rng, (2, 9), (1, top))
        z = corrupt(y, x, rng, rng.choice([0, 0.03, 0.1, 0.3])) + ["<eos>"]
        labels = oracle_labels(y, z)
    prompt = x if y is None else REFERENCE_TEMPLATE.format(x=" ".join(x), y=" ".join(y)).split()
    tokens = [IDS[w] for w in prompt + z]
    return tokens[:-1], [-100] * (len(prompt) - 1) + [IDS[w] for w in labels]


def collate(rows) -> tuple[torch.Tensor, torch.Tensor]:
    """-> tokens, targets [B, L]"""
    n = max(len(tokens) for tokens, _ in rows)
    tokens = torch.tensor([t + [0] * (n - len(t)) for t, _ in rows])
    return tokens, torch.tensor([t + [-100] * (n - len(t)) for _, t in rows])


def new_model(vocab: int, layers: int, width: int, positions: int, seed: int):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(seed)
    return GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=4 * width, max_position_embeddings=positions, tie_word_embeddings=True,
        initializer_range=0.1, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    ))  # fmt: skip


def train_base(seed: int, steps: int, lr=2e-3, batch=32):
    rng, model = random.Random(f"base {seed}"), new_model(len(WORDS), 4, 96, 512, seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)
    bar = tqdm(range(steps), desc="base", mininterval=1)
    losses = {}
    for step in bar:
        t = step / steps
        kind = "copy" if t < 0.15 and step % 2 else "plain" if step % 2 else "reference"
        if t < 0.1:
            kind = "copy"
        top = 1 if t < 0.25 else 2 if t < 0.6 else 4
        tokens, targets = collate([document(rng, kind, top) for _ in range(batch)])
        loss = F.cross_entropy(model(tokens, use_cache=False).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.param_groups[0]["lr"] = lr * min(1, (step + 1) / 50, (1 - t) * 4 + 0.02)
        optimiser.step()
        optimiser.zero_grad()
        losses[kind] = 0.9 * losses.get(kind, loss.item()) + 0.1 * loss.item()
        bar.set_postfix({k: f"{v:.3f}" for k, v in losses.items()}, refresh=False)
        if os.environ.get("TOY_V") and step % 100 == 99:
            print(step, {k: f"{v:.3f}" for k, v in losses.items()}, flush=True)
    return model.eval()
