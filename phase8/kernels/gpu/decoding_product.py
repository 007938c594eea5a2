"""Products of a few tokens with large weights in Triton. A program holds some rows of the weight in registers and computes their outputs.

All its bytes of the weight are on their way before it looks at a token, so that memory is busy while the norm is computed. Every program computes
the norm itself: a stream of a few thousand numbers is in the cache, and another kernel would cost more.

Shapes: B tokens, D width of the input, F width of the output.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.gpu.layout import contiguous, with_rows_contiguous
from phase8.kernels.gpu.overlap import await_results, overlap_options

GATED_BLOCK = 1024


@dataclass(frozen=True)
class Tile:
    """The part of a weight that a program holds.

    Args:
        numbers: Numbers of the weight, those beyond the end of its rows included.
        num_warps: Warps of a program.
    """

    numbers: int
    num_warps: int


# Candidates that tools/bench/decoding_product.py --tiles times.
TILES = (Tile(8192, 4), Tile(16384, 4), Tile(16384, 8), Tile(32768, 8), Tile(32768, 16), Tile(65536, 16))
TILE = Tile(16384, 4)


def normed_product(
    x: Tensor, summand: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor, *, is_gated: bool, is_wide: bool
) -> tuple[Tensor, Tensor]:
    """Computes the reference `normed_product`."""
    return _launch(x, summand, norm_weight, eps, weight, is_gated=is_gated, is_wide=is_wide)


def product(x: Tensor, weight: Tensor, *, is_wide: bool) -> Tensor:
    """Computes the reference `product`."""
    return _launch(x, None, None, 0.0, weight, is_gated=False, is_wide=is_wide)[1]


def gated(y: Tensor) -> Tensor:
    """Computes the reference `gated`."""
    (y,) = with_rows_contiguous(y)
    num_tokens, width = y.shape
    result = torch.empty(num_tokens, width // 2, dtype=y.dtype, device=y.device)
    grid = (triton.cdiv(width // 2, GATED_BLOCK), num_tokens)
    _gated_kernel[grid](y, y.stride(0), result, WIDTH=width // 2, BLOCK=GATED_BLOCK, **overlap_options(y.device))
    return result


def _launch(
    x: Tensor, summand: Tensor | None, norm_weight: Tensor | None, eps: float, weight: Tensor, *, is_gated: bool, is_wide: bool
) -> tuple[Tensor, Tensor]:
    x, norm_weight, weight = contiguous(x, norm_weight, weight)
    (summand,) = with_rows_contiguous(summand)
    num_tokens, width = x.shape
    num_outputs = len(weight) // 2 if is_gated else len(weight)
    block = triton.next_power_of_2(width)
    # Several tokens read a weight that has been widened in registers.
    rows = max(TILE.numbers // block // (2 if is_gated else 1) // (2 if num_tokens > 1 else 1), 1)
    y = torch.empty(num_tokens, num_outputs, dtype=torch.float32 if is_wide else x.dtype, device=x.device)
    summed = x if summand is None else torch.empty_like(x)
    _product_kernel[(triton.cdiv(num_outputs, rows),)](
        x, summand, 0 if summand is None else summand.stride(0), norm_weight, weight, summed, y, num_outputs, eps,
        TOKENS=num_tokens, WIDTH=width, BLOCK_D=block, BLOCK_F=rows, ADDS=summand is not None, NORMS=norm_weight is not None, GATED=is_gated,
        num_warps=TILE.num_warps, **overlap_options(x.device),
    )  # fmt: skip
    return summed, y


@triton.jit
def _product_kernel(
    x, summand, summand_stride, norm_weight, weight, summed, y, num_outputs, eps,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, ADDS: tl.constexpr, NORMS: tl.constexpr,
    GATED: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = x.dtype.element_ty
    feature, column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_D)[None, :]
    is_feature, inside = feature < num_outputs, column < WIDTH
    at = tl.cast(feature, tl.int64)[:, None] * WIDTH + column
    mask = is_feature[:, None] & inside
    tile = tl.load(weight + at, mask=mask, other=0.0, eviction_policy="evict_first")
    if GATED:
        ups = tl.load(weight + tl.cast(num_outputs, tl.int64) * WIDTH + at, mask=mask, other=0.0, eviction_policy="evict_first")
    if NORMS:
        factor = tl.load(norm_weight + column, mask=inside, other=0.0)
    if OVERLAPS:
        await_results()
    for token in range(TOKENS):
        value = tl.load(x + token * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        if ADDS:
            value += tl.load(summand + token * summand_stride + column, mask=inside, other=0.0).to(tl.float32)
            value = value.to(TYPE)
            tl.store(summed + token * WIDTH + column, value, mask=inside & (tl.program_id(0) == 0))
            value = value.to(tl.float32)
        if NORMS:
            value = value / tl.sqrt(tl.sum(value * value, 1, keep_dims=True) / WIDTH + eps) * factor
            value = value.to(TYPE).to(tl.float32)
        result = tl.sum(tile.to(tl.float32) * value, 1)
        if GATED:
            gate = result.to(TYPE).to(tl.float32)
            gate = (gate * tl.sigmoid(gate)).to(TYPE).to(tl.float32)
            result = gate * tl.sum(ups.to(tl.float32) * value, 1).to(TYPE).to(tl.float32)
        tl.store(y + token * num_outputs + feature, result.to(y.dtype.element_ty), mask=is_feature)


@triton.jit
def _gated_kernel(y, stride, result, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    TYPE: tl.constexpr = y.dtype.element_ty
    token, column = tl.cast(tl.program_id(1), tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    if OVERLAPS:
        await_results()
    gate = tl.load(y + token * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(y + token * stride + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + token * WIDTH + column, (gate * tl.sigmoid(gate)).to(TYPE).to(tl.float32) * up, mask=inside)
