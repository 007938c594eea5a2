"""The gated feed-forward between the bottlenecks of low-rank linears as one operator; no tensor of the feed-forward's width is in memory.

Shapes: N tokens, R rank, F feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phase8.kernels.backends import keeps_for_backward, uses_triton
from phase8.kernels.limits import MAX_RANK
from phase8.kernels.reference import low_rank_swiglu as reference


def low_rank_swiglu(bottlenecks: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x')); arguments and result as in the reference of the same name."""
    rank = gate.shape[1]
    if keeps_for_backward(bottlenecks) or rank > MAX_RANK:
        return reference.low_rank_swiglu(bottlenecks, gate, up, down)
    return _forward(bottlenecks.reshape(-1, 2 * rank), gate, up, down).unflatten(0, bottlenecks.shape[:-1])


@torch.library.custom_op("phase8::low_rank_swiglu", mutates_args=())
def _forward(bottlenecks: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    if uses_triton(bottlenecks) and bottlenecks.dtype != torch.float64:
        from phase8.kernels.gpu.low_rank_swiglu import feed_forward

        return feed_forward(bottlenecks, gate, up, down)
    return reference.low_rank_swiglu(bottlenecks, gate, up, down)


@torch.library.custom_op("phase8::low_rank_swiglu_backward", mutates_args=())
def _backward(dy: Tensor, bottlenecks: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the bottlenecks [N, 2 R] and of the three weights, each flat [3, F R], since an operator may not return views of one tensor."""
    if uses_triton(bottlenecks) and bottlenecks.dtype != torch.float64:
        from phase8.kernels.gpu.low_rank_swiglu_backward import feed_forward_backward

        return feed_forward_backward(dy, bottlenecks, gate, up, down)
    dbottlenecks, *dweights = reference.low_rank_swiglu_backward(dy, bottlenecks, gate, up, down)
    return dbottlenecks, torch.stack([each.flatten() for each in dweights])


@_forward.register_fake
def _(bottlenecks: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return bottlenecks.new_empty(bottlenecks.shape[0], gate.shape[1])


@_backward.register_fake
def _(dy: Tensor, bottlenecks: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    return bottlenecks.new_empty(bottlenecks.shape), gate.new_empty(3, gate.numel())


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    bottlenecks, *weights = ctx.saved_tensors
    dbottlenecks, dweights = _backward(dy, bottlenecks, *weights)
    return dbottlenecks, *(gradient.view(weight.shape) for gradient, weight in zip(dweights.unbind(), weights, strict=True))


_forward.register_autograd(_autograd, setup_context=_setup_context)
