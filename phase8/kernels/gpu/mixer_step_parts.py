"""What a program of a decoding step does for a head: it reads a part of the window, or some columns of the memory, or merges what others have left.

A head is held as two halves where a rotation mixes the channels i and i + K/2, and whole elsewhere. The token itself takes part in the window from
registers, so that no program reads what another thread has just written.

Shapes: H heads of queries, J heads of keys and values, K head size, W window, G global tokens, R rank of the gate per channel.
"""

import triton
import triton.language as tl

from phase8.kernels.gpu.overlap import await_results

NO_SCORE = tl.constexpr(-1e30)  # below every score


@triton.jit
def _convolved(x, before, taps, channel, inside, TYPE: tl.constexpr, ROW: tl.constexpr, TAPS: tl.constexpr):
    """The convolution of some channels, rounded as it is stored, fp32; `x`, `before` and `taps` point at the first channel of the head."""
    value = tl.load(x + channel, mask=inside, other=0.0).to(TYPE).to(tl.float32)
    if TAPS > 1:
        # Earlier inputs as one tile: their sum has few registers in any layout.
        BLOCK_T: tl.constexpr = triton.next_power_of_2(TAPS - 1)
        tap = tl.arange(0, BLOCK_T)[:, None]
        at, mask = tap * ROW + channel[None, :], (tap < TAPS - 1) & inside[None, :]
        earlier = tl.load(before + at, mask=mask, other=0.0).to(tl.float32) * tl.load(taps + at, mask=mask, other=0.0)
        value = value * tl.load(taps + (TAPS - 1) * ROW + channel, mask=inside, other=0.0) + tl.sum(earlier, 0)
    return value.to(TYPE).to(tl.float32)


@triton.jit
def move_up(x, before, channel, inside, WIDTH: tl.constexpr, TAPS: tl.constexpr):
    """Moves the inputs of the convolution of a head up by one, when all programs have read them."""
    if TAPS > 1:
        for part in tl.static_range(3):
            at = part * WIDTH + channel
            for tap in tl.static_range(TAPS - 2):
                tl.store(before + tap * (3 * WIDTH) + at, tl.load(before + (tap + 1) * (3 * WIDTH) + at, mask=inside), mask=inside)
            tl.store(before + (TAPS - 2) * (3 * WIDTH) + at, tl.load(x + at, mask=inside).to(before.dtype.element_ty), mask=inside)


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
def _local(
    x, before, taps, half, inside_half, cosines, sines, scale, eps,
    TYPE: tl.constexpr, ROW: tl.constexpr, HEAD_SIZE: tl.constexpr, TAPS: tl.constexpr, ROTARY: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """The two halves of a query or a key of the window, rounded as they are stored, fp32; pointers are at the head, and at the angles of the row."""
    HALF: tl.constexpr = HEAD_SIZE // 2
    low = _convolved(x, before, taps, half, inside_half, TYPE, ROW, TAPS)
    high = _convolved(x + HALF, before + HALF, taps + HALF, half, inside_half, TYPE, ROW, TAPS)
    if ROTARY:
        cosine = tl.load(cosines + half, mask=inside_half, other=0.0)
        sine = tl.load(sines + half, mask=inside_half, other=0.0)
        low, high = low * cosine - high * sine, low * sine + high * cosine
    if SCALE:
        factor = tl.load(scale) / tl.sqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / HEAD_SIZE + eps)
        low, high = low * factor, high * factor
    return low.to(TYPE).to(tl.float32), high.to(TYPE).to(tl.float32)


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
def read_window(
    x, before, taps, cosines, sines, scale, keys, values, position, parts, part, head, key_head, is_writer,
    window, global_tokens, score_scale, eps,
    TYPE: tl.constexpr, NUM_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_G: tl.constexpr, PARTS: tl.constexpr, TAPS: tl.constexpr, ROTARY: tl.constexpr, SCALE: tl.constexpr,
    GLOBALS: tl.constexpr,
):  # fmt: skip
    """Leaves a part of the window's softmax; the first part has the token itself, and writes it to its slots."""
    HALF: tl.constexpr = HEAD_SIZE // 2
    KEY_WIDTH: tl.constexpr = KEY_HEADS * HEAD_SIZE
    ROW: tl.constexpr = NUM_HEADS * HEAD_SIZE + 2 * KEY_WIDTH
    half, channel = tl.arange(0, BLOCK_HALF), tl.arange(0, BLOCK_K)
    inside_half, inside = half < HALF, channel < HEAD_SIZE
    to_key = NUM_HEADS * HEAD_SIZE + (key_head - head) * HEAD_SIZE  # from the queries of the head
    to_value = to_key + KEY_WIDTH
    low, high = _local(x, before, taps, half, inside_half, cosines, sines, scale + head, eps, TYPE, ROW, HEAD_SIZE, TAPS, ROTARY, SCALE)
    own, num_seen, is_first = position % window, tl.minimum(position, window), part == 0
    if is_first:
        k_low, k_high = _local(
            x + to_key, before + to_key, taps + to_key, half, inside_half, cosines, sines, scale + NUM_HEADS + key_head, eps,
            TYPE, ROW, HEAD_SIZE, TAPS, ROTARY, SCALE,
        )  # fmt: skip
        y = _convolved(x + to_value, before + to_value, taps + to_value, channel, inside, TYPE, ROW, TAPS)
        largest = (tl.sum(low * k_low, 0) + tl.sum(high * k_high, 0)) * score_scale
        at = (global_tokens + own) * KEY_WIDTH
        tl.store(keys + at + half, k_low.to(TYPE), mask=inside_half & is_writer)
        tl.store(keys + at + HALF + half, k_high.to(TYPE), mask=inside_half & is_writer)
        tl.store(values + at + channel, y.to(TYPE), mask=inside & is_writer)
        if GLOBALS:
            is_global = (position < global_tokens) & is_writer
            at = position * KEY_WIDTH
            tl.store(keys + at + half, k_low.to(TYPE), mask=inside_half & is_global)
            tl.store(keys + at + HALF + half, k_high.to(TYPE), mask=inside_half & is_global)
            tl.store(values + at + channel, y.to(TYPE), mask=inside & is_global)
    else:
        y = tl.zeros((BLOCK_K,), tl.float32)
        largest = tl.full((), NO_SCORE, tl.float32)  # finite, so that no difference of two infinities can occur
    total = tl.where(is_first, 1.0, 0.0)
    size = tl.cdiv(tl.cdiv(num_seen, PARTS), BLOCK_J) * BLOCK_J
    for begin in range(part * size, tl.minimum((part + 1) * size, num_seen), BLOCK_J):
        slot = begin + tl.arange(0, BLOCK_J)
        visible = (slot < num_seen) & (slot != own)
        largest, total, y = _attended(
            keys, values, inside_half, half, inside, channel, visible, global_tokens + slot, low, high, largest, total, y, score_scale,
            KEY_WIDTH, HALF,
        )  # fmt: skip
    if GLOBALS:
        slot = tl.arange(0, BLOCK_G)
        visible = (slot < global_tokens) & (slot <= position - window) & is_first
        largest, total, y = _attended(
            keys, values, inside_half, half, inside, channel, visible, slot, low, high, largest, total, y, score_scale, KEY_WIDTH, HALF,
        )  # fmt: skip
    at = parts + part * (HEAD_SIZE + 2)
    tl.store(at + channel, y, mask=inside)
    tl.store(at + HEAD_SIZE, largest)
    tl.store(at + HEAD_SIZE + 1, total)


@triton.jit
def remember(
    x, before, taps, scalars, channels, gate_up, decay_bias, gate_bias, memory, first, read_out, score_scale, eps, decay_floor,
    TYPE: tl.constexpr, WIDTH: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, TAPS: tl.constexpr,
    SILU: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, SCALARS: tl.constexpr, DELTA: tl.constexpr, FLOOR: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Leaves what the query reads of some columns of a head's memory, and their gates; it writes the memory. All pointers are at the head."""
    channel, column = tl.arange(0, BLOCK_K), first + tl.arange(0, BLOCK_V)
    inside, inside_columns = channel < HEAD_SIZE, column < HEAD_SIZE
    at = memory + channel[:, None] * HEAD_SIZE + column[None, :]
    mask = inside[:, None] & inside_columns[None, :]
    state = tl.load(at, mask=mask, other=0.0)
    if RANK > 0:
        rank = tl.arange(0, BLOCK_R)
        up = tl.load(gate_up + column[:, None] * RANK + rank[None, :], mask=inside_columns[:, None] & (rank < RANK)[None, :], other=0.0)
    if OVERLAPS:
        await_results()
    q = _convolved(x, before, taps, channel, inside, TYPE, 3 * WIDTH, TAPS)
    k = _convolved(x + WIDTH, before + WIDTH, taps + WIDTH, channel, inside, TYPE, 3 * WIDTH, TAPS)
    v = _convolved(x + 2 * WIDTH, before + 2 * WIDTH, taps + 2 * WIDTH, column, inside_columns, TYPE, 3 * WIDTH, TAPS)
    if SILU:
        q, k = (q * tl.sigmoid(q)).to(TYPE).to(tl.float32), (k * tl.sigmoid(k)).to(TYPE).to(tl.float32)
    q = _normalised(q, eps, HEAD_SIZE).to(TYPE).to(tl.float32)
    k = _normalised(k, eps, HEAD_SIZE).to(TYPE).to(tl.float32)
    decay = tl.exp(_log_decay(tl.load(scalars) + decay_bias, decay_floor, FLOOR))
    if RANK > 0:
        bottleneck = tl.load(channels + rank, mask=rank < RANK, other=0.0).to(TYPE).to(tl.float32)
        gate = tl.sigmoid(tl.sum(up.to(tl.float32) * bottleneck[None, :], 1).to(TYPE).to(tl.float32) + gate_bias)
    else:
        gate = tl.zeros((BLOCK_V,), tl.float32) + tl.sigmoid(tl.load(scalars + 1) + gate_bias)
    read = tl.sum(state * q[:, None], 0)
    if DELTA:
        rate = tl.sigmoid(tl.load(scalars + SCALARS - 1)) / HEAD_SIZE
        written = rate * (v - decay * tl.sum(state * k[:, None], 0))
    else:
        written = (1.0 - decay) * score_scale * v
    tl.store(at, state * decay + k[:, None] * written[None, :], mask=mask)
    tl.store(read_out + column, decay * read + tl.sum(q * k, 0) * written, mask=inside_columns)
    tl.store(read_out + HEAD_SIZE + column, gate, mask=inside_columns)


@triton.jit
def merged(
    parts, norm_weight, eps, TYPE: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, WINDOW_PARTS: tl.constexpr,
    MEMORY_PARTS: tl.constexpr,
):  # fmt: skip
    """The sum of both paths of a head from the parts that its programs have left, which are read past the cache of a processor."""
    part, channel = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_K)
    inside, is_part = channel < HEAD_SIZE, part < WINDOW_PARTS
    sum_of_paths = tl.zeros((BLOCK_K,), tl.float32)
    if WINDOW_PARTS > 0:
        at = parts + part * (HEAD_SIZE + 2)
        largest = tl.load(at + HEAD_SIZE, mask=is_part, other=NO_SCORE, cache_modifier=".cg")
        weight = tl.exp(largest - tl.max(largest, 0))
        total = tl.sum(tl.load(at + HEAD_SIZE + 1, mask=is_part, other=0.0, cache_modifier=".cg") * weight, 0)
        y = tl.load(at[:, None] + channel[None, :], mask=is_part[:, None] & inside[None, :], other=0.0, cache_modifier=".cg")
        sum_of_paths += (tl.sum(y * weight[:, None], 0) / total).to(TYPE).to(tl.float32)
    if MEMORY_PARTS > 0:
        at = parts + WINDOW_PARTS * (HEAD_SIZE + 2) + channel
        read = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
        gate = tl.load(at + HEAD_SIZE, mask=inside, other=0.0, cache_modifier=".cg")
        read = _normalised(read, eps, HEAD_SIZE) * tl.load(norm_weight + channel, mask=inside, other=0.0)
        sum_of_paths += (gate * read).to(TYPE).to(tl.float32)
    return sum_of_paths
