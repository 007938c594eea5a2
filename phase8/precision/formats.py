"""The number formats of the matrix products of linear layers.

A format computes three products; tensor_parallel/products.py determines when they run and which tokens travel between ranks. A new format is a
file in this folder with a class like `OperandDtype`, and a line in `policy.py`.

Shapes: N tokens, D width of the input, F width of the output. x [N, D], weight [F, D], y = x W^T [N, F].
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class NumberFormat(Protocol):
    """The products of a linear layer; x, weight, grad and the results have the dtype of the residual stream.

    The result is written to `out` if it is given, else to new memory. `plus` is added to the result before it is rounded; it may be the
    same tensor as `out`.
    """

    name: str
    """By which operators, whose arguments are tensors and plain values, find the format."""
    is_differentiable: bool
    """`F.linear` computes in this format, so that autograd and torch.compile know the product and its gradients themselves."""

    def output(self, x: Tensor, weight: Tensor, *, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
        """Computes x W^T [N, F]."""

    def input_gradient(self, grad: Tensor, weight: Tensor, *, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
        """Computes grad W [N, D] from the gradient of the output [N, F]."""

    def weight_gradient(self, grad: Tensor, x: Tensor, *, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
        """Computes grad^T x [F, D] from the gradient of the output [N, F]."""


class OperandDtype:
    """Products in the dtype of their operands: fp32 (or tf32) and bf16."""

    name = "operand-dtype"
    is_differentiable = True

    def output(self, x: Tensor, weight: Tensor, *, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
        """Computes x W^T by `torch.mm`."""
        return _product(x, weight.T, out, plus)

    def input_gradient(self, grad: Tensor, weight: Tensor, *, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
        """Computes grad W by `torch.mm`."""
        return _product(grad, weight, out, plus)

    def weight_gradient(self, grad: Tensor, x: Tensor, *, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
        """Computes grad^T x by `torch.mm`."""
        return _product(grad.T, x, out, plus)


def _product(left: Tensor, right: Tensor, out: Tensor | None, plus: Tensor | None) -> Tensor:
    if out is None:
        return torch.mm(left, right) if plus is None else torch.addmm(plus, left, right)
    return torch.mm(left, right, out=out) if plus is None else torch.addmm(plus, left, right, out=out)


OPERAND_DTYPE = OperandDtype()
