"""Head and cross-entropy with the vocabulary divided over the ranks; each rank computes the logits of its own ids only.

For each chunk of rows the ranks exchange three numbers per token: the largest term, the sum of terms and the logit of the target. The gradients
are formed while the logits exist, as in one process.

Shapes: N tokens, R rows (tokens of a chunk), D model width, V vocabulary of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phase8.distributed.collectives import Axis, maximum_over, sum_over
from phase8.exchanges import Exchange, Exchanges, Operation
from phase8.kernels.cross_entropy import linear_cross_entropy
from phase8.kernels.reference.cross_entropy import CHUNK_TOKENS, IGNORED_TARGET
from phase8.kernels.reference.vocabulary_shard import ELSEWHERE
from phase8.kernels.vocabulary_shard import shard_cross_entropy_gradients


def parallel_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, first_id: int, axis: Axis) -> Tensor:
    """Sum of the cross-entropies of the valid targets in nats, the same on every rank.

    Args:
        hidden: Final hidden states of all tokens [N, D].
        weight: Rows of the output head for this rank's ids [V, D].
        targets: Token ids of the whole vocabulary [N]; IGNORED_TARGET where there is nothing to predict.
        first_id: Token id of the first row of `weight`.
        axis: Axis of tensor parallelism.

    Returns:
        A scalar, fp32 or wider. The gradient of `hidden` is this rank's summand; the backward of the gather that made `hidden` adds up the summands.
    """
    if axis.size == 1:
        return linear_cross_entropy(hidden, weight, targets)
    return _ParallelCrossEntropy.apply(hidden, weight, targets, first_id, axis)


def chunk_tokens(num_ranks: int) -> int:
    """Number of rows whose logits exist at a time; a rank then holds as many logits as the reference of one process."""
    return CHUNK_TOKENS * num_ranks


def loss_exchanges() -> Exchanges:
    """The exchanges of the numbers of each chunk of rows. The gradients are formed in forward, so backward exchanges nothing."""
    largest, sums = (Exchange(Operation.ALL_REDUCE, numbers, is_wide=True, tokens_per_rank=chunk_tokens(1)) for numbers in (1, 2))
    return Exchanges(forward=(largest, sums))


class _ParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, first_id: int, axis: Axis) -> Tensor:
        loss, dhidden, dweight = shard_cross_entropy_gradients(
            hidden,
            weight,
            _own_columns(targets, first_id, weight.shape[0]),
            lambda statistics: _of_all_ranks(statistics, axis),
            chunk_tokens=chunk_tokens(axis.size),
            needs_gradients=any(ctx.needs_input_grad[:2]),
        )
        ctx.save_for_backward(dhidden, dweight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dhidden, dweight = ctx.saved_tensors
        # A vector takes part in type promotion; a scalar would be rounded to bf16 first.
        return (dhidden * grad.reshape(1)).to(dhidden.dtype), (dweight * grad.reshape(1)).to(dweight.dtype), None, None, None


def _own_columns(targets: Tensor, first_id: int, num_ids: int) -> Tensor:
    """The targets as rows of this rank's part of the head; ELSEWHERE where another rank has the row."""
    own = targets - first_id
    own = own.where((own >= 0) & (own < num_ids), ELSEWHERE)
    return own.where(targets != IGNORED_TARGET, IGNORED_TARGET)


def _of_all_ranks(statistics: Tensor, axis: Axis) -> Tensor:
    """The statistics of rows over the whole vocabulary [3, R], from those over this rank's part of it."""
    highest = maximum_over(statistics[0], axis)
    total = statistics[1] * (statistics[0] - highest).exp2()
    return torch.stack((highest, *sum_over(torch.stack((total, statistics[2])), axis)))
