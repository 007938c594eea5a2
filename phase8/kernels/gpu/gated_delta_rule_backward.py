"""The gated delta rule in Triton, backward: a walk from the last token to the first for dv, then all chunks at once for the other gradients.

The walk carries columns of the gradient of the state, which do not meet either. It solves the transposed triangular systems, and leaves the
gradient of the state after every chunk. The gradients of q, k, log alpha and beta need whole rows; with the states on both sides of a chunk
at hand they need nothing else from outside it.

Shapes: B batch, T tokens, H heads, K key size, V value size, N chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.gpu.fast_math import exp2
from phase8.kernels.gpu.gated_delta_rule import MIN_COLUMNS, Kept, tiles_for, walk_again
from phase8.kernels.gpu.gated_delta_rule_inverse import (
    SMALLEST_RATE,
    Gates,
    chunk_inverses,
    prepare_gates,
    token_gates,
    unravel_chunk,
)
from phase8.kernels.gpu.gated_linear_attention import Tiles, block_size, strides, walk_constants
from phase8.kernels.gpu.gated_linear_attention_walk import CHUNK, load_state, store_state, tile_mask, tile_pointers, unravel
from phase8.kernels.gpu.layout import with_rows_contiguous


def gated_delta_rule_backward(
    dy: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    starts: Tensor | None,
    initial_state: Tensor | None,
    *,
    tiles: Tiles | None = None,
    chunk_tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes the reference with this name; `tiles` of the walks and `chunk_tiles` of the last kernel override the choice for the shape."""
    (batch, _, num_heads, key_size), value_size = q.shape, v.shape[-1]
    inputs = with_rows_contiguous(*(x.to(v.dtype) for x in (q, k, v, dy)))
    gates = prepare_gates(log_decay, beta, starts)
    inverse = chunk_inverses(inputs[1], gates)
    kept = walk_again(inputs[1], inputs[2], gates, inverse, initial_state, tiles=tiles)
    dinitial = torch.empty(batch, num_heads, key_size, value_size, dtype=torch.float32, device=v.device)
    dv, dafter = _walk_back(*inputs, gates, inverse, dstate, dinitial, tiles=tiles)
    dq, dk, dlog_decay, dbeta = _chunk_gradients(*inputs, gates, kept, dv, dafter, tiles=chunk_tiles)
    return dq.to(q.dtype), dk.to(k.dtype), dv, dlog_decay.to(log_decay.dtype), dbeta.to(beta.dtype), dinitial


def chunk_tiles_for(value_size: int, element_bytes: int) -> Tiles:
    """Timed on an H200: a pipeline of loads is worth the five registers that it spills for heads of 128."""
    if triton.knobs.runtime.interpret:
        return Tiles(block_size(value_size), 4, 1)
    if element_bytes > 2:
        return Tiles(MIN_COLUMNS, 8, 1)
    # At least two blocks of columns: without a loop all loads of the kernel would be moved to its beginning.
    return Tiles(64, 8, 2) if value_size > 64 else Tiles(max(block_size(value_size) // 2, MIN_COLUMNS), 4, 1)


def _walk_back(
    q: Tensor, k: Tensor, v: Tensor, dy: Tensor, gates: Gates, inverse: Tensor, dstate: Tensor | None, dinitial: Tensor, *, tiles: Tiles | None
) -> tuple[Tensor, Tensor]:
    """The gradient of v, and that of the state after each chunk [B, H, N, K, V]; fills `dinitial`."""
    (batch, _, num_heads, key_size), value_size = k.shape, v.shape[-1]
    tiles = tiles or tiles_for(k, v)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    dafter = torch.empty(batch, num_heads, gates.num_chunks, key_size, value_size, dtype=v.dtype, device=v.device)
    dfinal = None if dstate is None else dstate.float().contiguous()
    _walk_back_kernel[(batch * num_heads * triton.cdiv(value_size, tiles.columns),)](
        q, k, dy, *gates.arguments, inverse, dv, dafter, dfinal, dinitial, *strides(q, k, dy), num_heads, gates.num_chunks,
        K=key_size, V=value_size, BLOCK_K=block_size(key_size), **walk_constants(tiles),
    )  # fmt: skip
    return dv, dafter


def _chunk_gradients(
    q: Tensor, k: Tensor, v: Tensor, dy: Tensor, gates: Gates, kept: Kept, dv: Tensor, dafter: Tensor, *, tiles: Tiles | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, log alpha and beta."""
    (batch, length, num_heads, key_size), value_size = k.shape, v.shape[-1]
    tiles = tiles or chunk_tiles_for(value_size, v.element_size())
    dq, dk = (torch.empty(x.shape, dtype=v.dtype, device=v.device) for x in (q, k))
    dlog_decay, dbeta = (torch.empty(batch, length, num_heads, dtype=torch.float32, device=v.device) for _ in range(2))
    _chunk_gradients_kernel[(batch * num_heads * gates.num_chunks,)](
        q, k, dy, *gates.arguments, kept.written, dv, kept.before, dafter, dq, dk, dlog_decay, dbeta, *strides(q, k, dy),
        num_heads, gates.num_chunks, K=key_size, V=value_size, BLOCK_K=block_size(key_size), **walk_constants(tiles),
    )  # fmt: skip
    return dq, dk, dlog_decay, dbeta


@triton.jit
def _walk_back_kernel(
    q, k, dy, decay, decay_b, decay_t, decay_h, rate, rate_b, rate_t, rate_h, starts, length, inverse, dv, dafter, dfinal, dinitial,
    q_b, k_b, dy_b, q_h, k_h, dy_h, q_t, k_t, dy_t, num_heads, num_chunks,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carries one block of columns of the gradient of the state of one head from the last chunk to the first."""
    block, head, _, batch = unravel(tl.program_id(0), tl.cdiv(V, COLUMNS), num_heads, 1)
    row, column, width = batch * num_heads + head, block * COLUMNS, V - block * COLUMNS
    q, k, dy = q + batch * q_b + head * q_h, k + batch * k_b + head * k_h, dy + batch * dy_b + head * dy_h + column
    decay += batch * decay_b + head * decay_h
    rate += batch * rate_b + head * rate_h
    if starts is not None:
        starts += batch * length
    inverse += row * num_chunks * CHUNK * CHUNK
    token = tl.arange(0, CHUNK)
    dstate = tl.zeros([BLOCK_K, COLUMNS], tl.float32)
    if dfinal is not None:
        dstate = load_state(dfinal + row * K * V + column, V, 1, width, K, V, BLOCK_K, COLUMNS)
    out = dv + (batch * length * num_heads + head) * V + column

    for step in tl.range(num_chunks, disable_licm=True):  # see the forward's walk
        chunk = num_chunks - 1 - step
        first = chunk * CHUNK
        limit = length - first
        query = tl.load(tile_pointers(q, first, q_t, CHUNK, BLOCK_K), tile_mask(limit, K, CHUNK, BLOCK_K, K), 0.0)
        key = tl.load(tile_pointers(k, first, k_t, CHUNK, BLOCK_K), tile_mask(limit, K, CHUNK, BLOCK_K, K), 0.0)
        grad = tl.load(tile_pointers(dy, first, dy_t, CHUNK, COLUMNS), tile_mask(limit, width, CHUNK, COLUMNS, V), 0.0)
        x = tl.load(tile_pointers(inverse, first, CHUNK, CHUNK, CHUNK))
        total, rates = token_gates(decay, decay_t, rate, rate_t, starts, first, length, CHUNK)
        last = tl.min(total, 0)
        from_start, to_end = exp2(total, FAST), exp2(last - total, FAST)
        store_state(dafter + (row * num_chunks + chunk) * K * V + column, dstate, width, K, V, BLOCK_K, COLUMNS)
        # Rows are tokens that write, columns tokens that read.
        gate = exp2(tl.where(token[:, None] <= token[None, :], total[None, :] - total[:, None], float("-inf")), FAST)
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * gate
        carried = tl.dot(key, dstate.to(key.dtype), input_precision=PRECISION)
        dwrites = tl.dot(scores.to(grad.dtype), grad, input_precision=PRECISION)
        dwrites = tl.fma(carried, tl.broadcast_to(to_end[:, None], [CHUNK, COLUMNS]), dwrites)
        dvalue = tl.dot(tl.trans(x), dwrites.to(x.dtype), input_precision=PRECISION) * rates[:, None]
        tl.store(tile_pointers(out, first, num_heads * V, CHUNK, COLUMNS), dvalue.to(dv.dtype.element_ty), tile_mask(limit, width, CHUNK, COLUMNS, V))
        read = (grad.to(tl.float32) * from_start[:, None]).to(query.dtype)
        dstate = tl.dot(tl.trans(query), read, dstate * tl.exp2(last), input_precision=PRECISION)
        dstate = tl.dot(tl.trans(key), (dvalue * -from_start[:, None]).to(key.dtype), dstate, input_precision=PRECISION)
    store_state(dinitial + row * K * V + column, dstate, width, K, V, BLOCK_K, COLUMNS)


@triton.jit
def _chunk_gradients_kernel(
    q, k, dy, decay, decay_b, decay_t, decay_h, rate, rate_b, rate_t, rate_h, starts, length, written, dv, before, dafter,
    dq, dk, dlog_decay, dbeta, q_b, k_b, dy_b, q_h, k_h, dy_h, q_t, k_t, dy_t, num_heads, num_chunks,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of one chunk that need the states on both sides of it.

    A key is read with, to find what it holds, and written with; the two parts of its gradient stay apart, because the gradient of the decays is
    what is read less what is written. The same rounded products of a pair of tokens enter both, so that their rounding cancels.
    The three parts follow each other, and read their tiles again: together they would not fit into the registers.
    """
    chunk, head, batch = unravel_chunk(tl.program_id(0), num_chunks, num_heads)
    first = tl.cast(chunk * CHUNK, tl.int32)
    limit, token = length - first, tl.arange(0, CHUNK)
    row, column = token[:, None], token[None, :]
    q, k, dy = q + batch * q_b + head * q_h, k + batch * k_b + head * k_h, dy + batch * dy_b + head * dy_h
    if starts is not None:
        starts += batch * length
    total, rates = token_gates(
        decay + batch * decay_b + head * decay_h, decay_t, rate + batch * rate_b + head * rate_h, rate_t, starts, first, length, CHUNK
    )
    last = tl.min(total, 0)
    from_start, to_end, keeps = exp2(total, FAST), exp2(last - total, FAST), tl.exp2(last)
    values = (batch * length * num_heads + head) * V
    written, dv, values_t = written + values, dv + values, num_heads * V
    states = tl.cast(tl.program_id(0), tl.int64) * K * V
    before, dafter = before + states, dafter + states
    keys = (batch * length * num_heads + head) * K
    key_mask, keys_t = tile_mask(limit, K, CHUNK, BLOCK_K, K), num_heads * K

    # What queries read.
    read, pairs = tl.zeros([CHUNK, BLOCK_K], tl.float32), tl.zeros([CHUNK, CHUNK], tl.float32)
    for begin in range(0, V, COLUMNS):
        grad = _columns(dy, begin, dy_t, first, limit, V, COLUMNS)
        state = load_state(before + begin, V, 1, V - begin, K, V, BLOCK_K, COLUMNS)
        read = tl.dot(grad, tl.trans(state), read, input_precision=PRECISION)
        writes = _columns(written, begin, values_t, first, limit, V, COLUMNS)
        pairs = tl.dot(grad, tl.trans(writes), pairs, input_precision=PRECISION)
    key = tl.load(tile_pointers(k, first, k_t, CHUNK, BLOCK_K), key_mask, 0.0)
    pairs *= exp2(tl.where(row >= column, total[:, None] - total[None, :], float("-inf")), FAST)
    dquery = read * from_start[:, None] + tl.dot(pairs.to(key.dtype), key, input_precision=PRECISION)
    query = tl.load(tile_pointers(q, first, q_t, CHUNK, BLOCK_K), key_mask, 0.0)
    change = tl.sum(query.to(tl.float32) * dquery, 1)
    tl.store(tile_pointers(dq + keys, first, keys_t, CHUNK, BLOCK_K), dquery.to(dq.dtype.element_ty), key_mask)

    # What keys read, to replace it.
    read, pairs = tl.zeros([CHUNK, BLOCK_K], tl.float32), tl.zeros([CHUNK, CHUNK], tl.float32)
    drates = tl.zeros([CHUNK], tl.float32)
    for begin in range(0, V, COLUMNS):
        dvalue = _columns(dv, begin, values_t, first, limit, V, COLUMNS)
        state = load_state(before + begin, V, 1, V - begin, K, V, BLOCK_K, COLUMNS)
        read = tl.dot(dvalue, tl.trans(state), read, input_precision=PRECISION)
        writes = _columns(written, begin, values_t, first, limit, V, COLUMNS)
        pairs = tl.dot(dvalue, tl.trans(writes), pairs, input_precision=PRECISION)
        drates += tl.sum(dvalue.to(tl.float32) * writes.to(tl.float32), 1)
    key = tl.load(tile_pointers(k, first, k_t, CHUNK, BLOCK_K), key_mask, 0.0)
    pairs *= exp2(tl.where(row > column, total[:, None] - total[None, :], float("-inf")), FAST)
    dkey = read * -from_start[:, None] - tl.dot(pairs.to(key.dtype), key, input_precision=PRECISION)
    change += tl.sum(key.to(tl.float32) * dkey, 1)

    # What keys write. Rows are the tokens that write, columns the later ones: queries read it, keys replace it.
    kept, crossing_end = tl.zeros([CHUNK, BLOCK_K], tl.float32), 0.0
    read_pairs, replaced_pairs = tl.zeros([CHUNK, CHUNK], tl.float32), tl.zeros([CHUNK, CHUNK], tl.float32)
    for begin in range(0, V, COLUMNS):
        writes = _columns(written, begin, values_t, first, limit, V, COLUMNS)
        dstate = load_state(dafter + begin, V, 1, V - begin, K, V, BLOCK_K, COLUMNS)
        kept = tl.dot(writes, tl.trans(dstate), kept, input_precision=PRECISION)
        grad = _columns(dy, begin, dy_t, first, limit, V, COLUMNS)
        read_pairs = tl.dot(writes, tl.trans(grad), read_pairs, input_precision=PRECISION)
        dvalue = _columns(dv, begin, values_t, first, limit, V, COLUMNS)
        replaced_pairs = tl.dot(writes, tl.trans(dvalue), replaced_pairs, input_precision=PRECISION)
        state = load_state(before + begin, V, 1, V - begin, K, V, BLOCK_K, COLUMNS)
        crossing_end += tl.sum(tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1), 0)
    gate = exp2(tl.where(row <= column, total[None, :] - total[:, None], float("-inf")), FAST)
    query = tl.load(tile_pointers(q, first, q_t, CHUNK, BLOCK_K), key_mask, 0.0)
    kept *= to_end[:, None]
    written_gradient = tl.dot((read_pairs * gate).to(query.dtype), query, kept, input_precision=PRECISION)
    key = tl.load(tile_pointers(k, first, k_t, CHUNK, BLOCK_K), key_mask, 0.0)
    replaced = (replaced_pairs * tl.where(row < column, -gate, 0.0)).to(key.dtype)
    written_gradient = tl.dot(replaced, key, written_gradient, input_precision=PRECISION)
    wide = key.to(tl.float32)
    crossing_end = crossing_end * keeps + tl.sum(tl.sum(wide * kept, 1), 0)
    change -= tl.sum(wide * written_gradient, 1)
    tl.store(tile_pointers(dk + keys, first, keys_t, CHUNK, BLOCK_K), (dkey + written_gradient).to(dk.dtype.element_ty), key_mask)

    # What crosses into a token is what crosses the end of the chunk, plus what is read from the token on, less what is written from it on.
    # A sum of its own for each token: a difference of running sums would drown short memories, and documents after those with large states.
    crossing = crossing_end + tl.sum(tl.where(row >= column, change[:, None], 0.0), 0)
    if starts is not None:  # nothing crosses into a document; what is left is rounding
        crossing = tl.where(tl.load(starts + first + token, token < limit, 0) != 0, 0.0, crossing)
    scalars = (batch * length + first + token) * num_heads + head
    tl.store(dlog_decay + scalars, crossing, token < limit)
    rates = tl.maximum(rates, SMALLEST_RATE)  # 0 beyond the sequence
    tl.store(dbeta + scalars, drates / (rates * rates), token < limit)


@triton.jit
def _columns(base, begin, stride, first, limit, V: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of a chunk of rows [T, V] from `begin` on."""
    return tl.load(tile_pointers(base + begin, first, stride, CHUNK, COLUMNS), tile_mask(limit, V - begin, CHUNK, COLUMNS, V), 0.0)
