"""The Green scan in Triton: a sequence is cut into segments, which the lanes of a program process in parallel.

Each lane first composes the Möbius map of its segment alone, as a 2 x 2 complex matrix. A scan over the lanes turns the maps into what
enters each segment, and each lane then runs through its segment once more, exactly as the recurrence says. It holds the tokens of its
segment in registers in between: memory is read once, and all loads are under way at once. The adjoint is built alike.

Shapes: B batch, T tokens, H heads; of a program: N heads, S segments, L tokens of a segment. A sequence longer than S L tokens is worked
off in tiles of so many, the state carried from one to the next. A complex number is two tensors, named by _r and _i.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.gpu.fast_math import has_fast_math
from phase8.kernels.gpu.layout import as_bytes, contiguous

FULL_CHIP = 96  # number of programs that counts as filling a GPU


@dataclass(frozen=True)
class Schedule:
    """The division of the work.

    Args:
        heads: N, a power of two.
        segments: S, a power of two.
        tokens: L, a power of two up to 32.
        num_warps: Warps of a program.
    """

    heads: int
    segments: int
    tokens: int
    num_warps: int

    def divides(self, length: int, num_heads: int) -> bool:
        """Whether every tile is full, so that no access needs a mask."""
        return length % (self.segments * self.tokens) == 0 and num_heads % self.heads == 0


def heads_of_a_program(batch_size: int, num_heads: int) -> int:
    """N: as many heads (neighbours in memory) as still leave the chip filled."""
    return next((n for n in (4, 2) if batch_size * triton.cdiv(num_heads, n) >= FULL_CHIP), 1)


def forward_schedule(batch_size: int, length: int, num_heads: int, *, packed: bool) -> Schedule:
    """Schedule of the forward: about a hundred segments hide latency; more would cost more in the scan than they save.

    Args:
        batch_size: B.
        length: T.
        num_heads: H.
        packed: Whether documents begin inside sequences.
    """
    if triton.knobs.runtime.interpret:
        return Schedule(heads=2, segments=4, tokens=16, num_warps=1)
    heads, segments = heads_of_a_program(batch_size, num_heads), 128
    tokens = min(max(triton.next_power_of_2(triton.cdiv(length, segments)), 4), 32)
    num_warps = segments * heads // (32 * min(heads, 2))  # two chains in a thread hide each other's latency
    schedule = Schedule(heads, segments, tokens, num_warps)
    # A mask per token costs registers and compile time, so there are fewer tokens.
    return schedule if schedule.divides(length, num_heads) and not packed else Schedule(heads, segments, min(tokens, 16), num_warps)


def green_scan(
    potential: Tensor,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    starts: Tensor | None,
    initial_state: Tensor | None,
    schedule: Schedule | None = None,
) -> Tensor:
    """Computes the reference with this name, in fp32."""
    batch_size, length, num_heads = potential.shape
    schedule = forward_schedule(batch_size, length, num_heads, packed=starts is not None) if schedule is None else schedule
    if potential.stride(2) != 1:
        potential = potential.contiguous()
    g = torch.empty(*potential.shape, 2, dtype=torch.float32, device=potential.device)
    forward_kernel[(triton.cdiv(num_heads, schedule.heads), batch_size)](
        potential, *contiguous(energy, eta, hopping), as_bytes(starts), *contiguous(initial_state), g,
        length, potential.stride(0), STRIDE_T=potential.stride(1), H=num_heads,
        N=schedule.heads, S=schedule.segments, L=schedule.tokens, EVEN=schedule.divides(length, num_heads), FAST=has_fast_math(),
        num_warps=schedule.num_warps,
    )  # fmt: skip
    return g


@triton.jit
def forward_kernel(
    potential, energy, eta, hopping, starts, initial_state, g,
    length, stride_b, STRIDE_T: tl.constexpr, H: tl.constexpr,
    N: tl.constexpr, S: tl.constexpr, L: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Computes every g of N heads of one batch element."""
    b = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, S)[:, None]
    h = (tl.program_id(0) * N + tl.arange(0, N))[None, :]
    part = (tl.program_id(0) * (2 * N) + tl.arange(0, 2 * N))[None, :]
    zero = tl.zeros([S, N], tl.float32)
    energy_h = zero + tl.load(energy + h, mask=h < H, other=0.0)
    minus_eta = zero - tl.load(eta + h, mask=h < H, other=1.0)
    hopping_h = zero + tl.load(hopping + h, mask=h < H, other=0.0)
    entry_r, entry_i = load_state(initial_state, b * H + h, h < H)
    potential += b * stride_b + h
    g += b * length * H * 2 + part

    for tile in range(0, length, S * L):
        first = tile + lane * L
        started = starts
        if starts is not None:
            started = load_starts(starts + b * length, first, length, L)
        tokens, out = potential + first * STRIDE_T, g + first * (2 * H)
        x = ()  # real part of z - a = x + i eta
        for j in tl.static_range(L):
            x += (energy_h - load(tokens + j * STRIDE_T, (first + j < length) & (h < H), EVEN),)

        # The product of [[0, 1], [-b2, z - a]] over the segment: the lower row moves up, so that a step costs one new row.
        a_r, a_i, b_r, b_i = zero, zero, zero + 1.0, zero
        c_r, c_i, d_r, d_i = unless_started(-hopping_h, started, 0), zero, x[0], -minus_eta
        for j in tl.static_range(1, L):
            minus_b2 = unless_started(-hopping_h, started, j)
            a_r, a_i, c_r, c_i = c_r, c_i, _next(x[j], minus_eta, c_r, c_i, minus_b2 * a_r), _next(x[j], -minus_eta, c_i, c_r, minus_b2 * a_i)
            b_r, b_i, d_r, d_i = d_r, d_i, _next(x[j], minus_eta, d_r, d_i, minus_b2 * b_r), _next(x[j], -minus_eta, d_i, d_r, minus_b2 * b_i)
            if j % 8 == 7 or j == L - 1:
                scale = _reciprocal(tl.maximum(tl.maximum(tl.abs(c_r), tl.abs(c_i)), tl.maximum(tl.abs(d_r), tl.abs(d_i))), FAST)
                a_r, a_i, b_r, b_i = a_r * scale, a_i * scale, b_r * scale, b_i * scale
                c_r, c_i, d_r, d_i = c_r * scale, c_i * scale, d_r * scale, d_i * scale

        # As g -> (A g + B) / (C g + 1). With the state that enters the tile put into the first map, B of every prefix is its exit.
        a_r, a_i, b_r, b_i, c_r, c_i = _divide(a_r, a_i, b_r, b_i, c_r, c_i, d_r, d_i, FAST)
        is_first = lane == 0
        b_r, b_i = _apply_in(is_first, a_r, a_i, b_r, b_i, c_r, c_i, entry_r, entry_i, FAST)
        if FAST:
            _, _, exit_r, exit_i, _, _ = tl.associative_scan((a_r, a_i, b_r, b_i, c_r, c_i), 0, _then_moebius_fast)
        else:
            _, _, exit_r, exit_i, _, _ = tl.associative_scan((a_r, a_i, b_r, b_i, c_r, c_i), 0, _then_moebius)

        g_r, g_i = from_lane_before(exit_r, exit_i)
        g_r, g_i = tl.where(is_first, entry_r, g_r), tl.where(is_first, entry_i, g_i)
        for j in tl.static_range(L):
            b2 = unless_started(hopping_h, started, j)
            d_r, minus_d_i = tl.fma(-b2, g_r, x[j]), tl.fma(b2, g_i, minus_eta)
            scale = _reciprocal(tl.fma(d_r, d_r, minus_d_i * minus_d_i), FAST)
            g_r, g_i = d_r * scale, minus_d_i * scale
            store(out + j * (2 * H), tl.reshape(tl.join(g_r, g_i), [S, 2 * N]), (first + j < length) & (part < 2 * H), EVEN)
        entry_r, entry_i = of_last_lane(g_r, lane, S), of_last_lane(g_i, lane, S)


@triton.jit
def _next(x, y, u, v, w):
    """The sum x u + y v + w."""
    return tl.fma(x, u, tl.fma(y, v, w))


@triton.jit
def _reciprocal(x, FAST: tl.constexpr):
    """1 / x for a normal x, in one instruction where there is one."""
    if FAST:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def _divide(a_r, a_i, b_r, b_i, c_r, c_i, d_r, d_i, FAST: tl.constexpr):
    """A / D, B / D and C / D."""
    scale = _reciprocal(tl.fma(d_r, d_r, d_i * d_i), FAST)
    d_r, d_i = d_r * scale, -d_i * scale
    a_r, a_i = multiply(a_r, a_i, d_r, d_i)
    b_r, b_i = multiply(b_r, b_i, d_r, d_i)
    c_r, c_i = multiply(c_r, c_i, d_r, d_i)
    return a_r, a_i, b_r, b_i, c_r, c_i


@triton.jit
def _apply_in(lanes, a_r, a_i, b_r, b_i, c_r, c_i, g_r, g_i, FAST: tl.constexpr):
    """Applies (A g + B) / (C g + 1) in the given lanes; B in the other lanes."""
    d_r, d_i = multiply_add(c_r, c_i, g_r, g_i, 1.0, 0.0)
    scale = _reciprocal(tl.fma(d_r, d_r, d_i * d_i), FAST)
    n_r, n_i = multiply_add(a_r, a_i, g_r, g_i, b_r, b_i)
    n_r, n_i = multiply(n_r, n_i, d_r * scale, -d_i * scale)
    return tl.where(lanes, n_r, b_r), tl.where(lanes, n_i, b_i)


@triton.jit
def _then_moebius(a1_r, a1_i, b1_r, b1_i, c1_r, c1_i, a2_r, a2_i, b2_r, b2_i, c2_r, c2_i):
    return _compose(a1_r, a1_i, b1_r, b1_i, c1_r, c1_i, a2_r, a2_i, b2_r, b2_i, c2_r, c2_i, False)


@triton.jit
def _then_moebius_fast(a1_r, a1_i, b1_r, b1_i, c1_r, c1_i, a2_r, a2_i, b2_r, b2_i, c2_r, c2_i):
    return _compose(a1_r, a1_i, b1_r, b1_i, c1_r, c1_i, a2_r, a2_i, b2_r, b2_i, c2_r, c2_i, True)


@triton.jit
def _compose(a1_r, a1_i, b1_r, b1_i, c1_r, c1_i, a2_r, a2_i, b2_r, b2_i, c2_r, c2_i, FAST: tl.constexpr):
    """Composes the first map with the second. Both have D = 1, and so has the result, whose entries are bounded by powers of 1 / eta and b2."""
    d_r, d_i = multiply_add(c2_r, c2_i, b1_r, b1_i, 1.0, 0.0)
    a_r, a_i = multiply(a2_r, a2_i, a1_r, a1_i)
    a_r, a_i = multiply_add(b2_r, b2_i, c1_r, c1_i, a_r, a_i)
    b_r, b_i = multiply_add(a2_r, a2_i, b1_r, b1_i, b2_r, b2_i)
    c_r, c_i = multiply_add(c2_r, c2_i, a1_r, a1_i, c1_r, c1_i)
    return _divide(a_r, a_i, b_r, b_i, c_r, c_i, d_r, d_i, FAST)


@triton.jit
def load(pointers, mask, EVEN: tl.constexpr):
    """Loads with a mask, 0 where it is False; EVEN: without a mask."""
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store(pointers, x, mask, EVEN: tl.constexpr):
    """Stores with a mask; EVEN: without a mask."""
    if EVEN:
        tl.store(pointers, x)
    else:
        tl.store(pointers, x, mask=mask)


@triton.jit
def load_state(state, place, mask):
    """Loads a complex number per head; 0 without a state."""
    if state is None:
        return place * 0.0, place * 0.0
    else:
        return tl.load(state + 2 * place, mask=mask, other=0.0), tl.load(state + 2 * place + 1, mask=mask, other=0.0)


@triton.jit
def load_starts(starts, first, length, L: tl.constexpr):
    """The tokens of each lane that begin a document, as bits [S, 1]."""
    token = tl.arange(0, L)[None, :]
    flags = tl.load(starts + first + token, mask=first + token < length, other=0)
    return tl.sum(flags.to(tl.int32) << token, 1)[:, None]


@triton.jit
def unless_started(x, started, j: tl.constexpr):
    """`x`, but 0 in lanes whose token j begins a document."""
    if started is None:
        return x
    else:
        return tl.where(((started >> j) & 1) == 1, 0.0, x)


@triton.jit
def of_last_lane(x, lane, S: tl.constexpr):
    """The last lane: [S, N] -> [1, N]."""
    return tl.sum(tl.where(lane == S - 1, x, 0.0), 0)[None, :]


@triton.jit
def from_lane_before(x, y):
    """Shifts both tensors by one lane; lane 0 keeps its values. It uses a scan, because a gather would change the layout."""
    before_x, before_y, _, _, _ = tl.associative_scan((x, y, x, y, (x * 0.0).to(tl.int32) + 1), 0, _then_next)
    return before_x, before_y


@triton.jit
def _then_next(before_x1, before_y1, x1, y1, count1, before_x2, before_y2, x2, y2, count2):
    """The last element of a range of lanes, and the one before it."""
    return tl.where(count2 == 1, x1, before_x2), tl.where(count2 == 1, y1, before_y2), x2, y2, count1 + count2


@triton.jit
def multiply(x_r, x_i, y_r, y_i):
    """The product x y."""
    return tl.fma(x_r, y_r, -(x_i * y_i)), tl.fma(x_r, y_i, x_i * y_r)


@triton.jit
def multiply_add(x_r, x_i, y_r, y_i, u_r, u_i):
    """The sum x y + u."""
    return tl.fma(x_r, y_r, tl.fma(-x_i, y_i, u_r)), tl.fma(x_r, y_i, tl.fma(x_i, y_r, u_i))
