"""The inputs of the mixer's two paths from the bottlenecks of q, k and v in Triton, forward: one program per tiles of tokens and head.

Product and convolution are one product: with up weights U and taps w, the channel c of token t is the sum over distances d and ranks r of
h[t - d, r] (w[c, d] U[c, r]). Its left factor holds the bottlenecks of a token and of those before it, side by side, and its right factor is
folded once and rounded to the dtype of the bottlenecks; sums are fp32. So q, k and v are never in memory.

A head is held as two halves, the channels i and i + K/2 that a rotation mixes.

Shapes: B batch, T tokens of a sequence, N = B T, H heads, K head size, R rank; 3: queries, keys, values; of a program: X = taps * R, both padded.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.gpu.fast_math import has_fast_math, sigmoid, tensor_core_precision
from phase8.kernels.gpu.gated_linear_attention import num_processors
from phase8.kernels.gpu.layout import contiguous
from phase8.kernels.gpu.mixer_inputs import store_normalised

FOLDED_CHANNELS = 64


class Tiles(NamedTuple):
    """The layout of programs.

    Args:
        tokens: Tokens of a tile of the forward.
        steps: Tiles of a program of the forward, at the same positions of different sequences, which share the loads of weights and angles.
        num_warps: Warps of a program of the forward.
        rows: Pieces of sequences through which a program of the backward walks at once.
        backward_warps: Warps of a program of the backward.
        stages: Stages of the walk: with three, the loads of a step are in flight during all of the step before; with two, they are awaited at once.
        programs: Programs of the backward per processor, which the length of a piece is chosen for.
    """

    tokens: int = 64
    steps: int = 1
    num_warps: int = 4
    rows: int = 64
    backward_warps: int = 4
    stages: int = 3
    programs: int = 4


# Programs of the forward take several tiles where there are at least so many tiles for each processor: one tile takes 128 registers, several 168.
MANY_TILES = 32


def choose_tiles(num_tokens: int, num_heads: int, rank: int, device: torch.device) -> Tiles:
    """Chooses as many rows as four warps multiply at once, and stages such that two programs of the backward are on a multiprocessor."""
    if triton.knobs.runtime.interpret:
        return Tiles(tokens=16, steps=2, rows=16)
    tiles = Tiles(stages=3 if rank <= 16 else 2)
    has_many = num_tokens * num_heads >= MANY_TILES * tiles.tokens * num_processors(device)
    return tiles._replace(steps=4) if has_many else tiles


def prepare(
    bottlenecks: Tensor, ups: list[Tensor], taps: Tensor | None, angles: Tensor, radius: Tensor | None, starts: Tensor | None,
    num_heads: int, eps: float, silu: bool, silu_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Computes the reference `low_rank_mixer_inputs`."""
    bottlenecks = bottlenecks.contiguous()
    batch, length, _ = bottlenecks.shape
    tiles = choose_tiles(batch * length, num_heads, ups[0].shape[1], bottlenecks.device)
    shared = constants(ups, taps, radius, starts, num_heads, silu, silu_values)
    shape = (batch, length, num_heads, shared["HEAD_SIZE"])
    outputs = tuple(torch.empty(shape, dtype=bottlenecks.dtype, device=bottlenecks.device) for _ in range(5))
    num_programs = triton.cdiv(length, tiles.tokens) * triton.cdiv(batch, tiles.steps)
    _forward_kernel[(num_heads, num_programs)](
        bottlenecks, fold(bottlenecks, ups, taps, shared), *contiguous(angles.cos(), angles.sin(), radius, starts), *outputs, batch, length, eps,
        **shared,
        BLOCK_N=tiles.tokens, STEPS=tiles.steps, EVEN=length % tiles.tokens == 0 and batch % tiles.steps == 0, num_warps=tiles.num_warps,
    )  # fmt: skip
    return outputs


def constants(
    ups: list[Tensor], taps: Tensor | None, radius: Tensor | None, starts: Tensor | None, num_heads: int, silu: bool, silu_values: bool
) -> dict[str, object]:
    """Compile-time constants of the kernels of this operation."""
    width, rank = ups[0].shape
    num_taps = 1 if taps is None else taps.shape[1]
    return {
        "NUM_HEADS": num_heads,
        "HEAD_SIZE": width // num_heads,
        "RANK": rank,
        "BLOCK_R": max(triton.next_power_of_2(rank), 16),  # matrix products need 16
        "TAPS": num_taps,
        "BLOCK_TAPS": triton.next_power_of_2(num_taps),
        "RADIUS": radius is not None,
        "SILU": silu,
        "SILU_VALUES": silu_values,
        "DOCUMENTS": starts is not None,
        "FAST": has_fast_math(),
        "PRECISION": tensor_core_precision(),
    }


def fold(bottlenecks: Tensor, ups: list[Tensor], taps: Tensor | None, shared: dict[str, object]) -> Tensor:
    """Products of taps and up weights [3 H K, X] in the dtype of the bottlenecks, for each channel by distance and rank, zero where padded."""
    width, columns = ups[0].shape[0], shared["BLOCK_TAPS"] * shared["BLOCK_R"]
    folded = torch.empty(3 * width, columns, dtype=bottlenecks.dtype, device=bottlenecks.device)
    sizes = {name: shared[name] for name in ("RANK", "BLOCK_R", "TAPS", "BLOCK_TAPS")}
    _fold_kernel[(triton.cdiv(width, FOLDED_CHANNELS), 3)](
        *contiguous(*ups, taps), folded, width,
        **sizes, CONVOLUTION=taps is not None, BLOCK_C=FOLDED_CHANNELS, num_warps=4,
    )  # fmt: skip
    return folded


@triton.jit
def _fold_kernel(
    up_q, up_k, up_v, taps, folded, width,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, TAPS: tl.constexpr, BLOCK_TAPS: tl.constexpr, CONVOLUTION: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    up = up_q
    if part == 1:
        up = up_k
    elif part == 2:
        up = up_v
    channel = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
    column = tl.arange(0, BLOCK_TAPS * BLOCK_R)[None, :]
    distance, rank = column // BLOCK_R, column % BLOCK_R
    mask = (channel < width) & (rank < RANK) & (distance < TAPS)
    value = tl.load(up + channel * RANK + rank, mask=mask, other=0.0).to(tl.float32)
    if CONVOLUTION:
        value *= tl.load(taps + (part * width + channel) * TAPS + (TAPS - 1 - distance), mask=mask, other=0.0).to(tl.float32)
    tl.store(folded + (part * width + channel) * (BLOCK_TAPS * BLOCK_R) + column, value.to(folded.dtype.element_ty), mask=channel < width)


@triton.jit
def load_folded(folded, channel, BLOCK_HALF: tl.constexpr, COLUMNS: tl.constexpr):
    """The folded weights of half a head, beginning with a channel [K/2, X]."""
    return tl.load(folded + (channel + tl.arange(0, BLOCK_HALF))[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def load_ages(starts, token, position, there, TAPS: tl.constexpr, DOCUMENTS: tl.constexpr):
    """How many tokens before each one its convolution may see, or more: those of its sequence, or of its document; -1 where none is [tokens]."""
    age = tl.where(there, position, -1)
    if DOCUMENTS:
        for back in tl.static_range(TAPS - 2, -1, -1):
            begins = tl.load(starts + token - back, mask=age >= back, other=0)
            age = tl.where(begins != 0, tl.minimum(back, age), age)
    return age


@triton.jit
def load_seen(x, token, age, RANK: tl.constexpr, BLOCK_R: tl.constexpr, TAPS: tl.constexpr, BLOCK_TAPS: tl.constexpr):
    """The bottlenecks of tokens and of those before them, by distance and rank [tokens, X]; zero where there is none. `x` is that of a part."""
    column = tl.arange(0, BLOCK_TAPS * BLOCK_R)
    distance, rank = column // BLOCK_R, column % BLOCK_R
    mask = age[:, None] >= distance[None, :]
    # What is always true is not asked for: it would cost registers.
    if RANK < BLOCK_R:
        mask = mask & (rank < RANK)[None, :]
    if TAPS < BLOCK_TAPS:
        mask = mask & (distance < TAPS)[None, :]
    return tl.load(x + (token[:, None] - distance[None, :]) * (3 * RANK) + rank[None, :], mask=mask, other=0.0)


@triton.jit
def _forward_kernel(
    bottlenecks, folded, cosines, sines, radius, starts, local_q, local_k, global_q, global_k, v, batch, length, eps,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, TAPS: tl.constexpr, BLOCK_TAPS: tl.constexpr,
    RADIUS: tl.constexpr, SILU: tl.constexpr, SILU_VALUES: tl.constexpr, DOCUMENTS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = HEAD_SIZE // 2
    WIDTH: tl.constexpr = NUM_HEADS * HEAD_SIZE
    COLUMNS: tl.constexpr = BLOCK_TAPS * BLOCK_R
    head = tl.program_id(0)
    half = tl.arange(0, HALF)
    scale = tl.load(radius + head).to(tl.float32) * HEAD_SIZE**-0.5 if RADIUS else 1.0
    weights = ()
    for part in tl.static_range(3):
        channel = part * WIDTH + head * HEAD_SIZE
        weights += ((load_folded(folded, channel, HALF, COLUMNS), load_folded(folded, channel + HALF, HALF, COLUMNS)),)
    num_tiles = tl.cdiv(length, BLOCK_N)
    first = tl.program_id(1) // num_tiles * STEPS
    position = tl.program_id(1) % num_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    in_sequence = tl.full([BLOCK_N], True, tl.int1) if EVEN else position < length
    mask = tl.broadcast_to(in_sequence[:, None], [BLOCK_N, HALF])
    cosine = tl.load(cosines + position[:, None] * HALF + half[None, :], mask=mask, other=0.0)
    sine = tl.load(sines + position[:, None] * HALF + half[None, :], mask=mask, other=0.0)
    for sequence in tl.range(first, first + STEPS, num_stages=1):
        token = sequence * length + position
        there = in_sequence if EVEN else in_sequence & (sequence < batch)
        mask = tl.broadcast_to(there[:, None], [BLOCK_N, HALF])
        age = load_ages(starts, token, position, there, TAPS, DOCUMENTS)
        out = token[:, None] * WIDTH + (head * HEAD_SIZE + half)[None, :]
        for part in tl.static_range(3):
            seen = load_seen(bottlenecks + part * RANK, token, age, RANK, BLOCK_R, TAPS, BLOCK_TAPS)
            low = tl.dot(seen, tl.trans(weights[part][0]), input_precision=PRECISION)
            high = tl.dot(seen, tl.trans(weights[part][1]), input_precision=PRECISION)
            if part == 2:
                if SILU_VALUES:
                    low, high = low * sigmoid(low, FAST), high * sigmoid(high, FAST)
                tl.store(v + out, low.to(v.dtype.element_ty), mask=mask)
                tl.store(v + out + HALF, high.to(v.dtype.element_ty), mask=mask)
            else:
                to_global, to_local = (global_q, local_q) if part == 0 else (global_k, local_k)
                store_normalised(low, high, to_global + out, to_local + out, cosine, sine, scale, mask, eps, HEAD_SIZE, RADIUS, SILU, FAST)
