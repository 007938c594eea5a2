"""The programs of a decoding step: one for both paths of a head, or one of several, for a part of its window or for some columns of its memory.

All pointers are at the head of the row. Shapes: H heads of queries, J heads of keys and values, K head size.
"""

import triton
import triton.language as tl

from phase8.kernels.gpu.mixer_step_parts import (
    NO_SCORE,
    angles,
    attended,
    convolved,
    convolved_before,
    decay_of,
    gated,
    gates_of,
    keep_token,
    lengths,
    load_memory,
    load_slots,
    load_up,
    move_up,
    normalised,
    rate_of,
    recall,
    remember,
    scaled,
    silu_of_values,
    slots_of_part,
    turned,
    with_token,
)
from phase8.kernels.gpu.overlap import await_results


@triton.jit
def both_paths(
    x, before, taps, to_key, cosines, sines, scale, key_scale, keys, values, positions, is_writer,
    scalars, channels, gate_up, decay_bias, gate_bias, skip, norm_weight, memory, window, global_tokens, score_scale, eps, decay_floor,
    TYPE: tl.constexpr, ROW: tl.constexpr, KEY_WIDTH: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr,
    ROWS: tl.constexpr, TAPS: tl.constexpr, WINDOW: tl.constexpr, ROTARY: tl.constexpr, SCALE: tl.constexpr, GLOBALS: tl.constexpr,
    MEMORY: tl.constexpr, SILU: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, TILE_R: tl.constexpr, SCALARS: tl.constexpr,
    DELTA: tl.constexpr, FLOOR: tl.constexpr, SILU_VALUES: tl.constexpr, SILU_GATE: tl.constexpr,
    SKIP: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """The sum of both paths of a head [K], fp32; it writes all of the state.

    The memory is on its way while the inputs are normalised, and the window while the memory is written: so the two do not need registers at once.
    """
    channel = tl.arange(0, BLOCK_K)
    inside = channel < HEAD_SIZE
    if MEMORY:
        state = load_memory(memory, channel, inside, channel, inside, HEAD_SIZE)
        decay_offset, gate_offset, share = tl.load(decay_bias), tl.load(gate_bias), tl.load(skip) if SKIP else 0.0
    if WINDOW:
        position = tl.cast(tl.load(positions), tl.int32)
        begin, end = slots_of_part(position, 0, window, global_tokens, 1, BLOCK_J)
        length, key_length = lengths(scale, key_scale, SCALE)
        cosine, sine = angles(cosines, sines, channel, HEAD_SIZE, ROTARY)
    row = tl.arange(0, ROWS)[:, None]  # query, key, value, nothing
    at, mask = tl.where(row == 0, 0, to_key + (row - 1) * KEY_WIDTH) + channel[None, :], (row < 3) & inside[None, :]
    earlier, last_tap = convolved_before(before, taps, at, mask, ROW, TAPS)
    if OVERLAPS:
        await_results()
    inputs = convolved(x, at, mask, earlier, last_tap, TYPE)
    if MEMORY:
        decay, rate = decay_of(tl.load(scalars) + decay_offset, decay_floor, FLOOR), rate_of(scalars, HEAD_SIZE, SCALARS, DELTA)
        q, k = normalised(inputs, row, eps, TYPE, HEAD_SIZE, SILU)
        qk = tl.sum(q * k, 0)
    v = silu_of_values(tl.sum(tl.where(row == 2, inputs, 0.0), 0), TYPE, SILU_VALUES == "all")
    if WINDOW:
        near = turned(inputs, channel, cosine, sine, HEAD_SIZE, ROTARY)
        near_q, near_k = scaled(near, row, length, key_length, eps, TYPE, HEAD_SIZE, SCALE)
        score = tl.sum(near_q * near_k, 0) * score_scale
        keep_token(keys, values, near_k, v, position, is_writer, channel, inside, window, global_tokens, TYPE, KEY_WIDTH, GLOBALS)
    tl.debug_barrier()  # all threads have read the inputs of the convolution
    move_up(x, before, HEAD_SIZE, BLOCK_K, KEY_WIDTH, TAPS)
    sum_of_paths = tl.zeros((BLOCK_K,), tl.float32)
    if MEMORY:
        own = silu_of_values(v, TYPE, SILU_VALUES == "global")
        written, read = recall(state, q, k, own, qk, decay, rate, score_scale, DELTA)
        remember(state, memory, channel, inside, channel, inside, k, written, decay, HEAD_SIZE)
        read += share * own
    if WINDOW:
        key = load_slots(keys, begin, end, position, channel, inside, window, global_tokens, BLOCK_J, KEY_WIDTH, GLOBALS)
        value = load_slots(values, begin, end, position, channel, inside, window, global_tokens, BLOCK_J, KEY_WIDTH, GLOBALS)
    if MEMORY:
        weight_of_norm, up = tl.load(norm_weight + channel, mask=inside, other=0.0), load_up(gate_up, channel, inside, 0, RANK, TILE_R)
    tl.debug_barrier()  # behind which the compiler would otherwise move these loads: it does so with what is needed late
    if MEMORY:
        gate = gates_of(up, scalars, channels, gate_up, gate_offset, channel, inside, TYPE, RANK, BLOCK_R, BLOCK_K, TILE_R, SILU_GATE)
        sum_of_paths += gated(read, gate, weight_of_norm, eps, TYPE, HEAD_SIZE)
    if WINDOW:
        largest, total, y = attended(
            key, value, keys, values, near_q, begin, end, position, channel, inside, window, global_tokens, score_scale,
            BLOCK_J, BLOCK_K, KEY_WIDTH, GLOBALS,
        )  # fmt: skip
        largest, total, y = with_token(largest, total, y, score, v)
        sum_of_paths += (y / total).to(TYPE).to(tl.float32)
    return sum_of_paths


@triton.jit
def part_of_window(
    x, before, taps, to_key, cosines, sines, scale, key_scale, keys, values, positions, parts, part, is_writer,
    window, global_tokens, score_scale, eps,
    TYPE: tl.constexpr, ROW: tl.constexpr, KEY_WIDTH: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, TAPS: tl.constexpr, ROTARY: tl.constexpr, SCALE: tl.constexpr, GLOBALS: tl.constexpr,
    SILU_VALUES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Leaves a part of the window's softmax; the first part has the token itself, and writes it to its slots."""
    channel = tl.arange(0, BLOCK_K)
    inside, is_first = channel < HEAD_SIZE, part == 0
    position = tl.cast(tl.load(positions), tl.int32)
    begin, end = slots_of_part(position, part, window, global_tokens, PARTS, BLOCK_J)
    key = load_slots(keys, begin, end, position, channel, inside, window, global_tokens, BLOCK_J, KEY_WIDTH, GLOBALS)
    value = load_slots(values, begin, end, position, channel, inside, window, global_tokens, BLOCK_J, KEY_WIDTH, GLOBALS)
    length, key_length = lengths(scale, key_scale, SCALE)
    cosine, sine = angles(cosines, sines, channel, HEAD_SIZE, ROTARY)
    row = tl.arange(0, ROWS)[:, None]  # query, key, value, nothing; the token's key and value are the first part's alone
    at, mask = tl.where(row == 0, 0, to_key + (row - 1) * KEY_WIDTH) + channel[None, :], (row < tl.where(is_first, 3, 1)) & inside[None, :]
    earlier, last_tap = convolved_before(before, taps, at, mask, ROW, TAPS)
    if OVERLAPS:
        await_results()
    inputs = convolved(x, at, mask, earlier, last_tap, TYPE)
    near = turned(inputs, channel, cosine, sine, HEAD_SIZE, ROTARY)
    q, k = scaled(near, row, length, key_length, eps, TYPE, HEAD_SIZE, SCALE)
    v = silu_of_values(tl.sum(tl.where(row == 2, inputs, 0.0), 0), TYPE, SILU_VALUES == "all")
    keep_token(keys, values, k, v, position, is_writer & is_first, channel, inside, window, global_tokens, TYPE, KEY_WIDTH, GLOBALS)
    score = tl.where(is_first, tl.sum(q * k, 0) * score_scale, NO_SCORE)
    largest, total, y = attended(
        key, value, keys, values, q, begin, end, position, channel, inside, window, global_tokens, score_scale, BLOCK_J, BLOCK_K, KEY_WIDTH, GLOBALS
    )
    largest, total, y = with_token(largest, total, y, score, v)
    at = parts + part * (HEAD_SIZE + 2)
    tl.store(at + channel, y, mask=inside)
    tl.store(at + HEAD_SIZE, largest)
    tl.store(at + HEAD_SIZE + 1, total)


@triton.jit
def columns_of_memory(
    x, before, taps, scalars, channels, gate_up, decay_bias, gate_bias, skip, memory, read_out, first, score_scale, eps, decay_floor,
    TYPE: tl.constexpr, WIDTH: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    TAPS: tl.constexpr, SILU: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, TILE_R: tl.constexpr, SCALARS: tl.constexpr,
    DELTA: tl.constexpr, FLOOR: tl.constexpr, SILU_VALUES: tl.constexpr, SILU_GATE: tl.constexpr,
    SKIP: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Leaves what the query reads of some columns of the memory, and their gates; it writes the columns."""
    channel, column = tl.arange(0, BLOCK_K), first + tl.arange(0, BLOCK_V)
    inside, inside_columns = channel < HEAD_SIZE, column < HEAD_SIZE
    state = load_memory(memory, channel, inside, column, inside_columns, HEAD_SIZE)
    up = load_up(gate_up, column, inside_columns, 0, RANK, TILE_R)
    decay_offset, gate_offset, share = tl.load(decay_bias), tl.load(gate_bias), tl.load(skip) if SKIP else 0.0
    row = tl.arange(0, ROWS)[:, None]  # query, key, nothing
    at, mask, at_v = row * WIDTH + channel[None, :], (row < 2) & inside[None, :], 2 * WIDTH + column
    earlier, last_tap = convolved_before(before, taps, at, mask, 3 * WIDTH, TAPS)
    earlier_v, last_tap_v = convolved_before(before, taps, at_v, inside_columns, 3 * WIDTH, TAPS)
    if OVERLAPS:
        await_results()
    inputs, v = convolved(x, at, mask, earlier, last_tap, TYPE), convolved(x, at_v, inside_columns, earlier_v, last_tap_v, TYPE)
    decay, rate = decay_of(tl.load(scalars) + decay_offset, decay_floor, FLOOR), rate_of(scalars, HEAD_SIZE, SCALARS, DELTA)
    gate = gates_of(up, scalars, channels, gate_up, gate_offset, column, inside_columns, TYPE, RANK, BLOCK_R, BLOCK_V, TILE_R, SILU_GATE)
    q, k = normalised(inputs, row, eps, TYPE, HEAD_SIZE, SILU)
    qk = tl.sum(q * k, 0)
    v = silu_of_values(v, TYPE, SILU_VALUES != "none")
    written, read = recall(state, q, k, v, qk, decay, rate, score_scale, DELTA)
    remember(state, memory, channel, inside, column, inside_columns, k, written, decay, HEAD_SIZE)
    tl.store(read_out + column, read + share * v, mask=inside_columns)
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
    if MEMORY_PARTS > 0:
        at = parts + WINDOW_PARTS * (HEAD_SIZE + 2) + channel
        read = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
        gate = tl.load(at + HEAD_SIZE, mask=inside, other=0.0, cache_modifier=".cg")
        weight_of_norm = tl.load(norm_weight + channel, mask=inside, other=0.0)
    if WINDOW_PARTS > 0:
        at = parts + part * (HEAD_SIZE + 2)
        largest = tl.load(at + HEAD_SIZE, mask=is_part, other=NO_SCORE, cache_modifier=".cg")
        total = tl.load(at + HEAD_SIZE + 1, mask=is_part, other=0.0, cache_modifier=".cg")
        y = tl.load(at[:, None] + channel[None, :], mask=is_part[:, None] & inside[None, :], other=0.0, cache_modifier=".cg")
        weight = tl.exp(largest - tl.max(largest, 0))
        sum_of_paths += (tl.sum(y * weight[:, None], 0) / tl.sum(total * weight, 0)).to(TYPE).to(tl.float32)
    if MEMORY_PARTS > 0:
        sum_of_paths += gated(read, gate, weight_of_norm, eps, TYPE, HEAD_SIZE)
    return sum_of_paths
