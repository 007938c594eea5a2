"""Gated linear attention in Triton, backward: dq, dk and dv are the forward's walk with exchanged roles, all in one launch.

The gradient of log alpha follows from what the walks write on the way: for each token the numbers q dq and k dk, and at every border,
that is, every BORDER_CHUNKS chunks, the state and its gradient. What crosses a border is <S, dS>; what crosses from one token to the
next differs from it by what is read and written between. Inside a chunk the same rounded products enter both numbers, so that their
rounding cancels; the rest adds up between two borders only, and not over the sequence, where it would drown short memories.

Shapes: B batch, T tokens, H heads, K key size, V value size; I and O as in gated_linear_attention_walk.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.gpu.gated_linear_attention import (
    Tiles,
    block_size,
    choose_segment_chunks,
    entering_states,
    num_processors,
    prepare_decays,
    strides,
    walk_constants,
    walk_tiles,
)
from phase8.kernels.gpu.gated_linear_attention_walk import (
    BORDER,
    BORDER_CHUNKS,
    CHUNK,
    LOWEST,
    chunks_of,
    load_state,
    store_state,
    token_weight,
    unravel,
    walk,
)
from phase8.kernels.gpu.layout import with_rows_contiguous


def gated_linear_attention_backward(
    dy: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    starts: Tensor | None,
    initial_state: Tensor | None,
    *,
    tiles: Tiles | None = None,
    segment_chunks: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes the reference with this name; `tiles` and `segment_chunks` override the choice for the shape."""
    (batch, length, num_heads, key_size), value_size = q.shape, v.shape[-1]
    inputs = with_rows_contiguous(*(x.to(v.dtype) for x in (q, k, v, dy)))
    decays = prepare_decays(log_decay, starts, key_size)
    tiles = tiles or walk_tiles(max(key_size, value_size), min(key_size, value_size), v.element_size())
    # First role, number of roles, I and O: dq and dk have the shape of q, dv that of v; with equal shapes all three share a launch.
    launches = [(0, 3, value_size, key_size)] if key_size == value_size else [(0, 2, value_size, key_size), (2, 1, key_size, value_size)]
    num_programs = batch * num_heads * sum(roles * triton.cdiv(outer, tiles.columns) for _, roles, _, outer in launches)
    if segment_chunks is None:
        segment_chunks = choose_segment_chunks(num_programs, decays.num_chunks, num_processors(v.device))
    num_segments, num_borders = triton.cdiv(decays.num_chunks, segment_chunks), triton.cdiv(decays.num_chunks, BORDER_CHUNKS)
    states = entering_states(inputs[1], inputs[2], decays, initial_state, segment_chunks=segment_chunks, turn=1)
    dstates = entering_states(inputs[0], inputs[3], decays, dstate, segment_chunks=segment_chunks, turn=-1)

    dq, dk, dv = (torch.empty(x.shape, dtype=v.dtype, device=v.device) for x in (q, k, v))
    dinitial = torch.empty(batch, num_heads, key_size, value_size, dtype=torch.float32, device=v.device)
    key_blocks = triton.cdiv(key_size, tiles.columns)
    products = torch.empty(2, key_blocks, batch, num_heads, length, dtype=torch.float32, device=v.device)
    borders = torch.empty(2, batch, num_heads, num_borders, value_size, key_size, dtype=v.dtype, device=v.device)
    for first_role, roles, inner, outer in launches:
        blocks = triton.cdiv(outer, tiles.columns)
        _gradients_kernel[(batch * num_heads * num_segments * roles * blocks,)](
            *inputs, *decays.arguments, dq, dk, dv, dinitial, *products, *borders, states, dstates,
            *strides(*inputs), batch, num_heads, segment_chunks, num_segments, num_borders, first_role,
            ROLES=roles, BLOCKS=blocks, INNER=inner, OUTER=outer, BLOCK_INNER=block_size(inner), **walk_constants(tiles),
        )  # fmt: skip
    dlog_decay, size = torch.empty(log_decay.shape, dtype=torch.float32, device=v.device), key_size * value_size
    _decay_gradient_kernel[(batch * num_heads, num_borders)](
        *products, *borders, *decays.arguments, dlog_decay, batch, num_heads, num_borders,
        SIZE=size, BLOCK=min(triton.next_power_of_2(size), 4096), BLOCKS=key_blocks,
    )  # fmt: skip
    return dq.to(q.dtype), dk.to(k.dtype), dv, dlog_decay.to(log_decay.dtype), dinitial


@triton.jit
def _gradients_kernel(
    q, k, v, dy, decay, decay_b, decay_t, decay_h, starts, length, scale,
    dq, dk, dv, dinitial, read, written, borders, dborders, states, dstates,
    q_b, k_b, v_b, dy_b, q_h, k_h, v_h, dy_h, q_t: tl.constexpr, k_t: tl.constexpr, v_t: tl.constexpr, dy_t: tl.constexpr,
    batch_size, num_heads: tl.constexpr, segment_chunks, num_segments, num_borders, first_role,
    ROLES: tl.constexpr, BLOCKS: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr,
    BLOCK_INNER: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes one block of columns of dq, dk or dv (role 0, 1, 2) in one segment; dk and dv read the same tensors side by side."""
    part, head, segment, batch = unravel(tl.program_id(0), ROLES * BLOCKS, num_heads, num_segments)
    role, block = first_role + tl.cast(part // BLOCKS, tl.int32), part % BLOCKS
    is_dq, is_dk, is_dv = role == 0, role == 1, role == 2
    row, column, width = batch * num_heads + head, block * COLUMNS, OUTER - block * COLUMNS
    q, k = q + batch * q_b + head * q_h, k + batch * k_b + head * k_h
    v, dy = v + batch * v_b + head * v_h, dy + batch * dy_b + head * dy_h
    query, query_t = tl.where(is_dq, dy, tl.where(is_dk, v, k)), tl.where(is_dq, dy_t, tl.where(is_dk, v_t, k_t))
    key, key_t = tl.where(is_dq, v, tl.where(is_dk, dy, q)), tl.where(is_dq, v_t, tl.where(is_dk, dy_t, q_t))
    value, value_t = tl.where(is_dq, k, tl.where(is_dk, q, dy)), tl.where(is_dq, k_t, tl.where(is_dk, q_t, dy_t))
    probe, probe_t = tl.where(is_dq, q, k), tl.where(is_dq, q_t, k_t)
    out = tl.where(is_dq, dq, tl.where(is_dk, dk, dv)) + (batch * length * num_heads + head) * OUTER + column
    products = tl.where(is_dq, read, written) + ((block * batch_size + batch) * num_heads + head) * length
    crossing = tl.where(is_dq, borders, dborders) + row * num_borders * INNER * OUTER + column
    first_chunk, end_chunk = chunks_of(segment, segment_chunks, length)
    # States enter and leave as [K, V]; dq and dk walk with their transposes.
    down, across = tl.where(is_dv, OUTER, 1), tl.where(is_dv, 1, INNER)
    entering = ((batch * num_segments + segment) * num_heads + head) * INNER * OUTER + column * across
    state = tl.zeros([BLOCK_INNER, COLUMNS], tl.float32)
    if states is not None and is_dq:
        state = load_state(states + entering, down, across, width, INNER, OUTER, BLOCK_INNER, COLUMNS)
    if dstates is not None and role > 0:
        state = load_state(dstates + entering, down, across, width, INNER, OUTER, BLOCK_INNER, COLUMNS)
    if is_dk & (segment == num_segments - 1):
        store_state(crossing + (num_borders - 1) * INNER * OUTER, state, width, INNER, OUTER, BLOCK_INNER, COLUMNS)
    state, _ = walk(
        query, query_t, key, key_t, value + column, value_t, decay + batch * decay_b + head * decay_h, decay_t,
        None if starts is None else starts + batch * length, length, scale, out, num_heads * OUTER,
        probe + column, probe_t, role < 2, products, crossing, state, first_chunk, end_chunk, width, tl.where(is_dq, 1, -1),
        True, True, INNER, OUTER, BLOCK_INNER, COLUMNS, FAST, PRECISION,
    )  # fmt: skip
    if is_dv & (segment == 0):
        store_state(dinitial + row * INNER * OUTER + column, state, width, INNER, OUTER, BLOCK_INNER, COLUMNS)


@triton.jit
def _decay_gradient_kernel(
    read, written, borders, dborders, decay, decay_b, decay_t, decay_h, starts, length, scale, dlog_decay, batch_size, num_heads, num_borders,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of log alpha up to a border: alpha <S before the token, dS> - alpha / sqrt(K) k^T dS v."""
    row, border = tl.cast(tl.program_id(0), tl.int64), tl.cast(tl.program_id(1), tl.int64)
    batch, head = row // num_heads, row % num_heads
    crossing_border = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, SIZE, BLOCK):
        entry = begin + tl.arange(0, BLOCK)
        offsets, mask = (row * num_borders + border) * SIZE + entry, entry < SIZE
        crossing_border += tl.load(borders + offsets, mask, 0.0).to(tl.float32) * tl.load(dborders + offsets, mask, 0.0).to(tl.float32)

    token = (border + 1) * BORDER * CHUNK - 1 - tl.arange(0, BORDER * CHUNK)  # the last one first
    mask = token < length
    change, writes = tl.zeros([BORDER * CHUNK], tl.float32), tl.zeros([BORDER * CHUNK], tl.float32)
    for block in tl.static_range(BLOCKS):
        offsets = ((block * batch_size + batch) * num_heads + head) * length + token
        block_writes = tl.load(written + offsets, mask, 0.0)
        change += tl.load(read + offsets, mask, 0.0) - block_writes
        writes += block_writes
    # What crosses into a token is what crosses the border, plus what is read from the token on, less what is written from it on.
    crossing = tl.sum(crossing_border, 0) + tl.cumsum(change, 0)
    log_alpha = tl.maximum(tl.load(decay + batch * decay_b + head * decay_h + token * decay_t, mask, 0.0), LOWEST)
    result = crossing - tl.exp(log_alpha) * scale * writes / token_weight(log_alpha, scale)
    tl.store(dlog_decay + (batch * length + token) * num_heads + head, result, mask)
