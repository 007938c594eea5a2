"""Output head and cross-entropy together, in chunks of rows: the logits of a microbatch never exist whole.

Shapes: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.kernels.dtypes import at_least_fp32
from phase8.kernels.fp32_product import fp32_product

IGNORED_TARGET = -100
CHUNK_TOKENS = 1024


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight^T)[target], in nats.

    Args:
        hidden: Final hidden states [N, D].
        weight: Output head [V, D]; cast to the dtype of `hidden` for the matmuls, its gradient accumulates in its own dtype.
        targets: Token ids below V, IGNORED_TARGET where nothing is predicted [N].
        chunk_tokens: Tokens whose logits exist at the same time; None: the implementation chooses.

    Returns:
        Scalar, fp32 or wider.
    """
    loss = at_least_fp32(hidden.new_zeros(()))
    head = weight.to(hidden.dtype)
    for rows in _chunks(hidden.shape[0], chunk_tokens):
        logits = at_least_fp32(hidden[rows] @ head.T)
        loss = loss + F.cross_entropy(logits, targets[rows], ignore_index=IGNORED_TARGET, reduction="sum")
    return loss


def linear_cross_entropy_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_tokens: int | None = None,
    *,
    needs_dhidden: bool = True,
    needs_dweight: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss with its gradients, computed while the logits of a chunk exist, so that backward recomputes nothing.

    Args:
        hidden: As above.
        weight: As above.
        targets: As above.
        chunk_tokens: As above.
        needs_dhidden: Form the gradient of `hidden`.
        needs_dweight: Form the gradient of `weight`.

    Returns:
        The loss, its gradients of `hidden` [N, D] and `weight` [V, D] (None where not needed).
    """
    head = weight.to(hidden.dtype)
    dhidden = hidden.new_empty(hidden.shape) if needs_dhidden else None
    dweight = weight.new_zeros(weight.shape) if needs_dweight else None
    loss = at_least_fp32(hidden.new_zeros(()))
    for rows in _chunks(hidden.shape[0], chunk_tokens):
        logits = at_least_fp32(fp32_product(hidden[rows], head.T))
        log_probabilities = F.log_softmax(logits, dim=-1)
        loss += F.nll_loss(log_probabilities, targets[rows], ignore_index=IGNORED_TARGET, reduction="sum")
        dlogits = _gradient_of_logits(log_probabilities, targets[rows]).to(hidden.dtype)
        if dhidden is not None:
            dhidden[rows] = fp32_product(dlogits, head)
        if dweight is not None:
            dweight += fp32_product(dlogits.T, hidden[rows])
    return loss, dhidden, dweight


def _chunks(num_tokens: int, chunk_tokens: int | None) -> list[slice]:
    step = CHUNK_TOKENS if chunk_tokens is None else chunk_tokens
    return [slice(begin, begin + step) for begin in range(0, num_tokens, step)]


def _gradient_of_logits(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """softmax(logits) - onehot(target), 0 for ignored tokens; overwrites its input."""
    valid = (targets != IGNORED_TARGET)[:, None]
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(1, targets.clamp(min=0)[:, None], torch.full_like(valid, -1, dtype=gradient.dtype))
    return gradient.mul_(valid)
