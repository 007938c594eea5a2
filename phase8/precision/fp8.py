"""Products of linear layers in fp8: both factors are rounded to eight bits with scales taken from their largest numbers, forward and backward.

| `precision.fp8_scaling` | numbers share a scale | numbers | numbers of gradients |
|---|---|---|---|
| `row` | in a row of the left factor, in a column of the right one | e4m3 | e4m3 |
| `tensor` | in a matrix | e4m3 | e5m2, whose range is wider |

The matrix units want the dim that is summed over to be contiguous in both factors. Each matrix of a layer is summed over both of its dims, so its
numbers are needed as it lies and transposed (kernels/fp8_numbers.py). Where one rank has all factors, backward keeps the transposed numbers of the
input, a byte each. Sums are in fp32. A product that is too thin to gain (a bottleneck, a gate's rank), or whose dims the matrix units do not divide,
is computed in the dtype of its operands.

Source: P. Micikevicius et al., "FP8 formats for deep learning" (2022); the scaling by rows is that of torchao's `rowwise` recipe.

Shapes: N tokens, D width of the input, F width of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.accelerator import multiplies_fp8
from phase8.config.precision import DIVISOR, LEAST_WIDTH
from phase8.kernels.fp8_numbers import fp8_numbers
from phase8.precision.formats import OPERAND_DTYPE

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Factor(NamedTuple):
    """A factor of a product that is summed over its last dim.

    Args:
        numbers: fp8 [M, K], contiguous.
        scale: Scales of the rows, fp32 [M, 1] or [1, 1].
    """

    numbers: Tensor
    scale: Tensor


class Fp8:
    """Products in fp8.

    Args:
        scaling: What shares a scale: `row` or `tensor`.
    """

    def __init__(self, scaling: str):
        self.name = f"fp8-{scaling}"
        self.by_row = scaling == "row"
        self._of_gradients = E4M3 if self.by_row else E5M2

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Computes x W^T [..., F] with its gradients."""
        rows = x.flatten(0, -2)
        return _Linear.apply(rows, weight, self).unflatten(0, x.shape[:-1]) if _gains(rows, weight) else F.linear(x, weight)

    def output(self, x: Tensor, weight: Tensor, *, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
        """Computes x W^T in fp8."""
        if not _gains(x, weight):
            return OPERAND_DTYPE.output(x, weight, out=out, plus=plus)
        return _placed(product(self.lying(x), self.lying(weight), x.dtype), out, plus)

    def input_gradient(self, grad: Tensor, weight: Tensor, *, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
        """Computes grad W in fp8."""
        if not _gains(grad, weight):
            return OPERAND_DTYPE.input_gradient(grad, weight, out=out, plus=plus)
        return _placed(product(self.lying(grad, self._of_gradients), self.transposed(weight), grad.dtype), out, plus)

    def weight_gradient(self, grad: Tensor, x: Tensor, *, out: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
        """Computes grad^T x in fp8."""
        if not _gains(grad, x):
            return OPERAND_DTYPE.weight_gradient(grad, x, out=out, plus=plus)
        return _placed(product(self.transposed(grad, self._of_gradients), self.transposed(x), grad.dtype), out, plus)

    def sends_numbers(self, x: Tensor, weight: Tensor, num_ranks: int) -> bool:
        """Whether the matrix units multiply the tokens of all ranks in fp8."""
        return _gains_shape((num_ranks * x.shape[0], *x.shape[1:])) and _gains(weight)

    def lying(self, x: Tensor, dtype: torch.dtype = E4M3, *, shared: Callable[[Tensor], Tensor] | None = None) -> Factor:
        """The factor of a product that is summed over the columns of x [M, K].

        Args:
            x: Matrix, or some rows of one.
            dtype: Dtype of the numbers.
            shared: Maps the scale of these rows to that of all of them; None: these are all. The scales of rows do not depend on other rows.
        """
        scale = scale_of(x, dtype, dim=-1 if self.by_row else None)
        return _numbers(x, scale if shared is None or self.by_row else shared(scale), dtype)

    def by_columns(self, x: Tensor, *, shared: Callable[[Tensor], Tensor]) -> Factor:
        """Rows of what `transposed` makes of a matrix, before it is transposed, with scales [1, K] or [1, 1]; arguments as of `lying`."""
        return _numbers(x, shared(scale_of(x, E4M3, dim=0 if self.by_row else None)), E4M3)

    def transposed(self, x: Tensor, dtype: torch.dtype = E4M3) -> Factor:
        """The factor [K, M] of a product that is summed over the rows of x [M, K]."""
        scale = scale_of(x, dtype, dim=0 if self.by_row else None)
        return Factor(fp8_numbers(x, None, scale.reciprocal(), dtype)[1], scale.T)

    def both(self, x: Tensor, dtype: torch.dtype) -> tuple[Factor, Factor]:
        """Both factors, from one reading of x [M, K]."""
        of_row = scale_of(x, dtype, dim=-1 if self.by_row else None)
        of_column = scale_of(x, dtype, dim=0) if self.by_row else of_row
        numbers, transposed = fp8_numbers(x, of_row.reciprocal(), of_column.reciprocal(), dtype)
        assert numbers is not None  # since there are factors of rows
        return Factor(numbers, of_row), Factor(transposed, of_column.T)

    def both_of_gradient(self, grad: Tensor) -> tuple[Factor, Factor]:
        """Both factors of a gradient [N, F]."""
        return self.both(grad, self._of_gradients)


class _Linear(torch.autograd.Function):
    """The product on one rank, where each matrix is read once for both of the products that it is a factor of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, number_format: Fp8) -> Tensor:
        lying, transposed = number_format.both(x, E4M3)
        ctx.save_for_backward(transposed.numbers, transposed.scale, weight)
        ctx.number_format = number_format
        return product(lying, number_format.lying(weight), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        numbers, scale, weight = ctx.saved_tensors
        lying, transposed = ctx.number_format.both_of_gradient(grad)
        dx = product(lying, ctx.number_format.transposed(weight), grad.dtype)
        return dx, product(transposed, Factor(numbers, scale), weight.dtype), None


def product(left: Factor, right: Factor, dtype: torch.dtype) -> Tensor:
    """Computes left right^T [M, N] in a dtype from factors [M, K] and [N, K]; sums of e4m3 are kept in the matrix units, which is faster."""
    if not multiplies_fp8(left.numbers.device.type):  # torch 2.11 knows no scales of rows on a CPU
        return (left.numbers.float() @ right.numbers.float().T * left.scale * right.scale.T).to(dtype)
    is_fast = left.numbers.dtype == E4M3
    scales = {"scale_a": left.scale.flatten().unsqueeze(1), "scale_b": right.scale.flatten().unsqueeze(0)}  # with the strides that torch asks for
    return torch._scaled_mm(left.numbers, right.numbers.T, **scales, out_dtype=dtype, use_fast_accum=is_fast)


def scale_of(x: Tensor, dtype: torch.dtype, *, dim: int | None) -> Tensor:
    """What the largest number of fp8 stands for, fp32, so that the largest of x [M, K] along a dim, or of all (None), becomes it.

    A number that is not finite makes the scale, and so the product, not finite; zeros have the least scale that is normal.
    """
    magnitude = x.abs().amax().reshape(1, 1) if dim is None else x.abs().amax(dim=dim, keepdim=True)
    return (magnitude.float() / torch.finfo(dtype).max).clamp(min=torch.finfo(torch.float32).tiny)


def _numbers(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Factor:
    largest = torch.finfo(dtype).max
    return Factor((x.float() * scale.reciprocal()).clamp(-largest, largest).to(dtype).contiguous(), scale)


def _gains(*operands: Tensor) -> bool:
    return all(_gains_shape(operand.shape) for operand in operands)


def _gains_shape(shape: Sequence[int]) -> bool:
    return all(dim >= LEAST_WIDTH and dim % DIVISOR == 0 for dim in shape)


def _placed(result: Tensor, out: Tensor | None, plus: Tensor | None) -> Tensor:
    if plus is not None:
        result = result + plus
    return result if out is None else out.copy_(result)
