"""One token of both paths of the mixer in Triton: one program per head and sequence, which holds the memory of its head in registers.

Where sequences are few and the window is large, several programs share it: each leaves its part of the softmax, and a second kernel merges the parts.

A head is held as two halves where a rotation mixes the channels i and i + K/2, and whole elsewhere. The token itself takes part in the window from
registers, so that no program reads what another thread has just written.

Each of the heads of queries that share a head of keys reads it, and the first of them writes it. They have no convolution here: one program would
move up its inputs before another has read them.

Shapes: B sequences, H heads of queries, J heads of keys and values, K head size, W window, G global tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.decoding_state import MixerConstants, MixerStepState, TokenPlace

NUM_WARPS = 4
TILE_NUMBERS = 16384  # of a tile of keys or values
FEW_PROGRAMS = 128  # about as many as a GPU has processors
SLOTS_OF_A_PART = 256  # the fewest that are worth a program of their own
NO_SCORE = tl.constexpr(-1e30)  # below every score


def mixer_step(
    qkv: Tensor, scalars: Tensor | None, channels: Tensor | None, constants: MixerConstants, state: MixerStepState, place: TokenPlace
) -> Tensor:
    """Computes the reference `mixer_step`, without the Lorentz score, without the chain, and with a convolution only where J is H."""
    batch, num_heads = len(qkv), constants.num_heads
    head_size = qkv.shape[1] // (num_heads + 2 * constants.num_key_heads)
    path = constants.global_path
    decay_and_gate = None if path is None else path.decay_and_gate
    out = torch.empty(batch, num_heads * head_size, dtype=qkv.dtype, device=qkv.device)
    block = triton.next_power_of_2(head_size)
    parts = num_parts(batch * num_heads, constants.window)
    partial = torch.empty(batch, num_heads, parts, head_size + 2, dtype=torch.float32, device=qkv.device) if parts > 1 else None
    taps = qkv if constants.taps is None else constants.taps
    shape = {
        "NUM_HEADS": num_heads, "HEAD_SIZE": head_size, "BLOCK_K": block, "TAPS": 1 if constants.taps is None else len(constants.taps),
        "GLOBAL_PATH": path is not None, "PARTS": parts, "num_warps": NUM_WARPS,
    }  # fmt: skip
    _step_kernel[(num_heads, batch, parts)](
        qkv, qkv.stride(0), state.convolution, taps,
        place.cos, place.sin, constants.scale, state.keys, state.values, place.position,
        scalars, 0 if scalars is None else scalars.stride(0), qkv if channels is None else channels, 0 if channels is None else channels.stride(0),
        None if decay_and_gate is None else decay_and_gate.decay_bias, None if decay_and_gate is None else decay_and_gate.gate_bias,
        None if path is None else path.norm_weight, state.memory, out, partial,
        constants.window, constants.global_tokens, head_size**-0.5, constants.eps,
        0.0 if decay_and_gate is None or decay_and_gate.decay_floor is None else decay_and_gate.decay_floor,
        BLOCK_HALF=triton.next_power_of_2(head_size // 2), BLOCK_J=tile_slots(block), BLOCK_G=triton.next_power_of_2(max(constants.global_tokens, 1)),
        ROTARY=constants.has_rotary, SCALE=constants.scale is not None, WINDOW=constants.window > 0, GLOBALS=constants.global_tokens > 0,
        KEY_HEADS=constants.num_key_heads, CHANNELS=channels is not None, SILU=constants.has_silu,
        SCALARS=0 if scalars is None else scalars.shape[1] // num_heads,
        DELTA=decay_and_gate is not None and decay_and_gate.delta_size is not None,
        FLOOR=decay_and_gate is not None and decay_and_gate.decay_floor is not None,
        **shape,
    )  # fmt: skip
    if partial is not None:
        _merge_kernel[(num_heads, batch)](qkv, qkv.stride(0), state.convolution, out, partial, BLOCK_P=triton.next_power_of_2(parts), **shape)
    return out


def tile_slots(block: int) -> int:
    """Slots of a tile of keys or values."""
    return max(TILE_NUMBERS // block, 16)


def num_parts(num_programs: int, window: int) -> int:
    """Number of programs that share the window of a head."""
    return max(1, min(triton.cdiv(FEW_PROGRAMS, num_programs), window // SLOTS_OF_A_PART))


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
def _remembered(
    x, before, taps, v, channel, inside, scalars, channels, decay_bias, gate_bias, norm_weight, memory, score_scale, eps, decay_floor,
    WIDTH: tl.constexpr, HEAD_SIZE: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr, SCALARS: tl.constexpr,
    DELTA: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """The gated global path of a head, rounded as it is stored, fp32 [K]; it writes the memory. All pointers are at the head."""
    TYPE: tl.constexpr = x.dtype.element_ty
    q = _convolved(x, before, taps, channel, inside, 3 * WIDTH, TAPS)
    k = _convolved(x + WIDTH, before + WIDTH, taps + WIDTH, channel, inside, 3 * WIDTH, TAPS)
    if SILU:
        q, k = (q * tl.sigmoid(q)).to(TYPE).to(tl.float32), (k * tl.sigmoid(k)).to(TYPE).to(tl.float32)
    q = _normalised(q, eps, HEAD_SIZE).to(TYPE).to(tl.float32)
    k = _normalised(k, eps, HEAD_SIZE).to(TYPE).to(tl.float32)
    decay = tl.exp(_log_decay(tl.load(scalars) + decay_bias, decay_floor, FLOOR))
    if CHANNELS:
        gate = tl.sigmoid(tl.load(channels + channel, mask=inside, other=0.0).to(tl.float32) + gate_bias)
    else:
        gate = tl.sigmoid(tl.load(scalars + 1) + gate_bias)
    at = memory + channel[:, None] * HEAD_SIZE + channel[None, :]
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
    z = _normalised(z, eps, HEAD_SIZE) * tl.load(norm_weight + channel, mask=inside, other=0.0) * gate
    return z.to(TYPE).to(tl.float32)


@triton.jit
def _step_kernel(
    qkv, qkv_stride, before, taps, cosines, sines, scale, keys, values, positions,
    scalars, scalars_stride, channels, channels_stride, decay_bias, gate_bias, norm_weight, memory, out, partial,
    window, global_tokens, score_scale, eps, decay_floor,
    NUM_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_K: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_G: tl.constexpr, ROTARY: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr, GLOBALS: tl.constexpr,
    GLOBAL_PATH: tl.constexpr, CHANNELS: tl.constexpr, SILU: tl.constexpr, SCALARS: tl.constexpr, DELTA: tl.constexpr, FLOOR: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    head, row, part = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64), tl.program_id(2)
    is_first = part == 0
    HALF: tl.constexpr = HEAD_SIZE // 2
    WIDTH: tl.constexpr = NUM_HEADS * HEAD_SIZE
    KEY_WIDTH: tl.constexpr = KEY_HEADS * HEAD_SIZE
    ROW: tl.constexpr = WIDTH + 2 * KEY_WIDTH
    TYPE: tl.constexpr = qkv.dtype.element_ty
    half, channel = tl.arange(0, BLOCK_HALF), tl.arange(0, BLOCK_K)
    inside_half, inside = half < HALF, channel < HEAD_SIZE
    first = head * HEAD_SIZE
    key_head, is_writer = head // (NUM_HEADS // KEY_HEADS), is_first & (head % (NUM_HEADS // KEY_HEADS) == 0)
    to_key = WIDTH + (key_head - head) * HEAD_SIZE  # from the queries of the head
    to_value = to_key + KEY_WIDTH
    x = qkv + row * qkv_stride + first
    before += row * (TAPS - 1) * ROW + first
    taps += first
    v = _convolved(x + to_value, before + to_value, taps + to_value, channel, inside, ROW, TAPS)
    y = tl.zeros((BLOCK_K,), tl.float32)
    if WINDOW:
        position = tl.load(positions + row)
        q_low = _convolved(x, before, taps, half, inside_half, ROW, TAPS)
        q_high = _convolved(x + HALF, before + HALF, taps + HALF, half, inside_half, ROW, TAPS)
        k_low = _convolved(x + to_key, before + to_key, taps + to_key, half, inside_half, ROW, TAPS)
        k_high = _convolved(x + to_key + HALF, before + to_key + HALF, taps + to_key + HALF, half, inside_half, ROW, TAPS)
        if ROTARY:
            cosine = tl.load(cosines + row * HALF + half, mask=inside_half, other=0.0)
            sine = tl.load(sines + row * HALF + half, mask=inside_half, other=0.0)
            q_low, q_high = q_low * cosine - q_high * sine, q_low * sine + q_high * cosine
            k_low, k_high = k_low * cosine - k_high * sine, k_low * sine + k_high * cosine
        if SCALE:
            q_factor = tl.load(scale + head) / tl.sqrt((tl.sum(q_low * q_low, 0) + tl.sum(q_high * q_high, 0)) / HEAD_SIZE + eps)
            k_factor = tl.load(scale + NUM_HEADS + key_head) / tl.sqrt((tl.sum(k_low * k_low, 0) + tl.sum(k_high * k_high, 0)) / HEAD_SIZE + eps)
            q_low, q_high, k_low, k_high = q_low * q_factor, q_high * q_factor, k_low * k_factor, k_high * k_factor
        q_low, q_high = q_low.to(TYPE).to(tl.float32), q_high.to(TYPE).to(tl.float32)
        k_low, k_high = k_low.to(TYPE).to(tl.float32), k_high.to(TYPE).to(tl.float32)
        keys += row * (global_tokens + window) * KEY_WIDTH + key_head * HEAD_SIZE
        values += row * (global_tokens + window) * KEY_WIDTH + key_head * HEAD_SIZE
        # The first part has the token itself; the others begin with a finite number, so that no difference of two infinities can occur.
        largest = tl.where(is_first, (tl.sum(q_low * k_low, 0) + tl.sum(q_high * k_high, 0)) * score_scale, NO_SCORE)
        total, y = tl.where(is_first, 1.0, 0.0), tl.where(is_first, v, 0.0)
        own, num_seen = position % window, tl.minimum(position, window)
        size = tl.cdiv(tl.cdiv(num_seen, PARTS), BLOCK_J) * BLOCK_J
        for begin in range(part * size, tl.minimum((part + 1) * size, num_seen), BLOCK_J):
            slot = begin + tl.arange(0, BLOCK_J)
            visible = (slot < num_seen) & (slot != own)
            largest, total, y = _attended(
                keys, values, inside_half, half, inside, channel, visible, global_tokens + slot, q_low, q_high, largest, total, y, score_scale,
                KEY_WIDTH, HALF,
            )  # fmt: skip
        if GLOBALS:
            slot = tl.arange(0, BLOCK_G)
            visible = (slot < global_tokens) & (slot <= position - window) & is_first
            largest, total, y = _attended(
                keys, values, inside_half, half, inside, channel, visible, slot, q_low, q_high, largest, total, y, score_scale, KEY_WIDTH, HALF,
            )  # fmt: skip
        if PARTS > 1:
            at = ((row * NUM_HEADS + head) * PARTS + part) * (HEAD_SIZE + 2)
            tl.store(partial + at + channel, y, mask=inside)
            tl.store(partial + at + HEAD_SIZE, largest)
            tl.store(partial + at + HEAD_SIZE + 1, total)
            y = tl.zeros((BLOCK_K,), tl.float32)
        else:
            y = (y / total).to(TYPE).to(tl.float32)
        at = (global_tokens + own) * KEY_WIDTH
        tl.store(keys + at + half, k_low.to(TYPE), mask=inside_half & is_writer)
        tl.store(keys + at + HALF + half, k_high.to(TYPE), mask=inside_half & is_writer)
        tl.store(values + at + channel, v.to(TYPE), mask=inside & is_writer)
        if GLOBALS:
            is_global = (position < global_tokens) & is_writer
            at = position * KEY_WIDTH
            tl.store(keys + at + half, k_low.to(TYPE), mask=inside_half & is_global)
            tl.store(keys + at + HALF + half, k_high.to(TYPE), mask=inside_half & is_global)
            tl.store(values + at + channel, v.to(TYPE), mask=inside & is_global)
    if is_first:
        if GLOBAL_PATH:
            y += _remembered(
                x, before, taps, v, channel, inside, scalars + row * scalars_stride + head * SCALARS, channels + row * channels_stride + first,
                tl.load(decay_bias + head), tl.load(gate_bias + head), norm_weight + first,
                memory + (row * NUM_HEADS + head) * (HEAD_SIZE * HEAD_SIZE), score_scale, eps, decay_floor,
                WIDTH, HEAD_SIZE, TAPS, SILU, CHANNELS, SCALARS, DELTA, FLOOR,
            )  # fmt: skip
        tl.store(out + row * WIDTH + first + channel, y.to(TYPE), mask=inside)
    if PARTS == 1:
        _move_up(x, before, channel, inside, WIDTH, TAPS)


@triton.jit
def _merge_kernel(
    qkv, qkv_stride, before, out, partial,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, TAPS: tl.constexpr, GLOBAL_PATH: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Merges the parts of a softmax, adds them to what the global path has left, and moves the inputs of the convolution up."""
    head, row = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    WIDTH: tl.constexpr = NUM_HEADS * HEAD_SIZE
    TYPE: tl.constexpr = qkv.dtype.element_ty
    part, channel, first = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_K), head * HEAD_SIZE
    inside, is_part = channel < HEAD_SIZE, part < PARTS
    at = partial + ((row * NUM_HEADS + head) * PARTS + part) * (HEAD_SIZE + 2)
    largest = tl.load(at + HEAD_SIZE, mask=is_part, other=NO_SCORE)
    weight = tl.exp(largest - tl.max(largest, 0))
    total = tl.sum(tl.load(at + HEAD_SIZE + 1, mask=is_part, other=0.0) * weight, 0)
    y = tl.load(at[:, None] + channel[None, :], mask=is_part[:, None] & inside[None, :], other=0.0)
    y = (tl.sum(y * weight[:, None], 0) / total).to(TYPE).to(tl.float32)
    place = out + row * WIDTH + first + channel
    if GLOBAL_PATH:
        y += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, y.to(TYPE), mask=inside)
    before += row * (TAPS - 1) * (3 * WIDTH) + first
    _move_up(qkv + row * qkv_stride + first, before, channel, inside, WIDTH, TAPS)
