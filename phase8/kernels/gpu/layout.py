"""Layouts of memory that kernels ask for; callers may pass views of any strides."""

from __future__ import annotations

from torch import Tensor


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, those that there are without gaps: a kernel that is not told strides computes them from the shape."""
    return [None if x is None else x.contiguous() for x in tensors]


def with_rows_contiguous(*tensors: Tensor) -> list[Tensor]:
    """The tensors with a contiguous last dim, for kernels that are told the other strides; views of a wider buffer already have one."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
