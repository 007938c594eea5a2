"""The gated feed-forward between bottlenecks in Triton, backward: one kernel for the gradient of the bottlenecks, one for the weights.

Both recompute gate, factor and their gradients from the bottlenecks. The first walks over the width for a tile of tokens. The second
walks over a segment of the tokens for a tile of the width; the sums of the segments are added afterwards, so there are no atomics.

Shapes: N tokens, R rank, F feed-forward width, S segments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.gpu.gated_linear_attention import num_processors
from phase8.kernels.gpu.low_rank_swiglu import choose_tiles, constants, load_columns, load_rows, sigmoid_of

PROGRAMS_PER_PROCESSOR = 4


def feed_forward_backward(dy: Tensor, bottlenecks: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the bottlenecks [N, 2 R], and of gate, up and down, each flattened to [3, F R]."""
    (num_tokens, _), (width, rank) = bottlenecks.shape, gate.shape
    dy, bottlenecks, gate, up, down = (x.contiguous() for x in (dy, bottlenecks, gate, up, down))
    dbottlenecks = torch.empty_like(bottlenecks)
    tiles = choose_tiles(rank)
    shared = constants(rank, tiles)
    _bottlenecks_kernel[(triton.cdiv(num_tokens, tiles.outer),)](
        dy, bottlenecks, gate, up, down, dbottlenecks, num_tokens, width, BLOCK_N=tiles.outer, BLOCK_F=tiles.inner, **shared,
    )  # fmt: skip
    num_steps, num_features = triton.cdiv(num_tokens, tiles.inner), triton.cdiv(width, tiles.outer)
    num_segments = max(1, min(num_steps, PROGRAMS_PER_PROCESSOR * num_processors(bottlenecks.device) // num_features))
    segment_tokens = triton.cdiv(num_steps, num_segments) * tiles.inner
    num_segments = triton.cdiv(num_tokens, segment_tokens)
    sums = torch.empty(num_segments, 3, width * rank, dtype=torch.float32, device=bottlenecks.device)
    _weights_kernel[(num_features, num_segments)](
        dy, bottlenecks, gate, up, down, sums, num_tokens, width, segment_tokens, BLOCK_N=tiles.inner, BLOCK_F=tiles.outer, **shared,
    )  # fmt: skip
    return dbottlenecks, sums.sum(0).to(gate.dtype)


@triton.jit
def gradients_of_gate(before, factor, dhidden, LOG2E: tl.constexpr, FAST: tl.constexpr):
    """Returns silu(before), and the gradients of before and factor from that of their product silu(before) * factor."""
    sigmoid = sigmoid_of(before, LOG2E, FAST)
    silu = before * sigmoid
    return silu, dhidden * factor * (sigmoid + silu * (1.0 - sigmoid)), dhidden * silu


@triton.jit
def _bottlenecks_kernel(
    dy, bottlenecks, gate, up, down, dbottlenecks, num_tokens, width,
    RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
    LOG2E: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_gate = load_rows(bottlenecks, token, 2 * RANK, num_tokens, RANK, BLOCK_R)
    x_up = load_rows(bottlenecks + RANK, token, 2 * RANK, num_tokens, RANK, BLOCK_R)
    dy_rows = load_rows(dy, token, RANK, num_tokens, RANK, BLOCK_R)
    dx_gate = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    dx_up = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for begin in range(0, width, BLOCK_F):
        feature = begin + tl.arange(0, BLOCK_F)
        gate_rows = load_rows(gate, feature, RANK, width, RANK, BLOCK_R).to(x_gate.dtype)
        up_rows = load_rows(up, feature, RANK, width, RANK, BLOCK_R).to(x_gate.dtype)
        down_columns = load_columns(down, feature, width, RANK, BLOCK_R).to(x_gate.dtype)
        before = tl.dot(x_gate, tl.trans(gate_rows), input_precision=PRECISION)
        factor = tl.dot(x_up, tl.trans(up_rows), input_precision=PRECISION)
        dhidden = tl.dot(dy_rows, down_columns, input_precision=PRECISION)
        _, dbefore, dfactor = gradients_of_gate(before, factor, dhidden, LOG2E, FAST)
        dx_gate = tl.dot(dbefore.to(x_gate.dtype), gate_rows, dx_gate, input_precision=PRECISION)
        dx_up = tl.dot(dfactor.to(x_gate.dtype), up_rows, dx_up, input_precision=PRECISION)
    column = tl.arange(0, BLOCK_R)
    mask = (token < num_tokens)[:, None] & (column < RANK)[None, :]
    out = dbottlenecks + tl.cast(token, tl.int64)[:, None] * (2 * RANK) + column[None, :]
    tl.store(out, dx_gate.to(dbottlenecks.dtype.element_ty), mask=mask)
    tl.store(out + RANK, dx_up.to(dbottlenecks.dtype.element_ty), mask=mask)


@triton.jit
def _weights_kernel(
    dy, bottlenecks, gate, up, down, sums, num_tokens, width, segment_tokens,
    RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
    LOG2E: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    first = tl.program_id(1) * segment_tokens
    dtype = bottlenecks.dtype.element_ty
    gate_rows = load_rows(gate, feature, RANK, width, RANK, BLOCK_R).to(dtype)
    up_rows = load_rows(up, feature, RANK, width, RANK, BLOCK_R).to(dtype)
    down_rows = tl.trans(load_columns(down, feature, width, RANK, BLOCK_R).to(dtype))
    dgate = tl.zeros((BLOCK_F, BLOCK_R), dtype=tl.float32)
    dup = tl.zeros((BLOCK_F, BLOCK_R), dtype=tl.float32)
    ddown = tl.zeros((BLOCK_F, BLOCK_R), dtype=tl.float32)
    for begin in range(first, tl.minimum(first + segment_tokens, num_tokens), BLOCK_N):
        token = begin + tl.arange(0, BLOCK_N)
        x_gate = load_rows(bottlenecks, token, 2 * RANK, num_tokens, RANK, BLOCK_R)
        x_up = load_rows(bottlenecks + RANK, token, 2 * RANK, num_tokens, RANK, BLOCK_R)
        dy_rows = load_rows(dy, token, RANK, num_tokens, RANK, BLOCK_R)
        # [features, tokens], so that the results can be left operands without a transpose.
        before = tl.dot(gate_rows, tl.trans(x_gate), input_precision=PRECISION)
        factor = tl.dot(up_rows, tl.trans(x_up), input_precision=PRECISION)
        dhidden = tl.dot(down_rows, tl.trans(dy_rows), input_precision=PRECISION)
        silu, dbefore, dfactor = gradients_of_gate(before, factor, dhidden, LOG2E, FAST)
        dgate = tl.dot(dbefore.to(dtype), x_gate, dgate, input_precision=PRECISION)
        dup = tl.dot(dfactor.to(dtype), x_up, dup, input_precision=PRECISION)
        ddown = tl.dot((silu * factor).to(dtype), dy_rows, ddown, input_precision=PRECISION)
    column = tl.arange(0, BLOCK_R)
    mask = (feature < width)[:, None] & (column < RANK)[None, :]
    size = width * RANK
    out = sums + tl.program_id(1) * (3 * size)
    place = feature[:, None] * RANK + column[None, :]
    tl.store(out + place, dgate, mask=mask)
    tl.store(out + size + place, dup, mask=mask)
    tl.store(out + 2 * size + column[None, :] * width + feature[:, None], ddown, mask=mask)
