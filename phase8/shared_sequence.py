"""Which tokens of a sequence that ranks share each of them has, and which others it wants. Plain numbers, no torch.

Each rank has `length` consecutive tokens, its slice, in the order of the ranks; tokens are numbered in the whole sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# For each rank the ranges of tokens that it wants.
Wanted = Sequence[Sequence[range]]


@dataclass(frozen=True)
class SequenceSlice:
    """The part that a rank has of every sequence.

    Args:
        index: Number of the slice.
        count: Number of slices, which are equally long.
    """

    index: int = 0
    count: int = 1

    def tokens(self, sequence_length: int) -> range:
        """The tokens of the slice in a sequence whose length is a multiple of `count`."""
        length = sequence_length // self.count
        return range(self.index * length, (self.index + 1) * length)


WHOLE = SequenceSlice()


def wanted_tokens(length: int, num_ranks: int, *, before: int, first: int = 0) -> Wanted:
    """The tokens that each rank wants of others: the last ones before its slice, and the first ones of the sequence that are before its slice.

    Args:
        length: Tokens of a slice.
        num_ranks: Ranks that share the sequence.
        before: Number of tokens before the slice.
        first: Number of first tokens.
    """
    begins = range(0, length * num_ranks, length)
    return [[range(max(begin - before, 0), begin), range(min(first, begin))] for begin in begins]


def parts_of(ranges: Sequence[range], owner: int, length: int) -> list[range]:
    """The part of each range that a rank has, as places in its slice."""
    begin = owner * length
    return [_clipped(range(tokens.start - begin, tokens.stop - begin), length) for tokens in ranges]


def num_sent(wanted: Wanted, owner: int, length: int) -> int:
    """The number of tokens that a rank sends to all others, and to itself where it wants tokens of its own."""
    return sum(len(part) for ranges in wanted for part in parts_of(ranges, owner, length))


def _clipped(places: range, length: int) -> range:
    start = min(max(places.start, 0), length)
    return range(start, max(min(places.stop, length), start))
