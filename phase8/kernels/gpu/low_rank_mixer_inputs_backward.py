"""The inputs of the mixer's two paths from bottlenecks in Triton, backward: one kernel reads every gradient once, a small one adds its sums.

A program has one head of queries, keys or values, and walks backwards through pieces of sequences, a token of each at a time. What later
tokens owe to the bottlenecks of earlier ones so stays in the rows of a tile, as in the walk of `mixer_inputs_backward`: with X columns by
distance and rank, the gradient at a token times the folded weights is what it owes to itself and to the tokens before it. At the beginning of
its piece it writes what is still owed to the piece before, which the second kernel adds beside the sum over heads. Gradients of weights are
sums of the walk, [X, K/2] for either half. There are no atomics.

Shapes: as in `low_rank_mixer_inputs`; P tokens of a piece, S streams = pieces of all sequences, M programs for each head and part.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.gpu.fast_math import sigmoid, silu_slope
from phase8.kernels.gpu.gated_linear_attention import num_processors
from phase8.kernels.gpu.layout import contiguous
from phase8.kernels.gpu.low_rank_mixer_inputs import choose_tiles, constants, fold, load_ages, load_folded, load_seen

PIECE_TOKENS = (8, 128)  # shortest, so that what is owed to the piece before is little; longest
SUMMED_TOKENS = 64


def prepare_backward(
    gradients: list[Tensor], bottlenecks: Tensor, ups: list[Tensor], taps: Tensor | None, angles: Tensor, radius: Tensor | None,
    starts: Tensor | None, num_heads: int, eps: float, silu: bool, silu_values: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the bottlenecks, and those of the weights in one row: the three up weights, the taps, and of the radius those by q and by k."""
    bottlenecks = bottlenecks.contiguous()
    batch, length, _ = bottlenecks.shape
    tiles = choose_tiles(batch * length, num_heads, ups[0].shape[1], bottlenecks.device)
    shared = constants(ups, taps, radius, starts, num_heads, silu, silu_values)
    num_tokens, rank, num_taps, device = batch * length, shared["RANK"], shared["TAPS"], bottlenecks.device
    piece = _piece_tokens(length, num_tokens * 3 * num_heads // tiles.rows, tiles.programs * num_processors(device))
    num_streams = batch * triton.cdiv(length, piece)
    num_programs = triton.cdiv(num_streams, tiles.rows)
    is_even = length % piece == 0 and num_streams % tiles.rows == 0
    by_head = torch.empty(3, num_heads, num_tokens, rank, dtype=bottlenecks.dtype, device=device)
    owed = torch.empty(3, num_heads, num_streams, num_taps - 1, rank, dtype=bottlenecks.dtype, device=device)
    num_sums = _num_sums(ups, taps, radius, num_heads)
    sums = torch.empty(num_programs, num_sums, dtype=torch.float32, device=device)
    _backward_kernel[(num_heads, num_programs, 3)](
        bottlenecks, fold(bottlenecks, ups, taps, shared), *contiguous(*ups, taps, angles.cos(), angles.sin(), radius, starts, *gradients),
        by_head, owed, sums,
        num_streams, batch, length, piece, num_sums, eps,
        **shared, CONVOLUTION=taps is not None, ROWS=tiles.rows, STAGES=tiles.stages, EVEN=is_even, ALIGNED=is_even and batch % tiles.rows == 0,
        num_warps=tiles.backward_warps,
    )  # fmt: skip
    dbottlenecks = torch.empty_like(bottlenecks)
    sizes = {name: shared[name] for name in ("NUM_HEADS", "RANK", "BLOCK_R", "TAPS")}
    _sum_kernel[(triton.cdiv(num_tokens, SUMMED_TOKENS), 3)](
        by_head, owed, dbottlenecks, num_tokens, num_streams, batch, length, piece, **sizes, BLOCK_N=SUMMED_TOKENS, num_warps=2,
    )  # fmt: skip
    return dbottlenecks, sums.sum(0)


def _num_sums(ups: list[Tensor], taps: Tensor | None, radius: Tensor | None, num_heads: int) -> int:
    """How many numbers the gradients of the weights have."""
    return sum(up.numel() for up in ups) + (0 if taps is None else taps.numel()) + (0 if radius is None else 2 * num_heads)


def _piece_tokens(length: int, num_steps: int, num_programs: int) -> int:
    """Tokens of a piece, a power of two: walks of altogether so many steps make at least so many programs, where pieces can be that short."""
    shortest, longest = (4, 8) if triton.knobs.runtime.interpret else PIECE_TOKENS
    wanted = max(shortest, min(longest, num_steps // num_programs))
    return min(1 << (wanted.bit_length() - 1), triton.next_power_of_2(length))


@triton.jit
def _backward_kernel(
    bottlenecks, folded, up_q, up_k, up_v, taps, cosines, sines, radius, starts, dlocal_q, dlocal_k, dglobal_q, dglobal_k, dv, by_head, owed, sums,
    num_streams, batch, length, piece, num_sums, eps,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, TAPS: tl.constexpr, BLOCK_TAPS: tl.constexpr,
    RADIUS: tl.constexpr, SILU: tl.constexpr, SILU_VALUES: tl.constexpr, DOCUMENTS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    CONVOLUTION: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(2)
    sums += tl.cast(tl.program_id(1), tl.int64) * num_sums
    if part < 2:
        dlocal, dglobal, up = dlocal_q, dglobal_q, up_q
        if part == 1:
            dlocal, dglobal, up = dlocal_k, dglobal_k, up_k
        _walk(
            bottlenecks, folded, up, taps, cosines, sines, radius, starts, dlocal, dglobal, by_head, owed, sums, part,
            num_streams, batch, length, piece, eps, NUM_HEADS, HEAD_SIZE, RANK, BLOCK_R, TAPS, BLOCK_TAPS,
            True, RADIUS, SILU, DOCUMENTS, FAST, PRECISION, CONVOLUTION, ROWS, STAGES, EVEN, ALIGNED,
        )  # fmt: skip
    else:
        _walk(
            bottlenecks, folded, up_v, taps, cosines, sines, radius, starts, dv, dv, by_head, owed, sums, part,
            num_streams, batch, length, piece, eps, NUM_HEADS, HEAD_SIZE, RANK, BLOCK_R, TAPS, BLOCK_TAPS,
            False, False, SILU_VALUES, DOCUMENTS, FAST, PRECISION, CONVOLUTION, ROWS, STAGES, EVEN, ALIGNED,
        )  # fmt: skip


@triton.jit
def _walk(
    bottlenecks, folded, up, taps, cosines, sines, radius, starts, dlocal, dglobal, by_head, owed, sums, part,
    num_streams, batch, length, piece, eps,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, TAPS: tl.constexpr, BLOCK_TAPS: tl.constexpr,
    NORMALISED: tl.constexpr, RADIUS: tl.constexpr, SILU: tl.constexpr, DOCUMENTS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    CONVOLUTION: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Walks through the pieces of some streams for one head, which is either normalised and rotated, or values; SILU is that of either."""
    HALF: tl.constexpr = HEAD_SIZE // 2
    WIDTH: tl.constexpr = NUM_HEADS * HEAD_SIZE
    COLUMNS: tl.constexpr = BLOCK_TAPS * BLOCK_R
    head = tl.program_id(0)
    half, rank = tl.arange(0, HALF), tl.arange(0, BLOCK_R)
    channel = part * WIDTH + head * HEAD_SIZE
    weight_low, weight_high = load_folded(folded, channel, HALF, COLUMNS), load_folded(folded, channel + HALF, HALF, COLUMNS)
    # The pieces of all sequences that begin at the same position are neighbours, so that rows of a tile read the same angles where they can.
    stream = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    exists = tl.full([ROWS], True, tl.int1) if EVEN else stream < num_streams
    begin = tl.where(exists, stream // batch * piece, length)
    before = stream % batch * length  # tokens of earlier sequences
    column = (head * HEAD_SIZE + half)[None, :]
    scale = tl.load(radius + head).to(tl.float32) * HEAD_SIZE**-0.5 if RADIUS else 1.0
    # Where this program writes the head's share of the gradient of each token's bottleneck.
    shares = by_head + tl.cast(part * NUM_HEADS + head, tl.int64) * (tl.cast(batch, tl.int64) * length * RANK) + rank[None, :]
    dlow_sum, dhigh_sum = tl.zeros([COLUMNS, HALF], tl.float32), tl.zeros([COLUMNS, HALF], tl.float32)
    debts = (tl.zeros([ROWS, BLOCK_R], tl.float32),) * (TAPS - 1)
    dradius = tl.zeros([ROWS], tl.float32)
    for step in tl.range(0, piece, num_stages=STAGES, disable_licm=True):
        index = piece - 1 - step
        position = begin + index
        there, token = tl.full([ROWS], True, tl.int1) if EVEN else position < length, before + position
        age = load_ages(starts, token, position, there, TAPS, DOCUMENTS)
        seen = load_seen(bottlenecks + part * RANK, token, age, RANK, BLOCK_R, TAPS, BLOCK_TAPS)
        row = token[:, None] * WIDTH + column
        mask = tl.broadcast_to(there[:, None], [ROWS, HALF])
        dlow = tl.load(dlocal + row, mask=mask, other=0.0).to(tl.float32)
        dhigh = tl.load(dlocal + row + HALF, mask=mask, other=0.0).to(tl.float32)
        if NORMALISED:
            if ALIGNED:  # all rows have one position
                angle = (tl.program_id(1) * ROWS // batch * piece + index) * HALF + half[None, :]
                cosine, sine = tl.load(cosines + angle), tl.load(sines + angle)
            else:
                angle = position[:, None] * HALF + half[None, :]
                cosine, sine = tl.load(cosines + angle, mask=mask, other=0.0), tl.load(sines + angle, mask=mask, other=0.0)
            # The adjoint of a rotation is the inverse rotation.
            dlow, dhigh = dlow * cosine + dhigh * sine, dhigh * cosine - dlow * sine
            low = tl.dot(seen, tl.trans(weight_low), input_precision=PRECISION)
            high = tl.dot(seen, tl.trans(weight_high), input_precision=PRECISION)
            dglobal_low = tl.load(dglobal + row, mask=mask, other=0.0)
            dglobal_high = tl.load(dglobal + row + HALF, mask=mask, other=0.0)
            dlow, dhigh, row_dscale = _before_normalisation(
                low, high, dlow, dhigh, dglobal_low.to(tl.float32), dglobal_high.to(tl.float32), scale, eps, HEAD_SIZE, RADIUS, SILU, FAST
            )  # fmt: skip
            if RADIUS:
                dradius += row_dscale
        elif SILU:
            dlow *= silu_slope(tl.dot(seen, tl.trans(weight_low), input_precision=PRECISION), FAST)
            dhigh *= silu_slope(tl.dot(seen, tl.trans(weight_high), input_precision=PRECISION), FAST)
        dlow, dhigh = dlow.to(seen.dtype), dhigh.to(seen.dtype)
        dlow_sum = tl.dot(tl.trans(seen), dlow, dlow_sum, input_precision=PRECISION)
        dhigh_sum = tl.dot(tl.trans(seen), dhigh, dhigh_sum, input_precision=PRECISION)
        owes = tl.dot(dlow, weight_low, input_precision=PRECISION)
        owes = tl.dot(dhigh, weight_high, owes, input_precision=PRECISION)
        share, debts = _paid(_by_distance(owes, ROWS, BLOCK_R, BLOCK_TAPS), debts, age, TAPS)
        tl.store(shares + token[:, None] * RANK, share.to(by_head.dtype.element_ty), mask=_of_ranks(there, rank, RANK, BLOCK_R))
    for distance in tl.static_range(1, TAPS):
        place = tl.cast(part * NUM_HEADS + head, tl.int64) * num_streams + stream
        out = owed + (place[:, None] * (TAPS - 1) + (distance - 1)) * RANK + rank[None, :]
        tl.store(out, debts[distance - 1].to(owed.dtype.element_ty), mask=_of_ranks(exists, rank, RANK, BLOCK_R))
    _store_weights(dlow_sum, up, taps, sums, part, head * HEAD_SIZE, WIDTH, HALF, RANK, BLOCK_R, TAPS, BLOCK_TAPS, CONVOLUTION)
    _store_weights(dhigh_sum, up, taps, sums, part, head * HEAD_SIZE + HALF, WIDTH, HALF, RANK, BLOCK_R, TAPS, BLOCK_TAPS, CONVOLUTION)
    if RADIUS:
        of_radius: tl.constexpr = 3 * WIDTH * (RANK + (TAPS if CONVOLUTION else 0))
        tl.store(sums + of_radius + part * NUM_HEADS + head, tl.sum(dradius, 0) * HEAD_SIZE**-0.5)


@triton.jit
def _before_normalisation(
    low, high, dlow, dhigh, dglobal_low, dglobal_high, scale, eps,
    HEAD_SIZE: tl.constexpr, RADIUS: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradients before normalisation from those after the inverse rotation and those of the global path; also each token's share of the radius.

    The same as of `mixer_inputs_backward`, with as few operations as a token of many threads allows.
    """
    # All sums precede what is computed of them, for each channel in one go, so that few values are held at a time.
    local = tl.rsqrt(tl.sum(low * low + high * high, 1) / HEAD_SIZE + eps)
    dscale = local
    if RADIUS:
        dscale = tl.sum(low * dlow + high * dhigh, 1) * local
    if SILU:
        sigmoid_low, sigmoid_high = sigmoid(low, FAST), sigmoid(high, FAST)
        active_low, active_high = low * sigmoid_low, high * sigmoid_high
        shared = tl.rsqrt(tl.sum(active_low * active_low + active_high * active_high, 1) / HEAD_SIZE + eps)
    else:
        active_low, active_high, shared = low, high, local
    along = (tl.sum(active_low * dglobal_low + active_high * dglobal_high, 1) * (shared * shared * shared / HEAD_SIZE))[:, None]
    dglobal_low = dglobal_low * shared[:, None] - active_low * along
    dglobal_high = dglobal_high * shared[:, None] - active_high * along
    if SILU:
        dglobal_low *= sigmoid_low + active_low * (1.0 - sigmoid_low)
        dglobal_high *= sigmoid_high + active_high * (1.0 - sigmoid_high)
    if RADIUS:
        along, factor = (dscale * scale * local * local / HEAD_SIZE)[:, None], (scale * local)[:, None]
        dlow, dhigh = dlow * factor - low * along, dhigh * factor - high * along
    dlow, dhigh = dlow + dglobal_low, dhigh + dglobal_high
    return dlow, dhigh, dscale


@triton.jit
def _of_ranks(rows, rank, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """The mask of some rows and of the ranks that are not padded [rows, R]."""
    mask = tl.broadcast_to(rows[:, None], [rows.shape[0], BLOCK_R])
    return mask & (rank < RANK)[None, :] if RANK < BLOCK_R else mask


@triton.jit
def _by_distance(x, ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_TAPS: tl.constexpr):
    """Splits the columns by distance: [rows, X] -> [rows, R] each, up to four."""
    if BLOCK_TAPS == 1:
        parts = (x,)
    elif BLOCK_TAPS == 2:
        parts = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, BLOCK_R)), (0, 2, 1)))
    else:
        even, odd = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, 2, BLOCK_R)), (0, 3, 1, 2)))
        zero, two = tl.split(even)
        one, three = tl.split(odd)
        parts = (zero, one, two, three)
    return parts


@triton.jit
def _paid(owes, debts, age, TAPS: tl.constexpr):
    """What is paid to a token by itself and by those after it, and the debts then, by distance, of which none passes the beginning of a document."""
    paid = owes[0] + debts[0] if TAPS > 1 else owes[0]
    left = ()
    for distance in tl.static_range(1, TAPS):
        total = owes[distance] + debts[distance] if distance < TAPS - 1 else owes[distance]
        left += (tl.where((age >= distance)[:, None], total, 0.0),)
    return paid, left


@triton.jit
def _store_weights(
    gradient, up, taps, sums, part, first, WIDTH: tl.constexpr, HALF: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_TAPS: tl.constexpr, CONVOLUTION: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of the up weights and taps of half a head from that of their products [X, K/2]."""
    channel = (first + tl.arange(0, HALF))[None, :]
    distance, rank = tl.arange(0, BLOCK_TAPS)[:, None], tl.arange(0, BLOCK_R)[:, None]
    gradient = tl.reshape(gradient, (BLOCK_TAPS, BLOCK_R, HALF))
    row, inside = part * WIDTH + channel, tl.broadcast_to(rank < RANK, [BLOCK_R, HALF])
    dup = gradient
    if CONVOLUTION:
        place, exists = row * TAPS + (TAPS - 1 - distance), tl.broadcast_to(distance < TAPS, [BLOCK_TAPS, HALF])
        weight = tl.load(up + channel * RANK + rank, mask=inside, other=0.0).to(tl.float32)
        tl.store(sums + 3 * WIDTH * RANK + place, tl.sum(gradient * weight[None, :, :], 1), mask=exists)
        dup *= tl.load(taps + place, mask=exists, other=0.0).to(tl.float32)[:, None, :]
    tl.store(sums + row * RANK + rank, tl.sum(dup, 0), mask=inside)


@triton.jit
def _sum_kernel(
    by_head, owed, dbottlenecks, num_tokens, num_streams, batch, length, piece,
    NUM_HEADS: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, TAPS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums the shares of the heads and, at the end of a piece, what the next piece owes."""
    part = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rank = tl.arange(0, BLOCK_R)
    inside = (rank < RANK)[None, :]
    mask = (token < num_tokens)[:, None] & inside
    position = token % length
    next_piece = position // piece + 1
    distance = next_piece * piece - position
    stream = next_piece * batch + token // length
    is_owed = ((token < num_tokens) & (distance < TAPS) & (next_piece * piece < length))[:, None] & inside
    total = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for head in tl.range(0, NUM_HEADS, loop_unroll_factor=4):  # so that loads are in flight together
        place = tl.cast(part * NUM_HEADS + head, tl.int64)
        total += tl.load(by_head + (place * num_tokens + token)[:, None] * RANK + rank[None, :], mask=mask, other=0.0).to(tl.float32)
        if TAPS > 1:
            from_next = owed + ((place * num_streams + stream) * (TAPS - 1) + (distance - 1))[:, None] * RANK + rank[None, :]
            total += tl.load(from_next, mask=is_owed, other=0.0).to(tl.float32)
    out = dbottlenecks + (tl.cast(token, tl.int64) * 3 + part)[:, None] * RANK + rank[None, :]
    tl.store(out, total.to(dbottlenecks.dtype.element_ty), mask=mask)
