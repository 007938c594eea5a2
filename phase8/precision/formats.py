"""The number formats of the matrix products of linear layers.

A format computes three products; tensor_parallel/products.py determines when they run and which tokens travel between ranks. A new format is a
file in this folder with a class like `OperandDtype`, and a line in `policy.py`.

Shapes: N tokens, D width of the input, F width of the output. x [N, D], weight [F, D], y = x W^T [N, F].
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.kernels.fp32_product import fp32_product, takes_products


class NumberFormat(Protocol):
    """The products of a linear layer; x, weight, grad and the results have the dtype of the residual stream.

    The result is written to `out` if it is given, else to new memory. `plus` is added to the result before it is rounded; it may be the
    same tensor as `out`.
    """

    name: str
    """By which operators, whose arguments are tensors and plain values, find the format."""

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Computes x W^T [N, F] with its gradients, on a rank that has all of both; x may be [..., D]. Without a better way: `linear_by_products`."""

    def output(self, x: Tensor, weight: Tensor, *, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
        """Computes x W^T [N, F]."""

    def input_gradient(self, grad: Tensor, weight: Tensor, *, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
        """Computes grad W [N, D] from the gradient of the output [N, F]."""

    def weight_gradient(self, grad: Tensor, x: Tensor, *, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
        """Computes grad^T x [F, D] from the gradient of the output [N, F]."""

    def sends_numbers(self, x: Tensor, weight: Tensor, num_ranks: int) -> bool:
        """Whether ranks round their own tokens x [n, D] before they gather them (tensor_parallel/gathered_numbers.py), or send them as they are."""


class OperandDtype:
    """Products in the dtype of their operands: fp32 (or tf32) and bf16."""

    name = "operand-dtype"

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Computes x W^T by `F.linear`, which autograd and torch.compile know, or on a CPU by the three products below where these are faster."""
        return linear_by_products(x, weight, self) if takes_products(x) else F.linear(x, weight)

    def output(self, x: Tensor, weight: Tensor, *, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
        """Computes x W^T."""
        return _product(x, weight.T, out, plus)

    def input_gradient(self, grad: Tensor, weight: Tensor, *, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
        """Computes grad W."""
        return _product(grad, weight, out, plus)

    def weight_gradient(self, grad: Tensor, x: Tensor, *, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
        """Computes grad^T x."""
        return _product(grad.T, x, out, plus)

    def sends_numbers(self, x: Tensor, weight: Tensor, num_ranks: int) -> bool:
        """No: the operands are what is multiplied."""
        return False


def linear_by_products(x: Tensor, weight: Tensor, number_format: NumberFormat) -> Tensor:
    """Computes x W^T [..., F] of x [..., D] and its gradients by the three products of a format."""
    return _LinearByProducts.apply(x.flatten(0, -2), weight, number_format).unflatten(0, x.shape[:-1])


class _LinearByProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, number_format: NumberFormat) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.number_format = number_format
        return number_format.output(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return ctx.number_format.input_gradient(grad, weight), ctx.number_format.weight_gradient(grad, x), None


def _product(left: Tensor, right: Tensor, out: Tensor | None, plus: Tensor | None) -> Tensor:
    if out is None:
        return fp32_product(left, right) if plus is None else torch.addmm(plus, left, right)
    return torch.mm(left, right, out=out) if plus is None else torch.addmm(plus, left, right, out=out)


OPERAND_DTYPE = OperandDtype()
