"""The inputs of the mixer's two paths in Triton, backward: one kernel, which reads and writes everything once.

A program walks over a piece of the sequence, token by token, for some heads of queries, keys or values. Values that a token
shares with its neighbours stay in registers: the convolution looks back at the last projections, and the gradient of a projection is
summed while the walk passes the tokens that used it. The gradients of the taps are sums of the walk, so nothing is reduced over
tokens and there are no atomics. After the end of its piece a program computes taps - 1 more tokens, for their use of the piece.

A head is held as two halves, the channels i and i + K/2 that a rotation mixes, and up to a size of 128 by one warp.

Shapes: B batch, T tokens, H heads, K head size; 3: queries, keys, values; of a program: N heads, channels [N, K/2] of either half.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.gpu.fast_math import sigmoid, silu_slope
from phase8.kernels.gpu.layout import contiguous
from phase8.kernels.gpu.mixer_inputs import constants, read_tensors

NUM_WARPS = 1
TOKENS_AT_A_TIME = 4  # at least the number of taps: only then does Triton overlap the next loads with the work
PIECE_TOKENS = 128
STAGES = 3


def prepare_backward(
    gradients: list[Tensor], qkv: Tensor, weight: Tensor | None, angles: Tensor, radius: Tensor | None, starts: Tensor | None,
    initial_state: Tensor | None, eps: float, silu: bool, silu_values: bool,
) -> list[Tensor]:
    """Gradients of qkv, with those of the projections before it in front, and of weight and radius if they exist."""
    batch, length, _, num_heads, _ = qkv.shape
    shared = constants(qkv, weight, radius, starts, initial_state, silu, silu_values)
    heads, num_warps = _heads_of_a_program(num_heads, shared["BLOCK_HALF"])
    piece = 8 if triton.knobs.runtime.interpret else PIECE_TOKENS
    num_pieces = triton.cdiv(length, piece)
    num_before = 0 if initial_state is None else initial_state.shape[1]
    dqkv = torch.empty(batch, num_before + length, *qkv.shape[2:], dtype=qkv.dtype, device=qkv.device)
    dtaps_parts = torch.empty(batch, num_pieces, shared["TAPS"], qkv[0, 0].numel(), dtype=torch.float32, device=qkv.device)
    dradius_parts = torch.empty(batch, num_pieces, 2, num_heads, dtype=torch.float32, device=qkv.device)
    _backward_kernel[(3 * (num_heads // heads), num_pieces, batch)](
        *read_tensors(qkv, weight, angles, radius, starts, initial_state), *contiguous(*gradients),
        dqkv, dtaps_parts, dradius_parts, length, eps,
        **shared, HEADS=heads, PIECE=piece, TOKENS=math.gcd(length, TOKENS_AT_A_TIME), STAGES=STAGES, num_warps=num_warps,
    )  # fmt: skip
    found = [dqkv]
    if weight is not None:
        found.append(dtaps_parts.sum((0, 1)).t().contiguous().to(weight.dtype))
    if radius is not None:
        found.append(dradius_parts.sum((0, 1, 2)).to(radius.dtype))
    return found


def _heads_of_a_program(num_heads: int, block_half: int) -> tuple[int, int]:
    """A divisor of the number of heads, and warps, such that a thread holds two channels of each half, whatever the head size."""
    heads = math.gcd(num_heads, max(1, NUM_WARPS * 64 // block_half))
    return heads, max(1, heads * block_half // 64)


@triton.jit
def _backward_kernel(
    qkv, weight, cosines, sines, radius, starts, initial, dlocal_q, dlocal_k, dglobal_q, dglobal_k, dv, dqkv, dtaps_parts, dradius_parts, length,
    eps, NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_HALF: tl.constexpr, TAPS: tl.constexpr, CONVOLUTION: tl.constexpr,
    RADIUS: tl.constexpr, SILU: tl.constexpr, SILU_VALUES: tl.constexpr, DOCUMENTS: tl.constexpr, CONTINUED: tl.constexpr, FAST: tl.constexpr,
    HEADS: tl.constexpr, PIECE: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) // (NUM_HEADS // HEADS)
    if part < 2:
        dlocal, dglobal = dlocal_q, dglobal_q
        if part == 1:
            dlocal, dglobal = dlocal_k, dglobal_k
        _walk(
            qkv, weight, cosines, sines, radius, starts, initial, dlocal, dglobal, dqkv, dtaps_parts, dradius_parts, part, length, eps,
            NUM_HEADS, HEAD_SIZE, BLOCK_HALF, TAPS, CONVOLUTION, True, RADIUS, SILU, DOCUMENTS, CONTINUED, FAST, HEADS, PIECE, TOKENS, STAGES,
        )  # fmt: skip
    else:
        _walk(
            qkv, weight, cosines, sines, radius, starts, initial, dv, dv, dqkv, dtaps_parts, dradius_parts, part, length, eps,
            NUM_HEADS, HEAD_SIZE, BLOCK_HALF, TAPS, CONVOLUTION, False, False, SILU_VALUES, DOCUMENTS, CONTINUED, FAST, HEADS, PIECE, TOKENS, STAGES,
        )  # fmt: skip


@triton.jit
def _walk(
    qkv, weight, cosines, sines, radius, starts, initial, dlocal, dglobal, dqkv, dtaps_parts, dradius_parts, part, length, eps,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_HALF: tl.constexpr, TAPS: tl.constexpr, CONVOLUTION: tl.constexpr,
    NORMALISED: tl.constexpr, RADIUS: tl.constexpr, SILU: tl.constexpr, DOCUMENTS: tl.constexpr, CONTINUED: tl.constexpr, FAST: tl.constexpr,
    HEADS: tl.constexpr, PIECE: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walks over a piece of the sequence for some heads, which are either normalised and rotated, or values; SILU is that of either."""
    HALF: tl.constexpr = HEAD_SIZE // 2
    WIDTH: tl.constexpr = NUM_HEADS * HEAD_SIZE
    batch, begin = tl.cast(tl.program_id(2), tl.int64), tl.program_id(1) * PIECE
    end = tl.minimum(begin + PIECE, length)
    head = (tl.program_id(0) % (NUM_HEADS // HEADS) * HEADS + tl.arange(0, HEADS))[:, None]
    half = tl.broadcast_to(tl.arange(0, BLOCK_HALF)[None, :], [HEADS, BLOCK_HALF])
    inside = half < HALF
    column = head * HEAD_SIZE + half
    channel = part * WIDTH + column
    first_row = batch * length
    # Where a sequence is continued, rows of gradients for the tokens before it precede those of each sequence.
    NUM_BEFORE: tl.constexpr = TAPS - 1 if CONTINUED else 0
    x, dx = qkv + first_row * (3 * WIDTH) + channel, dqkv + (first_row + (batch + 1) * NUM_BEFORE) * (3 * WIDTH) + channel
    initial = initial + (batch + 1) * (NUM_BEFORE * 3 * WIDTH) + channel if CONTINUED else x
    first_stored = tl.where(begin == 0, -NUM_BEFORE, begin) if CONTINUED else begin
    dlocal, dglobal = dlocal + first_row * WIDTH + column, dglobal + first_row * WIDTH + column
    starts = starts + first_row if DOCUMENTS else x
    root: tl.constexpr = HEAD_SIZE**-0.5
    scale = tl.load(radius + head).to(tl.float32) * root if RADIUS else root
    taps_low = _taps(weight + channel, inside, 3 * WIDTH, TAPS) if CONVOLUTION else (1.0,)
    taps_high = _taps(weight + channel + HALF, inside, 3 * WIDTH, TAPS) if CONVOLUTION else (1.0,)
    zero = tl.zeros([HEADS, BLOCK_HALF], tl.float32)
    nothing = (zero,) * TAPS
    # The projections before the first token. Age: number of tokens since its document began, or more.
    seen_low, seen_high, age = nothing, nothing, 0
    for distance in tl.static_range(TAPS - 1, 0, -1):
        token = tl.cast(begin - distance, tl.int64)
        if DOCUMENTS:
            age = tl.where(tl.load(starts + token, mask=token >= 0, other=0 if CONTINUED else 1) == 0, age + 1, 0)
        low, high = _halves(x + token * (3 * WIDTH), inside & (token >= 0), HALF)
        if CONTINUED:
            low_before, high_before = _halves(initial + token * (3 * WIDTH), inside & (token < 0), HALF)
            low, high = low + low_before, high + high_before
        seen_low, seen_high = _shifted(low, seen_low, age, TAPS, False), _shifted(high, seen_high, age, TAPS, False)
    state = (seen_low, seen_high, nothing, nothing, nothing, nothing, zero, age)
    for first in tl.range(begin, end, TOKENS, num_stages=STAGES):
        state = _advance(
            state, taps_low, taps_high, x, dlocal, dglobal, cosines + half, sines + half, starts, dx, inside, scale, first, first_stored, length, eps,
            WIDTH, HEAD_SIZE, TAPS, NORMALISED, RADIUS, SILU, DOCUMENTS, FAST, TOKENS, False,
        )  # fmt: skip
    if TAPS > 1:
        state = _advance(
            state, taps_low, taps_high, x, dlocal, dglobal, cosines + half, sines + half, starts, dx, inside, scale, end, first_stored, length, eps,
            WIDTH, HEAD_SIZE, TAPS, NORMALISED, RADIUS, SILU, DOCUMENTS, FAST, TAPS - 1, True,
        )  # fmt: skip
    piece = batch * tl.num_programs(1) + tl.program_id(1)
    if CONVOLUTION:
        for distance in tl.static_range(TAPS):
            parts = dtaps_parts + (piece * TAPS + (TAPS - 1 - distance)) * (3 * WIDTH) + channel
            tl.store(parts, state[4][distance], mask=inside)
            tl.store(parts + HALF, state[5][distance], mask=inside)
    if RADIUS:
        tl.store(dradius_parts + (piece * 2 + part) * NUM_HEADS + head, tl.sum(state[6], 1, keep_dims=True) * root)


@triton.jit
def _advance(
    state, taps_low, taps_high, x, dlocal, dglobal, cosines, sines, starts, dx, inside, scale, first, first_stored, length, eps,
    WIDTH: tl.constexpr, HEAD_SIZE: tl.constexpr, TAPS: tl.constexpr, NORMALISED: tl.constexpr, RADIUS: tl.constexpr,
    SILU: tl.constexpr, DOCUMENTS: tl.constexpr, FAST: tl.constexpr, TOKENS: tl.constexpr, BEHIND: tl.constexpr,
):  # fmt: skip
    """Advances by some tokens, in the piece or after its end; those after the end are not counted, since the next piece counts them."""
    HALF: tl.constexpr = HEAD_SIZE // 2
    seen_low, seen_high, sums_low, sums_high, dtaps_low, dtaps_high, dradius, age = state
    # All loads precede the first store, since loads are not moved across stores.
    values, dlocals, dglobals = (), (), ()
    for index in tl.static_range(TOKENS):
        token = tl.cast(first + index, tl.int64)
        there = inside & (token < length) if BEHIND else inside
        values += (_halves(x + token * (3 * WIDTH), there, HALF),)
        dlocals += (_halves(dlocal + token * WIDTH, there, HALF),)
        if NORMALISED:
            dglobals += (_halves(dglobal + token * WIDTH, there, HALF),)
    finished = ()
    for index in tl.static_range(TOKENS):
        token = tl.cast(first + index, tl.int64)
        there = inside & (token < length) if BEHIND else inside
        if DOCUMENTS:
            begins = tl.load(starts + token, mask=token < length, other=1) if BEHIND else tl.load(starts + token)
            age = tl.where(begins == 0, age + 1, 0)
        seen_low = _shifted(values[index][0], seen_low, age, TAPS, DOCUMENTS)
        seen_high = _shifted(values[index][1], seen_high, age, TAPS, DOCUMENTS)
        dlow, dhigh = dlocals[index]
        if NORMALISED:
            cosine = tl.load(cosines + token * HALF, mask=there, other=0.0)
            sine = tl.load(sines + token * HALF, mask=there, other=0.0)
            # The adjoint of a rotation is the inverse rotation.
            dlow, dhigh = dlow * cosine + dhigh * sine, dhigh * cosine - dlow * sine
            dlow, dhigh, dscale = _before_normalisation(
                _convolved(seen_low, taps_low, TAPS), _convolved(seen_high, taps_high, TAPS), dlow, dhigh, *dglobals[index],
                scale, eps, HEAD_SIZE, RADIUS, SILU, FAST,
            )  # fmt: skip
        elif SILU:
            dlow *= silu_slope(_convolved(seen_low, taps_low, TAPS), FAST)
            dhigh *= silu_slope(_convolved(seen_high, taps_high, TAPS), FAST)
        if BEHIND:
            dlow, dhigh = tl.where(there, dlow, 0.0), tl.where(there, dhigh, 0.0)
        else:
            dtaps_low, dtaps_high = _counted(dtaps_low, dlow, seen_low, TAPS), _counted(dtaps_high, dhigh, seen_high, TAPS)
            if RADIUS:
                dradius += dscale
        sums_low = _spread(sums_low, dlow, taps_low, age, TAPS, DOCUMENTS)
        sums_high = _spread(sums_high, dhigh, taps_high, age, TAPS, DOCUMENTS)
        finished += ((sums_low[TAPS - 1].to(dx.dtype.element_ty), sums_high[TAPS - 1].to(dx.dtype.element_ty)),)
    for index in tl.static_range(TOKENS):
        token = first + index - (TAPS - 1)  # the last token that uses it has passed
        row = dx + tl.cast(token, tl.int64) * (3 * WIDTH)
        tl.store(row, finished[index][0], mask=inside & (token >= first_stored))
        tl.store(row + HALF, finished[index][1], mask=inside & (token >= first_stored))
    return (seen_low, seen_high, sums_low, sums_high, dtaps_low, dtaps_high, dradius, age)


@triton.jit
def _before_normalisation(
    low, high, dlow, dhigh, dnormal_low, dnormal_high, scale, eps,
    HEAD_SIZE: tl.constexpr, RADIUS: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradients before normalisation from those after the inverse rotation and those of the global path; also each channel's share of the radius."""
    reciprocal = tl.rsqrt(tl.sum(low * low + high * high, 1, keep_dims=True) / HEAD_SIZE + eps)
    dscale = reciprocal * (low * dlow + high * dhigh)
    if SILU:
        sigmoid_low, sigmoid_high = sigmoid(low, FAST), sigmoid(high, FAST)
        active_low, active_high = low * sigmoid_low, high * sigmoid_high
        by_rms = tl.rsqrt(tl.sum(active_low * active_low + active_high * active_high, 1, keep_dims=True) / HEAD_SIZE + eps)
        mean = tl.sum(active_low * dnormal_low + active_high * dnormal_high, 1, keep_dims=True) * (by_rms * by_rms / HEAD_SIZE)
        dglobal_low = (dnormal_low - active_low * mean) * by_rms * (sigmoid_low + active_low * (1.0 - sigmoid_low))
        dglobal_high = (dnormal_high - active_high * mean) * by_rms * (sigmoid_high + active_high * (1.0 - sigmoid_high))
        if RADIUS:
            dlow, dhigh = dlow * scale, dhigh * scale
            mean = tl.sum(low * dlow + high * dhigh, 1, keep_dims=True) * (reciprocal * reciprocal / HEAD_SIZE)
            dlow, dhigh = (dlow - low * mean) * reciprocal, (dhigh - high * mean) * reciprocal
        dnormal_low, dnormal_high = dglobal_low + dlow, dglobal_high + dhigh
    else:
        if RADIUS:
            dnormal_low, dnormal_high = dnormal_low + dlow * scale, dnormal_high + dhigh * scale
        # The two sums over channels are independent, so neither waits for the other.
        mean = tl.sum(low * dnormal_low + high * dnormal_high, 1, keep_dims=True) * (reciprocal * reciprocal / HEAD_SIZE)
        dnormal_low, dnormal_high = (dnormal_low - low * mean) * reciprocal, (dnormal_high - high * mean) * reciprocal
        if not RADIUS:
            dnormal_low, dnormal_high = dnormal_low + dlow, dnormal_high + dhigh
    return dnormal_low, dnormal_high, dscale


@triton.jit
def _halves(pointers, inside, HALF: tl.constexpr):
    """Loads both halves of the heads, fp32."""
    low, high = tl.load(pointers, mask=inside, other=0.0), tl.load(pointers + HALF, mask=inside, other=0.0)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _taps(weight, inside, ROW: tl.constexpr, TAPS: tl.constexpr):
    """Loads the taps of a half by distance, beginning with the token itself."""
    taps = ()
    for distance in tl.static_range(TAPS):
        taps += (tl.load(weight + (TAPS - 1 - distance) * ROW, mask=inside, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _shifted(newest, seen, age, TAPS: tl.constexpr, DOCUMENTS: tl.constexpr):
    """The projections that a token sees, by distance; zero before its document."""
    now = (newest,)
    for distance in tl.static_range(1, TAPS):
        now += (tl.where(age >= distance, seen[distance - 1], 0.0) if DOCUMENTS else seen[distance - 1],)
    return now


@triton.jit
def _convolved(seen, taps, TAPS: tl.constexpr):
    """The convolution at one token."""
    total = seen[0] * taps[0]
    for distance in tl.static_range(1, TAPS):
        total += seen[distance] * taps[distance]
    return total


@triton.jit
def _counted(dtaps, gradient, seen, TAPS: tl.constexpr):
    """Adds one token to the gradients of the taps."""
    now = ()
    for distance in tl.static_range(TAPS):
        now += (dtaps[distance] + gradient * seen[distance],)
    return now


@triton.jit
def _spread(sums, gradient, taps, age, TAPS: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Adds a token's contribution to the gradients of the projections that it sees, by distance; the last one is then complete."""
    now = (gradient * taps[0],)
    for distance in tl.static_range(1, TAPS):
        term = gradient * taps[distance]
        now += (sums[distance - 1] + (tl.where(age >= distance, term, 0.0) if DOCUMENTS else term),)
    return now
