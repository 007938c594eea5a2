"""A check that regions tile a tensor, so that every element lies in exactly one region."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from phase8.checkpoint.untrusted import shown
from phase8.division import RegionLike, whole_region

# Sixteen corners of eight edges each; a region of up to four dims never has more.
_MOST_EDGES_PER_REGION, _FEW_CORNERS = 16 * 8, 2**16


def coverage_problem(shape: Sequence[int], regions: Sequence[RegionLike]) -> str | None:
    """A text about the first defect of `regions` as a tiling of a tensor of `shape`; None if they tile it.

    Time is proportional to the number of regions, because only their corners are counted, not the elements.
    """
    for region in regions:
        has_dims = len(region.offsets) == len(region.shape) == len(shape)
        if not has_dims or any(offset + size > limit for offset, size, limit in zip(region.offsets, region.shape, shape, strict=True)):
            problem = "reaches outside" if has_dims else "has another number of dims than"
            return f"a slice at {shown(region.offsets)} of shape {shown(region.shape)} {problem} the tensor's shape {shown(list(shape))}"
    if math.prod(shape) == 0:
        return None
    # A dim that every region spans in full needs no comparison.
    divided = [dim for dim, size in enumerate(shape) if any(region.shape[dim] != size for region in regions)]
    divided.sort(key=lambda dim: -len({region.offsets[dim] for region in regions}))
    corners = _surplus_corners([_edges(region, divided) for region in regions if math.prod(region.shape)], _edges(whole_region(shape), divided))
    if corners is None:
        return f"its {len(regions)} slices divide it along too many dims to be compared"
    if not corners:
        return None
    # A corner adds its number to all elements at or after it in every dim. To the element at the first corner no other corner adds.
    first, surplus = min(corners.items())
    element = [dict(zip(divided, first, strict=True)).get(dim, 0) for dim in range(len(shape))]
    if surplus > 0:
        a, b = [region for region in regions if _holds(region, element)][:2]
        return f"the slices at {shown(a.offsets)} and {shown(b.offsets)} overlap"
    covered, whole = sum(math.prod(region.shape) for region in regions), math.prod(shape)
    return f"its slices hold {covered} of {whole} elements, and none of them the one at {shown(element)}"


def _edges(region: RegionLike, dims: Sequence[int]) -> tuple[int, ...]:
    """Begin and end of a region in each of these dims."""
    return tuple(edge for dim in dims for edge in (region.offsets[dim], region.offsets[dim] + region.shape[dim]))


def _surplus_corners(regions: Sequence[tuple[int, ...]], whole: tuple[int, ...]) -> dict[tuple[int, ...], int] | None:
    """The corners, with their numbers, of the surplus: how many regions hold an element, minus one. Without corners it is zero everywhere.

    In each dim a region is a step up at its begin and a step down at its end, which gives a positive or negative number at each of its
    corners. Where a region ends and its neighbour begins, the numbers cancel, dim by dim, so a grid of regions leaves few corners. None:
    too many corners are left, as when regions without a pattern divide a tensor along more than a few dims.

    Args:
        regions: Edges of each region, none of which is empty.
        whole: Edges of the whole tensor.
    """
    # Maps (corner in the dims done so far, edges in the dims to come) to its number.
    counts = Counter(((), edges) for edges in regions)
    counts[(), whole] -= 1
    most = _MOST_EDGES_PER_REGION * (len(regions) + 1)
    for _ in range(len(whole) // 2):
        found: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
        for (corner, (begin, end, *rest)), count in counts.items():
            found[(*corner, begin), (*rest,)] += count
            found[(*corner, end), (*rest,)] -= count
        counts = Counter({place: count for place, count in found.items() if count})
        if len(counts) > max(most // len(whole), _FEW_CORNERS):
            return None
    return {corner: count for (corner, _), count in counts.items() if count}


def _holds(region: RegionLike, element: Sequence[int]) -> bool:
    return all(offset <= index < offset + size for offset, size, index in zip(region.offsets, region.shape, element, strict=True))
