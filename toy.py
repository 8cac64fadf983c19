"""The embedded default: a synthetic maths task and the tiny base model for it, built from nothing in minutes.

    python toy.py base   --out out/base [--seed 0]             # trains the base model: an ordinary Hugging Face folder
    python toy.py data   --out out/data [--train 500]          # train.jsonl, valid.jsonl, test.jsonl: prompt, response
    python toy.py data   --out out/data --operands 10 99 --steps 4 6 --top 200    # harder ones, for --task sums
    python toy.py data   --out out/data --operands 2 5 --steps 1 1 --hard 0.5 --hard-operands 10 20 --hard-steps 4 4
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

import argparse
import json
import random
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from core.flags import new_parser, number, positive
from core.ranks import cli
from core.rows import read
from data import TOY_REFERENCE
from folders import read_pairs
from sums import GAINS, LOSSES, NAMES, ORDINALS, THINGS, TOP, add, problem, right_words, sentences_of, splits

NUMBERS = [str(i) for i in range(TOP + 1)]
WORDS = "<pad> <eos> <unk> . , : ? = + - #### has again how many does have reference question".split()
WORDS += ORDINALS + NAMES + THINGS + GAINS + LOSSES + NUMBERS
IDS = {word: i for i, word in enumerate(WORDS)}


# ---- words and tokens ----


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


def oracle_labels(y: list[str], z: list[str]) -> list[str]:
    """The right words for z by `sums.right_words`; z's own where nothing right can be said, or no token says it."""
    return [word if word in IDS else own for word, own in zip(right_words(y, z, "<eos>"), z, strict=True)]


def preferences(rows) -> list[dict]:
    """Rows for dpo.py from a D_r: the reference y is preferred to the model's own z, where the two differ."""
    words = (tuple(" ".join(to_words(row[name])) for name in ("x", "y", "z")) for row in rows)
    pairs = ((x, *(side.removesuffix("<eos>").strip() for side in (y, z))) for x, y, z in words)
    return [{"prompt": x, "chosen": y, "rejected": z} for x, y, z in pairs if z and y != z]


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


def check_difficulty(args) -> None:
    """Raises ValueError where the flags of `data` contradict each other."""
    for name in ("operands", "steps", "hard_operands", "hard_steps"):
        low, high = getattr(args, name) or (0, 0)
        if low > high:
            raise ValueError(f"--{name.replace('_', '-')} {low} {high}: give the smaller number first")
    if bool(args.hard) != bool(args.hard_operands or args.hard_steps):
        told = "--hard is the share of harder problems, --hard-operands and --hard-steps say how hard"
        raise ValueError(f"{told}: give both")


def write(args: argparse.Namespace, out: Path) -> None:
    """Fills the folder with what the command makes."""
    torch.manual_seed(args.seed)
    if args.command in ("data", "preferences"):
        if args.command == "data":
            easy = {"operands": tuple(args.operands), "n_steps": tuple(args.steps), "top": args.top}
            harder = {"operands": args.hard_operands or args.operands, "n_steps": args.hard_steps or args.steps}
            files = splits(args.train, args.valid, args.test, args.seed, args.hard, easy | harder, **easy)
        else:
            files = {"pairs": preferences(read_pairs(args.pairs, ("z", "z_bar"), tokenizer()))}
        for name, rows in files.items():
            (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    tok = tokenizer() if args.command == "base" else byte_tokenizer(args.text, args.vocab)
    special_ids = {name: getattr(tok, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if args.command == "base":
        model = train_base(new_model(len(tok), args.layers, args.width, **special_ids), args.steps, args.seed)
    else:
        model = new_model(len(tok), args.layers, args.width, 2048, **special_ids)
    model.save_pretrained(out)
    tok.save_pretrained(out)


def main():
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    names = ("base", "data", "preferences", "bytes")
    base, data, preferred, text = (commands.add_parser(name, allow_abbrev=False) for name in names)
    for command in (base, data, preferred, text):
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--seed", type=number(0, 2**63 - 1, int), default=0)
    base.add_argument("--steps", type=positive, default=900, help="two minutes on one core")
    for command, width in ((base, 48), (text, 128)):
        command.add_argument("--layers", type=positive, default=4)
        command.add_argument("--width", type=number(16, kind=int), default=width)
    for split, n in (("train", 500), ("valid", 300), ("test", 400)):
        data.add_argument(f"--{split}", type=positive, default=n)
    data.add_argument("--operands", type=positive, nargs=2, default=(2, 15), help="the smallest and the largest")
    data.add_argument("--steps", type=positive, nargs=2, default=(3, 4), help="the fewest and the most")
    data.add_argument("--top", type=positive, default=TOP, help="the largest number")
    data.add_argument("--hard", type=number(0, 1), default=0.0, help="this share of the problems is harder")
    data.add_argument("--hard-operands", type=positive, nargs=2, help="theirs (as --operands)")
    data.add_argument("--hard-steps", type=positive, nargs=2, help="theirs (as --steps)")
    preferred.add_argument("--pairs", required=True, help="a `datasets` folder with columns x, y, z, z_bar")
    text.add_argument("--text", nargs="+", required=True, help=".jsonl files")
    text.add_argument("--vocab", type=number(257, kind=int), default=2048, help="the bytes, <eos>, and merges")
    args = parser.parse_args()
    if args.command in ("base", "bytes") and args.width % 16:
        raise ValueError(f"--width {args.width}: must be a multiple of 16 (four heads of an even number of pairs)")
    if args.command == "data":
        check_difficulty(args)

    if args.out.exists():
        raise ValueError(f"--out {args.out} exists already; choose another folder or delete it")
    partial = args.out.with_name(args.out.name + ".partial")  # renamed at the end: what is there is whole
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(args, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(args.out)


if __name__ == "__main__":
    cli(main)
