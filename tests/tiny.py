"""Tiny models and a tokenizer for the tests, built in code: no network, and all of transformers' real classes."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

ARCHS = ("gpt_neox", "llama", "mistral", "gpt2", "qwen2", "qwen3", "gemma")
TEXT = """amy bob carl dora has buys gives wins eggs pens how many does have ? . , : ; + - * / = > < now so the a is
what of to and #### Reference Answer Question TL;DR SUBREDDIT TITLE POST"""
WORDS = [*TEXT.split(), *map(str, range(60))]


def model(arch: str, vocab: int = 64, seed: int = 0, **kw) -> PreTrainedModel:
    """A random float32 model of 2 layers, in eval mode. Weights are large, so that its distributions are far from flat
    and differ by position. Mistral's window is 8, shorter than most test sequences. `kw` overrides the config."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
    grouped = {**size, "intermediate_size": 48, "num_key_value_heads": 2}
    config = {
        "gpt_neox": {**size, "intermediate_size": 64, "rotary_pct": 0.5},
        "llama": {**grouped, "tie_word_embeddings": True},
        "mistral": {**grouped, "sliding_window": 8},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
        "qwen2": grouped,
        "qwen3": {**grouped, "head_dim": 8},
        "gemma": {**grouped, "head_dim": 8},
    }[arch]
    common = {"vocab_size": vocab, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    config = AutoConfig.for_model(arch, **{**config, **common, **kw})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def word_tokenizer(words: list[str] = WORDS, eos: str = "<eos>", pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """One token a word, split at spaces; ids 0 <unk>, 1 <eos>, 2 <pad>. pad=None: no pad token."""
    special = [token for token in ("<unk>", eos, pad) if token]
    vocab = {word: i for i, word in enumerate(dict.fromkeys([*special, *words]))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token=eos, pad_token=pad)


def parity(text: str) -> str:
    """An answer that any text has, and about half of them the same."""
    return str(len(text.split()) % 2)
