"""The products of tensor-parallel layers with the exchange of tokens beside them, through memory of the peers.

n own tokens, N = n * ranks tokens, D wide outside, F of this rank inside. What a rank has itself comes first or last, so that products hide
what travels:

| product | order |
|---|---|
| gathered, [n, D] -> [N, F] | own tokens go out; product of the own tokens, then of each other rank's when they have come |
| scattered, [N, F] -> [n, D] | product of each other rank's tokens, written to that rank; then of the own ones, added to what the others wrote |
| gradient of the weight | summed over the ranks' tokens in the order in which they come |

The backward of one contains the other. Collectives followed by products are the reference (phase8/tensor_parallel/linear.py). What ranks add up
has the dtype of x, and so has a gradient of the weight between two ranks' tokens, as between microbatches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phase8.distributed.collectives import Axis
from phase8.distributed.peer_memory import PeerMemory, peer_memory


def gathered_product(x: Tensor, weight: Tensor, axis: Axis) -> Tensor:
    """gather_tokens(x) W^T.

    Args:
        x: Own tokens [n, D].
        weight: [F, D].
        axis: Of tensor parallelism, whose ranks reach each other's memory.

    Returns:
        [N, F].
    """
    return _gathered_product(x, weight, axis.group.group_name, axis.size)


def scattered_product(x: Tensor, weight: Tensor, axis: Axis) -> Tensor:
    """scatter_tokens(x W^T).

    Args:
        x: All tokens [N, F].
        weight: [D, F].
        axis: Of tensor parallelism, whose ranks reach each other's memory.

    Returns:
        [n, D].
    """
    return _scattered_product(x, weight, axis.group.group_name, axis.size)


@torch.library.custom_op("phase8::gathered_product", mutates_args=())
def _gathered_product(x: Tensor, weight: Tensor, group: str, size: int) -> Tensor:
    memory = peer_memory(group)
    product = x.new_empty((size * len(x), len(weight)))
    by_rank = product.chunk(size)
    with memory.gathering(x.contiguous()) as tokens:
        torch.mm(x, weight.T, out=by_rank[memory.rank])
        for rank in memory.others:
            torch.mm(tokens.of(rank), weight.T, out=by_rank[rank])
    return product


@torch.library.custom_op("phase8::gathered_product_backward", mutates_args=())
def _gathered_product_backward(grad: Tensor, x: Tensor, weight: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Gradients of x [n, D] and of the weight [F, D]."""
    memory = peer_memory(group)
    by_rank = grad.chunk(memory.size)
    with memory.gathering(x.contiguous()) as tokens:
        dx = _sum_of_products(grad, weight, memory)
        dweight = by_rank[memory.rank].T @ x
        for rank in memory.others:
            dweight.addmm_(by_rank[rank].T, tokens.of(rank))
    return dx, dweight


@torch.library.custom_op("phase8::scattered_product", mutates_args=())
def _scattered_product(x: Tensor, weight: Tensor, group: str, size: int) -> Tensor:
    return _sum_of_products(x, weight.T, peer_memory(group))


@torch.library.custom_op("phase8::scattered_product_backward", mutates_args=())
def _scattered_product_backward(grad: Tensor, x: Tensor, weight: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Gradients of x [N, F] and of the weight [D, F]."""
    memory = peer_memory(group)
    dx = x.new_empty(x.shape)
    x_by_rank, dx_by_rank = x.chunk(memory.size), dx.chunk(memory.size)
    with memory.gathering(grad.contiguous()) as tokens:
        torch.mm(grad, weight, out=dx_by_rank[memory.rank])
        dweight = grad.T @ x_by_rank[memory.rank]
        for rank in memory.others:
            gradient = tokens.of(rank)
            torch.mm(gradient, weight, out=dx_by_rank[rank])
            dweight.addmm_(gradient.T, x_by_rank[rank])
    return dx, dweight


def _sum_of_products(x: Tensor, matrix: Tensor, memory: PeerMemory) -> Tensor:
    """The sum over the ranks of x [N, F] times a matrix [F, D], own tokens: [n, D]."""
    by_rank = x.chunk(memory.size)
    own = by_rank[memory.rank]
    summands = memory.adding((len(own), matrix.shape[1]), x.dtype)
    for rank in memory.others:
        torch.mm(by_rank[rank], matrix, out=summands.place_on(rank))
        summands.filled(rank)
    first, *rest = memory.others
    total = torch.addmm(summands.of(first), own, matrix)
    for rank in rest:
        total += summands.of(rank)
    return total


@_gathered_product.register_fake
def _(x: Tensor, weight: Tensor, group: str, size: int) -> Tensor:
    return x.new_empty((size * len(x), len(weight)))


@_scattered_product.register_fake
def _(x: Tensor, weight: Tensor, group: str, size: int) -> Tensor:
    return x.new_empty((len(x) // size, len(weight)))


@_gathered_product_backward.register_fake
@_scattered_product_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, group: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.group, _ = inputs
    ctx.save_for_backward(x, weight)


def _gathered_product_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_gathered_product_backward(grad, *ctx.saved_tensors, ctx.group), None, None


def _scattered_product_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_scattered_product_backward(grad, *ctx.saved_tensors, ctx.group), None, None


_gathered_product.register_autograd(_gathered_product_autograd, setup_context=_setup_context)
_scattered_product.register_autograd(_scattered_product_autograd, setup_context=_setup_context)
