"""How ranks divide a dim among them, and the regions of a tensor that come of it. Plain numbers, no torch.

Ranks divide as `torch.chunk` cuts: parts of ceil(size / ranks), the last ones smaller or empty. A layer declares which dim the ranks of which
axis divide; ZeRO divides what is left to a rank once more, by dim 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


def part_size(size: int, num_parts: int) -> int:
    """Size of the first part, which is the largest."""
    return -(-size // num_parts)


def padded_size(size: int, num_parts: int) -> int:
    """Size with which all parts are as large as the first."""
    return part_size(size, num_parts) * num_parts


def part(size: int, num_parts: int, index: int) -> range:
    """Where a part lies; empty at the end where there are fewer parts."""
    length = part_size(size, num_parts)
    return range(min(index * length, size), min((index + 1) * length, size))


class RegionLike(Protocol):
    """A rectangular part of a tensor: where it begins in every dim, and its shape."""

    offsets: list[int]
    shape: list[int]


@dataclass(frozen=True)
class Region:
    """A region and no more; a slice of a manifest is one, too, with a place in a file."""

    offsets: list[int]
    shape: list[int]

    @property
    def num_elements(self) -> int:
        """Elements of the tensor that lie in it."""
        return math.prod(self.shape)


def whole_region(shape: Sequence[int]) -> Region:
    """All of a tensor."""
    return Region([0] * len(shape), list(shape))


def common_region(a: RegionLike, b: RegionLike) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where the elements that two overlapping regions share lie in a tensor that holds the first region, and in one that holds the second."""
    begins = [max(pair) for pair in zip(a.offsets, b.offsets, strict=True)]
    ends = [min(x + m, y + n) for x, m, y, n in zip(a.offsets, a.shape, b.offsets, b.shape, strict=True)]

    def seen_from(region: RegionLike) -> tuple[slice, ...]:
        return tuple(slice(begin - offset, end - offset) for begin, end, offset in zip(begins, ends, region.offsets, strict=True))

    return seen_from(a), seen_from(b)


def overlap(a: RegionLike, b: RegionLike) -> bool:
    """Whether two regions share an element."""
    return all(
        max(a_begin, b_begin) < min(a_begin + a_size, b_begin + b_size)
        for a_begin, a_size, b_begin, b_size in zip(a.offsets, a.shape, b.offsets, b.shape, strict=True)
    )


@dataclass(frozen=True)
class Place:
    """The place of a rank on an axis.

    Args:
        size: Ranks along the axis.
        index: The rank's position.
    """

    size: int
    index: int = 0


def region_of_rank(region: Region, dim: int, place: Place) -> Region:
    """The part of a region that a rank has when the ranks of an axis divide a dim of it."""
    own = part(region.shape[dim], place.size, place.index)
    offsets, shape = list(region.offsets), list(region.shape)
    offsets[dim] += own.start
    shape[dim] = len(own)
    return Region(offsets, shape)


@dataclass(frozen=True)
class DividedShape:
    """The shape of a parameter on all ranks together, and how ranks divide it.

    Args:
        shape: Of all of it.
        divided: Axis -> the dim that the ranks of the axis divide; along any other axis each rank has it whole.
    """

    shape: tuple[int, ...]
    divided: Mapping[str, int] = field(default_factory=dict)

    def region(self, places: Mapping[str, Place]) -> Region:
        """What a rank has.

        Args:
            places: Axis -> its place; an axis that is missing has one rank.
        """
        found = whole_region(self.shape)
        for axis, dim in self.divided.items():
            if axis in places:
                found = region_of_rank(found, dim, places[axis])
        return found
