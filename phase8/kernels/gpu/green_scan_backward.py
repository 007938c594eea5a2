"""The adjoint of the Green scan in Triton, built like the forward: p_i = conj(g_i^2) (dg_i + q_{i+1}), q_i = b2_i p_i.

The value that passes from a token to the previous one is q, and a segment is an affine map q -> A q + B. Tokens are taken from the last to the
first, so lane 0 has the last segment.

Shapes: as in the forward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.gpu.green_scan import (
    Schedule,
    from_lane_before,
    heads_of_a_program,
    load,
    load_starts,
    load_state,
    multiply,
    multiply_add,
    of_last_lane,
    store,
    unless_started,
)
from phase8.kernels.gpu.layout import as_bytes, contiguous


def backward_schedule(batch_size: int, length: int, num_heads: int) -> Schedule:
    """Schedule of the backward, with shorter segments than the forward: a token is four numbers, and the scan of affine maps is cheap."""
    if triton.knobs.runtime.interpret:
        return Schedule(heads=2, segments=4, tokens=16, num_warps=1)
    heads = heads_of_a_program(batch_size, num_heads)
    segments = 256 // max(heads, 2)
    tokens = min(max(triton.next_power_of_2(triton.cdiv(length, segments)), 4), 16)
    return Schedule(heads, segments, tokens, num_warps=segments * heads // 32)


def green_scan_backward(
    grad: Tensor,
    g: Tensor,
    hopping: Tensor,
    starts: Tensor | None,
    initial_state: Tensor | None,
    schedule: Schedule | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the reference with this name, in fp32; the gradients of energy, eta and hopping are one tensor [3, H]."""
    batch_size, length, num_heads, _ = g.shape
    schedule = backward_schedule(batch_size, length, num_heads) if schedule is None else schedule
    dpotential = torch.empty(batch_size, length, num_heads, dtype=torch.float32, device=g.device)
    dscalars = torch.empty(3, batch_size, num_heads, dtype=torch.float32, device=g.device)
    dinitial = torch.empty(batch_size, num_heads, 2, dtype=torch.float32, device=g.device)
    backward_kernel[(triton.cdiv(num_heads, schedule.heads), batch_size)](
        *contiguous(grad, g, hopping), as_bytes(starts), *contiguous(initial_state), dpotential, dscalars, dinitial,
        batch_size, length, H=num_heads,
        N=schedule.heads, S=schedule.segments, L=schedule.tokens, EVEN=schedule.divides(length, num_heads),
        num_warps=schedule.num_warps,
    )  # fmt: skip
    return dpotential, dscalars.sum(1), dinitial


@triton.jit
def backward_kernel(
    grad, g, hopping, starts, initial_state, dpotential, dscalars, dinitial,
    batch_size, length, H: tl.constexpr,
    N: tl.constexpr, S: tl.constexpr, L: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Computes every p of N heads of one batch element, and their sums over its tokens."""
    b = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, S)[:, None]
    h = (tl.program_id(0) * N + tl.arange(0, N))[None, :]
    part = (tl.program_id(0) * (2 * N) + tl.arange(0, 2 * N))[None, :]
    zero = tl.zeros([S, N], tl.float32)
    hopping_h = zero + tl.load(hopping + h, mask=h < H, other=0.0)
    initial_r, initial_i = load_state(initial_state, b * H + h, h < H)
    grad += b * length * H * 2 + part
    g += b * length * H * 2 + part
    dpotential += b * length * H + h
    entry_r, entry_i = of_last_lane(zero, lane, S), of_last_lane(zero, lane, S)
    sum_p_r, sum_p_i, dhopping = zero, zero, zero

    num_tiles = tl.cdiv(length, S * L)
    for step in range(0, num_tiles):
        first = ((num_tiles - 1 - step) * S + (S - 1 - lane)) * L
        started = starts
        if starts is not None:
            started = load_starts(starts + b * length, first, length, L)
        g_first, grad_first, out = g + first * (2 * H), grad + first * (2 * H), dpotential + first * H
        # g_r[j] belongs to the token before token j.
        x, y = _load_complex(g_first - 2 * H, (first > 0) & (first <= length) & (part < 2 * H), False, S, N)
        g_r, g_i = (tl.where(first == 0, initial_r, x),), (tl.where(first == 0, initial_i, y),)
        grad_r, grad_i = (), ()
        for j in tl.static_range(L):
            mask = (first + j < length) & (part < 2 * H)
            x, y = _load_complex(g_first + j * (2 * H), mask, EVEN, S, N)
            g_r += (x,)
            g_i += (y,)
            x, y = _load_complex(grad_first + j * (2 * H), mask, EVEN, S, N)
            grad_r += (x,)
            grad_i += (y,)

        a_r, a_i, b_r, b_i = zero + 1.0, zero, zero, zero
        for j in tl.static_range(L - 1, -1, -1):
            m_r, m_i = _conjugate_square(g_r[j + 1], g_i[j + 1])
            b2 = unless_started(hopping_h, started, j)
            m_r, m_i = b2 * m_r, b2 * m_i
            a_r, a_i = multiply(m_r, m_i, a_r, a_i)
            b_r, b_i = multiply(m_r, m_i, b_r + grad_r[j], b_i + grad_i[j])

        # With the value that enters the tile put into the first map, B of every prefix is its exit.
        is_first = lane == 0
        into_r, into_i = multiply_add(a_r, a_i, entry_r, entry_i, b_r, b_i)
        b_r, b_i = tl.where(is_first, into_r, b_r), tl.where(is_first, into_i, b_i)
        _, _, exit_r, exit_i = tl.associative_scan((a_r, a_i, b_r, b_i), 0, _then_affine)

        q_r, q_i = from_lane_before(exit_r, exit_i)
        q_r, q_i = tl.where(is_first, entry_r, q_r), tl.where(is_first, entry_i, q_i)
        for j in tl.static_range(L - 1, -1, -1):
            m_r, m_i = _conjugate_square(g_r[j + 1], g_i[j + 1])
            p_r, p_i = multiply(m_r, m_i, q_r + grad_r[j], q_i + grad_i[j])
            store(out + j * H, p_r, (first + j < length) & (h < H), EVEN)
            sum_p_r, sum_p_i = sum_p_r + p_r, sum_p_i + p_i
            p_r, p_i = unless_started(p_r, started, j), unless_started(p_i, started, j)
            dhopping = tl.fma(g_r[j], p_r, tl.fma(g_i[j], p_i, dhopping))
            q_r, q_i = hopping_h * p_r, hopping_h * p_i
        entry_r, entry_i = of_last_lane(q_r, lane, S), of_last_lane(q_i, lane, S)

    place = b * H + h
    tl.store(dinitial + 2 * place, entry_r, mask=h < H)
    tl.store(dinitial + 2 * place + 1, entry_i, mask=h < H)
    tl.store(dscalars + place, -tl.sum(sum_p_r, 0)[None, :], mask=h < H)
    tl.store(dscalars + place + batch_size * H, -tl.sum(sum_p_i, 0)[None, :], mask=h < H)
    tl.store(dscalars + place + 2 * batch_size * H, tl.sum(dhopping, 0)[None, :], mask=h < H)


@triton.jit
def _load_complex(pointers, mask, EVEN: tl.constexpr, S: tl.constexpr, N: tl.constexpr):
    """Loads real and imaginary part [S, N], which are adjacent in memory, at once."""
    return tl.split(tl.reshape(load(pointers, mask, EVEN), [S, N, 2]))


@triton.jit
def _conjugate_square(x_r, x_i):
    return tl.fma(x_r, x_r, -(x_i * x_i)), -2.0 * x_r * x_i


@triton.jit
def _then_affine(a1_r, a1_i, b1_r, b1_i, a2_r, a2_i, b2_r, b2_i):
    """Composes two affine maps q -> A q + B, the first one applied first."""
    a_r, a_i = multiply(a2_r, a2_i, a1_r, a1_i)
    b_r, b_i = multiply_add(a2_r, a2_i, b1_r, b1_i, b2_r, b2_i)
    return a_r, a_i, b_r, b_i
