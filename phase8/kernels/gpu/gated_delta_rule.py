"""The gated delta rule in Triton, forward: the triangular systems of all chunks at once, then a walk along the sequence.

A program of the walk carries some columns of the state in registers. Columns do not meet: where batch and heads are few, narrower blocks of
columns fill the GPU. Backward walks the same way once more, and keeps for each chunk the state before it and what its tokens write.

Shapes: B batch, T tokens, H heads, K key size, V value size, N chunks.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.gpu.fast_math import exp2
from phase8.kernels.gpu.gated_delta_rule_inverse import Gates, chunk_inverses, prepare_gates, token_gates
from phase8.kernels.gpu.gated_linear_attention import Tiles, block_size, num_processors, strides, walk_constants
from phase8.kernels.gpu.gated_linear_attention_walk import CHUNK, load_state, store_state, tile_mask, tile_pointers, unravel
from phase8.kernels.gpu.layout import with_rows_contiguous

MIN_COLUMNS = 16  # as matrix products need


def walk_tiles(key_size: int, value_size: int, element_bytes: int, *, num_sequences: int, num_processors: int) -> Tiles:
    """Timed on an H200: 32 columns for heads of 128, 64 for smaller ones, and fewer where there would not be a program on every processor.

    Args:
        key_size: K.
        value_size: V.
        element_bytes: Size of a value.
        num_sequences: Batch times heads.
        num_processors: Multiprocessors of the GPU.
    """
    if triton.knobs.runtime.interpret:
        return Tiles(block_size(value_size), 4, 1)
    columns = min(block_size(value_size), 64 if element_bytes == 2 and key_size <= 64 else 32)
    while columns > MIN_COLUMNS and 4 * num_sequences * triton.cdiv(value_size, columns) < 3 * num_processors:
        columns //= 2
    return Tiles(columns, 4, 2 if element_bytes == 2 else 1)


@dataclass(frozen=True)
class Kept:
    """What backward needs of the walk, in the dtype of the values.

    Args:
        written: What each token writes, U [B, T, H, V].
        before: State before each chunk [B, H, N, K, V].
    """

    written: Tensor
    before: Tensor


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    starts: Tensor | None,
    initial_state: Tensor | None,
    *,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the reference with this name; `tiles` overrides the choice for the shape."""
    (batch, _, num_heads, key_size), value_size = q.shape, v.shape[-1]
    q, k, v = with_rows_contiguous(*(x.to(v.dtype) for x in (q, k, v)))
    gates = prepare_gates(log_decay, beta, starts)
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final = torch.empty(batch, num_heads, key_size, value_size, dtype=torch.float32, device=v.device)
    _walk(q, k, v, gates, chunk_inverses(k, gates), initial_state, y=y, final=final, kept=None, tiles=tiles)
    return y, final


def walk_again(k: Tensor, v: Tensor, gates: Gates, inverse: Tensor, initial_state: Tensor | None, *, tiles: Tiles | None) -> Kept:
    """Walks without reading, for backward."""
    (batch, _, num_heads, key_size), value_size = k.shape, v.shape[-1]
    before = torch.empty(batch, num_heads, gates.num_chunks, key_size, value_size, dtype=v.dtype, device=v.device)
    kept = Kept(torch.empty(v.shape, dtype=v.dtype, device=v.device), before)
    _walk(k, k, v, gates, inverse, initial_state, y=None, final=None, kept=kept, tiles=tiles)
    return kept


def _walk(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, inverse: Tensor, initial_state: Tensor | None,
    *, y: Tensor | None, final: Tensor | None, kept: Kept | None, tiles: Tiles | None,
) -> None:  # fmt: skip
    """Fills the given tensors."""
    (batch, _, num_heads, key_size), value_size = k.shape, v.shape[-1]
    tiles = tiles or tiles_for(k, v)
    blocks = triton.cdiv(value_size, tiles.columns)
    initial = None if initial_state is None else initial_state.float().contiguous()
    _walk_kernel[(batch * num_heads * blocks,)](
        q, k, v, *gates.arguments, inverse, y, initial, final, None if kept is None else kept.written, None if kept is None else kept.before,
        *strides(q, k, v), num_heads, gates.num_chunks, K=key_size, V=value_size, BLOCK_K=block_size(key_size), **walk_constants(tiles),
    )  # fmt: skip


def tiles_for(k: Tensor, v: Tensor) -> Tiles:
    """The tiles for tensors of these shapes."""
    sizes = {"num_sequences": k.shape[0] * k.shape[2], "num_processors": num_processors(v.device)}
    return walk_tiles(k.shape[-1], v.shape[-1], v.element_size(), **sizes)


@triton.jit
def _walk_kernel(
    q, k, v, decay, decay_b, decay_t, decay_h, rate, rate_b, rate_t, rate_h, starts, length, inverse, y, initial, final, written, before,
    q_b, k_b, v_b, q_h, k_h, v_h, q_t, k_t, v_t, num_heads, num_chunks,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carries one block of columns of the state of one head; writes y and the final state, or what tokens write and the states before chunks."""
    block, head, _, batch = unravel(tl.program_id(0), tl.cdiv(V, COLUMNS), num_heads, 1)
    row, column, width = batch * num_heads + head, block * COLUMNS, V - block * COLUMNS
    q, k, v = q + batch * q_b + head * q_h, k + batch * k_b + head * k_h, v + batch * v_b + head * v_h + column
    decay += batch * decay_b + head * decay_h
    rate += batch * rate_b + head * rate_h
    if starts is not None:
        starts += batch * length
    inverse += row * num_chunks * CHUNK * CHUNK
    token = tl.arange(0, CHUNK)
    state = tl.zeros([BLOCK_K, COLUMNS], tl.float32)
    if initial is not None:
        state = load_state(initial + row * K * V + column, V, 1, width, K, V, BLOCK_K, COLUMNS)
    out, out_t = (batch * length * num_heads + head) * V + column, num_heads * V

    # Addresses and masks hoisted out of the loop would occupy a hundred registers, and the state would be spilled.
    for chunk in tl.range(num_chunks, disable_licm=True):
        first = chunk * CHUNK
        limit = length - first
        key = tl.load(tile_pointers(k, first, k_t, CHUNK, BLOCK_K), tile_mask(limit, K, CHUNK, BLOCK_K, K), 0.0)
        value = tl.load(tile_pointers(v, first, v_t, CHUNK, COLUMNS), tile_mask(limit, width, CHUNK, COLUMNS, V), 0.0)
        x = tl.load(tile_pointers(inverse, first, CHUNK, CHUNK, CHUNK))
        if y is not None:
            query = tl.load(tile_pointers(q, first, q_t, CHUNK, BLOCK_K), tile_mask(limit, K, CHUNK, BLOCK_K, K), 0.0)
        total, rates = token_gates(decay, decay_t, rate, rate_t, starts, first, length, CHUNK)
        last = tl.min(total, 0)
        from_start, to_end = exp2(total, FAST), exp2(last - total, FAST)
        if before is not None:
            store_state(before + (row * num_chunks + chunk) * K * V + column, state, width, K, V, BLOCK_K, COLUMNS)
        held = tl.dot(key, state.to(key.dtype), input_precision=PRECISION)
        offered = (value.to(tl.float32) - held * from_start[:, None]) * rates[:, None]
        writes = tl.dot(x, offered.to(x.dtype), input_precision=PRECISION)
        if written is not None:
            pointers = tile_pointers(written + out, first, out_t, CHUNK, COLUMNS)
            tl.store(pointers, writes.to(written.dtype.element_ty), tile_mask(limit, width, CHUNK, COLUMNS, V))
        if y is not None:
            gate = exp2(tl.where(token[:, None] >= token[None, :], total[:, None] - total[None, :], float("-inf")), FAST)
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * gate
            carried = tl.dot(query, state.to(query.dtype), input_precision=PRECISION)
            read = tl.dot(scores.to(value.dtype), writes.to(value.dtype), input_precision=PRECISION)
            # fma: a plain sum would become the accumulator of the previous product, which would have to wait for this one.
            read = tl.fma(carried, tl.broadcast_to(from_start[:, None], [CHUNK, COLUMNS]), read)
            pointers = tile_pointers(y + out, first, out_t, CHUNK, COLUMNS)
            tl.store(pointers, read.to(y.dtype.element_ty), tile_mask(limit, width, CHUNK, COLUMNS, V))
        state = tl.dot(tl.trans(key), (writes * to_end[:, None]).to(key.dtype), state * tl.exp2(last), input_precision=PRECISION)
    if final is not None:
        store_state(final + row * K * V + column, state, width, K, V, BLOCK_K, COLUMNS)
