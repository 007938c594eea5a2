"""The division of a dim over ranks, and the regions of a tensor that result. Plain numbers, no torch.

Ranks divide a dim as `torch.chunk` does: into parts of ceil(size / ranks), of which the last may be smaller or empty. A layer declares which dim
the ranks of which axis divide; ZeRO divides the resulting part of each rank once more, by dim 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


def part_size(size: int, num_parts: int) -> int:
    """Size of the first part, which is the largest one."""
    return -(-size // num_parts)


def padded_size(size: int, num_parts: int) -> int:
    """The size rounded up so that all parts are as large as the first."""
    return part_size(size, num_parts) * num_parts


def part(size: int, num_parts: int, index: int) -> range:
    """The indices of a part; empty for the last parts where the size does not suffice for all."""
    length = part_size(size, num_parts)
    return range(min(index * length, size), min((index + 1) * length, size))


class RegionLike(Protocol):
    """A rectangular part of a tensor: where it begins in every dim, and its shape."""

    offsets: list[int]
    shape: list[int]


@dataclass(frozen=True)
class Region:
    """A plain region. A slice in a manifest is a region too, which has a place in a file in addition."""

    offsets: list[int]
    shape: list[int]

    @property
    def num_elements(self) -> int:
        """Number of elements of the tensor in the region."""
        return math.prod(self.shape)


def whole_region(shape: Sequence[int]) -> Region:
    """The region that is a whole tensor."""
    return Region([0] * len(shape), list(shape))


def slices_of(region: RegionLike) -> tuple[slice, ...]:
    """The slices of a whole tensor that are a region."""
    return tuple(slice(offset, offset + length) for offset, length in zip(region.offsets, region.shape, strict=True))


def common_region(a: RegionLike, b: RegionLike) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices of the elements that two overlapping regions share: in a tensor that holds region a, and in one that holds region b."""
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
        size: Number of ranks along the axis.
        index: Position of the rank.
    """

    size: int
    index: int = 0


def region_of_rank(region: Region, dim: int, place: Place) -> Region:
    """The part of a region that a rank has where the ranks of an axis divide one of its dims."""
    own = part(region.shape[dim], place.size, place.index)
    offsets, shape = list(region.offsets), list(region.shape)
    offsets[dim] += own.start
    shape[dim] = len(own)
    return Region(offsets, shape)


def experts_place(shards: Place, experts: Place) -> Place:
    """The place of a rank among those that divide the same experts, given its place among those that divide all else, of which they are a part."""
    return Place(max(shards.size // experts.size, 1), shards.index // experts.size)


@dataclass(frozen=True)
class DividedShape:
    """The whole shape of a parameter, and its division over ranks.

    Args:
        shape: Whole shape.
        divided: Axis -> dim that the ranks of the axis divide; along any other axis each rank has the parameter whole. `shard` is the dim
            that ZeRO divides, the first one if it is not named.
        is_whole: Whether no rank divides it, ZeRO included, as buffers are.
        is_rounded: Whether its layer rounds it to the dtype of the residual stream before anything else.
    """

    shape: tuple[int, ...]
    divided: Mapping[str, int] = field(default_factory=dict)
    is_whole: bool = False
    is_rounded: bool = False

    def region(self, places: Mapping[str, Place]) -> Region:
        """The region that a rank has.

        Args:
            places: Axis -> place of the rank; an axis that is missing has one rank.
        """
        found = whole_region(self.shape)
        for axis, dim in self.divided.items():
            if axis in places:
                found = region_of_rank(found, dim, places[axis])
        return found

    @property
    def shard_dim(self) -> int:
        """The dim that ZeRO divides."""
        return self.divided.get("shard", 0)

    def shards(self, places: Mapping[str, Place], shards: Place) -> Place:
        """The place of a rank among those that divide its region further.

        Args:
            places: As of `region`.
            shards: Place of the rank among those that divide one copy of the model.
        """
        return experts_place(shards, places["ep"]) if "ep" in self.divided and "ep" in places else shards

    def held(self, places: Mapping[str, Place], shards: Place) -> Region:
        """The region that a rank keeps between steps; arguments as of `shards`."""
        return region_of_rank(self.region(places), self.shard_dim, self.shards(places, shards))
