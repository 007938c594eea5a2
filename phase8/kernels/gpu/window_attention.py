"""Window attention in Triton, forward: one program per tile of queries walks over the tiles of keys that its window touches.

Scores live in registers only. With the `lorentz` score the weight of a key is (1 + u + root)^-beta, which cannot overflow, so there is
no running maximum; it underflows where beta log2(2 + 4 R^2) > 126, with R the largest |q| and |k|, far beyond trained radii.

Shapes: B batch, T tokens, H heads, K head size, W window, G global tokens, P carried tokens; tiles of M queries and N keys.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.gpu.fast_math import dot_precision, exp2, has_fast_math, log2, rsqrt
from phase8.kernels.gpu.layout import with_rows_contiguous
from phase8.kernels.reference.window_attention import ARCCOSH_EPS
from phase8.kernels.window_state import VisibleKeys

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
EPS = tl.constexpr(ARCCOSH_EPS)


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of one kernel.

    Args:
        queries: M.
        keys: N.
        num_warps: Warps of a program.
        num_stages: Depth of the load pipeline.
        split: Fully visible tiles get a loop of their own, without masks.
    """

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    split: bool = False


def forward_tiles(head_size: int, element_bytes: int, *, lorentz: bool) -> Tiles:
    """Tiles of the forward: three programs fit on a multiprocessor, so that matrix products of one overlap special functions of the rest."""
    if triton.knobs.runtime.interpret:
        return Tiles(16, 16, 4, 1, split=True)
    if element_bytes > 2 or head_size > 128:
        return Tiles(64, 32, 4, 2)
    return Tiles(64, 32, 4, 2, split=lorentz and head_size <= 64)


def attend(q: Tensor, seen: VisibleKeys, beta: Tensor | None, window: int) -> tuple[Tensor, Tensor]:
    """Computes the reference with this name: y [B, T, H, K] and the logarithm of the sum of weights, fp32 [B, T, H]."""
    batch, num_queries, num_heads, head_size = q.shape
    q, keys, values, global_keys, global_values = with_rows_contiguous(q, seen.keys, seen.values, seen.global_keys, seen.global_values)
    tiles = forward_tiles(head_size, q.element_size(), lorentz=beta is not None)
    y = torch.empty(q.shape, dtype=values.dtype, device=q.device)
    log_sum = torch.empty(batch, num_heads, num_queries, dtype=torch.float32, device=q.device)
    key_heights, global_heights = (None, None) if beta is None else (heights(keys), heights(global_keys))
    _forward_kernel[(triton.cdiv(num_queries, tiles.queries), num_heads, batch)](
        q, keys, values, global_keys, global_values, key_heights, global_heights,
        None if beta is None else beta.float().contiguous(), *documents_of(seen), y, log_sum,
        *q.stride()[:3], *keys.stride()[:3], *values.stride()[:3], *global_keys.stride()[:3], *global_values.stride()[:3], *y.stride()[:3],
        num_queries, keys.shape[1] - num_queries, global_keys.shape[1], seen.num_seen, window, head_size**-0.5 * LOG2_E.value,
        **common_constants(q, beta, seen), BLOCK_M=tiles.queries, BLOCK_N=tiles.keys, SPLIT=tiles.split,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return y, log_sum.transpose(1, 2).contiguous()


def common_constants(q: Tensor, beta: Tensor | None, seen: VisibleKeys) -> dict[str, object]:
    """Compile-time constants that all kernels of this operation share."""
    head_size = q.shape[-1]
    return {
        "HEAD_SIZE": head_size,
        "BLOCK_K": max(triton.next_power_of_2(head_size), 16),
        "LORENTZ": beta is not None,
        "DOCUMENTS": seen.documents is not None,
        "FAST": has_fast_math(),
        "PRECISION": dot_precision(),
    }


def documents_of(seen: VisibleKeys) -> tuple[Tensor | None, Tensor | None]:
    """Document numbers of keys and of global keys, made contiguous."""
    if seen.documents is None or seen.global_documents is None:
        return None, None
    return seen.documents.contiguous(), seen.global_documents.contiguous()


def heights(x: Tensor) -> Tensor:
    """Heights of keys above 1 on the hyperboloid, from the rounded keys, fp32: [B, T, H, K] -> [B, H, T]."""
    batch, num_tokens, num_heads, head_size = x.shape
    result = torch.empty(batch, num_heads, num_tokens, dtype=torch.float32, device=x.device)
    block = 16 if triton.knobs.runtime.interpret else 64
    if num_tokens:
        _heights_kernel[(triton.cdiv(num_tokens, block), num_heads, batch)](
            x, result, *x.stride()[:3], num_tokens, num_heads, head_size, BLOCK=block, BLOCK_K=max(triton.next_power_of_2(head_size), 16)
        )
    return result


@triton.jit
def _heights_kernel(x, result, stride_b, stride_t, stride_h, num_tokens, num_heads, HEAD_SIZE, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    first, head, batch = tl.program_id(0) * BLOCK, tl.program_id(1), tl.program_id(2)
    rows, columns = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    base = x + tl.cast(batch, tl.int64) * stride_b + head * stride_h
    mask = (rows < num_tokens)[:, None] & (columns < HEAD_SIZE)[None, :]
    values = tl.load(base + tl.cast(rows, tl.int64)[:, None] * stride_t + columns[None, :], mask=mask, other=0.0)
    tl.store(result + (tl.cast(batch, tl.int64) * num_heads + head) * num_tokens + rows, height(values), mask=rows < num_tokens)


@triton.jit
def height(x):
    """sqrt(1 + |x|^2) - 1 of every row without cancellation: [rows, K] -> [rows]."""
    wide = x.to(tl.float32)
    square = tl.sum(wide * wide, 1)
    return square / (1.0 + tl.sqrt(1.0 + square))


@triton.jit
def load_rows(
    base, first, stride, limit, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, HEAD_SIZE: tl.constexpr,
    CHECK: tl.constexpr = True, CACHE: tl.constexpr = None,
):  # fmt: skip
    """Loads rows first ... first + BLOCK - 1 of a [T, K] matrix; with CHECK, rows past the limit are 0."""
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    pointers = base + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    inside = (columns < HEAD_SIZE)[None, :]
    if CHECK:
        inside = (first + rows < limit)[:, None] if BLOCK_K == HEAD_SIZE else inside & (first + rows < limit)[:, None]
    if CACHE is not None:
        return tl.load(pointers, mask=inside, other=0.0, cache_modifier=CACHE)
    elif CHECK or BLOCK_K != HEAD_SIZE:
        return tl.load(pointers, mask=inside, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def lorentz_distance(dot, q_height, k_height, FAST: tl.constexpr):
    """log2(1 + u + root) and 1 / root, for products and heights that broadcast against each other.

    Rounding may leave u slightly below 0; the epsilon keeps the radicand positive.
    """
    # One fused operation: a separate product q_height (1 + k_height) would be computed in another layout and moved through shared memory.
    u = tl.fma(q_height, 1.0 + k_height, k_height - dot)
    square = u * (u + 2.0) + EPS
    slope = rsqrt(square, FAST)
    return log2((1.0 + u) + square * slope, FAST), slope


@triton.jit
def window_ranges(first_query, num_carried, num_keys, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Ranges of key tiles for a tile of queries: begin, begin and end of the tiles that all queries see whole, end."""
    begin = tl.maximum(first_query + num_carried - window + 1, 0) // BLOCK_N * BLOCK_N
    whole_end = tl.maximum((first_query + num_carried + 1) // BLOCK_N * BLOCK_N, begin)
    whole_begin = tl.minimum(tl.cdiv(tl.maximum(first_query + BLOCK_M + num_carried - window, 0), BLOCK_N) * BLOCK_N, whole_end)
    return begin, whole_begin, whole_end, tl.minimum(first_query + BLOCK_M + num_carried, num_keys)


@triton.jit
def in_window(query, key, window):
    """Whether a key is not later than the query and inside its window, by a single unsigned comparison."""
    return (query - key).to(tl.uint32, bitcast=True) < tl.cast(window, tl.uint32)


@triton.jit
def _attend_keys(
    total, weight_sum, largest, begin, end, q, q_height, query, query_document, k, v, k_heights, k_documents, num_keys, shift, scale, reach,
    k_t: tl.constexpr, v_t: tl.constexpr, IS_GLOBAL: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HEAD_SIZE: tl.constexpr, LORENTZ: tl.constexpr, DOCUMENTS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds keys begin ... end - 1 to the sum of weighted values, the sum of weights and the largest score of each query.

    Key n stands at position n - shift. `reach` is W for keys of the window and, for global keys, W less the tokens before the first query.
    """
    for first in range(begin, end, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        k_tile = load_rows(k, first, k_t, num_keys, BLOCK_N, BLOCK_K, HEAD_SIZE, MASKED)
        dot = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        if LORENTZ:
            k_height = tl.load(k_heights + column, mask=column < num_keys, other=0.0) if MASKED else tl.load(k_heights + column)
            distance, _ = lorentz_distance(dot, q_height[:, None], k_height[None, :], FAST)
            score = distance * -scale
        else:
            score = dot * scale
        if MASKED:
            key = tl.where(column < num_keys, column - shift, 1 << 30)
            visible = key[None, :] + reach <= query[:, None] if IS_GLOBAL else in_window(query[:, None], key[None, :], reach)
            score = tl.where(visible, score, float("-inf"))
        if DOCUMENTS:
            key_document = tl.load(k_documents + column, mask=column < num_keys, other=-1)
            score = tl.where(query_document[:, None] == key_document[None, :], score, float("-inf"))
        if LORENTZ:
            weights = exp2(score, FAST)
        else:
            # A row may have seen nothing so far; -inf - -inf would be NaN.
            new_largest = tl.maximum(tl.maximum(largest, tl.max(score, 1)), -1e30)
            weights = exp2(score - new_largest[:, None], FAST)
            shrink = exp2(largest - new_largest, FAST)
            total, weight_sum, largest = total * shrink[:, None], weight_sum * shrink, new_largest
        weight_sum += tl.sum(weights, 1)
        v_tile = load_rows(v, first, v_t, num_keys, BLOCK_N, BLOCK_K, HEAD_SIZE, MASKED)
        total = tl.dot(weights.to(v_tile.dtype), v_tile, total, input_precision=PRECISION)
    return total, weight_sum, largest


@triton.jit
def _forward_kernel(
    q, k, v, gk, gv, k_heights, g_heights, beta, documents, g_documents, y, log_sum,
    q_b, q_t: tl.constexpr, q_h, k_b, k_t: tl.constexpr, k_h, v_b, v_t: tl.constexpr, v_h,
    gk_b, gk_t: tl.constexpr, gk_h, gv_b, gv_t: tl.constexpr, gv_h, y_b, y_t: tl.constexpr, y_h,
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
    q_tile = load_rows(q + batch * q_b + head * q_h, first_query, q_t, num_queries, BLOCK_M, BLOCK_K, HEAD_SIZE)
    q_height = height(q_tile) if LORENTZ else query
    query_document = tl.load(documents + num_carried + query, mask=query < num_queries, other=0) if DOCUMENTS else query
    scale = tl.load(beta + head) if LORENTZ else dot_scale
    total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    weight_sum, largest = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], float("-inf"), tl.float32)
    # Global keys outside the window of the tile's last query.
    reach = window - num_seen
    total, weight_sum, largest = _attend_keys(
        total, weight_sum, largest, 0, tl.minimum(num_globals, first_query + BLOCK_M - reach),
        q_tile, q_height, query, query_document, gk, gv, g_heights, g_documents, num_globals, 0, scale, reach,
        gk_t, gv_t, True, True, BLOCK_N, BLOCK_K, HEAD_SIZE, LORENTZ, DOCUMENTS, FAST, PRECISION,
    )  # fmt: skip
    begin, whole_begin, whole_end, end = window_ranges(first_query, num_carried, num_keys, window, BLOCK_M, BLOCK_N)
    if not SPLIT:
        whole_end = begin
    for part in tl.static_range(3):
        if SPLIT or part == 2:
            total, weight_sum, largest = _attend_keys(
                total, weight_sum, largest,
                begin if part == 0 else whole_begin if part == 1 else whole_end, whole_begin if part == 0 else whole_end if part == 1 else end,
                q_tile, q_height, query, query_document, k, v, k_heights, documents, num_keys, num_carried, scale, window,
                k_t, v_t, False, part != 1, BLOCK_N, BLOCK_K, HEAD_SIZE, LORENTZ, DOCUMENTS, FAST, PRECISION,
            )  # fmt: skip
    dims = tl.arange(0, BLOCK_K)
    mask = (query < num_queries)[:, None] & (dims < HEAD_SIZE)[None, :]
    y_rows = y + batch * y_b + head * y_h + tl.cast(query, tl.int64)[:, None] * y_t
    tl.store(y_rows + dims[None, :], (total / weight_sum[:, None]).to(y.dtype.element_ty), mask=mask)
    log_weight_sum = tl.log2(weight_sum) if LORENTZ else tl.log2(weight_sum) + largest
    tl.store(log_sum + row * num_queries + query, log_weight_sum * LN_2, mask=query < num_queries)
