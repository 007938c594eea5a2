"""Boxes of a tensor: what two have in common, and the proof that some tile it, so that every element lies in exactly one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from phase8.checkpoint.untrusted import shown

# Sixteen corners of eight edges: boxes of up to four dims never have more.
_MOST_EDGES_PER_BOX, _FEW_CORNERS = 16 * 8, 2**16


class Box(Protocol):
    """A rectangular part of a tensor: where it begins in every dim, and its shape."""

    offsets: list[int]
    shape: list[int]


@dataclass(frozen=True)
class Region:
    """A box on its own."""

    offsets: list[int]
    shape: list[int]


def whole_box(shape: Sequence[int]) -> Region:
    """All of a tensor."""
    return Region([0] * len(shape), list(shape))


def common_part(a: Box, b: Box) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where the elements that two overlapping boxes share lie in a tensor that holds the first box, and in one that holds the second."""
    begins = [max(pair) for pair in zip(a.offsets, b.offsets, strict=True)]
    ends = [min(x + m, y + n) for x, m, y, n in zip(a.offsets, a.shape, b.offsets, b.shape, strict=True)]

    def seen_from(box: Box) -> tuple[slice, ...]:
        return tuple(slice(begin - offset, end - offset) for begin, end, offset in zip(begins, ends, box.offsets, strict=True))

    return seen_from(a), seen_from(b)


def coverage_problem(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """What is wrong with `boxes` as a tiling of a tensor of `shape`, or None.

    Time grows as their number: how often each element is held follows from the corners of the boxes alone.
    """
    for box in boxes:
        has_dims = len(box.offsets) == len(box.shape) == len(shape)
        if not has_dims or any(offset + size > limit for offset, size, limit in zip(box.offsets, box.shape, shape, strict=True)):
            problem = "reaches outside" if has_dims else "has another number of dims than"
            return f"a slice at {shown(box.offsets)} of shape {shown(box.shape)} {problem} the tensor's shape {shown(list(shape))}"
    if math.prod(shape) == 0:
        return None
    # What every box spans in full is the same for all.
    divided = [dim for dim, size in enumerate(shape) if any(box.shape[dim] != size for box in boxes)]
    divided.sort(key=lambda dim: -len({box.offsets[dim] for box in boxes}))
    corners = _surplus_corners([_edges(box, divided) for box in boxes if math.prod(box.shape)], _edges(whole_box(shape), divided))
    if corners is None:
        return f"its {len(boxes)} slices divide it along too many dims to be compared"
    if not corners:
        return None
    # A corner counts for all elements that lie behind it in every dim: where the first one lies, no other does.
    first, surplus = min(corners.items())
    element = [dict(zip(divided, first, strict=True)).get(dim, 0) for dim in range(len(shape))]
    if surplus > 0:
        a, b = [box for box in boxes if _holds(box, element)][:2]
        return f"the slices at {shown(a.offsets)} and {shown(b.offsets)} overlap"
    covered, whole = sum(math.prod(box.shape) for box in boxes), math.prod(shape)
    return f"its slices hold {covered} of {whole} elements, and none of them the one at {shown(element)}"


def _edges(box: Box, dims: Sequence[int]) -> tuple[int, ...]:
    """Begin and end in each of these dims."""
    return tuple(edge for dim in dims for edge in (box.offsets[dim], box.offsets[dim] + box.shape[dim]))


def _surplus_corners(boxes: Sequence[tuple[int, ...]], whole: tuple[int, ...]) -> dict[tuple[int, ...], int] | None:
    """The corners of the function that says how many boxes hold an element, less one in the whole; without any it is zero everywhere.

    A box is a step up where it begins and a step down where it ends, in each dim, which gives a number of either sign at each of its
    corners. Where one ends and its neighbour begins they cancel, dim by dim, so that a grid keeps few. None: far too many are left, as
    when boxes without a pattern divide a tensor along more than a few dims.

    Args:
        boxes: Their edges, none of them empty.
        whole: That of the tensor.
    """
    # Corners up to the present dim -> edges in the dims to come.
    counts = Counter(((), edges) for edges in boxes)
    counts[(), whole] -= 1
    most = _MOST_EDGES_PER_BOX * (len(boxes) + 1)
    for _ in range(len(whole) // 2):
        found: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
        for (corner, (begin, end, *rest)), count in counts.items():
            found[(*corner, begin), (*rest,)] += count
            found[(*corner, end), (*rest,)] -= count
        counts = Counter({place: count for place, count in found.items() if count})
        if len(counts) > max(most // len(whole), _FEW_CORNERS):
            return None
    return {corner: count for (corner, _), count in counts.items() if count}


def _holds(box: Box, element: Sequence[int]) -> bool:
    return all(offset <= index < offset + size for offset, size, index in zip(box.offsets, box.shape, element, strict=True))


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes share an element."""
    return all(
        max(a_begin, b_begin) < min(a_begin + a_size, b_begin + b_size)
        for a_begin, a_size, b_begin, b_size in zip(a.offsets, a.shape, b.offsets, b.shape, strict=True)
    )
