"""The walk of gated linear attention: a program carries its columns of the state along the sequence, chunk by chunk, in registers.

Inside a chunk tokens meet as masked matrix products, as in the reference; between chunks only the state is carried. The same walk
computes y and, with the roles exchanged, the gradients:

    result   query  key  value   state           direction
    y        q      k    v       S      [K, V]   first to last token
    dq       dy     v    k       S^T    [V, K]   first to last token
    dk       v      dy   q       dS^T   [V, K]   last to first token
    dv       k      q    dy      dS     [K, V]   last to first token

Decays are sums of log2 alpha from the start of the chunk, fp32, and ratios of two tokens exp2 of a difference that is not positive.

Shapes: K key size, V value size; of a walk C tokens of a chunk, I inner size (of query and key), O outer size (of value and result).
"""

import triton
import triton.language as tl

from phase8.kernels.gpu.fast_math import exp2, log2

CHUNK_TOKENS = 64
BORDER_CHUNKS = 8
CHUNK = tl.constexpr(CHUNK_TOKENS)
BORDER = tl.constexpr(BORDER_CHUNKS)
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-26.0)  # bound of log alpha, as in the reference: a smaller one costs precision in sums over a chunk
BOUNDARY = tl.constexpr(160.0)  # subtracted from log2 alpha where a document begins: 2^-160 is 0 in fp32
SMALLEST_WEIGHT = tl.constexpr(2.0**-60)  # negligible, but what was multiplied by it can be divided by it


@triton.jit
def token_weight(log_alpha, scale):
    """The weight of a token, (1 - alpha) / sqrt(K), without cancellation."""
    series = log_alpha * (1.0 + log_alpha * (1.0 / 2 + log_alpha * (1.0 / 6 + log_alpha * (1.0 / 24))))
    return tl.maximum(tl.where(log_alpha > -0.03, -series, 1.0 - tl.exp(log_alpha)) * scale, SMALLEST_WEIGHT)


@triton.jit
def unravel(program, num_blocks, num_heads, num_segments):
    """Column block, head, segment and sequence of a program, in 64 bits because they become offsets."""
    program = tl.cast(program, tl.int64)
    rest = program // num_blocks
    return program % num_blocks, rest % num_heads, rest // num_heads % num_segments, rest // num_heads // num_segments


@triton.jit
def chunks_of(segment, segment_chunks, length):
    """First chunk of a segment, and the chunk after its last."""
    first = tl.cast(segment, tl.int32) * segment_chunks
    return first, tl.minimum(first + segment_chunks, tl.cdiv(length, CHUNK))


@triton.jit
def tile_mask(limit, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OUTER: tl.constexpr):
    """Mask that is True above row `limit` and left of column `width`; `width` is tested only where tiles do not cover OUTER columns evenly."""
    mask = (tl.arange(0, ROWS) < limit)[:, None]
    if OUTER % COLUMNS != 0:
        mask = mask & (tl.arange(0, COLUMNS) < width)[None, :]
    return mask


@triton.jit
def tile_pointers(base, first, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to a tile of a matrix that begins at row `first`."""
    rows = tl.cast(first + tl.arange(0, ROWS), tl.int64)
    return base + (rows[:, None] * stride + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def state_tile(
    base, row_stride, column_stride, width, INNER: tl.constexpr, OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Pointers to columns of a state [I, O], and a mask of those that exist."""
    rows, columns = tl.arange(0, BLOCK_INNER)[:, None], tl.arange(0, COLUMNS)[None, :]
    return base + rows * row_stride + columns * column_stride, tile_mask(INNER, width, BLOCK_INNER, COLUMNS, OUTER)


@triton.jit
def load_state(
    base, row_stride, column_stride, width, INNER: tl.constexpr, OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Columns of a state [I, O] of any strides."""
    pointers, mask = state_tile(base, row_stride, column_stride, width, INNER, OUTER, BLOCK_INNER, COLUMNS)
    return tl.load(pointers, mask, 0.0)


@triton.jit
def store_state(base, state, width, INNER: tl.constexpr, OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of a state into a contiguous one [I, O]."""
    pointers, mask = state_tile(base, OUTER, 1, width, INNER, OUTER, BLOCK_INNER, COLUMNS)
    tl.store(pointers, state.to(base.dtype.element_ty), mask)


@triton.jit
def walk(
    query, query_stride, key, key_stride, value, value_stride, decay, decay_stride, starts, length, scale,
    out, out_stride, probe, probe_stride, probes, products, borders, state, first_chunk, end_chunk, width, turn,
    READS: tl.constexpr, PROBES: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carries `state` through chunks first_chunk ... end_chunk - 1 of one head: forward if `turn` is 1, backward if -1.

    With READS it writes what each token reads into `out`. With PROBES, and if `probes` is set, it also writes the product of that with the row
    of `probe`, summed over the columns, into `products`, and the states that cross multiples of BORDER chunks into `borders`.

    Pointers are those of the head's first token and (except `query` and `key`) of the program's first column, which is followed by
    `width` columns.

    Returns:
        The state, and the share of the first state that is left in it.
    """
    rows, forwards = tl.arange(0, CHUNK), turn > 0
    share = 1.0
    # Addresses and masks hoisted out of the loop would occupy a hundred registers, and the state would be spilled.
    for step in tl.range(end_chunk - first_chunk, disable_licm=True):
        chunk = tl.where(forwards, first_chunk + step, end_chunk - 1 - step)
        first = chunk * CHUNK
        live, limit = first + rows < length, length - first
        key_tile = tl.load(tile_pointers(key, first, key_stride, CHUNK, BLOCK_INNER), tile_mask(limit, INNER, CHUNK, BLOCK_INNER, INNER), 0.0)
        value_tile = tl.load(tile_pointers(value, first, value_stride, CHUNK, COLUMNS), tile_mask(limit, width, CHUNK, COLUMNS, OUTER), 0.0)
        if READS:
            query_pointers = tile_pointers(query, first, query_stride, CHUNK, BLOCK_INNER)
            query_tile = tl.load(query_pointers, tile_mask(limit, INNER, CHUNK, BLOCK_INNER, INNER), 0.0)
        if PROBES:
            probe_pointers = tile_pointers(probe, first, probe_stride, CHUNK, COLUMNS)
            probe_tile = tl.load(probe_pointers, tile_mask(limit, width, CHUNK, COLUMNS, OUTER) & probes, 0.0)

        log_alpha = tl.maximum(tl.load(decay + tl.cast(first + rows, tl.int64) * decay_stride, live, 0.0), LOWEST)
        weight, steps = token_weight(log_alpha, scale), log_alpha * LOG2_E
        if starts is not None:
            steps -= tl.where(tl.load(starts + first + rows, live, 0) != 0, BOUNDARY, 0.0)
        total = tl.cumsum(steps, 0)
        last = tl.min(total, 0)
        from_start, to_end, keeps = exp2(total, FAST), exp2(last - total, FAST) * weight, tl.exp2(last)
        added = (value_tile.to(tl.float32) * tl.where(forwards, to_end, from_start)[:, None]).to(value_tile.dtype)
        if READS:
            # Ratio from the earlier token to the later one, with its weight; masked before exp2, which could overflow for exchanged tokens.
            written = total - log2(weight, FAST)
            change = tl.where(forwards, total, -written)[:, None] - tl.where(forwards, written, -total)[None, :]
            order = rows * turn
            gate = exp2(tl.where(order[:, None] >= order[None, :], change, float("-inf")), FAST)
            scores = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION) * gate
            read = tl.dot(scores.to(value_tile.dtype), value_tile, input_precision=PRECISION)
            carried = tl.dot(query_tile, state.to(query_tile.dtype), input_precision=PRECISION)
            # fma: a plain sum would become the accumulator of the previous product, which would have to wait for this one and need more registers.
            read = tl.fma(carried, tl.broadcast_to(tl.where(forwards, from_start, to_end)[:, None], [CHUNK, COLUMNS]), read)
            out_pointers = tile_pointers(out, first, out_stride, CHUNK, COLUMNS)
            tl.store(out_pointers, read.to(out.dtype.element_ty), tile_mask(limit, width, CHUNK, COLUMNS, OUTER))
            if PROBES:
                tl.store(products + first + rows, tl.sum(probe_tile.to(tl.float32) * read, 1), live & probes)
        state = tl.dot(tl.trans(key_tile), added, state * keeps, input_precision=PRECISION)
        share *= keeps
        if PROBES:
            edge = chunk + tl.where(forwards, 1, 0)
            if ((edge % BORDER == 0) & (edge > 0) | (edge * CHUNK >= length)) & probes:
                store_state(borders + tl.cast((edge - 1) // BORDER, tl.int64) * INNER * OUTER, state, width, INNER, OUTER, BLOCK_INNER, COLUMNS)
    return state, share
