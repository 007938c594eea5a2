"""Sequences of the two recall tasks, drawn from a seed.

| task | a sequence of T tokens | the model recalls |
|---|---|---|
| `mqar` | begin, N pairs of key and value, filler, ask, the N keys in another order, each followed by its value; R rounds of that | every value |
| `passkey` | begin, filler, mark, a passkey of L tokens, filler, ask, the passkey again | every token of the passkey |

Keys of a sequence differ, values may repeat, and both are drawn anew for every sequence, so weights cannot hold them. Filler is the same
series of sentences again and again, whose tokens occur nowhere else. An evaluation asks for every key once.

The token format carries no mask, so a training loss covers all tokens, and those that nobody can predict (keys, values, the next key asked)
hide the answers. A transformer of two layers (d_model 64, T 64, 8 pairs, one seed) recalled everything after 500 steps on the loss of the
answers alone, and 65 % after 2250 steps on that of all tokens. Where three quarters of the sequences ask in as many rounds as fit, most
targets are answers, and it recalled everything after 500 steps again, asked once for every key.

Ids: 0 begin, 1 ask, 2 mark, 64 of filler, then the rest of the vocabulary in two halves, keys and values.

Shapes: B sequences, T tokens, A answers of a sequence (R N or L).

Source: multi-query associative recall, Arora et al., arXiv 2312.04927; passkey retrieval, Mohtashami and Jaggi, arXiv 2305.16300.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from phase8.errors import ConfigError

TASKS = ("mqar", "passkey")
TaskName = Literal["mqar", "passkey"]

BEGIN, ASK, MARK = 0, 1, 2
_FIRST_FILLER, _NUM_FILLER = 3, 64
_FIRST_KEY = _FIRST_FILLER + _NUM_FILLER
_FILLER_PERIOD = 128
# Fixed, whatever the seed of the sequences: a model that was trained on one seed knows the filler of every other.
_FILLER = np.random.default_rng(8).integers(_FIRST_FILLER, _FIRST_KEY, size=_FILLER_PERIOD)


class Sequences(NamedTuple):
    """Sequences of one task and size.

    Attributes:
        tokens: Token ids, int64 [B, T].
        answers: Positions of the tokens to recall, each predicted at the position before it, int64 [B, A].
        shown: Positions where the same tokens were shown first, int64 [B, A].
    """

    tokens: np.ndarray
    answers: np.ndarray
    shown: np.ndarray


@dataclass(frozen=True)
class Task:
    """A task, its vocabulary and the numbers of tokens to recall.

    Args:
        name: `mqar` or `passkey`.
        vocab_size: Number of ids.
        sizes: Numbers of pairs N, or of passkey tokens L; a sequence has one of them.

    Raises:
        ConfigError: The vocabulary is too small for the sizes, or a size is below 1.
    """

    name: TaskName
    vocab_size: int
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if min(self.sizes) < 1:
            raise ConfigError(f"{self._option} is {min(self.sizes)}; it must be at least 1")
        needed = _FIRST_KEY + 2 * (max(self.sizes) if self.name == "mqar" else 1)
        if self.vocab_size < needed:
            what = f"{self.name} with {self._option} {max(self.sizes)}"
            raise ConfigError(f"{what} needs {needed} ids, but the vocabulary has {self.vocab_size}; give it more with --vocab-size")

    @property
    def num_values(self) -> int:
        """Number of different tokens that an answer may be; guessing is right once in as many."""
        return self.vocab_size - self._first_value

    @property
    def _option(self) -> str:
        return "--pairs" if self.name == "mqar" else "--key-tokens"

    @property
    def _first_value(self) -> int:
        return _FIRST_KEY + (self.vocab_size - _FIRST_KEY) // 2

    def check_length(self, length: int) -> None:
        """Raises ConfigError if sequences of `length` tokens cannot hold the largest size."""
        needed = self._num_tokens(max(self.sizes))
        if length < needed:
            raise ConfigError(f"{self.name} with {self._option} {max(self.sizes)} needs {needed} tokens, but a sequence has {length}; make it longer")

    def most_rounds(self, length: int, size: int) -> int:
        """How often a sequence can ask for everything; a passkey is asked for once."""
        return (length - 2 - 2 * size) // (2 * size) if self.name == "mqar" else 1

    def draw(self, generator: np.random.Generator, *, length: int, size: int, count: int, rounds: int = 1) -> Sequences:
        """Draws `count` sequences of `length` tokens and one size, which ask for every key in each of `rounds` rounds."""
        num_filler = length - self._num_tokens(size) - 2 * size * (rounds - 1)
        if self.name == "mqar":
            parts = [self._draw_pairs(generator, size, num_filler, rounds) for _ in range(count)]
        else:
            parts = [self._draw_passkey(generator, size, num_filler) for _ in range(count)]
        return Sequences(*map(np.stack, zip(*parts, strict=True)))

    def _num_tokens(self, size: int) -> int:
        """Tokens of a sequence of one round without filler."""
        return 2 + 4 * size if self.name == "mqar" else 3 + 2 * size

    def _draw_pairs(self, generator: np.random.Generator, size: int, num_filler: int, rounds: int) -> Sequences:
        keys = _FIRST_KEY + generator.choice(self._first_value - _FIRST_KEY, size, replace=False)
        values = generator.integers(self._first_value, self.vocab_size, size=size)
        order = np.concatenate([generator.permutation(size) for _ in range(rounds)])
        pairs = np.stack([keys, values], axis=1)
        tokens = np.concatenate([[BEGIN], pairs.ravel(), _filler(num_filler), [ASK], pairs[order].ravel()])
        return Sequences(tokens, tokens.size - 2 * order.size + 1 + 2 * np.arange(order.size), 2 + 2 * order)

    def _draw_passkey(self, generator: np.random.Generator, size: int, num_filler: int) -> Sequences:
        passkey = generator.integers(self._first_value, self.vocab_size, size=size)
        filler, depth = _filler(num_filler), int(generator.integers(num_filler + 1))
        tokens = np.concatenate([[BEGIN], filler[:depth], [MARK], passkey, filler[depth:], [ASK], passkey])
        return Sequences(tokens, tokens.size - size + np.arange(size), 2 + depth + np.arange(size))


def _filler(count: int) -> np.ndarray:
    """`count` tokens of filler."""
    return np.resize(_FILLER, count)
