"""Window attention in Triton, backward: scores are recomputed, by rows for dq and by columns for dk and dv.

There are no atomics, so results are the same bits every time. A global key is seen by every later query: its column is cut into pieces of
queries, whose partial sums are added afterwards.

Shapes: B batch, T tokens, H heads, K head size, W window, G global tokens, P carried tokens; tiles of M queries and N keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.gpu.fast_math import exp2
from phase8.kernels.gpu.layout import with_rows_contiguous
from phase8.kernels.gpu.window_attention import (
    LN_2,
    LOG2_E,
    Tiles,
    common_constants,
    documents_of,
    height,
    heights,
    in_window,
    load_rows,
    lorentz_distance,
    window_ranges,
)
from phase8.kernels.window_state import VisibleKeys

GLOBAL_PIECE_TOKENS = 512


def row_tiles(head_size: int, element_bytes: int, *, lorentz: bool) -> Tiles:
    """Tiles of the kernel for dq."""
    if triton.knobs.runtime.interpret:
        return Tiles(16, 16, 4, 1, split=True)
    if element_bytes > 2 or head_size > 128:
        return Tiles(64, 32, 4, 1)
    return Tiles(64, 32, 4, 1 if lorentz and head_size <= 64 else 2)


def column_tiles(head_size: int, element_bytes: int, *, lorentz: bool) -> Tiles:
    """Tiles of the kernels for dk and dv.

    `lorentz` with heads of 128 spills some 18 registers; on an H100 tiles that do not were 3 to 10 % slower.
    """
    if triton.knobs.runtime.interpret:
        return Tiles(16, 16, 4, 1)
    if element_bytes > 2 or head_size > 128:
        return Tiles(32, 64, 8, 1)
    return Tiles(32, 64, 4, 1 if head_size <= 64 else 2)


def attend_backward(
    dy: Tensor, y: Tensor, log_sum: Tensor, q: Tensor, seen: VisibleKeys, beta: Tensor | None, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes the reference with this name."""
    dy, y, q, k, v, gk, gv = with_rows_contiguous(dy, y, q, seen.keys, seen.values, seen.global_keys, seen.global_values)
    batch, num_queries, num_heads, head_size = q.shape
    num_keys, num_globals = k.shape[1], gk.shape[1]
    wide_beta = None if beta is None else beta.float().contiguous()
    key_heights, global_heights = (None, None) if beta is None else (heights(k), heights(gk))
    log_sum = log_sum.transpose(1, 2).contiguous()
    constants = common_constants(q, beta, seen)
    documents, global_documents = documents_of(seen)
    tiles = row_tiles(head_size, q.element_size(), lorentz=beta is not None)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    delta, query_heights = (torch.empty_like(log_sum) for _ in range(2))
    num_tiles = triton.cdiv(num_queries, tiles.queries)
    dbeta_parts = torch.empty(batch, num_heads, num_tiles, dtype=torch.float32, device=q.device)
    sizes = (num_queries, num_keys - num_queries, num_globals, seen.num_seen, window, head_size**-0.5)
    _row_kernel[(num_tiles, num_heads, batch)](
        dy, y, log_sum, q, k, v, gk, gv, key_heights, global_heights, wide_beta, documents, global_documents,
        dq, dbeta_parts, delta, query_heights,
        *dy.stride()[:3], *y.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *gk.stride()[:3], *gv.stride()[:3],
        *dq.stride()[:3], *sizes, **constants,
        BLOCK_M=tiles.queries, BLOCK_N=tiles.keys, SPLIT=tiles.split, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip

    tiles = column_tiles(head_size, q.element_size(), lorentz=beta is not None)
    columns = {"BLOCK_M": tiles.queries, "BLOCK_N": tiles.keys, "num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    num_pieces = triton.cdiv(num_queries, GLOBAL_PIECE_TOKENS) if num_queries + seen.num_seen > window else 0

    def columns_of(
        keys: Tensor, values: Tensor, key_height: Tensor | None, key_documents: Tensor | None, pieces: int | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of window keys and values; with `pieces`, partial sums [pieces, B, G, H, K] for global keys."""
        is_global = pieces is not None
        shape = (pieces, *keys.shape) if is_global else (1, *keys.shape)
        dtype = torch.float32 if is_global else keys.dtype
        dkeys, dvalues = (torch.empty(shape, dtype=dtype, device=q.device) for _ in range(2))
        grid = (triton.cdiv(keys.shape[1], tiles.keys) * shape[0], num_heads, batch)
        if all(grid):
            _column_kernel[grid](
                dy, log_sum, delta, q, keys, values, query_heights, key_height, wide_beta, documents, key_documents, dkeys, dvalues,
                *dy.stride()[:3], *q.stride()[:3], *keys.stride()[:3], *values.stride()[:3], *dkeys.stride()[:4],
                keys.shape[1], *sizes, **constants, **columns, IS_GLOBAL=is_global, PIECE=GLOBAL_PIECE_TOKENS,
            )  # fmt: skip
        return dkeys, dvalues

    dkeys, dvalues = columns_of(k, v, key_heights, documents, None)
    dglobal_keys, dglobal_values = (
        x.sum(0).to(k.dtype) for x in columns_of(gk, gv, global_heights, global_documents, num_pieces)
    )
    dbeta = dbeta_parts.sum((0, 2)) if beta is None else dbeta_parts.sum((0, 2)).to(beta.dtype)
    return dq, dkeys[0], dvalues[0], dglobal_keys, dglobal_values, dbeta


@triton.jit
def _row_keys(
    dq, time_sum, dbeta, begin, end, q, dy, log2_sum, delta, q_height, query, query_document,
    k, v, k_heights, k_documents, num_keys, shift, scale, reach,
    k_t: tl.constexpr, v_t: tl.constexpr, IS_GLOBAL: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HEAD_SIZE: tl.constexpr, LORENTZ: tl.constexpr, DOCUMENTS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what keys begin ... end - 1 give to dq, to the sum of slopes times k0, and to dbeta; one row per query. Positions as in the forward."""
    for first in range(begin, end, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        k_tile = load_rows(k, first, k_t, num_keys, BLOCK_N, BLOCK_K, HEAD_SIZE, MASKED)
        v_tile = load_rows(v, first, v_t, num_keys, BLOCK_N, BLOCK_K, HEAD_SIZE, MASKED)
        dot = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        if LORENTZ:
            k_height = tl.load(k_heights + column, mask=column < num_keys, other=0.0) if MASKED else tl.load(k_heights + column)
            distance, slope = lorentz_distance(dot, q_height[:, None], k_height[None, :], FAST)
            score = distance * -scale
        else:
            score = dot * scale
        score -= log2_sum[:, None]
        if MASKED:
            key = tl.where(column < num_keys, column - shift, 1 << 30)
            visible = key[None, :] + reach <= query[:, None] if IS_GLOBAL else in_window(query[:, None], key[None, :], reach)
            score = tl.where(visible, score, float("-inf"))
        if DOCUMENTS:
            key_document = tl.load(k_documents + column, mask=column < num_keys, other=-1)
            score = tl.where(query_document[:, None] == key_document[None, :], score, float("-inf"))
        dscore = exp2(score, FAST) * (tl.dot(dy, tl.trans(v_tile), input_precision=PRECISION) - delta[:, None])
        if LORENTZ:
            dbeta -= tl.sum(dscore * distance, 1)
            dscore = dscore * slope
        rounded = dscore.to(k_tile.dtype)
        if LORENTZ:
            # Summed over the rounded matrix that the product below reads: the two terms of dq nearly cancel where q and k are close.
            time_sum += tl.sum(rounded.to(tl.float32) * (1.0 + k_height)[None, :], 1)
        dq = tl.dot(rounded, k_tile, dq, input_precision=PRECISION)
    return dq, time_sum, dbeta


@triton.jit
def _row_kernel(
    dy, y, log_sum, q, k, v, gk, gv, k_heights, g_heights, beta, documents, g_documents, dq, dbeta_parts, deltas, q_heights,
    dy_b, dy_t: tl.constexpr, dy_h, y_b, y_t: tl.constexpr, y_h, q_b, q_t: tl.constexpr, q_h, k_b, k_t: tl.constexpr, k_h,
    v_b, v_t: tl.constexpr, v_h, gk_b, gk_t: tl.constexpr, gk_h, gv_b, gv_t: tl.constexpr, gv_h, dq_b, dq_t: tl.constexpr, dq_h,
    num_queries, num_carried, num_globals, num_seen, window, dot_scale,
    HEAD_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    LORENTZ: tl.constexpr, DOCUMENTS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first_query, head, batch = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    num_heads, num_keys = tl.num_programs(1), num_carried + num_queries
    k, v = k + batch * k_b + head * k_h, v + batch * v_b + head * v_h
    gk, gv = gk + batch * gk_b + head * gk_h, gv + batch * gv_b + head * gv_h
    row = batch * num_heads + head
    k_heights, g_heights = k_heights + row * num_keys if LORENTZ else k, g_heights + row * num_globals if LORENTZ else k
    documents, g_documents = documents + batch * num_keys if DOCUMENTS else k, g_documents + batch * num_globals if DOCUMENTS else k

    query = first_query + tl.arange(0, BLOCK_M)
    inside = query < num_queries
    q_tile = load_rows(q + batch * q_b + head * q_h, first_query, q_t, num_queries, BLOCK_M, BLOCK_K, HEAD_SIZE)
    dy_tile = load_rows(dy + batch * dy_b + head * dy_h, first_query, dy_t, num_queries, BLOCK_M, BLOCK_K, HEAD_SIZE)
    y_tile = load_rows(y + batch * y_b + head * y_h, first_query, y_t, num_queries, BLOCK_M, BLOCK_K, HEAD_SIZE)
    delta = tl.sum(dy_tile.to(tl.float32) * y_tile.to(tl.float32), 1)
    tl.store(deltas + row * num_queries + query, delta, mask=inside)
    q_height = height(q_tile) if LORENTZ else delta
    if LORENTZ:
        tl.store(q_heights + row * num_queries + query, q_height, mask=inside)
    # Rows past the last query weigh 2^-inf = 0.
    log2_sum = tl.load(log_sum + row * num_queries + query, mask=inside, other=float("inf")) / LN_2
    query_document = tl.load(documents + num_carried + query, mask=inside, other=0) if DOCUMENTS else query
    slope_scale = tl.load(beta + head) if LORENTZ else dot_scale
    scale = slope_scale if LORENTZ else dot_scale * LOG2_E
    dq_tile, time_sum, dbeta = tl.zeros([BLOCK_M, BLOCK_K], tl.float32), tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    reach = window - num_seen
    dq_tile, time_sum, dbeta = _row_keys(
        dq_tile, time_sum, dbeta, 0, tl.minimum(num_globals, first_query + BLOCK_M - reach),
        q_tile, dy_tile, log2_sum, delta, q_height, query, query_document, gk, gv, g_heights, g_documents, num_globals, 0, scale, reach,
        gk_t, gv_t, True, True, BLOCK_N, BLOCK_K, HEAD_SIZE, LORENTZ, DOCUMENTS, FAST, PRECISION,
    )  # fmt: skip
    begin, whole_begin, whole_end, end = window_ranges(first_query, num_carried, num_keys, window, BLOCK_M, BLOCK_N)
    if not SPLIT:
        whole_end = begin
    for part in tl.static_range(3):
        if SPLIT or part == 2:
            dq_tile, time_sum, dbeta = _row_keys(
                dq_tile, time_sum, dbeta,
                begin if part == 0 else whole_begin if part == 1 else whole_end, whole_begin if part == 0 else whole_end if part == 1 else end,
                q_tile, dy_tile, log2_sum, delta, q_height, query, query_document, k, v, k_heights, documents, num_keys, num_carried, scale, window,
                k_t, v_t, False, part != 1, BLOCK_N, BLOCK_K, HEAD_SIZE, LORENTZ, DOCUMENTS, FAST, PRECISION,
            )  # fmt: skip
    if LORENTZ:
        # Loaded again rather than kept in registers through the loops (`.cg` prevents the compiler from merging the loads).
        q_tile = load_rows(q + batch * q_b + head * q_h, first_query, q_t, num_queries, BLOCK_M, BLOCK_K, HEAD_SIZE, True, ".cg")
        dq_tile -= q_tile.to(tl.float32) * (time_sum / (1.0 + q_height))[:, None]
    tl.store(dbeta_parts + row * tl.num_programs(0) + tl.program_id(0), tl.sum(dbeta, 0) * LN_2)
    dims = tl.arange(0, BLOCK_K)
    dq_rows = dq + batch * dq_b + head * dq_h + tl.cast(query, tl.int64)[:, None] * dq_t
    tl.store(dq_rows + dims[None, :], (dq_tile * slope_scale).to(dq.dtype.element_ty), mask=inside[:, None] & (dims < HEAD_SIZE)[None, :])


@triton.jit
def _column_queries(
    dk, dv, time_sum, begin, end, k, v, k_height, key, key_document, q, dy, log_sum, deltas, q_heights, documents, num_queries, scale, reach,
    q_t: tl.constexpr, dy_t: tl.constexpr, IS_GLOBAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    HEAD_SIZE: tl.constexpr, LORENTZ: tl.constexpr, DOCUMENTS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what queries begin ... end - 1 give to dk, dv and the sum of slopes times q0; one row per key."""
    for first in range(begin, end, BLOCK_M):
        query = first + tl.arange(0, BLOCK_M)
        q_tile = load_rows(q, first, q_t, num_queries, BLOCK_M, BLOCK_K, HEAD_SIZE)
        dy_tile = load_rows(dy, first, dy_t, num_queries, BLOCK_M, BLOCK_K, HEAD_SIZE)
        # Rows past the last query weigh 2^-inf = 0.
        log2_sum = tl.load(log_sum + query, mask=query < num_queries, other=float("inf")) / LN_2
        delta = tl.load(deltas + query, mask=query < num_queries, other=0.0)
        # Keys are rows from the start: an accumulator is never transposed.
        dot = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION)
        if LORENTZ:
            q_height = tl.load(q_heights + query, mask=query < num_queries, other=0.0)
            distance, slope = lorentz_distance(dot, q_height[None, :], k_height[:, None], FAST)
            score = distance * -scale
        else:
            score = dot * scale
        score -= log2_sum[None, :]
        visible = key[:, None] + reach <= query[None, :] if IS_GLOBAL else in_window(query[None, :], key[:, None], reach)
        score = tl.where(visible, score, float("-inf"))
        if DOCUMENTS:
            query_document = tl.load(documents + query, mask=query < num_queries, other=-2)
            score = tl.where(query_document[None, :] == key_document[:, None], score, float("-inf"))
        weights = exp2(score, FAST)
        dv = tl.dot(weights.to(dy_tile.dtype), dy_tile, dv, input_precision=PRECISION)
        dscore = weights * (tl.dot(v, tl.trans(dy_tile), input_precision=PRECISION) - delta[None, :])
        if LORENTZ:
            dscore = dscore * slope
        rounded = dscore.to(q_tile.dtype)
        if LORENTZ:
            time_sum += tl.sum(rounded.to(tl.float32) * (1.0 + q_height)[None, :], 1)
        dk = tl.dot(rounded, q_tile, dk, input_precision=PRECISION)
    return dk, dv, time_sum


@triton.jit
def _column_kernel(
    dy, log_sum, deltas, q, k, v, q_heights, k_heights, beta, documents, k_documents, dk, dv,
    dy_b, dy_t: tl.constexpr, dy_h, q_b, q_t: tl.constexpr, q_h, k_b, k_t: tl.constexpr, k_h, v_b, v_t: tl.constexpr, v_h,
    dk_p, dk_b, dk_t: tl.constexpr, dk_h,
    num_columns, num_queries, num_carried, num_globals, num_seen, window, dot_scale,
    HEAD_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LORENTZ: tl.constexpr, DOCUMENTS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    IS_GLOBAL: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(num_columns, BLOCK_N)
    first_key, piece = tl.program_id(0) % num_tiles * BLOCK_N, tl.program_id(0) // num_tiles
    head, batch = tl.program_id(1), tl.cast(tl.program_id(2), tl.int64)
    row = batch * tl.num_programs(1) + head
    q, dy = q + batch * q_b + head * q_h, dy + batch * dy_b + head * dy_h
    log_sum, deltas, q_heights = log_sum + row * num_queries, deltas + row * num_queries, q_heights + row * num_queries
    documents = documents + batch * (num_carried + num_queries) + num_carried if DOCUMENTS else q

    column = first_key + tl.arange(0, BLOCK_N)
    inside = column < num_columns
    k_tile = load_rows(k + batch * k_b + head * k_h, first_key, k_t, num_columns, BLOCK_N, BLOCK_K, HEAD_SIZE)
    v_tile = load_rows(v + batch * v_b + head * v_h, first_key, v_t, num_columns, BLOCK_N, BLOCK_K, HEAD_SIZE)
    k_height = tl.load(k_heights + row * num_columns + column, mask=inside, other=0.0) if LORENTZ else column
    key_document = tl.load(k_documents + batch * num_columns + column, mask=inside, other=-1) if DOCUMENTS else column
    slope_scale = tl.load(beta + head) if LORENTZ else dot_scale
    scale = slope_scale if LORENTZ else dot_scale * LOG2_E
    if IS_GLOBAL:
        # The queries of this piece outside the window of the tile's first key.
        reach = window - num_seen
        key = tl.where(inside, column, 1 << 30)
        begin = tl.maximum(piece * PIECE, (first_key + reach) // BLOCK_M * BLOCK_M)
        end = tl.minimum((piece + 1) * PIECE, num_queries)
    else:
        reach = window
        key = tl.where(inside, column - num_carried, 1 << 30)
        begin = tl.maximum(first_key - num_carried, 0) // BLOCK_M * BLOCK_M
        end = tl.minimum(first_key + BLOCK_N - 1 - num_carried + window, num_queries)
    dk_tile, dv_tile = tl.zeros([BLOCK_N, BLOCK_K], tl.float32), tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    time_sum = tl.zeros([BLOCK_N], tl.float32)
    dk_tile, dv_tile, time_sum = _column_queries(
        dk_tile, dv_tile, time_sum, begin, end, k_tile, v_tile, k_height, key, key_document,
        q, dy, log_sum, deltas, q_heights, documents, num_queries, scale, reach,
        q_t, dy_t, IS_GLOBAL, BLOCK_M, BLOCK_K, HEAD_SIZE, LORENTZ, DOCUMENTS, FAST, PRECISION,
    )  # fmt: skip
    if LORENTZ:
        k_tile = load_rows(k + batch * k_b + head * k_h, first_key, k_t, num_columns, BLOCK_N, BLOCK_K, HEAD_SIZE, True, ".cg")  # again: see above
        dk_tile -= k_tile.to(tl.float32) * (time_sum / (1.0 + k_height))[:, None]
    dims = tl.arange(0, BLOCK_K)
    mask = inside[:, None] & (dims < HEAD_SIZE)[None, :]
    offsets = piece * tl.cast(dk_p, tl.int64) + batch * dk_b + head * dk_h + tl.cast(column, tl.int64)[:, None] * dk_t + dims[None, :]
    tl.store(dk + offsets, (dk_tile * slope_scale).to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + offsets, dv_tile.to(dv.dtype.element_ty), mask=mask)
