"""The residual stream and its norm in Triton: one program per row. Shapes: B rows, D width."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.gpu.layout import with_rows_contiguous
from phase8.kernels.gpu.overlap import await_results, overlap_options

NUM_WARPS = 8


def residual_norm(x: Tensor, summand: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Computes the reference `residual_norm`."""
    x, weight = x.contiguous(), weight.contiguous()
    (summand,) = with_rows_contiguous(summand)
    summed = x if summand is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    width = x.shape[1]
    _norm_kernel[(len(x),)](
        x, summand, 0 if summand is None else summand.stride(0), weight, summed, normed, eps,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), ADDS=summand is not None, num_warps=NUM_WARPS, **overlap_options(x.device),
    )  # fmt: skip
    return summed, normed


@triton.jit
def _norm_kernel(
    x, summand, summand_stride, weight, summed, normed, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    row, column = tl.cast(tl.program_id(0), tl.int64), tl.arange(0, BLOCK)
    inside = column < WIDTH
    factor = tl.load(weight + column, mask=inside, other=0.0)
    if OVERLAPS:
        await_results()
    value = tl.load(x + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        value += tl.load(summand + row * summand_stride + column, mask=inside, other=0.0).to(tl.float32)
        value = value.to(x.dtype.element_ty)
        tl.store(summed + row * WIDTH + column, value, mask=inside)
        value = value.to(tl.float32)
    value = value / tl.sqrt(tl.sum(value * value, 0) / WIDTH + eps) * factor
    tl.store(normed + row * WIDTH + column, value.to(x.dtype.element_ty), mask=inside)
