"""The triangular systems of the gated delta rule in Triton: X = (I + A)^-1 of every chunk, which needs no state, so all chunks run at once.

A is strictly lower triangular, A_ij = beta_i Gamma_ij k_i k_j. It is cut into blocks of 16 x 16. The inverse of a block of the diagonal doubles
from pairs of tokens on; the blocks below follow by substitution. All of it is in fp32, or in three tf32 products that are as exact: the
entries of an inverse are differences.

Shapes: B batch, T tokens, H heads, K key size, N chunks, C tokens of a chunk.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.gpu.fast_math import exp2, has_fast_math, tensor_core_precision
from phase8.kernels.gpu.gated_linear_attention import block_size
from phase8.kernels.gpu.gated_linear_attention_walk import BOUNDARY, CHUNK, CHUNK_TOKENS, LOG2_E, LOWEST, tile_mask, tile_pointers
from phase8.kernels.gpu.layout import as_bytes

BLOCK_TOKENS = 16
BLOCK = tl.constexpr(BLOCK_TOKENS)
KEY_COLUMNS = 32  # of keys at once: more would not fit into the registers of one warp
SMALLEST_RATE = tl.constexpr(2.0**-40)  # negligible, but what was multiplied by it can be divided by it


@dataclass(frozen=True)
class Gates:
    """Decays, replaced shares and document boundaries as kernel arguments.

    Args:
        arguments: As every kernel takes them: log alpha and beta, each with its strides, `starts` as bytes or None, T.
        num_chunks: Chunks of the sequence.
    """

    arguments: tuple[Tensor | int | None, ...]
    num_chunks: int


def prepare_gates(log_decay: Tensor, beta: Tensor, starts: Tensor | None) -> Gates:
    """Prepares the tensors of the public function."""
    log_decay, beta, length = log_decay.float(), beta.float(), log_decay.shape[1]
    return Gates((log_decay, *log_decay.stride(), beta, *beta.stride(), as_bytes(starts), length), triton.cdiv(length, CHUNK_TOKENS))


def chunk_inverses(k: Tensor, gates: Gates, *, num_warps: int = 1) -> Tensor:
    """X of every chunk [B, H, N, C, C] in the dtype of k, whose rows are contiguous."""
    batch, _, num_heads, key_size = k.shape
    inverse = torch.empty(batch, num_heads, gates.num_chunks, CHUNK_TOKENS, CHUNK_TOKENS, dtype=k.dtype, device=k.device)
    _inverse_kernel[(batch * num_heads * gates.num_chunks,)](
        k, k.stride(0), k.stride(2), k.stride(1), *gates.arguments, inverse, num_heads, gates.num_chunks,
        K=key_size, COLUMNS=min(block_size(key_size), KEY_COLUMNS),
        FAST=has_fast_math(), PRECISION=tensor_core_precision(), num_warps=num_warps,
    )  # fmt: skip
    return inverse


@triton.jit
def token_gates(decay, decay_t, rate, rate_t, starts, first, length, TOKENS: tl.constexpr):
    """The running sum of log2 alpha, and beta, of TOKENS tokens that begin at `first`."""
    token = tl.cast(first + tl.arange(0, TOKENS), tl.int64)
    live = token < length
    steps = tl.maximum(tl.load(decay + token * decay_t, live, 0.0), LOWEST) * LOG2_E
    if starts is not None:
        steps -= tl.where(tl.load(starts + token, live, 0) != 0, BOUNDARY, 0.0)
    rates = tl.where(live, tl.maximum(tl.load(rate + token * rate_t, live, 0.0), SMALLEST_RATE), 0.0)
    return tl.cumsum(steps, 0), rates


@triton.jit
def unravel_chunk(program, num_chunks, num_heads):
    """Chunk, head and sequence of a program, in 64 bits because they become offsets."""
    program = tl.cast(program, tl.int64)
    rest = program // num_chunks
    return program % num_chunks, rest % num_heads, rest // num_heads


@triton.jit
def _inverse_kernel(
    k, k_b, k_h, k_t, decay, decay_b, decay_t, decay_h, rate, rate_b, rate_t, rate_h, starts, length, inverse, num_heads, num_chunks,
    K: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Inverts the system of one chunk."""
    chunk, head, batch = unravel_chunk(tl.program_id(0), num_chunks, num_heads)
    first = tl.cast(chunk * CHUNK, tl.int32)
    k += batch * k_b + head * k_h
    decay += batch * decay_b + head * decay_h
    rate += batch * rate_b + head * rate_h
    if starts is not None:
        starts += batch * length
    inverse += tl.cast(tl.program_id(0), tl.int64) * CHUNK * CHUNK

    total0, rate0 = token_gates(decay, decay_t, rate, rate_t, starts, first, length, BLOCK)
    total1, rate1 = token_gates(decay, decay_t, rate, rate_t, starts, first + BLOCK, length, BLOCK)
    total2, rate2 = token_gates(decay, decay_t, rate, rate_t, starts, first + 2 * BLOCK, length, BLOCK)
    total3, rate3 = token_gates(decay, decay_t, rate, rate_t, starts, first + 3 * BLOCK, length, BLOCK)
    # From here on sums count from the start of the chunk; their smallest value is the last one.
    total1 += tl.min(total0, 0)
    total2 += tl.min(total1, 0)
    total3 += tl.min(total2, 0)
    nothing = tl.zeros([BLOCK, BLOCK], tl.float32)

    # Row i of (I + A) X = I: X_ij = -X_ii (sum of A_im X_mj over m from j to i - 1). Keys are loaded again for each block: all of them at once
    # would not fit into the registers.
    x00 = _inverse_of_diagonal(_system(k, k_t, first, length, 0, 0, total0, total0, rate0, K, COLUMNS, FAST, PRECISION), PRECISION)
    _store_block_row(inverse, x00, nothing, nothing, nothing)

    x11 = _inverse_of_diagonal(_system(k, k_t, first, length, 1, 1, total1, total1, rate1, K, COLUMNS, FAST, PRECISION), PRECISION)
    a10 = _system(k, k_t, first, length, 1, 0, total1, total0, rate1, K, COLUMNS, FAST, PRECISION)
    x10 = -_dot(x11, _dot(a10, x00, PRECISION), PRECISION)
    _store_block_row(inverse + BLOCK * CHUNK, x10, x11, nothing, nothing)

    x22 = _inverse_of_diagonal(_system(k, k_t, first, length, 2, 2, total2, total2, rate2, K, COLUMNS, FAST, PRECISION), PRECISION)
    a20 = _system(k, k_t, first, length, 2, 0, total2, total0, rate2, K, COLUMNS, FAST, PRECISION)
    a21 = _system(k, k_t, first, length, 2, 1, total2, total1, rate2, K, COLUMNS, FAST, PRECISION)
    x20 = -_dot(x22, _dot(a20, x00, PRECISION) + _dot(a21, x10, PRECISION), PRECISION)
    x21 = -_dot(x22, _dot(a21, x11, PRECISION), PRECISION)
    _store_block_row(inverse + 2 * BLOCK * CHUNK, x20, x21, x22, nothing)

    x33 = _inverse_of_diagonal(_system(k, k_t, first, length, 3, 3, total3, total3, rate3, K, COLUMNS, FAST, PRECISION), PRECISION)
    a30 = _system(k, k_t, first, length, 3, 0, total3, total0, rate3, K, COLUMNS, FAST, PRECISION)
    a31 = _system(k, k_t, first, length, 3, 1, total3, total1, rate3, K, COLUMNS, FAST, PRECISION)
    a32 = _system(k, k_t, first, length, 3, 2, total3, total2, rate3, K, COLUMNS, FAST, PRECISION)
    x30 = -_dot(x33, _dot(a30, x00, PRECISION) + _dot(a31, x10, PRECISION) + _dot(a32, x20, PRECISION), PRECISION)
    x31 = -_dot(x33, _dot(a31, x11, PRECISION) + _dot(a32, x21, PRECISION), PRECISION)
    x32 = -_dot(x33, _dot(a32, x22, PRECISION), PRECISION)
    _store_block_row(inverse + 3 * BLOCK * CHUNK, x30, x31, x32, x33)


@triton.jit
def _system(
    k, k_t, first, length, I: tl.constexpr, J: tl.constexpr, rows_total, columns_total, rates,
    K: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Block (I, J) of A, from some columns of keys at a time; on the diagonal only what lies strictly below it."""
    change = rows_total[:, None] - columns_total[None, :]
    if I == J:
        token = tl.arange(0, BLOCK)
        change = tl.where(token[:, None] > token[None, :], change, float("-inf"))
    products = tl.zeros([BLOCK, BLOCK], tl.float32)
    for begin in tl.static_range(0, K, COLUMNS):
        rows_key = _key_rows(k, k_t, first + I * BLOCK, begin, length, K, COLUMNS)
        columns_key = _key_rows(k, k_t, first + J * BLOCK, begin, length, K, COLUMNS)
        products = tl.dot(rows_key, tl.trans(columns_key), products, input_precision=PRECISION)
    return products * exp2(change, FAST) * rates[:, None]


@triton.jit
def _key_rows(k, k_t, first, begin, length, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Some columns of a block of keys, 0 beyond the sequence."""
    return tl.load(tile_pointers(k + begin, first, k_t, BLOCK, COLUMNS), tile_mask(length - first, K - begin, BLOCK, COLUMNS, K), 0.0)


@triton.jit
def _inverse_of_diagonal(a, PRECISION: tl.constexpr):
    """(I + a)^-1 of a strictly lower triangular block: with X the inverse of the diagonal squares of some size, X - X a X is that of twice it."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    x = tl.where(row == column, 1.0, 0.0) - tl.where(row // 2 == column // 2, a, 0.0)
    for level in tl.static_range(1, 4):
        below = tl.where((row // 2**level != column // 2**level) & (row // 2 ** (level + 1) == column // 2 ** (level + 1)), a, 0.0)
        x -= _dot(_dot(x, below, PRECISION), x, PRECISION)
    return x


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision="tf32x3" if PRECISION == "tf32" else PRECISION)


@triton.jit
def _store_block_row(inverse, x0, x1, x2, x3):
    """Four neighbouring blocks of X."""
    pointers = tile_pointers(inverse, 0, CHUNK, BLOCK, BLOCK)
    tl.store(pointers, x0.to(inverse.dtype.element_ty))
    tl.store(pointers + BLOCK, x1.to(inverse.dtype.element_ty))
    tl.store(pointers + 2 * BLOCK, x2.to(inverse.dtype.element_ty))
    tl.store(pointers + 3 * BLOCK, x3.to(inverse.dtype.element_ty))
