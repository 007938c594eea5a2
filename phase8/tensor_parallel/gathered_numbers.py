"""The gathered product in fp8: ranks round their own tokens and gather the numbers, half of the bytes of bf16, with the bits of rounding after it.

| `precision.fp8_scaling` | gathered in forward | gathered in backward, for the gradient of the weight |
|---|---|---|
| `tensor` | numbers, whose scale is the largest of the ranks' | the same numbers |
| `row` | numbers, and the scale of each token | numbers by columns, of which each has the largest scale of the ranks' |

A number depends on its own value and its scale alone, and the largest of the ranks' scales is that of all tokens. The gradient of the input is that
of products.py: it is summed over the ranks, so it travels in the dtype of the residual stream.

    n  own tokens        D  width outside the layers
    N  n * ranks tokens  F  this rank's features inside them
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from phase8.distributed.collectives import Axis, maximum_over, start_gather, start_scatter
from phase8.precision.fp8 import Factor, Fp8, product


def gathered_product(x: Tensor, weight: Tensor, axis: Axis, number_format: Fp8) -> Tensor:
    """Product gather(x) W^T [N, F] of own tokens [n, D] and a weight [F, D] that the matrix units multiply in fp8."""
    return _GatheredNumbers.apply(x, weight, axis, number_format)


class _GatheredNumbers(torch.autograd.Function):
    """The product and its gradients; as in products.py, tokens travel again in backward, beside the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, axis: Axis, number_format: Fp8) -> Tensor:
        own = number_format.lying(x, shared=partial(_largest, axis=axis))
        ctx.save_for_backward(x, weight)
        ctx.axis, ctx.number_format = axis, number_format
        scales = start_gather(own.scale, axis) if number_format.by_row else lambda: own.scale
        numbers = _gather(own, axis)()
        return product(Factor(numbers, scales()), number_format.lying(weight), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        axis, number_format = ctx.axis, ctx.number_format
        own = number_format.by_columns(x, shared=partial(_largest, axis=axis))
        numbers = _gather(own, axis)
        of_rows, of_columns = number_format.both_of_gradient(grad)
        scattered = start_scatter(product(of_rows, number_format.transposed(weight), grad.dtype), axis)
        dweight = product(of_columns, Factor(numbers().T.contiguous(), own.scale.T), weight.dtype)
        return scattered(), dweight, None, None


def _largest(scale: Tensor, axis: Axis) -> Tensor:
    """The largest scale of the ranks'; a maximum may pass over what is no number, but not over infinity, which makes the product no number either."""
    return maximum_over(scale.nan_to_num(nan=math.inf, posinf=math.inf), axis)


def _gather(own: Factor, axis: Axis) -> Callable[[], Tensor]:
    """Begins to gather the numbers of all tokens, as bytes, which every backend of collectives knows; returns a function that waits for them."""
    gathered = start_gather(own.numbers.view(torch.uint8), axis)
    return lambda: gathered().view(own.numbers.dtype)
