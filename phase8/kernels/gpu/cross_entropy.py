"""Output head and cross-entropy on a GPU: cuBLAS for the three products of a chunk, one kernel for everything between them.

The kernel reads the logits of a row twice: for log-sum-exp and loss, and for the gradient, which overwrites them.

Shapes: N tokens, R rows (tokens of a chunk), D model width, V vocabulary, L leading dimension of the logits, V rounded up.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.gpu.fast_math import exp2, has_fast_math, log2
from phase8.kernels.loss_chunks import HEAD_ALIGNMENT, choose_chunk_tokens, scratch_limit
from phase8.kernels.reference.cross_entropy import IGNORED_TARGET

VECTOR_BYTES = 16  # the widest load of a thread
LOWEST = -3.0e38  # initial value of a running maximum; finite, because -inf - -inf is NaN


def linear_cross_entropy_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None = None, *, needs_dhidden: bool = True, needs_dweight: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss and its gradients, as the reference with this name; `weight` has the dtype of `hidden` or is fp32, and N > 0."""
    (num_tokens, width), vocabulary = hidden.shape, weight.shape[0]
    hidden, targets = hidden.contiguous(), targets.contiguous()
    head = cast_head(weight, hidden.dtype)
    if chunk_tokens is None:
        limit = scratch_limit(_device_bytes(hidden.device))
        chunk_tokens = choose_chunk_tokens(num_tokens, vocabulary, width, element_bytes=hidden.element_size(), scratch_bytes=limit)
    logits_of_chunk = hidden.new_empty(min(chunk_tokens, num_tokens), head.shape[0])
    losses = hidden.new_empty(num_tokens, dtype=torch.float32)
    dhidden = torch.empty_like(hidden) if needs_dhidden else None
    # Padding rows are included, with gradient zero: products with an odd number of rows run at two thirds of the speed.
    dweight = weight.new_empty(head.shape) if needs_dweight else None
    for begin in range(0, num_tokens, chunk_tokens):
        rows = slice(begin, begin + chunk_tokens)
        logits = logits_of_chunk[: hidden[rows].shape[0]]
        torch.mm(hidden[rows], head.T, out=logits)
        losses_of_rows(logits, targets[rows], losses[rows], vocabulary=vocabulary, writes_gradient=needs_dhidden or needs_dweight)
        if dhidden is not None:
            torch.mm(logits, head, out=dhidden[rows])
        if dweight is not None:
            add_product(dweight, logits.T, hidden[rows], is_first=begin == 0)
    return losses.sum(), dhidden, None if dweight is None else dweight[:vocabulary]


def cast_head(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The head in the dtype of the matmuls [L, D], padded with zero rows, because an odd leading dimension would be unaligned."""
    vocabulary, width = weight.shape
    padding = -vocabulary % HEAD_ALIGNMENT
    if not padding:
        return weight.to(dtype).contiguous()
    head = weight.new_empty(vocabulary + padding, width, dtype=dtype)
    head[:vocabulary] = weight
    head[vocabulary:] = 0
    return head


def losses_of_rows(
    logits: Tensor, targets: Tensor, losses: Tensor, *, vocabulary: int, writes_gradient: bool, block: int | None = None
) -> None:
    """Writes the loss of every row into `losses` [R] and, if asked, the gradient of the logits over the logits [R, L].

    Ignored rows have loss and gradient 0, padding columns gradient 0, for any logits. A target out of range gives the loss NaN.

    Args:
        logits: Contiguous [R, L]; 16 divides L.
        targets: [R].
        losses: fp32 [R].
        vocabulary: Number of columns that count.
        writes_gradient: Overwrite the logits.
        block: Columns that a program reads at once, a power of two; None: chosen by size.
    """
    num_rows, leading = logits.shape
    loss_kernel[(num_rows,)](
        logits, targets, losses, leading, vocabulary,
        WRITES_GRADIENT=writes_gradient, **row_constants(logits, vocabulary, block),
    )  # fmt: skip


def row_constants(logits: Tensor, vocabulary: int, block: int | None = None) -> dict[str, object]:
    """Compile-time constants and launch options of kernels that read a row of logits; arguments as above."""
    leading = logits.shape[1]
    if block is None:
        # Two vectors for each of 1024 threads hide the latency of memory, and the rows being processed stay in the L2 cache (132
        # rows of 256 kB) until the second pass. Short rows use 512 threads, so that two programs share a multiprocessor; those between, 1024
        # with one vector each: 8,192 rows of 50,257 ids take 0.54 ms instead of 0.61.
        block = min(triton.next_power_of_2(leading), 16384 if leading > 65536 else 8192)
    vector = VECTOR_BYTES // logits.element_size()
    return {
        "IGNORED": IGNORED_TARGET, "LOWEST": LOWEST, "LOG2E": 1 / math.log(2),
        "FAST": has_fast_math(), "BLOCK": block, "VECTOR": vector,
        "num_warps": max(1, min(32, block // (32 * vector * (1 if 32768 < leading <= 65536 else 2)))),
    }  # fmt: skip


@triton.jit
def loss_kernel(
    logits, targets, losses, leading, vocabulary,
    IGNORED: tl.constexpr, LOWEST: tl.constexpr, LOG2E: tl.constexpr,
    WRITES_GRADIENT: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Computes the loss of one row of logits [L], and its gradient in place."""
    row, logits, columns = row_and_columns(logits, leading, BLOCK, VECTOR)
    target = tl.load(targets + row)
    if target == IGNORED:
        tl.store(losses + row, 0.0)
        if WRITES_GRADIENT:
            write_zeros_over_row(logits, columns, leading, BLOCK, VECTOR)
        return
    is_known = (target >= 0) & (target < vocabulary)
    target_logit = tl.load(logits + target, mask=is_known, other=float("nan")).to(tl.float32)

    highest, partition = partition_of_row(logits, columns, leading, vocabulary, LOWEST, LOG2E, FAST, BLOCK, VECTOR)
    tl.store(losses + row, (tl.fma(target_logit, -LOG2E, highest) + log2(partition, FAST)) / LOG2E)
    if WRITES_GRADIENT:
        write_gradient_of_row(logits, columns, leading, vocabulary, target, target_logit, is_known, highest, partition, LOG2E, FAST, BLOCK)


@triton.jit
def row_and_columns(logits, leading, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """The row of this program, its logits, and the columns of a block."""
    row = tl.program_id(0)
    # Each thread owns vectors of a row. Loads and stores are cut at the leading dimension, which whole vectors divide, and padding columns
    # are masked in registers.
    columns = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    return row, logits + row.to(tl.int64) * leading, columns


@triton.jit
def partition_of_row(
    logits, columns, leading, vocabulary,
    LOWEST: tl.constexpr, LOG2E: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The rounded base-2 logarithm of the largest term of a row, and the sum of all terms relative to it."""
    # In base 2, relative to m = the rounded logarithm of the largest term; the products with LOG2E are exact up to the subtraction of
    # m, so large logits lose no precision. Each thread keeps maximum and sum of its vectors: one rescaling per vector, no exchange.
    m = tl.full([BLOCK // VECTOR], LOWEST, tl.float32)
    total = tl.zeros([BLOCK // VECTOR], tl.float32)
    whole = vocabulary // BLOCK * BLOCK  # comparisons would be a quarter of the instructions
    for begin in range(0, whole, BLOCK):
        m, total = _with_block(m, total, logits, begin + columns, leading, vocabulary, LOG2E, False, FAST)
    for begin in range(whole, leading, BLOCK):
        m, total = _with_block(m, total, logits, begin + columns, leading, vocabulary, LOG2E, True, FAST)
    highest = tl.max(m, axis=0)
    return highest, tl.sum(total * exp2(m - highest, FAST), axis=0)


@triton.jit
def _with_block(m, total, logits, columns, leading, vocabulary, LOG2E: tl.constexpr, IS_CUT: tl.constexpr, FAST: tl.constexpr):
    """Largest terms and sums of the vectors after some columns of each; only of a block that is cut may columns lie outside the vocabulary."""
    if IS_CUT:
        x = tl.load(logits + columns, mask=columns < leading, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
        x = tl.where(columns < vocabulary, x, float("-inf"))
    else:
        x = tl.load(logits + columns, eviction_policy="evict_last").to(tl.float32)
    new_m = tl.maximum(m, tl.max(x, axis=1) * LOG2E)
    return new_m, total * exp2(m - new_m, FAST) + tl.sum(exp2(tl.fma(x, LOG2E, -new_m[:, None]), FAST), axis=1)


@triton.jit
def write_gradient_of_row(
    logits, columns, leading, vocabulary, target, target_logit, has_target, highest, partition,
    LOG2E: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Replaces the logits of a row by the gradient of its loss."""
    normaliser = 1.0 / partition
    whole = vocabulary // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        x = tl.load(logits + begin + columns, eviction_policy="evict_first").to(tl.float32)
        tl.store(logits + begin + columns, exp2(tl.fma(x, LOG2E, -highest), FAST) * normaliser)
    for begin in range(whole, leading, BLOCK):
        column = begin + columns
        x = tl.load(logits + column, mask=column < leading, other=0.0, eviction_policy="evict_first").to(tl.float32)
        probabilities = exp2(tl.fma(x, LOG2E, -highest), FAST) * normaliser
        tl.store(logits + column, tl.where(column < vocabulary, probabilities, 0.0), mask=column < leading)
    # The target's column is corrected last, once per row instead of by a comparison per element; the barrier orders the two stores.
    tl.debug_barrier()
    tl.store(logits + target, exp2(tl.fma(target_logit, LOG2E, -highest), FAST) * normaliser - 1.0, mask=has_target)


@triton.jit
def write_zeros_over_row(logits, columns, leading, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Writes a zero gradient for a row that does not count."""
    for begin in range(0, leading, BLOCK):
        tl.store(logits + begin + columns, tl.zeros([BLOCK // VECTOR, VECTOR], tl.float32), mask=begin + columns < leading)


def add_product(total: Tensor, left: Tensor, right: Tensor, *, is_first: bool) -> None:
    """Adds left @ right to `total`, accumulated in its dtype; the first product overwrites it."""
    beta = 0 if is_first else 1
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=beta, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)


def _device_bytes(device: torch.device) -> int | None:
    """Memory of the device that this process may use."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory * torch.cuda.get_per_process_memory_fraction(device))
