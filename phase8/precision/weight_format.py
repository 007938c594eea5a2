"""What a format of the weights of a trained model is: whole numbers of few bits in `weight`, their scales in `scale`.

Shapes: D inputs, F outputs; the weights of experts are stacked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

IN_WORDS = {4: "four", 8: "eight"}


class WeightProduct(Protocol):
    """A layout of numbers and scales in memory, and the product with them; it holds none itself."""

    def product(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """The product x W^T [..., F] in the dtype of x [..., D]."""


class WeightFormat(WeightProduct, Protocol):
    """The format of a checkpoint."""

    @property
    def bits(self) -> int:
        """Bits of a number."""

    def tensors(self, shape: Sequence[int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of `weight` and `scale`, by name, of a weight of a shape [..., F, D]."""

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        """The values of `weight` and `scale`, by name, that stand for a weight [..., F, D]."""

    def product_of_each(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """The products [..., F] in the dtype of x of tokens [..., D] with a weight [..., F, D] each; leading dims broadcast."""

    def arranged(self, weight: Tensor, scale: Tensor) -> tuple[WeightProduct, Tensor, Tensor]:
        """The same numbers in the layout that this device multiplies fastest."""


def is_worthwhile(weight_format: WeightFormat, shape: Sequence[int]) -> bool:
    """Whether a weight of a shape takes fewer bytes than in bf16: scales, and groups that zeros fill up, may be more than what is saved."""
    stored = sum(dtype.itemsize * math.prod(dims) for dtype, dims in weight_format.tensors(shape).values())
    return stored < torch.bfloat16.itemsize * math.prod(shape)
