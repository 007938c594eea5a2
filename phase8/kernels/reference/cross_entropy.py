"""Output head and cross-entropy in one: the logits of a microbatch never exist whole.

The gradient is formed chunk by chunk while the logits of the chunk are there, so nothing is recomputed in backward.

Shapes: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.kernels.reference.dtypes import at_least_fp32

IGNORED_TARGET = -100
CHUNK_TOKENS = 1024


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight^T)[target], in nats.

    Args:
        hidden: Final hidden states [N, D].
        weight: Output head [V, D]; cast to the dtype of `hidden` for the matmuls, its gradient accumulates in its own dtype.
        targets: Token ids, IGNORED_TARGET where there is nothing to predict [N].
        chunk_tokens: Tokens whose logits exist at the same time.

    Returns:
        Scalar, fp32 or wider.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, chunk_tokens, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int, grad_enabled: bool) -> Tensor:
        needs_hidden, needs_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        head = weight.to(hidden.dtype)
        dhidden = torch.empty_like(hidden) if needs_hidden else None
        dweight = torch.zeros_like(weight) if needs_weight else None
        loss = at_least_fp32(hidden.new_zeros(()))
        for begin in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(begin, begin + chunk_tokens)
            logits = at_least_fp32(hidden[rows] @ head.T)
            log_probabilities = F.log_softmax(logits, dim=-1)
            loss += F.nll_loss(log_probabilities, targets[rows], ignore_index=IGNORED_TARGET, reduction="sum")
            if needs_hidden or needs_weight:
                dlogits = _gradient_of_logits(log_probabilities, targets[rows]).to(hidden.dtype)
            if dhidden is not None:
                torch.mm(dlogits, head, out=dhidden[rows])
            if dweight is not None:
                dweight += dlogits.T @ hidden[rows]
        ctx.save_for_backward(dhidden, dweight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        # `grad` holds 1 / number of tokens: rounded to bf16 it would scale every gradient below the head.
        scaled = (None if x is None else (at_least_fp32(x) * grad).to(x.dtype) for x in (dhidden, dweight))
        return *scaled, None, None, None


def _gradient_of_logits(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """softmax(logits) - onehot(target), 0 for ignored tokens; overwrites its input."""
    valid = (targets != IGNORED_TARGET)[:, None]
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(1, targets.clamp(min=0)[:, None], torch.full_like(valid, -1, dtype=gradient.dtype))
    return gradient.mul_(valid)
