"""Layouts of memory that kernels ask for; callers may pass views of any strides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, those that there are without gaps: a kernel that is not told strides computes them from the shape."""
    return [None if x is None else x.contiguous() for x in tensors]


def with_rows_contiguous(*tensors: Tensor | None) -> list[Any]:
    """The tensors, those that there are with a contiguous last dim, for kernels that are told the other strides; slices of rows have one."""
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]


def as_bytes(starts: Tensor | None) -> Tensor | None:
    """Where documents begin, as bytes without gaps."""
    return None if starts is None else starts.contiguous().view(torch.uint8)
