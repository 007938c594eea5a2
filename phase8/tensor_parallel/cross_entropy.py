"""Head and cross-entropy with the vocabulary divided over the ranks: no rank sees the logits of another's ids.

Of each row chunk three numbers a token cross the axis: the largest logit, the sum of exponentials and the logit of the target. The
gradients are formed while the logits are there, as `kernels.cross_entropy` does in one process.

Shapes: N tokens, D model width, V vocabulary of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phase8.distributed.collectives import Axis, maximum_over, sum_over
from phase8.kernels.cross_entropy import linear_cross_entropy
from phase8.kernels.reference.cross_entropy import CHUNK_TOKENS, IGNORED_TARGET
from phase8.kernels.reference.dtypes import at_least_fp32


def parallel_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, first_id: int, axis: Axis) -> Tensor:
    """Sum of the cross-entropies of the valid targets in nats, the same on every rank.

    Args:
        hidden: Final hidden states of all tokens [N, D].
        weight: Rows of the output head for this rank's ids [V, D].
        targets: Token ids of the whole vocabulary, IGNORED_TARGET where there is nothing to predict [N].
        first_id: The id of the first row.
        axis: Of tensor parallelism.

    Returns:
        Scalar, fp32 or wider. Its gradient of `hidden` is this rank's summand: that of the gather before it adds them up.
    """
    if axis.size == 1:
        return linear_cross_entropy(hidden, weight, targets)
    return _ParallelCrossEntropy.apply(hidden, weight, targets, first_id, axis)


class _ParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, first_id: int, axis: Axis) -> Tensor:
        needs_gradient = any(ctx.needs_input_grad[:2])
        head = weight.to(hidden.dtype)
        dhidden, dweight = (torch.zeros_like(x) if needs_gradient else None for x in (hidden, weight))
        loss = at_least_fp32(hidden.new_zeros(()))
        for begin in range(0, len(hidden), CHUNK_TOKENS):
            rows = slice(begin, begin + CHUNK_TOKENS)
            chunk_loss, dlogits = _chunk(at_least_fp32(hidden[rows] @ head.T), targets[rows], first_id, axis)
            loss += chunk_loss
            if dhidden is not None and dweight is not None:
                dlogits = dlogits.to(hidden.dtype)
                torch.mm(dlogits, head, out=dhidden[rows])
                dweight += dlogits.T @ hidden[rows]
        ctx.save_for_backward(dhidden, dweight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dhidden, dweight = ctx.saved_tensors
        # A vector takes part in type promotion; a scalar would be rounded to bf16 first.
        return (dhidden * grad.reshape(1)).to(dhidden.dtype), (dweight * grad.reshape(1)).to(dweight.dtype), None, None, None


def _chunk(logits: Tensor, targets: Tensor, first_id: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """Loss of a chunk of rows, and its gradient of this rank's logits."""
    valid = targets != IGNORED_TARGET
    own = targets - first_id
    is_here = valid & (own >= 0) & (own < logits.shape[1])
    largest = maximum_over(logits.amax(1), axis)
    exponentials = (logits - largest[:, None]).exp_()
    place = own.where(is_here, 0)[:, None]
    here = logits.gather(1, place).squeeze(1).where(is_here, 0)
    total, target_logit = sum_over(torch.stack((exponentials.sum(1), here)), axis)
    losses = (total.log() + largest - target_logit).where(valid, 0)
    gradient = exponentials.div_(total[:, None])
    gradient.scatter_add_(1, place, -is_here[:, None].to(gradient.dtype))
    return losses.sum(), gradient.mul_(valid[:, None])
