"""What a program of a decoding step does for a head: its inputs, the slots of a window, columns of the memory, gates, and the sum of both paths.

Loads come first and sums over threads later: each of these sums is a barrier, behind which no load can be on its way early. The token itself takes
part in the window from registers, so that no program reads what another thread has just written.

Query, key and value are rows of one tile until they are normalised, as many rows as warps, so that a warp has a row. As vectors of their own they
would have fewer numbers than a large program has threads, and the compiler loads such vectors anew in each layout that it needs: it spilled hundreds
of registers.

Shapes: H heads of queries, J heads of keys and values, K head size, W window, G global tokens, R rank of the gate per channel.
"""

import triton
import triton.language as tl

NO_SCORE = tl.constexpr(-1e30)  # below every score, finite, so that no difference of two infinities can occur


@triton.jit
def convolved_before(before, taps, at, mask, ROW: tl.constexpr, TAPS: tl.constexpr):
    """What earlier inputs add to the convolution of some channels, fp32, and the last tap; pointers are at the first channel of the head."""
    if TAPS > 1:
        value = tl.zeros(at.shape, tl.float32)
        for tap in tl.static_range(TAPS - 1):
            earlier = tl.load(before + tap * ROW + at, mask=mask, other=0.0).to(tl.float32)
            value += earlier * tl.load(taps + tap * ROW + at, mask=mask, other=0.0)
        return value, tl.load(taps + (TAPS - 1) * ROW + at, mask=mask, other=0.0)
    else:
        return 0.0, 1.0


@triton.jit
def convolved(x, at, mask, earlier, last_tap, TYPE: tl.constexpr):
    """The convolution of some channels, rounded as it is stored, fp32; `x` points at the first channel of the head."""
    x = tl.load(x + at, mask=mask, other=0.0).to(TYPE).to(tl.float32)
    return (x * last_tap + earlier).to(TYPE).to(tl.float32)


@triton.jit
def lengths(scale, key_scale, SCALE: tl.constexpr):
    """Length of the query and of the key of the window over the root of the head size; 1 where they keep theirs."""
    if SCALE:
        return tl.load(scale), tl.load(key_scale)
    else:
        return 1.0, 1.0


@triton.jit
def angles(cosines, sines, channel, HEAD_SIZE: tl.constexpr, ROTARY: tl.constexpr):
    """Cosine and sine of the rotary angle of each channel, the sine with the sign that its partner i +- K/2 has in the rotation [K]."""
    if ROTARY:
        is_low, inside = channel < HEAD_SIZE // 2, channel < HEAD_SIZE
        angle = tl.where(is_low, channel, channel - HEAD_SIZE // 2)
        sine = tl.load(sines + angle, mask=inside, other=0.0)
        return tl.load(cosines + angle, mask=inside, other=0.0), tl.where(is_low, -sine, sine)
    else:
        return 1.0, 0.0


@triton.jit
def turned(inputs, channel, cosine, sine, HEAD_SIZE: tl.constexpr, ROTARY: tl.constexpr):
    """Inputs of the window before they are scaled, fp32 [rows, K]."""
    if ROTARY:
        HALF: tl.constexpr = HEAD_SIZE // 2
        partner = tl.where(channel < HALF, channel + HALF, tl.where(channel < HEAD_SIZE, channel - HALF, channel))
        inputs = inputs * cosine[None, :] + tl.gather(inputs, tl.broadcast_to(partner[None, :], inputs.shape), 1) * sine[None, :]
    return inputs


@triton.jit
def move_up(x, before, HEAD_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr):
    """Moves the inputs of the convolution of a head up by one, after a barrier behind which none else reads them; it loads all before it stores."""
    if TAPS > 1:
        BLOCK_T: tl.constexpr = triton.next_power_of_2(TAPS - 1)
        tap, number = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, 4 * BLOCK_K)[None, :]
        at, inside = number // BLOCK_K * WIDTH + number % BLOCK_K, (number < 3 * BLOCK_K) & (number % BLOCK_K < HEAD_SIZE)
        place, mask = before + tap * (3 * WIDTH) + at, (tap < TAPS - 2) & inside
        later, newest = tl.load(place + 3 * WIDTH, mask=mask), tl.load(x + at, mask=inside)
        tl.debug_barrier()
        tl.store(place, later, mask=mask)
        tl.store(before + (TAPS - 2) * (3 * WIDTH) + at, newest.to(before.dtype.element_ty), mask=inside)


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def query_and_key(tile, row):
    """The first two rows of a tile [rows, K], behind one barrier."""
    return tl.reduce((tl.where(row == 0, tile, 0.0), tl.where(row == 1, tile, 0.0)), 0, _add_two)


@triton.jit
def normalised(inputs, row, eps, TYPE: tl.constexpr, HEAD_SIZE: tl.constexpr, SILU: tl.constexpr):
    """Query and key of the global path from the rows of inputs, rounded as they are stored, fp32 [K]."""
    if SILU:
        inputs = (inputs * tl.sigmoid(inputs)).to(TYPE).to(tl.float32)
    inputs = inputs / tl.sqrt(tl.sum(inputs * inputs, 1) / HEAD_SIZE + eps)[:, None]
    return query_and_key(inputs.to(TYPE).to(tl.float32), row)


@triton.jit
def silu_of_values(v, TYPE: tl.constexpr, SILU: tl.constexpr):
    """Values after their activation, rounded as they are stored, fp32."""
    return (v * tl.sigmoid(v)).to(TYPE).to(tl.float32) if SILU else v


@triton.jit
def scaled(inputs, row, length, key_length, eps, TYPE: tl.constexpr, HEAD_SIZE: tl.constexpr, SCALE: tl.constexpr):
    """Query and key of the window in their lengths, rounded as they are stored, fp32 [K]."""
    if SCALE:
        inputs *= tl.where(row == 0, length, key_length) / tl.sqrt(tl.sum(inputs * inputs, 1) / HEAD_SIZE + eps)[:, None]
    return query_and_key(inputs.to(TYPE).to(tl.float32), row)


@triton.jit
def decay_of(step, decay_floor, FLOOR: tl.constexpr):
    """What a memory keeps, from the raw scalar of the head."""
    if FLOOR:
        return tl.exp(decay_floor * tl.sigmoid(step))
    else:
        return tl.exp(-(tl.maximum(step, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(step)))))


@triton.jit
def rate_of(scalars, HEAD_SIZE: tl.constexpr, SCALARS: tl.constexpr, DELTA: tl.constexpr):
    """Rate of the delta rule, which is the last scalar of a head; 0 without the rule."""
    return tl.sigmoid(tl.load(scalars + SCALARS - 1)) / HEAD_SIZE if DELTA else 0.0


@triton.jit
def keep_token(
    keys, values, k, v, position, is_writer, channel, inside, window, global_tokens, TYPE: tl.constexpr, WIDTH: tl.constexpr, GLOBALS: tl.constexpr
):
    """Writes the key and the value of the token to its slots."""
    at = tl.cast(global_tokens + position % window, tl.int64) * WIDTH + channel
    tl.store(keys + at, k.to(TYPE), mask=inside & is_writer)
    tl.store(values + at, v.to(TYPE), mask=inside & is_writer)
    if GLOBALS:
        at, is_global = position * WIDTH + channel, (position < global_tokens) & is_writer
        tl.store(keys + at, k.to(TYPE), mask=inside & is_global)
        tl.store(values + at, v.to(TYPE), mask=inside & is_global)


@triton.jit
def slots_of_part(position, part, window, global_tokens, PARTS: tl.constexpr, BLOCK_J: tl.constexpr):
    """The first slot of a part of those that have been seen, and the first one behind it."""
    num_seen = global_tokens + tl.minimum(position, window)
    size = tl.cdiv(tl.cdiv(num_seen, PARTS), BLOCK_J) * BLOCK_J
    return part * size, tl.minimum((part + 1) * size, num_seen)


@triton.jit
def _visible(slot, end, position, window, global_tokens, GLOBALS: tl.constexpr):
    """Which slots hold earlier tokens that are seen through the window, or global ones that have left it."""
    visible = (slot < end) & (slot != global_tokens + position % window)
    if GLOBALS:
        visible &= (slot >= global_tokens) | (slot <= position - window)
    return visible


@triton.jit
def load_slots(
    ring, begin, end, position, channel, inside, window, global_tokens, BLOCK_J: tl.constexpr, WIDTH: tl.constexpr, GLOBALS: tl.constexpr
):  # fmt: skip
    """A tile of keys or values [BLOCK_J, K]."""
    slot = begin + tl.arange(0, BLOCK_J)
    mask = _visible(slot, end, position, window, global_tokens, GLOBALS)[:, None] & inside[None, :]
    return tl.load(ring + tl.cast(slot, tl.int64)[:, None] * WIDTH + channel[None, :], mask=mask, other=0.0)


@triton.jit
def attended(
    key, value, keys, values, q, begin, end, position, channel, inside, window, global_tokens, score_scale,
    BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, GLOBALS: tl.constexpr,
):  # fmt: skip
    """Slots but that of the token itself, of which the first tile is given: the largest score, the sum of weights and that of weighted values [K].

    Each row of a tile has a softmax of its own until the end, so that the loop has no barrier, and a tile is on its way while one is computed.
    """
    largest, total = tl.full((BLOCK_J,), NO_SCORE, tl.float32), tl.zeros((BLOCK_J,), tl.float32)
    y = tl.zeros((BLOCK_J, BLOCK_K), tl.float32)
    for first in range(begin, end, BLOCK_J):
        next_key = load_slots(keys, first + BLOCK_J, end, position, channel, inside, window, global_tokens, BLOCK_J, WIDTH, GLOBALS)
        next_value = load_slots(values, first + BLOCK_J, end, position, channel, inside, window, global_tokens, BLOCK_J, WIDTH, GLOBALS)
        visible = _visible(first + tl.arange(0, BLOCK_J), end, position, window, global_tokens, GLOBALS)
        score = tl.where(visible, tl.sum(key.to(tl.float32) * q[None, :], 1) * score_scale, float("-inf"))
        new_largest = tl.maximum(largest, score)
        weight, kept = tl.exp(score - new_largest), tl.exp(largest - new_largest)
        total, y, largest = total * kept + weight, y * kept[:, None] + weight[:, None] * value.to(tl.float32), new_largest
        key, value = next_key, next_value
    largest_of_all = tl.max(largest, 0)
    weight = tl.exp(largest - largest_of_all)
    return largest_of_all, tl.sum(total * weight, 0), tl.sum(y * weight[:, None], 0)


@triton.jit
def with_token(largest, total, y, score, v):
    """The same three numbers with the token itself."""
    new_largest = tl.maximum(largest, score)
    kept, weight = tl.exp(largest - new_largest), tl.exp(score - new_largest)
    return new_largest, total * kept + weight, y * kept + v * weight


@triton.jit
def load_memory(memory, channel, inside, column, inside_columns, HEAD_SIZE: tl.constexpr):
    """Some columns of the memory of a head [K, columns]."""
    mask = inside[:, None] & inside_columns[None, :]
    return tl.load(memory + channel[:, None] * HEAD_SIZE + column[None, :], mask=mask, other=0.0)


@triton.jit
def recall(state, q, k, v, qk, decay, rate, score_scale, DELTA: tl.constexpr):
    """What the token writes to some columns of a memory, and what the query reads of them with it [columns]."""
    read = tl.sum(state * q[:, None], 0)
    written = rate * (v - decay * tl.sum(state * k[:, None], 0)) if DELTA else (1.0 - decay) * score_scale * v
    return written, decay * read + qk * written


@triton.jit
def remember(state, memory, channel, inside, column, inside_columns, k, written, decay, HEAD_SIZE: tl.constexpr):
    """Writes some columns of the memory of a head."""
    mask = inside[:, None] & inside_columns[None, :]
    tl.store(memory + channel[:, None] * HEAD_SIZE + column[None, :], state * decay + k[:, None] * written[None, :], mask=mask)


@triton.jit
def load_up(gate_up, column, inside_columns, begin, RANK: tl.constexpr, TILE_R: tl.constexpr):
    """A tile of the second weight of a gate per channel [columns, TILE_R]; 0 without one."""
    if RANK > 0:
        rank = begin + tl.arange(0, TILE_R)
        return tl.load(gate_up + column[:, None] * RANK + rank[None, :], mask=inside_columns[:, None] & (rank < RANK)[None, :], other=0.0)
    else:
        return 0.0


@triton.jit
def _opened(logits, SILU_GATE: tl.constexpr):
    return logits * tl.sigmoid(logits) if SILU_GATE else tl.sigmoid(logits)


@triton.jit
def gates_of(
    up, scalars, channels, gate_up, gate_bias, column, inside_columns,
    TYPE: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, TILE_R: tl.constexpr, SILU_GATE: tl.constexpr,
):  # fmt: skip
    """The gates of some columns [columns], with the first tile of the second weight of a gate per channel, in tiles that registers have room for."""
    if RANK > 0:
        products = tl.zeros((BLOCK_V, TILE_R), tl.float32)
        for begin in tl.static_range(0, BLOCK_R, TILE_R):
            if begin > 0:
                up = load_up(gate_up, column, inside_columns, begin, RANK, TILE_R)
            rank = begin + tl.arange(0, TILE_R)
            bottleneck = tl.load(channels + rank, mask=rank < RANK, other=0.0).to(TYPE).to(tl.float32)
            products += up.to(tl.float32) * bottleneck[None, :]
        return _opened(tl.sum(products, 1).to(TYPE).to(tl.float32) + gate_bias, SILU_GATE)
    else:
        return tl.zeros((BLOCK_V,), tl.float32) + _opened(tl.load(scalars + 1) + gate_bias, SILU_GATE)


@triton.jit
def gated(read, gate, norm_weight, eps, TYPE: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """The gated global path of a head [K], rounded as it is stored, fp32."""
    return (gate * (read / tl.sqrt(tl.sum(read * read, 0) / HEAD_SIZE + eps) * norm_weight)).to(TYPE).to(tl.float32)
