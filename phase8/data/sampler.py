"""The stateless order of training samples: which window of which data set is sample n.

A pure function of the seed, the window counts and the blend weights. Nothing is built and nothing is saved: a run that consumed
n samples goes on with sample n, whatever the batch layout, the number of loader workers or the length of the run. Only where a run
changes its blend, the first sample of that blend and what its data sets had delivered are arguments too (order_history.py).

A data set of N tokens is cut into (N - 1) // T windows of T + 1 tokens, neighbours sharing one token, so that every token but the
first is a target once; the rest of less than T tokens is dropped. Each epoch of a data set visits each of its windows exactly once,
in the order of a permutation of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from phase8.data.blend import BlendTable
from phase8.data.permutation import permute

# Part of every data fingerprint; must be raised with any change of the order.
ORDER_VERSION = 1


def count_windows(num_tokens: int, sequence_length: int) -> int:
    """Windows of `sequence_length` + 1 tokens, one shared with the next, in a stream of tokens."""
    return max(0, num_tokens - 1) // sequence_length


class Draws(NamedTuple):
    """What a data set has delivered.

    Args:
        key: Its number in the run, which its permutations depend on: in the run's first blend its place.
        drawn: Windows that it has delivered.
    """

    key: int
    drawn: int


class SampleOrder:
    """The mapping from global sample number to (data set, window).

    Args:
        seed: Seed of the run; every seed gives its own order.
        num_windows: Windows of each data set, at least one.
        blend: Which data set delivers which sample.
        begin: First sample of the blend; the order knows none before it.
        draws: What each data set had delivered by then; empty: nothing.
    """

    def __init__(self, *, seed: int, num_windows: Sequence[int], blend: BlendTable, begin: int = 0, draws: Sequence[Draws] = ()):
        self.seed = seed
        self.num_windows = tuple(num_windows)
        self.blend = blend
        self.begin = begin
        self.draws = tuple(draws) or tuple(Draws(key, 0) for key in range(len(self.num_windows)))

    def locate(self, n: int) -> tuple[int, int]:
        """Data set and window of global sample `n`."""
        dataset, own = self.blend.locate(n - self.begin)
        key, drawn = self.draws[dataset]
        epoch, position = divmod(drawn + own, self.num_windows[dataset])
        return dataset, permute(position, size=self.num_windows[dataset], key=(self.seed, key, epoch))

    def epochs(self, n: int) -> list[float]:
        """Epochs of each data set that the first `n` samples make: 1.25 after all its windows and a quarter of them again."""
        counts = zip(self.blend.counts(n - self.begin), self.draws, self.num_windows, strict=True)
        return [(draws.drawn + count) / available for count, draws, available in counts]


def evenly_spread_windows(num_samples: int, *, num_windows: Sequence[int], blend: BlendTable) -> list[tuple[int, int]]:
    """(data set, window) of an evaluation: always the same ones, evenly spread over each data set, in file order, none twice.

    Each data set gets its share of `num_samples` by the blend, but at least one window and no more than it has.
    """
    shares = [min(max(share, 1), available) for share, available in zip(blend.counts(num_samples), num_windows, strict=True)]
    return [
        (dataset, i * available // share)
        for dataset, (share, available) in enumerate(zip(shares, num_windows, strict=True))
        for i in range(share)
    ]
