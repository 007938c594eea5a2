"""The numbers of a matrix in fp8, as it lies and transposed, as one operator: a compiler that writes both reads the matrix, or computes it, twice.

Shapes: M rows, K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phase8.kernels.backends import uses_triton
from phase8.kernels.reference import fp8_numbers as reference


def fp8_numbers(x: Tensor, of_row: Tensor | None, of_column: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """Numbers [M, K] and [K, M] in fp8; arguments and result as in the reference of the same name. It has no gradient."""
    numbers, transposed = _forward(x, of_row, of_column, dtype)
    return None if of_row is None else numbers, transposed


@torch.library.custom_op("phase8::fp8_numbers", mutates_args=())
def _forward(x: Tensor, of_row: Tensor | None, of_column: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers, empty without `of_row`, since an operator returns tensors; and the transposed ones."""
    implementation = reference.fp8_numbers
    if uses_triton(x) and x.numel() and x.dtype != torch.float64:
        from phase8.kernels.gpu.fp8_numbers import fp8_numbers as implementation
    numbers, transposed = implementation(x, of_row, of_column, dtype)
    return x.new_empty(0, dtype=dtype) if numbers is None else numbers, transposed


@_forward.register_fake
def _(x: Tensor, of_row: Tensor | None, of_column: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty((0,) if of_row is None else x.shape, dtype=dtype), x.new_empty(x.shape[::-1], dtype=dtype)
