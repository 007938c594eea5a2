"""Differences between two checkpoints, tensor by tensor, bit by bit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from phase8.checkpoint.load import Checkpoint
from phase8.checkpoint.untrusted import shown

_CHUNK_ELEMENTS = 2**20  # a chunk of float64 differences stays small beside the tensors themselves


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that differs between two checkpoints.

    Args:
        name: Name of the tensor.
        kind: `only_in_first`, `only_in_second`, `shape`, `dtype` or `values`.
        detail: The two shapes or dtypes; empty otherwise.
        max_abs_difference: Maximum over all elements, in float64; NaN where only one side is NaN; None if nothing can be subtracted.
            0.0 for tensors that differ in bits only, such as the sign of a zero.
    """

    name: str
    kind: str
    detail: str
    max_abs_difference: float | None


def compare_checkpoints(first: Checkpoint, second: Checkpoint) -> Iterator[TensorDifference]:
    """Yields the tensors that differ, in the order of the first checkpoint; two tensors at a time are in memory."""
    in_second = set(second.tensor_names)
    for name in first.tensor_names:
        if name not in in_second:
            yield TensorDifference(name, "only_in_first", "", None)
        elif (difference := _difference(name, first, second)) is not None:
            yield difference
    in_first = set(first.tensor_names)
    for name in second.tensor_names:
        if name not in in_first:
            yield TensorDifference(name, "only_in_second", "", None)


def _difference(name: str, first: Checkpoint, second: Checkpoint) -> TensorDifference | None:
    a, b = first.entry(name), second.entry(name)
    if a.shape != b.shape:
        return TensorDifference(name, "shape", f"{shown(a.shape)} and {shown(b.shape)}", None)
    left, right = first.read(name), second.read(name)
    if a.dtype != b.dtype:
        return TensorDifference(name, "dtype", f"{a.dtype} and {b.dtype}", max_abs_difference(left, right))
    if not torch.equal(_bits(left), _bits(right)):
        return TensorDifference(name, "values", "", max_abs_difference(left, right))
    return None


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, so that NaNs and signs of zeros are compared as well."""
    return tensor.view(-1).view(torch.uint8)


def max_abs_difference(left: Tensor, right: Tensor) -> float:
    """Largest |left - right|; equal infinities and two NaNs differ by 0, a NaN on one side only gives NaN."""
    largest = 0.0
    for a, b in zip(left.reshape(-1).split(_CHUNK_ELEMENTS), right.reshape(-1).split(_CHUNK_ELEMENTS), strict=True):
        wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
        a, b = a.to(wide), b.to(wide)
        difference = (a - b).abs()
        difference[(a == b) | (a.isnan() & b.isnan())] = 0.0
        chunk_largest = difference.max().item() if difference.numel() else 0.0
        if math.isnan(chunk_largest):
            return chunk_largest
        largest = max(largest, chunk_largest)
    return largest
