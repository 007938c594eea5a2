"""Output head and cross-entropy as one operator, which computes its gradients in the forward; backward only scales them.

Shapes: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phase8.kernels.backends import uses_triton
from phase8.kernels.reference import cross_entropy as reference


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """Sum of the cross-entropies of the valid targets, in nats; arguments as in the reference of the same name.

    Returns:
        Scalar, fp32 or wider.
    """
    # An operator below autograd cannot see which gradients are wanted, so it is told.
    needs_dhidden, needs_dweight = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    return _forward(hidden, weight, targets, chunk_tokens, needs_dhidden, needs_dweight)[0]


@torch.library.custom_op("phase8::linear_cross_entropy", mutates_args=())
def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None, needs_dhidden: bool, needs_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients of `hidden` [N, D] and `weight` [V, D]; empty where not needed."""
    if hidden.numel() and weight.dtype in (hidden.dtype, torch.float32) and hidden.dtype != torch.float64 and uses_triton(hidden):
        from phase8.kernels.gpu import cross_entropy as implementation
    else:
        implementation = reference
    loss, dhidden, dweight = implementation.linear_cross_entropy_gradients(
        hidden, weight, targets, chunk_tokens, needs_dhidden=needs_dhidden, needs_dweight=needs_dweight
    )
    return loss, hidden.new_empty(0) if dhidden is None else dhidden, weight.new_empty(0) if dweight is None else dweight


@_forward.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None, needs_dhidden: bool, needs_dweight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return loss, hidden.new_empty(hidden.shape if needs_dhidden else 0), weight.new_empty(weight.shape if needs_dweight else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, dhidden, dweight = output
    ctx.mark_non_differentiable(dhidden, dweight)
    ctx.set_materialize_grads(False)  # otherwise backward would get zeros of [N, D] and [V, D] for them
    ctx.save_for_backward(dhidden, dweight)


@once_differentiable
def _autograd(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needed = (grad is not None and needs_it for needs_it in ctx.needs_input_grad[:2])
    gradients = (_scaled(x, grad) if needs_it else None for x, needs_it in zip(ctx.saved_tensors, needed, strict=True))
    return *gradients, None, None, None, None


def _scaled(x: Tensor, grad: Tensor) -> Tensor:
    """`x * grad` for a scalar `grad` in one pass, with the product in fp32.

    It is not in place: a kept graph would be scaled twice, and a traced one may not overwrite an output of its forward. The copy can reuse the
    memory of a chunk's logits and of the cast head, which are freed by then.
    """
    # `grad` holds 1 / number of tokens. A vector takes part in type promotion; a scalar would be rounded to bf16 first, and all
    # gradients below the head with it.
    return torch.mul(x, grad.reshape(1), out=torch.empty_like(x))


_forward.register_autograd(_autograd, setup_context=_setup_context)
