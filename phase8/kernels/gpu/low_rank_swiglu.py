"""The gated feed-forward between bottlenecks in Triton, forward: one program per tile of tokens walks over the width.

With a rank of 16 to 64, a tensor of the feed-forward's width is far cheaper to compute than to move; a token only reads and writes its
bottlenecks in memory. Weights are read in fp32 and rounded in registers to the dtype of the bottlenecks; gate, factor
and their product are formed in fp32.

Shapes: N tokens, R rank, F feed-forward width.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.gpu.fast_math import exp2, has_fast_math, tensor_core_precision


class Tiles(NamedTuple):
    """The layout of a program.

    Args:
        outer: Tokens or features per program.
        inner: Tokens or features per step of its walk.
        num_warps: Warps.
    """

    outer: int
    inner: int
    num_warps: int


def choose_tiles(rank: int) -> Tiles:
    """Chooses as many rows as four warps multiply at once; wide bottlenecks leave registers for only half as many inner rows."""
    if triton.knobs.runtime.interpret:
        return Tiles(16, 16, 4)
    return Tiles(64, 64 if rank <= 32 else 32, 4)


def feed_forward(bottlenecks: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Computes the reference `low_rank_swiglu` for bottlenecks [N, 2 R]."""
    num_tokens, width = bottlenecks.shape[0], gate.shape[0]
    y = torch.empty(num_tokens, gate.shape[1], dtype=bottlenecks.dtype, device=bottlenecks.device)
    tiles = choose_tiles(gate.shape[1])
    _forward_kernel[(triton.cdiv(num_tokens, tiles.outer),)](
        bottlenecks.contiguous(), gate.contiguous(), up.contiguous(), down.contiguous(), y, num_tokens, width,
        BLOCK_N=tiles.outer, BLOCK_F=tiles.inner, **constants(gate.shape[1], tiles),
    )  # fmt: skip
    return y


def constants(rank: int, tiles: Tiles) -> dict[str, object]:
    """Compile-time constants and launch options that the kernels of this operation share."""
    return {
        "RANK": rank,
        "BLOCK_R": max(triton.next_power_of_2(rank), 16),  # matrix products need 16
        "LOG2E": 1 / math.log(2),
        "FAST": has_fast_math(),
        "PRECISION": tensor_core_precision(),
        "num_warps": tiles.num_warps,
    }


@triton.jit
def load_rows(base, row, stride, num_rows, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """Some rows of R numbers [rows, BLOCK_R], zero outside."""
    column = tl.arange(0, BLOCK_R)
    mask = (row < num_rows)[:, None] & (column < RANK)[None, :]
    return tl.load(base + tl.cast(row, tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def load_columns(base, column, num_columns, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """Some columns of a matrix of R rows [BLOCK_R, columns], zero outside."""
    row = tl.arange(0, BLOCK_R)
    mask = (row < RANK)[:, None] & (column < num_columns)[None, :]
    return tl.load(base + row[:, None] * num_columns + column[None, :], mask=mask, other=0.0)


@triton.jit
def sigmoid_of(x, LOG2E: tl.constexpr, FAST: tl.constexpr):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + exp2(-LOG2E * x, FAST))


@triton.jit
def _forward_kernel(
    bottlenecks, gate, up, down, y, num_tokens, width,
    RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
    LOG2E: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_gate = load_rows(bottlenecks, token, 2 * RANK, num_tokens, RANK, BLOCK_R)
    x_up = load_rows(bottlenecks + RANK, token, 2 * RANK, num_tokens, RANK, BLOCK_R)
    total = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for begin in range(0, width, BLOCK_F):
        feature = begin + tl.arange(0, BLOCK_F)
        gate_rows = load_rows(gate, feature, RANK, width, RANK, BLOCK_R).to(x_gate.dtype)
        up_rows = load_rows(up, feature, RANK, width, RANK, BLOCK_R).to(x_gate.dtype)
        down_columns = load_columns(down, feature, width, RANK, BLOCK_R).to(x_gate.dtype)
        before = tl.dot(x_gate, tl.trans(gate_rows), input_precision=PRECISION)
        factor = tl.dot(x_up, tl.trans(up_rows), input_precision=PRECISION)
        hidden = before * sigmoid_of(before, LOG2E, FAST) * factor
        total = tl.dot(hidden.to(x_gate.dtype), tl.trans(down_columns), total, input_precision=PRECISION)
    column = tl.arange(0, BLOCK_R)
    mask = (token < num_tokens)[:, None] & (column < RANK)[None, :]
    tl.store(y + tl.cast(token, tl.int64)[:, None] * RANK + column[None, :], total.to(y.dtype.element_ty), mask=mask)
