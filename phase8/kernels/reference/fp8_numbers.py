"""The numbers of a matrix in fp8, as it lies and transposed: what the matrix units read in the products of a linear layer.

Source: P. Micikevicius et al., "FP8 formats for deep learning" (2022).

Shapes: M rows, K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fp8_numbers(x: Tensor, of_row: Tensor | None, of_column: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """Multiplies a matrix by factors and rounds it to fp8, twice; what lies beyond the largest number becomes that number.

    Args:
        x: Matrix [M, K].
        of_row: Factors of the rows for the numbers as they lie, fp32 [M, 1] or [1, 1]; None: those numbers are not wanted.
        of_column: Factors of the columns for the transposed numbers, fp32 [1, K] or [1, 1].
        dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.

    Returns:
        The numbers [M, K], or None, and the transposed ones [K, M], both contiguous.
    """
    largest, wide = torch.finfo(dtype).max, x.float()
    as_it_lies = None if of_row is None else (wide * of_row).clamp(-largest, largest).to(dtype).contiguous()
    return as_it_lies, (wide * of_column).clamp(-largest, largest).to(dtype).T.contiguous()
