"""The inputs of the mixer's two paths in Triton, forward: one program per tile of tokens and head.

A head is held as two halves, the channels i and i + K/2 that a rotation mixes. The taps of the convolution are loads from shifted rows,
which are served by the cache.

Shapes: B batch, T tokens, H heads, K head size; 3: queries, keys, values.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.gpu.fast_math import has_fast_math, sigmoid
from phase8.kernels.gpu.layout import contiguous

NUM_WARPS = 8


def tile_tokens() -> int:
    """Tokens of a tile, such that the weights, which every tile reads, are a quarter of its reads."""
    return 8 if triton.knobs.runtime.interpret else 32


def read_tensors(
    qkv: Tensor, weight: Tensor | None, angles: Tensor, radius: Tensor | None, starts: Tensor | None, initial_state: Tensor | None
) -> list[Tensor | None]:
    """What the kernels read, in their order, without gaps; taps are whole vectors of neighbouring channels: [C, taps] -> [taps, C]."""
    by_tap = None if weight is None else weight.t()
    return contiguous(qkv, by_tap, angles.cos(), angles.sin(), radius, starts, initial_state)


def prepare(
    qkv: Tensor,
    weight: Tensor | None,
    angles: Tensor,
    radius: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    eps: float,
    silu: bool,
    silu_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes the reference `mixer_inputs`."""
    batch, length, _, num_heads, head_size = qkv.shape
    outputs = tuple(torch.empty(batch, length, num_heads, head_size, dtype=qkv.dtype, device=qkv.device) for _ in range(5))
    tokens = tile_tokens()
    _prepare_kernel[(triton.cdiv(length, tokens), num_heads, batch)](
        *read_tensors(qkv, weight, angles, radius, starts, initial_state), *outputs, length, eps,
        **constants(qkv, weight, radius, starts, initial_state, silu, silu_values), BLOCK_T=tokens, num_warps=NUM_WARPS,
    )  # fmt: skip
    return outputs


def constants(
    qkv: Tensor, weight: Tensor | None, radius: Tensor | None, starts: Tensor | None, initial_state: Tensor | None, silu: bool, silu_values: bool
) -> dict[str, object]:
    """Compile-time constants of the kernels of this operation."""
    _, _, _, num_heads, head_size = qkv.shape
    return {
        "NUM_HEADS": num_heads,
        "HEAD_SIZE": head_size,
        "BLOCK_HALF": triton.next_power_of_2(head_size // 2),
        "TAPS": 1 if weight is None else weight.shape[1],
        "CONVOLUTION": weight is not None,
        "RADIUS": radius is not None,
        "SILU": silu,
        "SILU_VALUES": silu_values,
        "DOCUMENTS": starts is not None,
        "CONTINUED": initial_state is not None,
        "FAST": has_fast_math(),
    }


@triton.jit
def convolved_half(
    x, weight, starts, initial, token, channel, inside_channel, length,
    ROW: tl.constexpr, TAPS: tl.constexpr, CONVOLUTION: tl.constexpr, DOCUMENTS: tl.constexpr, CONTINUED: tl.constexpr,
):  # fmt: skip
    """The convolution of some channels at some tokens, fp32 [tokens, channels].

    `x` points at the first token, and where a sequence is continued, `initial` at the taps - 1 projections before it.
    """
    mask = (token < length)[:, None] & inside_channel[None, :]
    offsets = tl.cast(token, tl.int64)[:, None] * ROW + channel[None, :]
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if CONVOLUTION:
        values *= tl.load(weight + (TAPS - 1) * ROW + channel, mask=inside_channel, other=0.0).to(tl.float32)[None, :]
        connected = token < length
        for distance in tl.static_range(1, TAPS):
            # Token t is connected to t - distance while none of t, ..., t - distance + 1 begins a document.
            if not CONTINUED:
                connected = connected & (token >= distance)
            if DOCUMENTS:
                begins = tl.load(starts + token - (distance - 1), mask=connected & (token >= distance - 1), other=0)
                connected = connected & (begins == 0)
            tap = tl.load(weight + (TAPS - 1 - distance) * ROW + channel, mask=inside_channel, other=0.0).to(tl.float32)
            here = connected & (token >= distance) if CONTINUED else connected
            earlier = tl.load(x + offsets - distance * ROW, mask=here[:, None] & inside_channel[None, :], other=0.0).to(tl.float32)
            if CONTINUED:
                before = tl.cast(TAPS - 1 - distance + token, tl.int64)[:, None] * ROW + channel[None, :]
                there = connected & (token < distance)
                earlier += tl.load(initial + before, mask=there[:, None] & inside_channel[None, :], other=0.0).to(tl.float32)
            values += earlier * tap[None, :]
    return values


@triton.jit
def _prepare_kernel(
    qkv, weight, cosines, sines, radius, starts, initial, local_q, local_k, global_q, global_k, v, length, eps,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_HALF: tl.constexpr, TAPS: tl.constexpr, CONVOLUTION: tl.constexpr,
    RADIUS: tl.constexpr, SILU: tl.constexpr, SILU_VALUES: tl.constexpr, DOCUMENTS: tl.constexpr, CONTINUED: tl.constexpr, FAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    half = tl.arange(0, BLOCK_HALF)
    HALF: tl.constexpr = HEAD_SIZE // 2
    WIDTH: tl.constexpr = NUM_HEADS * HEAD_SIZE
    inside = half < HALF
    mask = (token < length)[:, None] & inside[None, :]
    x = qkv + batch * length * (3 * WIDTH)
    starts = starts + batch * length if DOCUMENTS else qkv
    initial = initial + batch * (TAPS - 1) * (3 * WIDTH) if CONTINUED else qkv
    angle = tl.cast(token, tl.int64)[:, None] * HALF + half[None, :]
    cosine, sine = tl.load(cosines + angle, mask=mask, other=0.0), tl.load(sines + angle, mask=mask, other=0.0)
    out = (batch * length + token)[:, None] * WIDTH + (head * HEAD_SIZE + half)[None, :]
    for part in tl.static_range(3):
        channel = part * WIDTH + head * HEAD_SIZE + half
        low = convolved_half(x, weight, starts, initial, token, channel, inside, length, 3 * WIDTH, TAPS, CONVOLUTION, DOCUMENTS, CONTINUED)
        high = convolved_half(
            x, weight, starts, initial, token, channel + HALF, inside, length, 3 * WIDTH, TAPS, CONVOLUTION, DOCUMENTS, CONTINUED
        )  # fmt: skip
        if part == 2:
            if SILU_VALUES:
                low, high = low * sigmoid(low, FAST), high * sigmoid(high, FAST)
            tl.store(v + out, low.to(v.dtype.element_ty), mask=mask)
            tl.store(v + out + HALF, high.to(v.dtype.element_ty), mask=mask)
        else:
            scale = tl.load(radius + head).to(tl.float32) * (1.0 / tl.sqrt(HEAD_SIZE * 1.0)) if RADIUS else 1.0
            to_global, to_local = (global_q, local_q) if part == 0 else (global_k, local_k)
            store_normalised(low, high, to_global + out, to_local + out, cosine, sine, scale, mask, eps, HEAD_SIZE, RADIUS, SILU, FAST)


@triton.jit
def store_normalised(
    low, high, to_global, to_local, cosine, sine, scale, mask, eps,
    HEAD_SIZE: tl.constexpr, RADIUS: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Writes queries or keys of both paths from the halves of a head after the convolution, fp32 [tokens, K/2]."""
    HALF: tl.constexpr = HEAD_SIZE // 2
    reciprocal = 1.0 / tl.sqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / HEAD_SIZE + eps)
    length = (reciprocal * scale)[:, None] if RADIUS else 1.0
    if SILU:
        global_low, global_high = low * sigmoid(low, FAST), high * sigmoid(high, FAST)
        mean_square = (tl.sum(global_low * global_low, 1) + tl.sum(global_high * global_high, 1)) / HEAD_SIZE
        reciprocal = 1.0 / tl.sqrt(mean_square + eps)
    else:
        global_low, global_high = low, high
    global_low, global_high = global_low * reciprocal[:, None], global_high * reciprocal[:, None]
    tl.store(to_global, global_low.to(to_global.dtype.element_ty), mask=mask)
    tl.store(to_global + HALF, global_high.to(to_global.dtype.element_ty), mask=mask)
    if RADIUS:
        low, high = low * length, high * length
    tl.store(to_local, (low * cosine - high * sine).to(to_local.dtype.element_ty), mask=mask)
    tl.store(to_local + HALF, (low * sine + high * cosine).to(to_local.dtype.element_ty), mask=mask)
