"""The embedded default: a synthetic maths task and the tiny base model for it, built from nothing in minutes.

    python toy.py base   --out out/base [--seed 0]             # trains the base model: an ordinary Hugging Face folder
    python toy.py data   --out out/data [--train 500]          # train.jsonl, valid.jsonl, test.jsonl: prompt, response
    python toy.py oracle --pairs out/D_r --out out/D_r_oracle  # the same D_r with the right labels: the control row
    python toy.py preferences --pairs out/D_r --out out/preferences  # pairs.jsonl for dpo.py: y is preferred to z
    python toy.py bytes  --out out/tiny --text train.jsonl     # a random small model + byte-level BPE, for real text

The task is to keep count over three or four steps. One word is one token, and so is one integer 0..40.

    x   amy has 25 eggs . first amy buys 15 . bob finds 3 . second amy gives 9 . how many eggs does amy have ?
    y   amy has 25 . first buys 15 : 25 + 15 = 40 , again 25 + 15 = 40 . second gives 9 : 40 - 9 = 31 , again …
        #### 31 <eos>

Errors fall after `=`. Each sum is written twice, and a step goes on from its second result. Teacher forcing shows only
second results that equal the first, so it leaves open whether to copy or to calculate: a model that copies carries its
error to the end, one that calculates recovers. That is the training-inference gap in small, and it can be closed from
the context alone. At the default width SFT teaches to copy, at `--width 96` less so (docs/study.md).

What the base is taught, openly: (1) sums, and the task itself, with operands 2..9; the task proper has 2..15, so errors
fall and fine-tuning has something to teach; (2) to continue f(x, y) = `TOY_REFERENCE` after a prefix z that holds
errors, with `oracle_labels` as targets: coherently with z, not by position. RAC needs (2), and it does not emerge by
itself in so small a model. Most references in (2) hold arbitrary results, and no sum with an operand over 9 is
a target there unless y states it: (2) teaches how to read a reference, not arithmetic.
"""

import json
import random
import re
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import TOY_REFERENCE
from folders import read_pairs
from lib.flags import new_parser, number, positive
from lib.ranks import cli
from lib.rows import read

NAMES = "amy bob cat dan eve fay gus hal ida joe kim leo mia ned".split()
THINGS = "eggs books coins cups pens hats cards shells stamps apples keys toys nuts balls".split()
GAINS = "buys wins finds gets picks earns takes makes".split()
LOSSES = "gives sells loses drops eats sends breaks spends".split()
ORDINALS = "first second third fourth".split()
TOP = 40  # the largest number
NUMBERS = [str(i) for i in range(TOP + 1)]
WORDS = "<pad> <eos> <unk> . , : ? = + - #### has again how many does have reference question".split()
WORDS += ORDINALS + NAMES + THINGS + GAINS + LOSSES + NUMBERS
IDS = {word: i for i, word in enumerate(WORDS)}


# ---- the task ----


def add(a: int | str, sign: str, b: int | str) -> int:
    """The sum (or difference): add("25", "+", 15) is 40."""
    return int(a) + int(b) if sign == "+" else int(a) - int(b)


def problem(rng: random.Random, operands=(2, 15), n_steps=(3, 4), arbitrary=False) -> tuple[list[str], list[str]]:
    """(x, y) as words. `arbitrary` draws the results at random: an answer that can be read but not calculated."""
    name, other = rng.sample(NAMES, 2)
    thing, state = rng.choice(THINGS), rng.randint(0, TOP)
    gains, losses = rng.sample(GAINS, len(GAINS)), rng.sample(LOSSES, len(LOSSES))
    x, y = [f"{name} has {state} {thing} ."], [f"{name} has {state} ."]
    for ordinal in ORDINALS[: rng.randint(*n_steps)]:
        operand = rng.randint(*operands)
        sign = rng.choice([sign for sign in "+-" if 0 <= add(state, sign, operand) <= TOP])
        verb = (gains if sign == "+" else losses).pop()
        result = rng.randint(0, TOP) if arbitrary else add(state, sign, operand)
        x.append(f"{ordinal} {name} {verb} {operand} .")
        total = f"{state} {sign} {operand} = {result}"
        y.append(f"{ordinal} {verb} {operand} : {total} , again {total} .")
        state = result
    if rng.random() < 0.5:  # a sentence about somebody else, to be left out
        x.insert(rng.randint(1, len(x)), f"{other} {gains.pop()} {rng.randint(*operands)} .")
    return " ".join(x + [f"how many {thing} does {name} have ?"]).split(), " ".join(y + [f"#### {state}"]).split()


def problems(n: int, seed: int | str, operands=(2, 15), n_steps=(3, 4), exclude=(), arbitrary=False) -> list[dict]:
    """n different problems as {"prompt": x, "response": y}, none of whose prompts is in `exclude`."""
    rng, rows, seen = random.Random(f"problems {seed}"), [], set(exclude)
    while len(rows) < n:
        x, y = (" ".join(words) for words in problem(rng, operands, n_steps, arbitrary))
        if x not in seen:
            rows.append({"prompt": x, "response": y})
            seen.add(x)
    return rows


def splits(train=500, valid=300, test=400, seed=0) -> dict[str, list[dict]]:
    """The three sets, disjoint by prompt. Settings are chosen on valid, tables are made on test: both are always the
    same problems; only train depends on the seed."""
    out, seen = {}, set()
    for split, n, key in (("test", test, "test"), ("valid", valid, "valid"), ("train", train, f"train {seed}")):
        out[split] = problems(n, key, exclude=seen)
        seen |= {row["prompt"] for row in out[split]}
    return out


def answer(text: str) -> str | None:
    """The value after the first `####`, or None."""
    found = re.search(r"####\s*(-?\d+)", text)
    return found.group(1) if found else None


def tokenizer():
    """One word, one token. No BOS is put before a text; every response ends with <eos>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<eos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tok, **special)


def to_words(tokens: list) -> list[str]:
    """Token ids, or words already -> words."""
    if any(isinstance(token, int) and token >= len(WORDS) for token in tokens):
        raise ValueError("these token ids are not the toy task's: they were made with another tokenizer")
    return [WORDS[token] if isinstance(token, int) else token for token in tokens]


# ---- the right labels ----


def oracle_labels(y: list, z: list) -> list:
    """The right label for every position of z: what a perfect corrector that has read y writes there, given z^{<j}.

    Sentences are matched by their first word (`amy`, `first`, …, `####`), so a sentence of z that is left out, told
    twice or out of order is still compared with its own counterpart in y. Within a sentence the label is y's word at
    that place, however wrong the numbers before it are; with one exception: after `=`, where z's operands are not y's,
    it is what z's own sum comes to (39 - 9 = 30 and not y's 31: a label must agree with its context, unlike Fig. 6).
    At the head of a sentence the label is y's next one. Once a sentence of z leaves the form of y's (other words, not
    just other numbers) nothing right can be said before the next `.`: the label is z's own token, that is, masked.

        y       buys 15 : 25 + 15 = 40 , again 25 + 15 = 40 . second gives 9 : 40 - 9 = 31 , again 40 - 9 = 31 .
        z       buys 15 : 25 + 15 = 39 , again 25 + 15 = 39 . second gives 9 : 39 - 9 = 30 , again 39 - 9 = 30 .
        labels  buys 15 : 25 + 15 = 40 , again 25 + 15 = 40 . second gives 9 : 40 - 9 = 30 , again 40 - 9 = 30 .

    Takes and gives token ids or words; as long as z.
    """
    as_ids, y, z = bool(z) and isinstance(z[0], int), to_words(y), to_words(z)
    sentences = sentences_of(y if y[-1] == "<eos>" else y + ["<eos>"])
    number = {sentence[0]: i for i, sentence in enumerate(sentences)}
    labels, done, right, written = [], -1, None, []  # right: y's sentence; written: z's so far
    for word in z:
        k = len(written)
        if k == 0:
            label = sentences[min(done + 1, len(sentences) - 1)][0]
            done = number.get(word, done)
            right = sentences[done] if word in number else None
        elif right is None:
            label = word
        else:
            label = right[k]
            if right[k - 1] == "=" and written != right[:k]:
                total = add(*written[-4:-1])
                label = str(total) if 0 <= total <= TOP else word
            if word != right[k] and not (word in NUMBERS and right[k] in NUMBERS):
                right = None  # another form than that of y
        labels.append(label)
        written = [] if word == "." else written + [word]
        if right is not None and len(written) == len(right):
            right = None  # z goes on after <eos>
    return [IDS[label] for label in labels] if as_ids else labels


def sentences_of(words: list[str]) -> list[list[str]]:
    """Words cut after each `.`"""
    out = [[]]
    for word in words:
        out[-1].append(word)
        if word == ".":
            out.append([])
    return out if out[-1] else out[:-1]


def label_quality(y_rows: list, z_rows: list, z_bar_rows: list) -> dict:
    """How good labels z_bar are, on rows of token ids or words (all positions of z count, EOS included).

    unmasked      share of the positions with z_bar != z
    precision     share of those where z_bar is right (None if there are none)
    recall        share of the positions where z is wrong at which z_bar is right (None if there are none)
    wrong_early   wrong unmasked labels before the first error of z: they change what was right
    n             positions
    """
    n = unmasked = right = errors = wrong_early = 0
    for y, z, z_bar in zip(y_rows, z_rows, z_bar_rows, strict=True):
        clean = True
        for z_j, label, truth in zip(z, z_bar, oracle_labels(y, z), strict=True):
            clean = clean and z_j == truth
            n += 1
            errors += z_j != truth
            unmasked += label != z_j
            right += label != z_j and label == truth
            wrong_early += clean and label != z_j
    return {
        "unmasked": unmasked / max(n, 1),
        "precision": right / unmasked if unmasked else None,
        "recall": right / errors if errors else None,
        "wrong_early": wrong_early,
        "n": n,
    }


def oracle(rows):
    """D_r (columns x, y, z, z_bar of token ids, and any others) with the right labels in place of z_bar."""
    return rows.map(lambda row: {"z_bar": oracle_labels(row["y"], row["z"])}, load_from_cache_file=False)


def preferences(rows) -> list[dict]:
    """Rows for dpo.py from a D_r: the reference y is preferred to the model's own z, where the two differ."""
    words = (tuple(" ".join(to_words(row[name])) for name in ("x", "y", "z")) for row in rows)
    pairs = ((x, *(side.removesuffix("<eos>").strip() for side in (y, z))) for x, y, z in words)
    return [{"prompt": x, "chosen": y, "rejected": z} for x, y, z in pairs if z and y != z]


# ---- recovery from an injected error ----


def inject_error(y: list, seed: int | str) -> list:
    """y up to and with one wrong first result, of a step drawn at random: a teacher-forced prefix. Ids or words."""
    rng, words = random.Random(f"inject {seed}"), to_words(y)
    j = rng.choice([j for j, word in enumerate(words) if word == "=" and words[j - 4] == ":"]) + 1
    wrong = rng.choice([number for number in NUMBERS if number != words[j]])
    return y[:j] + [IDS[wrong] if isinstance(y[0], int) else wrong]


def recovery(y: list, prefix: list, continuation: list) -> dict[str, bool]:
    """Did the continuation of an `inject_error` prefix repeat the sum rightly at once; was its final answer right?"""
    y, continuation = to_words(y), to_words(continuation)
    check = y[len(prefix) :][:7]  # , again 25 + 15 = 40
    final = answer(" ".join(continuation))
    return {"restated": continuation[:7] == check, "final": final == answer(" ".join(y))}


# ---- the base model ----


def flawed(y: list[str], rng: random.Random) -> list[str]:
    """A z such as a weak model writes: wrong numbers, carried on; a sentence left out, or one told again too soon."""
    sentences, rate = sentences_of(y), rng.choice([0, 0.03, 0.1, 0.3])
    steps, shape = range(1, len(sentences) - 1), rng.random()
    if shape < 0.1:
        sentences.insert(rng.choice(steps), sentences[rng.choice(steps)])
    elif shape < 0.2 and len(steps) > 1:
        del sentences[rng.choice(steps)]
    z, state = [], None
    for word in (word for sentence in sentences for word in sentence):
        before = z[-1] if z else None
        if word in NUMBERS:
            if before == "=" and 0 <= add(*z[-4:-1]) <= TOP and rng.random() < 0.5:
                word = str(add(*z[-4:-1]))
            elif before in (":", "####") and rng.random() < 0.8:
                word = state
            elif "again" in z[-3:] and rng.random() < 0.8:
                word = z[-7]  # the check repeats the sum's own operands
            if rng.random() < rate:
                word = rng.choice(NUMBERS)
            if before in ("has", "="):
                state = word
        z.append(word)
    return z


def document(kind: str, most: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """One training document -> (tokens, targets) of equal length; targets[j] follows tokens[:j+1], -100: not learnt.

    sums        ten sums with operands 2..9, the results learnt
    plain       x y, with operands 2..9 and up to `most` steps, y learnt
    reference   f(x, y) z, z with errors, the oracle's labels learnt (no sums with operands over 9, though)
    """
    if kind == "sums":
        words = []
        while len(words) < 60:
            a, sign, b = rng.randint(0, TOP), rng.choice("+-"), rng.randint(2, 9)
            if 0 <= add(a, sign, b) <= TOP:
                words += f"{a} {sign} {b} = {add(a, sign, b)} .".split()
        prompt, z, targets = [], words, [word if j % 6 == 4 else None for j, word in enumerate(words)]
    elif kind == "plain":
        prompt, z = problem(rng, (2, 9), (1, most))
        z = targets = z + ["<eos>"]
    else:
        arbitrary = rng.random() < 0.7
        x, y = problem(rng, (2, 15) if arbitrary else (2, 9), (1, most), arbitrary)
        prompt, z = TOY_REFERENCE.format(x=" ".join(x), y=" ".join(y)).split(), flawed(y, rng) + ["<eos>"]
        targets = oracle_labels(y, z)
        stated = f" {' '.join(y)} "
        for j in range(4, len(z)):
            if z[j - 1] == "=" and f" {' '.join([*z[j - 4 : j], targets[j]])} " not in stated:  # not to be read off y
                if z[j - 2] not in NUMBERS[:10] or not 0 <= add(*z[j - 4 : j - 1]) <= TOP:
                    targets[j] = None
    targets = [None] * len(prompt) + targets
    return [IDS[word] for word in prompt + z][:-1], [-100 if word is None else IDS[word] for word in targets][1:]


def new_model(vocab: int, layers: int, width: int, positions=512, **special_ids):
    """A randomly initialised GPT-NeoX. In so small a model, reading a reference needs these two unusual settings."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        **special_ids,
    )
    return GPTNeoXForCausalLM(config)


def train_base(model, steps: int, seed: int, batch_size=32):
    """Sums first; then the task and references to it in turn, with one, two, four steps.

    Muon for the matrices (AdamW for the rest) learns the sums in half the time that AdamW alone takes.
    """
    rng = random.Random(f"base {seed}")
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0)
    adamw = torch.optim.AdamW(others, lr=3e-3, weight_decay=0.0)
    losses, bar = {}, tqdm(range(steps), desc="base", mininterval=1)
    for step in bar:
        t = step / steps
        kind = "sums" if t < 0.15 or step % 8 == 7 else ("plain", "reference")[step % 2]
        rows = [document(kind, 1 if t < 0.2 else 2 if t < 0.4 else 4, rng) for _ in range(batch_size)]
        longest = max(len(tokens) for tokens, _ in rows)
        tokens = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in rows])  # [B, L]
        targets = torch.tensor([targets + [-100] * (longest - len(targets)) for _, targets in rows])  # [B, L]
        loss = F.cross_entropy(model(tokens, use_cache=False).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, lr in ((muon, 0.02), (adamw, 3e-3)):
            optimiser.param_groups[0]["lr"] = lr * min(1, (step + 1) / 30, 2 * (1 - t) + 0.02)
            optimiser.step()
            optimiser.zero_grad()
        losses[kind] = 0.9 * losses.get(kind, loss.item()) + 0.1 * loss.item()
        bar.set_postfix({kind: f"{value:.3f}" for kind, value in losses.items()}, refresh=False)
    return model.eval()


# ---- real text ----


def text_columns(files: list[str]):
    """Every string of every row of .jsonl files."""
    for file in files:
        for row in read(file):
            for value in row.values():
                yield from (part for part in (value if isinstance(value, list) else [value]) if isinstance(part, str))


def byte_tokenizer(files: list[str], vocab: int):
    """A byte-level BPE: all 256 bytes are in its alphabet, so that no text is unknown to it. pad is eos."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    tok = ByteLevelBPETokenizer()
    tok.train_from_iterator(text_columns(files), vocab_size=vocab, special_tokens=["<eos>"], show_progress=False)
    special = {"bos_token": "<eos>", "eos_token": "<eos>", "pad_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tok._tokenizer, **special)


# ---- the commands ----


def main():
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    names = ("base", "data", "oracle", "preferences", "bytes")
    base, data, pairs, preferred, text = (commands.add_parser(name, allow_abbrev=False) for name in names)
    for command in (base, data, pairs, preferred, text):
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--seed", type=number(0, 2**63 - 1, int), default=0)
    base.add_argument("--steps", type=positive, default=900, help="two minutes on one core")
    for command, width in ((base, 48), (text, 128)):
        command.add_argument("--layers", type=positive, default=4)
        command.add_argument("--width", type=number(16, kind=int), default=width)
    for split, n in (("train", 500), ("valid", 300), ("test", 400)):
        data.add_argument(f"--{split}", type=positive, default=n)
    for command in (pairs, preferred):
        command.add_argument("--pairs", required=True, help="a `datasets` folder with columns x, y, z, z_bar")
    text.add_argument("--text", nargs="+", required=True, help=".jsonl files")
    text.add_argument("--vocab", type=number(257, kind=int), default=2048, help="the bytes, <eos>, and merges")
    args = parser.parse_args()
    if args.command in ("base", "bytes") and args.width % 16:
        raise ValueError(f"--width {args.width}: must be a multiple of 16 (four heads of an even number of pairs)")

    if args.out.exists():
        raise ValueError(f"--out {args.out} exists already; choose another folder or delete it")
    partial = args.out.with_name(args.out.name + ".partial")  # renamed at the end: what is there is whole
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    torch.manual_seed(args.seed)
    if args.command in ("data", "preferences"):
        if args.command == "data":
            files = splits(args.train, args.valid, args.test, args.seed)
        else:
            files = {"pairs": preferences(read_pairs(args.pairs, ("z", "z_bar"), tokenizer()))}
        for name, rows in files.items():
            (partial / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif args.command == "oracle":
        oracle(read_pairs(args.pairs, ("z", "z_bar"), tokenizer())).save_to_disk(partial)
    else:
        tok = tokenizer() if args.command == "base" else byte_tokenizer(args.text, args.vocab)
        special_ids = {name: getattr(tok, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if args.command == "base":
            model = train_base(new_model(len(tok), args.layers, args.width, **special_ids), args.steps, args.seed)
        else:
            model = new_model(len(tok), args.layers, args.width, 2048, **special_ids)
        model.save_pretrained(partial)
        tok.save_pretrained(partial)
    partial.rename(args.out)


if __name__ == "__main__":
    cli(main)
