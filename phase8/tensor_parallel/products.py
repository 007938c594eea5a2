"""The matrix products of linear layers: plain, with a gather of tokens before, or with a scatter of tokens after.

| product | x | weight | result | gradient of x | gradient of the weight |
|---|---|---|---|---|---|
| plain | [N, D] | [F, D] | x W^T [N, F] | dy W | dy^T x |
| gathered | own tokens [n, D] | [F, D] | gather(x) W^T [N, F] | scatter(dy W) | dy^T gather(x) |
| scattered | all tokens [N, F] | [D, F] | scatter(x W^T) [n, D] | gather(dy) W | gather(dy)^T x |

The two gradients are two calls, so that the second may come later than the first; where autograd wants both at once, products hide the exchange.
Two things are passed in: the number format, which computes (precision/formats.py), and the axis, which says how tokens travel: by collectives, in
this module, or through memory of the other ranks (overlapped.py). By collectives, a format may send numbers in the place of tokens
(gathered_numbers.py). On an axis of one rank all three are the plain product.

    n  own tokens        D  width outside the layers
    N  n * ranks tokens  F  this rank's features inside them
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.distributed.collectives import Axis, gather_tokens, scatter_tokens, start_gather, start_scatter
from phase8.kernels.dtypes import at_least_fp32
from phase8.precision.formats import NumberFormat
from phase8.tensor_parallel import gathered_numbers, overlapped


def plain_product(x: Tensor, weight: Tensor, number_format: NumberFormat) -> Tensor:
    """Product x W^T [..., F] of x [..., D] and a weight [F, D]; the number format computes its gradients too."""
    return number_format.linear(x, weight)


def gathered_product(x: Tensor, weight: Tensor, axis: Axis, number_format: NumberFormat) -> Tensor:
    """Product gather(x) W^T [N, F] of own tokens [n, D]; on an axis of one rank x may be [..., D]."""
    if axis.size == 1:
        return plain_product(x, weight, number_format)
    if axis.has_peer_memory:
        return overlapped.gathered_product(x, weight, axis, number_format)
    if number_format.sends_numbers(x, weight, axis.size):
        return gathered_numbers.gathered_product(x, weight, axis, number_format)
    return _GatheredProduct.apply(x, weight, axis, number_format)


def gathered_input_gradient(grad: Tensor, weight: Tensor, axis: Axis, number_format: NumberFormat) -> Tensor:
    """The gradient of the own tokens [n, D], from that of the product [N, F]."""
    if axis.size == 1:
        return number_format.input_gradient(grad, weight)
    if axis.has_peer_memory:
        return overlapped.gathered_input_gradient(grad, weight, axis, number_format)
    return _start_input_gradient(grad, weight, axis, number_format)()


def gathered_weight_gradient(grad: Tensor, x: Tensor, axis: Axis, number_format: NumberFormat) -> Tensor:
    """The gradient of the weight [F, D], from that of the product [N, F] and the own tokens [n, D]."""
    if axis.size > 1 and axis.has_peer_memory:
        return overlapped.gathered_weight_gradient(grad, x, axis, number_format)
    return number_format.weight_gradient(grad, gather_tokens(x, axis))


def scattered_product(x: Tensor, weight: Tensor, axis: Axis, number_format: NumberFormat) -> Tensor:
    """Product scatter(x W^T) [n, D] of all N tokens [..., F]; on an axis of one rank the result is [..., D].

    With collectives it is a plain product and a scatter, two nodes of the graph, so a recomputation can stop before the scatter.
    """
    if axis.size > 1 and axis.has_peer_memory:
        return overlapped.scattered_product(x.flatten(0, -2), weight, axis, number_format)
    return scatter_tokens(plain_product(x, weight, number_format), axis)


def scattered_input_gradient(grad: Tensor, weight: Tensor, axis: Axis, number_format: NumberFormat) -> Tensor:
    """The gradient of all tokens [N, F], from that of the product [n, D]."""
    if axis.size > 1 and axis.has_peer_memory:
        return overlapped.scattered_input_gradient(grad, weight, axis, number_format)
    return number_format.input_gradient(gather_tokens(grad, axis), weight)


def scattered_weight_gradient(grad: Tensor, x: Tensor, axis: Axis, number_format: NumberFormat) -> Tensor:
    """The gradient of the weight [D, F], from that of the product [n, D] and all tokens [N, F]."""
    if axis.size > 1 and axis.has_peer_memory:
        return overlapped.scattered_weight_gradient(grad, x, axis, number_format)
    return number_format.weight_gradient(gather_tokens(grad, axis), x)


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """Product x W^T in fp32 or wider for x [..., D] and a weight [F, D] of any dtype and any number format."""
    if x.device.type == "cpu" or x.element_size() > 2:
        return F.linear(at_least_fp32(x), at_least_fp32(weight))
    return _WideProduct.apply(x.flatten(0, -2), weight.to(x.dtype)).unflatten(0, x.shape[:-1])


def _start_input_gradient(grad: Tensor, weight: Tensor, axis: Axis, number_format: NumberFormat) -> Callable[[], Tensor]:
    return start_scatter(number_format.input_gradient(grad, weight), axis)


class _GatheredProduct(torch.autograd.Function):
    """The gathered product by collectives. It keeps only the own tokens for backward, and gathers again while it computes the gradient of x.

    The gradient of x is then summed and scattered while the gradient of W is computed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, axis: Axis, number_format: NumberFormat) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.axis, ctx.number_format = axis, number_format
        return plain_product(start_gather(x, axis)(), weight, number_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        gathered = start_gather(x, ctx.axis)
        scattered = _start_input_gradient(grad, weight, ctx.axis, ctx.number_format)
        dweight = ctx.number_format.weight_gradient(grad, gathered())
        return scattered(), dweight, None, None


class _WideProduct(torch.autograd.Function):
    """Product x W^T of half-precision matrices with a result in fp32: matrix units accumulate in fp32, so x need not be widened in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)
        return grad @ weight, grad.T @ x
