"""The products of tensor-parallel layers, overlapped with the exchange of tokens through memory of the peers.

    n  own tokens        D  width outside the layers
    N  n * ranks tokens  F  this rank's features inside them

A rank multiplies its own tokens first or last, so that the products hide the exchange:

| product | order |
|---|---|
| gathered, [n, D] -> [N, F] | send the own tokens; multiply them, then each other rank's tokens as they arrive |
| scattered, [N, F] -> [n, D] | multiply each other rank's tokens and write the product to that rank; multiply the own ones, add what peers wrote |
| gradient of the weight | sum over the ranks' tokens in the order in which they arrive |

The backward of a gathered product contains a scattered one, and the reverse. The reference is products.py, where collectives and products run
one after the other. Summands of the ranks have the dtype of x, and so has the gradient of the weight while it is accumulated over the ranks' tokens,
as it is over microbatches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from phase8.distributed.collectives import Axis
from phase8.distributed.peer_memory import Exchange, PeerMemory, peer_memory
from phase8.precision.formats import NumberFormat
from phase8.precision.policy import format_named

# Multiplies rows of a matrix; `out` and `plus` are those of `NumberFormat`.
_Product = Callable[..., Tensor]


def gathered_product(x: Tensor, weight: Tensor, axis: Axis, number_format: NumberFormat) -> Tensor:
    """Computes gather_tokens(x) W^T.

    Args:
        x: Own tokens [n, D].
        weight: Weight [F, D].
        axis: Axis of tensor parallelism, whose ranks reach each other's memory.
        number_format: Format that computes the products.

    Returns:
        Product of all tokens [N, F].
    """
    return _gathered_product(x, weight, axis.group.group_name, axis.size, number_format.name)


def gathered_input_gradient(grad: Tensor, weight: Tensor, axis: Axis, number_format: NumberFormat) -> Tensor:
    """Only the gradient of the own tokens [n, D], from that of the product [N, F]."""
    return _sum_of_products(grad, partial(_input_gradient, number_format, weight), weight.shape[1], peer_memory(axis.group.group_name))


def gathered_weight_gradient(grad: Tensor, x: Tensor, axis: Axis, number_format: NumberFormat) -> Tensor:
    """Only the gradient of the weight [F, D], from that of the product [N, F] and the own tokens [n, D]."""
    memory = peer_memory(axis.group.group_name)
    with memory.gathering(x.contiguous()) as tokens:
        return _gathered_weight_gradient(grad, x, tokens, memory, number_format)


def scattered_product(x: Tensor, weight: Tensor, axis: Axis, number_format: NumberFormat) -> Tensor:
    """Computes scatter_tokens(x W^T).

    Args:
        x: All tokens [N, F].
        weight: Weight [D, F].
        axis: Axis of tensor parallelism, whose ranks reach each other's memory.
        number_format: Format that computes the products.

    Returns:
        Sum over the ranks for the own tokens [n, D].
    """
    return _scattered_product(x, weight, axis.group.group_name, axis.size, number_format.name)


def scattered_input_gradient(grad: Tensor, weight: Tensor, axis: Axis, number_format: NumberFormat) -> Tensor:
    """Only the gradient of all tokens [N, F], from that of the product [n, D]."""
    return _products_of_gathered(grad, partial(_input_gradient, number_format, weight), weight.shape[1], peer_memory(axis.group.group_name))


def scattered_weight_gradient(grad: Tensor, x: Tensor, axis: Axis, number_format: NumberFormat) -> Tensor:
    """Only the gradient of the weight [D, F], from that of the product [n, D] and all tokens [N, F]."""
    memory = peer_memory(axis.group.group_name)
    by_rank = x.chunk(memory.size)
    with memory.gathering(grad.contiguous()) as tokens:
        dweight = number_format.weight_gradient(grad, by_rank[memory.rank])
        for rank in memory.others:
            number_format.weight_gradient(tokens.of(rank), by_rank[rank], out=dweight, plus=dweight)
    return dweight


@torch.library.custom_op("phase8::gathered_product", mutates_args=())
def _gathered_product(x: Tensor, weight: Tensor, group: str, size: int, number_format: str) -> Tensor:
    return _products_of_gathered(x, partial(_output, format_named(number_format), weight), len(weight), peer_memory(group))


@torch.library.custom_op("phase8::gathered_product_backward", mutates_args=())
def _gathered_product_backward(grad: Tensor, x: Tensor, weight: Tensor, group: str, number_format: str) -> tuple[Tensor, Tensor]:
    """Gradients of x [n, D] and of the weight [F, D]; the tokens for the second travel while the first is computed."""
    memory, chosen = peer_memory(group), format_named(number_format)
    with memory.gathering(x.contiguous()) as tokens:
        dx = _sum_of_products(grad, partial(_input_gradient, chosen, weight), weight.shape[1], memory)
        dweight = _gathered_weight_gradient(grad, x, tokens, memory, chosen)
    return dx, dweight


@torch.library.custom_op("phase8::scattered_product", mutates_args=())
def _scattered_product(x: Tensor, weight: Tensor, group: str, size: int, number_format: str) -> Tensor:
    return _sum_of_products(x, partial(_output, format_named(number_format), weight), len(weight), peer_memory(group))


@torch.library.custom_op("phase8::scattered_product_backward", mutates_args=())
def _scattered_product_backward(grad: Tensor, x: Tensor, weight: Tensor, group: str, number_format: str) -> tuple[Tensor, Tensor]:
    """Gradients of x [N, F] and of the weight [D, F]; both need the gradients of the other ranks' tokens, which travel once."""
    memory, chosen = peer_memory(group), format_named(number_format)
    dx = x.new_empty(x.shape)
    x_by_rank, dx_by_rank = x.chunk(memory.size), dx.chunk(memory.size)
    with memory.gathering(grad.contiguous()) as tokens:
        chosen.input_gradient(grad, weight, out=dx_by_rank[memory.rank])
        dweight = chosen.weight_gradient(grad, x_by_rank[memory.rank])
        for rank in memory.others:
            gradient = tokens.of(rank)
            chosen.input_gradient(gradient, weight, out=dx_by_rank[rank])
            chosen.weight_gradient(gradient, x_by_rank[rank], out=dweight, plus=dweight)
    return dx, dweight


def _output(number_format: NumberFormat, weight: Tensor, x: Tensor, **where: Tensor) -> Tensor:
    return number_format.output(x, weight, **where)


def _input_gradient(number_format: NumberFormat, weight: Tensor, grad: Tensor, **where: Tensor) -> Tensor:
    return number_format.input_gradient(grad, weight, **where)


def _products_of_gathered(own: Tensor, product: _Product, width: int, memory: PeerMemory) -> Tensor:
    """The products of the tokens of all ranks [N, width]; each rank brings its own tokens."""
    products = own.new_empty((memory.size * len(own), width))
    by_rank = products.chunk(memory.size)
    with memory.gathering(own.contiguous()) as tokens:
        product(own, out=by_rank[memory.rank])
        for rank in memory.others:
            product(tokens.of(rank), out=by_rank[rank])
    return products


def _sum_of_products(x: Tensor, product: _Product, width: int, memory: PeerMemory) -> Tensor:
    """The sum over the ranks of their products of x [N, ...], for the own tokens [n, width]."""
    by_rank = x.chunk(memory.size)
    own = by_rank[memory.rank]
    summands = memory.adding((len(own), width), x.dtype)
    for rank in memory.others:
        product(by_rank[rank], out=summands.place_on(rank))
        summands.filled(rank)
    first, *rest = memory.others
    total = product(own, plus=summands.of(first))
    for rank in rest:
        total += summands.of(rank)
    return total


def _gathered_weight_gradient(grad: Tensor, x: Tensor, tokens: Exchange, memory: PeerMemory, number_format: NumberFormat) -> Tensor:
    """Sums the gradient of the weight while the tokens of the other ranks arrive."""
    by_rank = grad.chunk(memory.size)
    dweight = number_format.weight_gradient(by_rank[memory.rank], x)
    for rank in memory.others:
        number_format.weight_gradient(by_rank[rank], tokens.of(rank), out=dweight, plus=dweight)
    return dweight


@_gathered_product.register_fake
def _(x: Tensor, weight: Tensor, group: str, size: int, number_format: str) -> Tensor:
    return x.new_empty((size * len(x), len(weight)))


@_scattered_product.register_fake
def _(x: Tensor, weight: Tensor, group: str, size: int, number_format: str) -> Tensor:
    return x.new_empty((len(x) // size, len(weight)))


@_gathered_product_backward.register_fake
@_scattered_product_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, group: str, number_format: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.group, _, ctx.number_format = inputs
    ctx.save_for_backward(x, weight)


def _gathered_product_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_gathered_product_backward(grad, *ctx.saved_tensors, ctx.group, ctx.number_format), None, None, None


def _scattered_product_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_scattered_product_backward(grad, *ctx.saved_tensors, ctx.group, ctx.number_format), None, None, None


_gathered_product.register_autograd(_gathered_product_autograd, setup_context=_setup_context)
_scattered_product.register_autograd(_scattered_product_autograd, setup_context=_setup_context)
