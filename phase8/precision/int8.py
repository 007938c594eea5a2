"""Weights of eight bits with a scale for each output, for trained models: half the memory of bf16, a quarter of fp32.

| | activations | product |
|---|---|---|
| weight-only | as they are | in their dtype |
| dynamic | rounded to eight bits too, with a scale for each token | of whole numbers, exact in 32 bits |

Shapes: N tokens, D width of the input, F width of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.accelerator import has_kernels, is_accelerator
from phase8.precision.weight_format import WeightProduct

LARGEST = 127  # -128 has no counterpart
# torch's product of few tokens with packed weights reads each weight once; beyond, or with other widths, it is slow or crashes (torch 2.13).
_FEW_TOKENS = 8
_WIDTHS = 64
# torch's product of whole numbers on a GPU wants more than 16 rows, and widths that eight divides.
_LEAST_ROWS_ON_GPU, _WIDTHS_ON_GPU = 17, 8


@dataclass(frozen=True)
class Int8:
    """`weight` [..., F, D], int8, and `scale` [..., F], fp32.

    Args:
        is_dynamic: Whether activations are rounded to eight bits too.
    """

    is_dynamic: bool

    @property
    def bits(self) -> int:
        """Bits of a number."""
        return 8

    def tensors(self, shape: Sequence[int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of `weight` and `scale`."""
        return {"weight": (torch.int8, tuple(shape)), "scale": (torch.float32, tuple(shape[:-1]))}

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        """The nearest numbers and their scales."""
        numbers, scale = quantized(weight)
        return {"weight": numbers, "scale": scale.squeeze(-1)}

    def product(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """The product x W^T [..., F] in the dtype of x [..., D]."""
        return int8_product(x, weight, scale, is_dynamic=self.is_dynamic)

    def product_of_each(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """The products of tokens with a weight each."""
        numbers, scale_of_token = quantized(x) if self.is_dynamic else (x, 1)
        y = weight.to(x.dtype) @ numbers.to(x.dtype)[..., None]
        return (y[..., 0] * scale * scale_of_token).to(x.dtype)

    def arranged(self, weight: Tensor, scale: Tensor) -> tuple[WeightProduct, Tensor, Tensor]:
        """What is given."""
        return self, weight, scale


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127 with a scale for each row that come next to x.

    Args:
        x: Rows [..., D].

    Returns:
        The numbers [..., D], int8, and the scales [..., 1], fp32; a row of zeros has scale 0.
    """
    scale = x.abs().amax(dim=-1, keepdim=True).float() / LARGEST
    return (x.float() / scale.clamp(min=torch.finfo(torch.float32).tiny)).round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scale


def int8_product(x: Tensor, weight: Tensor, scale: Tensor, *, is_dynamic: bool) -> Tensor:
    """The product x W^T [..., F] in the dtype of x [..., D], with W = weight * scale.

    Args:
        x: Activations.
        weight: Whole numbers [F, D].
        scale: Scale of each output [F], fp32.
        is_dynamic: Whether activations are rounded to eight bits too.
    """
    rows = x.reshape(-1, x.shape[-1])
    if is_dynamic and _has_whole_product(rows, weight):
        numbers, scale_of_token = quantized(rows)
        y = (torch._int_mm(numbers, weight.T) * scale_of_token * scale).to(x.dtype)
    elif _has_packed_product(rows, weight):
        y = torch.ops.aten._weight_int8pack_mm(rows, weight, scale.to(x.dtype))
    else:
        y = F.linear(rows, weight.to(x.dtype)) * scale.to(x.dtype)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _has_whole_product(rows: Tensor, weight: Tensor) -> bool:
    if not is_accelerator(rows.device.type):
        return True
    if not has_kernels(rows.device.type):
        return False
    return len(rows) >= _LEAST_ROWS_ON_GPU and not any(width % _WIDTHS_ON_GPU for width in weight.shape)


def _has_packed_product(rows: Tensor, weight: Tensor) -> bool:
    is_fast = rows.device.type == "cpu" and rows.dtype == torch.bfloat16
    return is_fast and 0 < len(rows) <= _FEW_TOKENS and not any(width % _WIDTHS for width in weight.shape)
