"""What a format of the weights of a trained model's dense layers is: whole numbers of few bits in `weight`, their scales in `scale`.

Shapes: D inputs, F outputs.
"""

from __future__ import annotations

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

    def tensors(self, outputs: int, inputs: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of `weight` and `scale` of a layer, by name."""

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        """The values of `weight` and `scale`, by name, that stand for a weight [F, D]."""

    def arranged(self, weight: Tensor, scale: Tensor) -> tuple[WeightProduct, Tensor, Tensor]:
        """The same numbers in the layout that this device multiplies fastest."""
