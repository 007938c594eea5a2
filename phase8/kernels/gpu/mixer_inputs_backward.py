"""What the two paths of the mixer read, in Triton, backward: first through normalisation and rotation, then through the convolution.

The first kernel computes the convolved queries and keys again. The second walks over a piece of the sequence for a block of channels and
adds up its share of the gradient of the taps, so there are no atomics.

Shapes: B batch, T tokens, H heads, K head size; 3: queries, keys, values.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.gpu.mixer_inputs import NUM_WARPS, by_tap, constants, convolved_half, tile_tokens

PIECE_TOKENS = 512


def prepare_backward(
    gradients: list[Tensor], qkv: Tensor, weight: Tensor | None, angles: Tensor, radius: Tensor | None, starts: Tensor | None, eps: float
) -> list[Tensor]:
    """Gradients of qkv, and of weight and radius where there are such."""
    qkv = qkv.contiguous()
    dlocal_q, dlocal_k, dglobal_q, dglobal_k, dv = (gradient.contiguous() for gradient in gradients)
    batch, length, _, num_heads, head_size = qkv.shape
    dqkv = torch.empty_like(qkv)
    dq, dk = (torch.empty_like(dv) for _ in range(2))
    tokens = tile_tokens()
    num_tiles = triton.cdiv(length, tokens)
    dradius_parts = torch.empty(batch, num_tiles, num_heads, dtype=torch.float32, device=qkv.device)
    taps_first = by_tap(weight)
    shared = constants(qkv, weight, radius, starts)
    _normalisation_kernel[(num_tiles, num_heads, batch)](
        qkv, taps_first, angles.cos(), angles.sin(), radius, starts, dlocal_q, dlocal_k, dglobal_q, dglobal_k, dq, dk, dradius_parts,
        length, eps, **shared, BLOCK_T=tokens, num_warps=NUM_WARPS,
    )  # fmt: skip
    width, taps = num_heads * head_size, shared["TAPS"]
    channels = min(triton.next_power_of_2(width), 16 if triton.knobs.runtime.interpret else 128)
    num_blocks, num_pieces = triton.cdiv(width, channels), triton.cdiv(length, PIECE_TOKENS)
    dweight_parts = torch.empty(batch, num_pieces, 3 * width, taps, dtype=torch.float32, device=qkv.device)
    _convolution_kernel[(3 * num_blocks, num_pieces, batch)](
        qkv, taps_first, starts, dq, dk, dv, dqkv, dweight_parts, length,
        WIDTH=width, TAPS=taps, CONVOLUTION=weight is not None, DOCUMENTS=starts is not None,
        PIECE=PIECE_TOKENS, BLOCK_T=min(tokens, 16), BLOCK_C=channels, num_warps=NUM_WARPS,
    )  # fmt: skip
    found = [dqkv]
    if weight is not None:
        found.append(dweight_parts.sum((0, 1)).to(weight.dtype))
    if radius is not None:
        found.append(dradius_parts.sum((0, 1)).to(radius.dtype))
    return found


@triton.jit
def _normalisation_kernel(
    qkv, weight, cosines, sines, radius, starts, dlocal_q, dlocal_k, dglobal_q, dglobal_k, dq, dk, dradius_parts, length, eps,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_HALF: tl.constexpr, TAPS: tl.constexpr,
    CONVOLUTION: tl.constexpr, RADIUS: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK_T: tl.constexpr,
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
    cosine = tl.load(cosines + token[:, None] * HALF + half[None, :], mask=mask, other=0.0)
    sine = tl.load(sines + token[:, None] * HALF + half[None, :], mask=mask, other=0.0)
    rows = (batch * length + token)[:, None] * WIDTH + (head * HEAD_SIZE + half)[None, :]
    dradius = tl.zeros([BLOCK_T], tl.float32)
    for part in tl.static_range(2):
        channel = part * WIDTH + head * HEAD_SIZE + half
        low = convolved_half(x, weight, starts, token, channel, inside, length, 3 * WIDTH, TAPS, CONVOLUTION, DOCUMENTS)
        high = convolved_half(x, weight, starts, token, channel + HALF, inside, length, 3 * WIDTH, TAPS, CONVOLUTION, DOCUMENTS)
        reciprocal = 1.0 / tl.sqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / HEAD_SIZE + eps)[:, None]
        low, high = low * reciprocal, high * reciprocal
        dlocal, dglobal, dx = (dlocal_q, dglobal_q, dq) if part == 0 else (dlocal_k, dglobal_k, dk)
        dlow = tl.load(dlocal + rows, mask=mask, other=0.0).to(tl.float32)
        dhigh = tl.load(dlocal + rows + HALF, mask=mask, other=0.0).to(tl.float32)
        dnormal_low = tl.load(dglobal + rows, mask=mask, other=0.0).to(tl.float32)
        dnormal_high = tl.load(dglobal + rows + HALF, mask=mask, other=0.0).to(tl.float32)
        # The adjoint of a rotation turns back.
        dlow, dhigh = dlow * cosine + dhigh * sine, dhigh * cosine - dlow * sine
        if RADIUS:
            root = 1.0 / tl.sqrt(HEAD_SIZE * 1.0)
            dradius += tl.sum(low * dlow + high * dhigh, 1) * root
            scale = tl.load(radius + head).to(tl.float32) * root
            dnormal_low, dnormal_high = dnormal_low + dlow * scale, dnormal_high + dhigh * scale
        mean = (tl.sum(low * dnormal_low + high * dnormal_high, 1) / HEAD_SIZE)[:, None]
        dnormal_low, dnormal_high = (dnormal_low - low * mean) * reciprocal, (dnormal_high - high * mean) * reciprocal
        if not RADIUS:
            dnormal_low, dnormal_high = dnormal_low + dlow, dnormal_high + dhigh
        tl.store(dx + rows, dnormal_low.to(dx.dtype.element_ty), mask=mask)
        tl.store(dx + rows + HALF, dnormal_high.to(dx.dtype.element_ty), mask=mask)
    tl.store(dradius_parts + (batch * tl.num_programs(0) + tl.program_id(0)) * NUM_HEADS + head, tl.sum(dradius, 0))


@triton.jit
def _convolution_kernel(
    qkv, weight, starts, dq, dk, dv, dqkv, dweight_parts, length,
    WIDTH: tl.constexpr, TAPS: tl.constexpr, CONVOLUTION: tl.constexpr, DOCUMENTS: tl.constexpr,
    PIECE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    num_blocks: tl.constexpr = (WIDTH + BLOCK_C - 1) // BLOCK_C
    part, batch = tl.program_id(0) // num_blocks, tl.cast(tl.program_id(2), tl.int64)
    column = tl.program_id(0) % num_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < WIDTH
    channel = part * WIDTH + column
    if part == 0:
        dy = dq + batch * length * WIDTH
    elif part == 1:
        dy = dk + batch * length * WIDTH
    else:
        dy = dv + batch * length * WIDTH
    x, dx = qkv + batch * length * (3 * WIDTH), dqkv + batch * length * (3 * WIDTH)
    starts = starts + batch * length if DOCUMENTS else qkv
    # One sum per tap, added up over tokens only at the end: a reduction inside the loop would cost more than everything else.
    dweights = (tl.zeros([BLOCK_T, BLOCK_C], tl.float32),) * TAPS
    begin = tl.program_id(1) * PIECE
    for first in range(begin, tl.minimum(begin + PIECE, length), BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        mask = (token < length)[:, None] & inside[None, :]
        offsets = tl.cast(token, tl.int64)[:, None] * WIDTH + column[None, :]
        own = tl.cast(token, tl.int64)[:, None] * (3 * WIDTH) + channel[None, :]
        term = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
        if CONVOLUTION:
            values = tl.load(x + own, mask=mask, other=0.0).to(tl.float32)
            updated = (dweights[0] + term * values,)
            gradient = term * tl.load(weight + (TAPS - 1) * (3 * WIDTH) + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
            connected = token < length
            for distance in tl.static_range(1, TAPS):
                # What token t + distance took from token t.
                connected = connected & (token + distance < length)
                if DOCUMENTS:
                    connected = connected & (tl.load(starts + token + distance, mask=connected, other=1) == 0)
                term = tl.load(dy + offsets + distance * WIDTH, mask=connected[:, None] & inside[None, :], other=0.0).to(tl.float32)
                updated += (dweights[distance] + term * values,)
                tap = tl.load(weight + (TAPS - 1 - distance) * (3 * WIDTH) + channel, mask=inside, other=0.0).to(tl.float32)
                gradient += term * tap[None, :]
            term, dweights = gradient, updated
        tl.store(dx + own, term.to(dx.dtype.element_ty), mask=mask)
    if CONVOLUTION:
        parts = dweight_parts + ((batch * tl.num_programs(1) + tl.program_id(1)) * (3 * WIDTH) + channel) * TAPS
        for distance in tl.static_range(TAPS):
            tl.store(parts + (TAPS - 1 - distance), tl.sum(dweights[distance], 0), mask=inside)
