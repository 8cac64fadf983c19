"""Randomness that belongs to the token, not to the run: the noise of generate.py's draws.

A draw is argmax(logits + T · Gumbel), and the Gumbel noise of a token is a hash of (seed, example id, sample, position,
vocabulary entry). So batch size, order, padding, number of ranks and method do not change what is drawn, and a run can
be repeated, or split, at will. Needs nothing but torch.
"""

import torch
from torch import Tensor


def scramble(h: Tensor) -> Tensor:
    """A bijection of 64-bit integers that leaves no pattern (the finaliser of splitmix64; Steele et al. 2014)."""
    h = (h ^ (h >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # int64 wraps around, on CPU and GPU alike; `>>` drags the
    h = (h ^ (h >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15  # sign along, hence the `&`
    return h ^ (h >> 31 & 0x1FFFFFFFF)


def noise_keys(seed: int, ids: list[int], samples: list[int], length: int) -> Tensor:
    """One 64-bit key per token: int64 [B, length] for (seed, ids[b], samples[b], position); on the CPU."""
    key = scramble(torch.full((len(ids),), seed % 2**62, dtype=torch.int64) + 0x1E3779B97F4A7C15)  # [B]
    for part in (torch.tensor(ids), torch.tensor(samples)):
        key = scramble(scramble(key) + part)  # [B]
    return scramble(key[:, None] + torch.arange(length) * -0x61C8864680B583EB)  # [B, length]


def gumbel(keys: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise, float32 [N, vocab], from keys int64 [N]: always finite, and the same on every device (but
    for the last digit of the logarithm).

    A 32-bit hash of the vocabulary entry (constants of Wellons' lowbias32), with half of the key mixed in before each
    round. The 31-bit uniform is finest near 0, where -log(-log(1 - u)) is large, so the tail reaches 22 (p = 2e-10).
    """
    low, high = keys.int()[:, None], (keys >> 32).int()[:, None]  # [N, 1], the two halves of the key
    h = torch.arange(vocab, dtype=torch.int32, device=keys.device) * -0x61C88647 ^ low  # [N, V]
    h ^= h >> 16 & 0xFFFF
    h *= 0x7FEB352D
    h ^= high
    h ^= h >> 15 & 0x1FFFF
    h *= 0x846CA68B - 2**32
    h ^= h >> 16
    u = (h & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31 * (1 - 2.0**-24))  # in (0, 1), both ends excluded in float32
    return u.neg_().log1p_().neg_().log_().neg_()


def draw(logits: Tensor, keys: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """z ~ softmax(logits / T), cut to the top k, then to the nucleus p. logits [N, V], keys int64 [N] -> z int64 [N].

    T = 0 is the argmax. In the nucleus is a token with less than top_p of probability strictly above it (so ties go
    together). Sorting the vocabulary costs more than a small model does: instead z is drawn, and drawn on while it
    falls outside of the nucleus, which comes to the argmax over the nucleus.
    """
    logits = logits.float()  # [N, V]
    if temperature == 0:
        return logits.argmax(-1)
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    score = gumbel(keys, logits.shape[-1]).mul_(temperature).add_(logits)  # [N, V], logits + T · Gumbel
    z = score.argmax(-1)  # [N]
    if top_p < 1:
        p = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)  # [N, V]
        while True:
            p_z = p.gather(-1, z[:, None])  # [N, 1]
            outside = (p * (p > p_z)).sum(-1, keepdim=True) >= top_p  # [N, 1]
            if not outside.any():
                break
            score.masked_fill_(outside & (p <= p_z), -torch.inf)  # z, and all that is less probable
            z = score.argmax(-1)
    return z
