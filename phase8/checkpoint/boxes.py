"""Boxes of a tensor: what two have in common, and the proof that some tile it, so that every element lies in exactly one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


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

    Boxes inside the tensor whose volumes add up to its volume and which do not overlap cover every element exactly once.
    """
    for box in boxes:
        if len(box.offsets) != len(shape) or len(box.shape) != len(shape):
            return f"a slice at {box.offsets} of shape {box.shape} has another number of dims than the tensor's shape {list(shape)}"
        if any(offset + size > limit for offset, size, limit in zip(box.offsets, box.shape, shape, strict=True)):
            return f"a slice at {box.offsets} of shape {box.shape} reaches outside the tensor's shape {list(shape)}"
    if (overlap := _first_overlap(boxes)) is not None:
        return f"the slices at {overlap[0].offsets} and {overlap[1].offsets} overlap"
    covered, whole = sum(math.prod(box.shape) for box in boxes), math.prod(shape)
    if covered != whole:
        return f"its slices hold {covered} of {whole} elements"
    return None


def _first_overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share an element, found by a sweep along the dim that separates the boxes best."""
    solid = [box for box in boxes if math.prod(box.shape) > 0]
    if len(solid) < 2:
        return None
    num_dims = len(solid[0].shape)
    if num_dims == 0:
        return solid[0], solid[1]
    dim = max(range(num_dims), key=lambda d: len({box.offsets[d] for box in solid}))
    active: list[Box] = []
    for box in sorted(solid, key=lambda box: box.offsets[dim]):
        active = [other for other in active if other.offsets[dim] + other.shape[dim] > box.offsets[dim]]
        for other in active:
            if overlap(box, other):
                return other, box
        active.append(box)
    return None


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes share an element."""
    return all(
        max(a_begin, b_begin) < min(a_begin + a_size, b_begin + b_size)
        for a_begin, a_size, b_begin, b_size in zip(a.offsets, a.shape, b.offsets, b.shape, strict=True)
    )
