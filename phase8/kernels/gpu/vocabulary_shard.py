"""Output head and cross-entropy for a shard of the vocabulary, on a GPU: two kernels around the exchange of row statistics.

The first reads the logits of a row, the second overwrites them by their gradient; both are halves of `loss_kernel`.

Shapes: N tokens, R rows (tokens of a chunk), D model width, V vocabulary of this process, L leading dimension of the logits, V rounded up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phase8.kernels.gpu.cross_entropy import (
    add_product,
    cast_head,
    partition_of_row,
    row_and_columns,
    row_constants,
    write_gradient_of_row,
    write_zeros_over_row,
)
from phase8.kernels.reference.vocabulary_shard import Exchange, sum_of_losses


def shard_cross_entropy_gradients(
    hidden: Tensor, weight: Tensor, columns: Tensor, exchange: Exchange, *, chunk_tokens: int, needs_gradients: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Computes the reference with this name; `weight` has the dtype of `hidden` or is fp32, N > 0 and V > 0."""
    hidden, columns, vocabulary = hidden.contiguous(), columns.contiguous(), weight.shape[0]
    head = cast_head(weight, hidden.dtype)
    logits_of_chunk = hidden.new_empty(min(chunk_tokens, len(hidden)), head.shape[0])
    dhidden = torch.empty_like(hidden) if needs_gradients else None
    dweight = weight.new_empty(head.shape) if needs_gradients else None  # padding rows included, as in one process
    losses = []
    for begin in range(0, len(hidden), chunk_tokens):
        rows = slice(begin, begin + chunk_tokens)
        logits = logits_of_chunk[: len(hidden[rows])]
        torch.mm(hidden[rows], head.T, out=logits)
        whole = exchange(row_statistics(logits, columns[rows], vocabulary=vocabulary))
        losses.append(sum_of_losses(whole, columns[rows]))
        if dhidden is not None and dweight is not None:
            write_row_gradients(logits, columns[rows], whole, vocabulary=vocabulary)
            torch.mm(logits, head, out=dhidden[rows])
            add_product(dweight, logits.T, hidden[rows], is_first=begin == 0)
    return torch.stack(losses).sum(), dhidden, None if dweight is None else dweight[:vocabulary]


def row_statistics(logits: Tensor, columns: Tensor, *, vocabulary: int, block: int | None = None) -> Tensor:
    """Computes the reference with this name from contiguous logits [R, L] whose columns from `vocabulary` on are padding; fp32 [3, R]."""
    num_rows, leading = logits.shape
    statistics = logits.new_empty(3, num_rows, dtype=torch.float32)
    statistics_kernel[(num_rows,)](logits, columns, statistics, num_rows, leading, vocabulary, **row_constants(logits, vocabulary, block))
    return statistics


def write_row_gradients(logits: Tensor, columns: Tensor, whole: Tensor, *, vocabulary: int, block: int | None = None) -> None:
    """Overwrites the logits [R, L] by the result of the reference `row_gradients`, and padding columns by 0."""
    num_rows, leading = logits.shape
    constants = row_constants(logits, vocabulary, block)
    gradient_kernel[(num_rows,)](logits, columns, whole.contiguous(), num_rows, leading, vocabulary, **constants)


@triton.jit
def statistics_kernel(
    logits, columns, statistics, num_rows, leading, vocabulary,
    IGNORED: tl.constexpr, LOWEST: tl.constexpr, LOG2E: tl.constexpr,
    FAST: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Computes one row's statistics: logarithm of the largest term, sum of terms relative to it, logit of the target."""
    row, logits, places = row_and_columns(logits, leading, BLOCK, VECTOR)
    column = tl.load(columns + row)
    statistics += row
    if column == IGNORED:  # neutral statistics for the other processes
        tl.store(statistics, 0.0)
        tl.store(statistics + num_rows, 1.0)
        tl.store(statistics + 2 * num_rows, 0.0)
        return
    highest, partition = partition_of_row(logits, places, leading, vocabulary, LOWEST, LOG2E, FAST, BLOCK, VECTOR)
    tl.store(statistics, highest)
    tl.store(statistics + num_rows, partition)
    tl.store(statistics + 2 * num_rows, tl.load(logits + column, mask=column >= 0, other=0.0).to(tl.float32))


@triton.jit
def gradient_kernel(
    logits, columns, whole, num_rows, leading, vocabulary,
    IGNORED: tl.constexpr, LOWEST: tl.constexpr, LOG2E: tl.constexpr,
    FAST: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of one row from the statistics over the whole vocabulary."""
    row, logits, places = row_and_columns(logits, leading, BLOCK, VECTOR)
    column = tl.load(columns + row)
    if column == IGNORED:
        write_zeros_over_row(logits, places, leading, BLOCK, VECTOR)
        return
    target_logit = tl.load(logits + column, mask=column >= 0, other=0.0).to(tl.float32)
    tl.debug_barrier()  # every thread loads it, and none may have written the gradient there before
    highest, partition = tl.load(whole + row), tl.load(whole + num_rows + row)
    write_gradient_of_row(logits, places, leading, vocabulary, column, target_logit, column >= 0, highest, partition, LOG2E, FAST, BLOCK)
