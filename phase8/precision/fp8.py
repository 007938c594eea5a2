"""A stub of fp8 products: operands are rounded to fp8 with one scale each, and multiplied in the dtype they had."""

from __future__ import annotations

import torch
from torch import Tensor

from phase8.precision.formats import OPERAND_DTYPE


class RoundedToFp8:
    """Values and weights have four bits of exponent, gradients five."""

    name = "fp8"
    is_differentiable = False

    def output(self, x: Tensor, weight: Tensor, *, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
        """As of `NumberFormat`."""
        return OPERAND_DTYPE.output(_rounded(x, torch.float8_e4m3fn), _rounded(weight, torch.float8_e4m3fn), out=out, plus=plus)

    def input_gradient(self, grad: Tensor, weight: Tensor, *, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
        """As of `NumberFormat`."""
        return OPERAND_DTYPE.input_gradient(_rounded(grad, torch.float8_e5m2), _rounded(weight, torch.float8_e4m3fn), out=out, plus=plus)

    def weight_gradient(self, grad: Tensor, x: Tensor, *, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
        """As of `NumberFormat`."""
        return OPERAND_DTYPE.weight_gradient(_rounded(grad, torch.float8_e5m2), _rounded(x, torch.float8_e4m3fn), out=out, plus=plus)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    scale = x.abs().amax().clamp(min=1e-12) / torch.finfo(dtype).max
    return ((x / scale).to(dtype).to(x.dtype)) * scale
