"""One token of both paths of the mixer in Triton: one program per head and sequence, which holds the memory of its head in registers.

A head is held as two halves where a rotation mixes the channels i and i + K/2, and whole elsewhere. The token itself takes part in the window from
registers, so that no program reads what another thread has just written.

Shapes: B sequences, H heads, K head size, W window, G global tokens; 3: queries, keys, values.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.decoding_state import MixerConstants, MixerStepState, TokenPlace

NUM_WARPS = 8
TILE_NUMBERS = 16384  # of a tile of keys or values


def mixer_step(
    qkv: Tensor, scalars: Tensor | None, channels: Tensor | None, constants: MixerConstants, state: MixerStepState, place: TokenPlace
) -> Tensor:
    """Computes the reference `mixer_step`, without the Lorentz score and without the chain."""
    batch, num_heads = len(qkv), constants.num_heads
    head_size = qkv.shape[1] // (3 * num_heads)
    path = constants.global_path
    decay_and_gate = None if path is None else path.decay_and_gate
    out = torch.empty(batch, num_heads * head_size, dtype=qkv.dtype, device=qkv.device)
    block = triton.next_power_of_2(head_size)
    _step_kernel[(num_heads, batch)](
        qkv, qkv.stride(0), state.convolution, qkv if constants.taps is None else constants.taps,
        place.cos, place.sin, constants.scale, state.keys, state.values, place.position,
        scalars, None if scalars is None else scalars.stride(0), channels, None if channels is None else channels.stride(0),
        None if decay_and_gate is None else decay_and_gate.decay_bias, None if decay_and_gate is None else decay_and_gate.gate_bias,
        None if path is None else path.norm_weight, state.memory, out,
        constants.window, constants.global_tokens, head_size**-0.5, constants.eps,
        0.0 if decay_and_gate is None or decay_and_gate.decay_floor is None else decay_and_gate.decay_floor,
        NUM_HEADS=num_heads, HEAD_SIZE=head_size, BLOCK_HALF=triton.next_power_of_2(head_size // 2), BLOCK_K=block,
        TAPS=1 if constants.taps is None else len(constants.taps), BLOCK_J=max(TILE_NUMBERS // block, 16),
        BLOCK_G=triton.next_power_of_2(max(constants.global_tokens, 1)),
        ROTARY=constants.has_rotary, SCALE=constants.scale is not None, WINDOW=constants.window > 0, GLOBALS=constants.global_tokens > 0,
        GLOBAL_PATH=path is not None, CHANNELS=channels is not None, SILU=constants.has_silu,
        SCALARS=0 if scalars is None else scalars.shape[1] // num_heads,
        DELTA=decay_and_gate is not None and decay_and_gate.delta_size is not None,
        FLOOR=decay_and_gate is not None and decay_and_gate.decay_floor is not None,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


@triton.jit
def _convolved(x, before, taps, channel, inside, ROW: tl.constexpr, TAPS: tl.constexpr):
    """The convolution of some channels, rounded as it is stored, fp32; `x`, `before` and `taps` point at the first channel of the head."""
    value = tl.load(x + channel, mask=inside, other=0.0)
    if TAPS == 1:
        return value.to(tl.float32)
    y = value.to(tl.float32) * tl.load(taps + (TAPS - 1) * ROW + channel, mask=inside, other=0.0)
    for tap in tl.static_range(TAPS - 1):
        earlier = tl.load(before + tap * ROW + channel, mask=inside, other=0.0).to(tl.float32)
        y += earlier * tl.load(taps + tap * ROW + channel, mask=inside, other=0.0)
    return y.to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def _move_up(x, before, channel, inside, WIDTH: tl.constexpr, TAPS: tl.constexpr):
    """Moves the inputs of the convolution of a head up by one, when all threads have read them."""
    if TAPS > 1:
        tl.debug_barrier()
        for part in tl.static_range(3):
            at = part * WIDTH + channel
            for tap in tl.static_range(TAPS - 2):
                tl.store(before + tap * (3 * WIDTH) + at, tl.load(before + (tap + 1) * (3 * WIDTH) + at, mask=inside), mask=inside)
            tl.store(before + (TAPS - 2) * (3 * WIDTH) + at, tl.load(x + at, mask=inside), mask=inside)


@triton.jit
def _normalised(x, eps, HEAD_SIZE: tl.constexpr):
    return x / tl.sqrt(tl.sum(x * x, 0) / HEAD_SIZE + eps)


@triton.jit
def _log_decay(step, decay_floor, FLOOR: tl.constexpr):
    if FLOOR:
        return decay_floor * tl.sigmoid(step)
    else:
        return -(tl.maximum(step, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(step))))


@triton.jit
def _attended(
    keys, values, inside_half, half, inside, channel, visible, slot, low, high, largest, total, y, score_scale,
    ROW: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Adds the keys of some slots to a softmax: the largest score so far, the sum of weights and that of weighted values."""
    at = slot[:, None] * ROW
    mask = visible[:, None] & inside_half[None, :]
    key_low = tl.load(keys + at + half[None, :], mask=mask, other=0.0).to(tl.float32)
    key_high = tl.load(keys + at + HALF + half[None, :], mask=mask, other=0.0).to(tl.float32)
    value = tl.load(values + at + channel[None, :], mask=visible[:, None] & inside[None, :], other=0.0).to(tl.float32)
    score = (tl.sum(key_low * low[None, :], 1) + tl.sum(key_high * high[None, :], 1)) * score_scale
    score = tl.where(visible, score, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(score, 0))
    weight, kept = tl.exp(score - new_largest), tl.exp(largest - new_largest)
    return new_largest, total * kept + tl.sum(weight, 0), y * kept + tl.sum(weight[:, None] * value, 0)


@triton.jit
def _step_kernel(
    qkv, qkv_stride, before, taps, cosines, sines, scale, keys, values, positions,
    scalars, scalars_stride, channels, channels_stride, decay_bias, gate_bias, norm_weight, memory, out,
    window, global_tokens, score_scale, eps, decay_floor,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_K: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_G: tl.constexpr, ROTARY: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr, GLOBALS: tl.constexpr,
    GLOBAL_PATH: tl.constexpr, CHANNELS: tl.constexpr, SILU: tl.constexpr, SCALARS: tl.constexpr, DELTA: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    HALF: tl.constexpr = HEAD_SIZE // 2
    WIDTH: tl.constexpr = NUM_HEADS * HEAD_SIZE
    TYPE: tl.constexpr = qkv.dtype.element_ty
    half, channel = tl.arange(0, BLOCK_HALF), tl.arange(0, BLOCK_K)
    inside_half, inside = half < HALF, channel < HEAD_SIZE
    first = head * HEAD_SIZE
    x = qkv + row * qkv_stride + first
    before += row * (TAPS - 1) * (3 * WIDTH) + first
    taps += first
    v = _convolved(x + 2 * WIDTH, before + 2 * WIDTH, taps + 2 * WIDTH, channel, inside, 3 * WIDTH, TAPS)
    y = tl.zeros((BLOCK_K,), tl.float32)
    if WINDOW:
        position = tl.load(positions + row)
        q_low = _convolved(x, before, taps, half, inside_half, 3 * WIDTH, TAPS)
        q_high = _convolved(x + HALF, before + HALF, taps + HALF, half, inside_half, 3 * WIDTH, TAPS)
        k_low = _convolved(x + WIDTH, before + WIDTH, taps + WIDTH, half, inside_half, 3 * WIDTH, TAPS)
        k_high = _convolved(x + WIDTH + HALF, before + WIDTH + HALF, taps + WIDTH + HALF, half, inside_half, 3 * WIDTH, TAPS)
        if ROTARY:
            cosine = tl.load(cosines + row * HALF + half, mask=inside_half, other=0.0)
            sine = tl.load(sines + row * HALF + half, mask=inside_half, other=0.0)
            q_low, q_high = q_low * cosine - q_high * sine, q_low * sine + q_high * cosine
            k_low, k_high = k_low * cosine - k_high * sine, k_low * sine + k_high * cosine
        if SCALE:
            length = tl.load(scale + head)
            q_factor = length / tl.sqrt((tl.sum(q_low * q_low, 0) + tl.sum(q_high * q_high, 0)) / HEAD_SIZE + eps)
            k_factor = length / tl.sqrt((tl.sum(k_low * k_low, 0) + tl.sum(k_high * k_high, 0)) / HEAD_SIZE + eps)
            q_low, q_high, k_low, k_high = q_low * q_factor, q_high * q_factor, k_low * k_factor, k_high * k_factor
        q_low, q_high = q_low.to(TYPE).to(tl.float32), q_high.to(TYPE).to(tl.float32)
        k_low, k_high = k_low.to(TYPE).to(tl.float32), k_high.to(TYPE).to(tl.float32)
        keys += row * (global_tokens + window) * WIDTH + first
        values += row * (global_tokens + window) * WIDTH + first
        largest = (tl.sum(q_low * k_low, 0) + tl.sum(q_high * k_high, 0)) * score_scale
        total, y = largest * 0.0 + 1.0, v
        own, num_seen = position % window, tl.minimum(position, window)
        for begin in range(0, num_seen, BLOCK_J):
            slot = begin + tl.arange(0, BLOCK_J)
            visible = (slot < num_seen) & (slot != own)
            largest, total, y = _attended(
                keys, values, inside_half, half, inside, channel, visible, global_tokens + slot, q_low, q_high, largest, total, y, score_scale,
                WIDTH, HALF,
            )  # fmt: skip
        if GLOBALS:
            slot = tl.arange(0, BLOCK_G)
            visible = (slot < global_tokens) & (slot <= position - window)
            largest, total, y = _attended(
                keys, values, inside_half, half, inside, channel, visible, slot, q_low, q_high, largest, total, y, score_scale, WIDTH, HALF,
            )  # fmt: skip
        y = (y / total).to(TYPE).to(tl.float32)
        at = (global_tokens + own) * WIDTH
        tl.store(keys + at + half, k_low.to(TYPE), mask=inside_half)
        tl.store(keys + at + HALF + half, k_high.to(TYPE), mask=inside_half)
        tl.store(values + at + channel, v.to(TYPE), mask=inside)
        if GLOBALS:
            is_global = position < global_tokens
            at = position * WIDTH
            tl.store(keys + at + half, k_low.to(TYPE), mask=inside_half & is_global)
            tl.store(keys + at + HALF + half, k_high.to(TYPE), mask=inside_half & is_global)
            tl.store(values + at + channel, v.to(TYPE), mask=inside & is_global)
    if GLOBAL_PATH:
        q = _convolved(x, before, taps, channel, inside, 3 * WIDTH, TAPS)
        k = _convolved(x + WIDTH, before + WIDTH, taps + WIDTH, channel, inside, 3 * WIDTH, TAPS)
        if SILU:
            q, k = (q * tl.sigmoid(q)).to(TYPE).to(tl.float32), (k * tl.sigmoid(k)).to(TYPE).to(tl.float32)
        q = _normalised(q, eps, HEAD_SIZE).to(TYPE).to(tl.float32)
        k = _normalised(k, eps, HEAD_SIZE).to(TYPE).to(tl.float32)
        scalars += row * scalars_stride + head * SCALARS
        step = tl.load(scalars) + tl.load(decay_bias + head)
        decay = tl.exp(_log_decay(step, decay_floor, FLOOR))
        bias = tl.load(gate_bias + head)
        if CHANNELS:
            gate = tl.sigmoid(tl.load(channels + row * channels_stride + first + channel, mask=inside, other=0.0).to(tl.float32) + bias)
        else:
            gate = tl.sigmoid(tl.load(scalars + 1) + bias)
        at = memory + (row * NUM_HEADS + head) * (HEAD_SIZE * HEAD_SIZE) + channel[:, None] * HEAD_SIZE + channel[None, :]
        mask = inside[:, None] & inside[None, :]
        state = tl.load(at, mask=mask, other=0.0)
        read = tl.sum(state * q[:, None], 0)
        if DELTA:
            rate = tl.sigmoid(tl.load(scalars + SCALARS - 1)) / HEAD_SIZE
            written = rate * (v - decay * tl.sum(state * k[:, None], 0))
        else:
            written = (1.0 - decay) * score_scale * v
        tl.store(at, state * decay + k[:, None] * written[None, :], mask=mask)
        z = decay * read + tl.sum(q * k, 0) * written
        z = _normalised(z, eps, HEAD_SIZE) * tl.load(norm_weight + first + channel, mask=inside, other=0.0) * gate
        y += z.to(TYPE).to(tl.float32)
    tl.store(out + row * WIDTH + first + channel, y.to(TYPE), mask=inside)
    _move_up(x, before, channel, inside, WIDTH, TAPS)
