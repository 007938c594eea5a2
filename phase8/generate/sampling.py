"""Draws the next tokens on the device of the logits, without a look at them on the host.

A token is drawn by a race: the id with the largest probability over noise of an exponential distribution wins. The noise of an id is a function of
the seed, of the token's place in its sequence and of the id alone. So a seed means the same text on every device and beside any other sequences,
as far as logits agree.

Shapes: B sequences, V ids, k candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phase8.errors import ConfigError


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is drawn.

    Args:
        temperature: Logits are divided by it; 0: always the likeliest token.
        top_k: Only the k likeliest tokens; 0: all.
        top_p: Only the likeliest tokens that together have this probability; 1: all.
        seed: Seed of the random draws.

    Raises:
        ConfigError: A value is out of range; the sentences name the options of the command lines.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self):
        problems = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"--temperature is {self.temperature}, but a number of at least 0 is needed.")
        if self.top_k < 0:
            problems.append(f"--top-k is {self.top_k}, but a whole number of at least 0 is needed; 0 keeps every token.")
        if not 0 <= self.seed < 2**63:
            problems.append(f"--seed is {self.seed}, but a whole number from 0 to {2**63 - 1} is needed.")
        if not 0 < self.top_p <= 1:
            problems.append(f"--top-p is {self.top_p}, but a number above 0 and at most 1 is needed; 1 keeps every token.")
        if problems:
            raise ConfigError(problems)


def draw_tokens(logits: Tensor, seeds: Tensor, position: Tensor, options: SamplingOptions) -> Tensor:
    """Draws a token for each sequence.

    Args:
        logits: fp32 [B, V].
        seeds: Seed of each sequence, int64 [B].
        position: Place of the token in its sequence, int64 [B].
        options: Temperature and limits; the seed among them is not read.

    Returns:
        Token ids, int64 [B].
    """
    if options.temperature == 0:
        return logits.argmax(-1)
    # Relative to the largest, so that a tiny temperature cannot overflow; one that fp32, or its reciprocal, does not hold would divide 0 by 0.
    below = (logits.amax(-1, keepdim=True) - logits) / max(options.temperature, torch.finfo(logits.dtype).tiny)
    if options.top_k == 0 and options.top_p == 1:
        ids = torch.arange(below.shape[-1], device=below.device).expand_as(below)
        probabilities = (-below).softmax(-1)
    else:
        probabilities, ids = _likely(below, options)
    winner = (probabilities / _exponential_noise(seeds, position, ids)).argmax(-1, keepdim=True)
    return ids.gather(-1, winner)[:, 0]


def _likely(below: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor]:
    """Probabilities of the candidates [B, k], the likeliest first and 0 for those that top_p excludes, and their ids [B, k].

    Args:
        below: How far each logit is below the largest of its row, fp32 [B, V].
        options: Limits.
    """
    if 0 < options.top_k < below.shape[-1]:
        ordered, ids = below.topk(options.top_k, dim=-1, largest=False)
    else:
        ids = _order(below)
        ordered = below.gather(-1, ids)
    probabilities = (-ordered).softmax(-1)
    if options.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        is_excluded = before >= options.top_p
        is_excluded[:, 0] = False
        probabilities = probabilities.masked_fill(is_excluded, 0)
    return probabilities, ids


def _order(below: Tensor) -> Tensor:
    """Ids in ascending order of numbers that are not negative [B, V].

    A GPU sorts long rows one after the other, so all rows are sorted at once: bits of such numbers have their order, with the row before them.
    """
    first = torch.arange(len(below), device=below.device)[:, None]
    keys = below.contiguous().view(torch.int32) + (first << 32)
    return keys.flatten().sort().indices.view_as(below) - first * below.shape[-1]


def _exponential_noise(seeds: Tensor, position: Tensor, ids: Tensor) -> Tensor:
    """Numbers of the exponential distribution for each id [B, k], fp64."""
    key = _scrambled(_scrambled(seeds + _GOLDEN) + (position + 1) * _GOLDEN)
    bits = _scrambled(key[:, None] + (ids + 1) * _GOLDEN)
    return -((_shifted(bits, 12).double() + 0.5) * 2.0**-52).log()


# SplitMix64: G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators" (2014). Products of int64 wrap around, as it needs.
_GOLDEN, _FIRST, _SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _scrambled(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """`x` shifted to the right, with zeros from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
