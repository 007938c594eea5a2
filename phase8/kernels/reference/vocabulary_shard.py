"""Output head and cross-entropy where this process holds some rows of the head, and other processes the rest.

For each token three numbers are sent to the other processes: the base-2 logarithm of the largest term of its softmax, the sum of its terms
relative to that one, and the logit of its target (0 if another process has it). The exchange returns the same three for the whole vocabulary.

Shapes: N tokens, R rows (tokens of a chunk), D model width, V vocabulary of this process.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from phase8.kernels.dtypes import at_least_fp32
from phase8.kernels.reference.cross_entropy import IGNORED_TARGET

ELSEWHERE = -1  # the column of a target on another process
LOG2E = 1 / math.log(2)

# The statistics of the rows of this process [3, R] -> of the whole vocabulary, the same on every process.
Exchange = Callable[[Tensor], Tensor]


def shard_cross_entropy_gradients(
    hidden: Tensor, weight: Tensor, columns: Tensor, exchange: Exchange, *, chunk_tokens: int, needs_gradients: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss of the whole vocabulary with this process's share of its gradients.

    Args:
        hidden: Final hidden states [N, D].
        weight: The rows of this process [V, D]; cast to the dtype of `hidden` for the matmuls, its gradient accumulates in its own dtype.
        columns: The row of each target in `weight`, ELSEWHERE where it is in none of this process, IGNORED_TARGET where there is no target [N].
        exchange: Called once for each chunk, by every process.
        chunk_tokens: Tokens whose logits exist at the same time.
        needs_gradients: Compute the gradients.

    Returns:
        The loss, fp32 or wider, this process's summand of the gradient of `hidden` [N, D], and the gradient of `weight` [V, D].
    """
    head = weight.to(hidden.dtype)
    dhidden, dweight = (torch.zeros_like(x) if needs_gradients else None for x in (hidden, weight))
    loss = at_least_fp32(hidden.new_zeros(()))
    for begin in range(0, len(hidden), chunk_tokens):
        rows = slice(begin, begin + chunk_tokens)
        logits = at_least_fp32(hidden[rows] @ head.T)
        whole = exchange(row_statistics(logits, columns[rows]))
        loss += sum_of_losses(whole, columns[rows])
        if dhidden is not None and dweight is not None:
            dlogits = row_gradients(logits, columns[rows], whole).to(hidden.dtype)
            torch.mm(dlogits, head, out=dhidden[rows])
            dweight += dlogits.T @ hidden[rows]
    return loss, dhidden, dweight


def row_statistics(logits: Tensor, columns: Tensor) -> Tensor:
    """The statistics of logits [R, V] that the other processes need: [3, R], as above."""
    powers = logits * LOG2E
    highest = powers.amax(1)
    total = powers.sub_(highest[:, None]).exp2_().sum(1)
    target = logits.gather(1, columns.clamp(min=0)[:, None]).squeeze(1).where(columns >= 0, 0)
    return torch.stack((highest, total, target))


def sum_of_losses(whole: Tensor, columns: Tensor) -> Tensor:
    """Sum over rows that count, from the statistics of the whole vocabulary [3, R]."""
    highest, total, target = whole
    return ((highest + total.log2()) / LOG2E - target).where(columns != IGNORED_TARGET, 0).sum()


def row_gradients(logits: Tensor, columns: Tensor, whole: Tensor) -> Tensor:
    """The gradient of the loss of each row with respect to its logits here [R, V], 0 for rows that do not count; overwrites the logits."""
    highest, total, _ = whole
    gradient = logits.mul_(LOG2E).sub_(highest[:, None]).exp2_().div_(total[:, None])
    gradient.scatter_add_(1, columns.clamp(min=0)[:, None], -(columns >= 0)[:, None].to(gradient.dtype))
    return gradient.masked_fill_((columns == IGNORED_TARGET)[:, None], 0)
