"""Rounds a matrix to fp8 as it lies and transposed, and reads it once.

Shapes: M rows, K columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.gpu.layout import contiguous

BLOCK_M, BLOCK_K, NUM_WARPS = 128, 128, 4  # 3.8 TB/s on an H200; tiles of half the size are as fast


def fp8_numbers(x: Tensor, of_row: Tensor | None, of_column: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """Computes the reference with this name."""
    x, (num_rows, num_columns) = x.contiguous(), x.shape
    numbers = None if of_row is None else torch.empty(num_rows, num_columns, dtype=dtype, device=x.device)
    transposed = torch.empty(num_columns, num_rows, dtype=dtype, device=x.device)
    grid = (triton.cdiv(num_columns, BLOCK_K), triton.cdiv(num_rows, BLOCK_M))
    round_kernel[grid](
        x, *contiguous(of_row, of_column), numbers, transposed, num_rows, num_columns,
        PER_ROW=of_row is not None and of_row.numel() > 1, PER_COLUMN=of_column.numel() > 1,
        LARGEST=torch.finfo(dtype).max, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, num_warps=NUM_WARPS,
    )  # fmt: skip
    return numbers, transposed


@triton.jit
def round_kernel(
    x, of_row, of_column, numbers, transposed, num_rows, num_columns,
    PER_ROW: tl.constexpr, PER_COLUMN: tl.constexpr, LARGEST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rounds a tile, whose rows and columns of 128 numbers each fill a line of the cache in fp8."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows, columns = m < num_rows, k < num_columns
    inside = rows[:, None] & columns[None, :]
    place = m[:, None].to(tl.int64) * num_columns + k[None, :]
    tile = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if numbers is not None:
        factor = tl.load(of_row + m, mask=rows, other=0.0)[:, None] if PER_ROW else tl.load(of_row)
        tl.store(numbers + place, _rounded(tile * factor, numbers, LARGEST), mask=inside)
    factor = tl.load(of_column + k, mask=columns, other=0.0)[None, :] if PER_COLUMN else tl.load(of_column)
    turned = tl.trans(_rounded(tile * factor, transposed, LARGEST))
    tl.store(transposed + k[:, None].to(tl.int64) * num_rows + m[None, :], turned, mask=tl.trans(inside))


@triton.jit
def _rounded(x, pointer, LARGEST: tl.constexpr):
    return tl.clamp(x, -LARGEST, LARGEST).to(pointer.dtype.element_ty)
