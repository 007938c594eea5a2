"""Root-mean-square normalisation, computed in fp32.

Source: B. Zhang and R. Sennrich, "Root mean square layer normalization" (2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase8.kernels.decoding_product import gated, normed_product
from phase8.kernels.dtypes import at_least_fp32
from phase8.kernels.residual_norm import residual_norm
from phase8.tensor_parallel.linear import PreparedLinear
from phase8.tensor_parallel.parameters import ParameterSpec, local


@dataclass(frozen=True)
class PreparedNorm:
    """The norm for decoding; arguments as of `RMSNorm`, with the weight itself."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor, summand: Tensor | None) -> tuple[Tensor, Tensor]:
        """Adds a summand to the residual stream [B, D]; returns the stream, and its norm."""
        return residual_norm(x, summand, self.weight, self.eps)

    def then(self, layer: Callable[[Tensor], Tensor], x: Tensor, summand: Tensor | None, *, is_gated: bool = False) -> tuple[Tensor, Tensor]:
        """The same with a layer of the norm, which on a GPU is one kernel for few tokens; returns the stream, and the layer's outputs.

        Args:
            layer: Layer for decoding; maps [B, D] to [B, F].
            x: Residual stream.
            summand: What is added to it; None: nothing.
            is_gated: Whether the first half of the outputs gates the second.
        """
        if isinstance(layer, PreparedLinear):
            return normed_product(x, summand, self.weight, self.eps, layer.weight, is_gated=is_gated)
        x, normed = self(x, summand)
        return x, gated(layer(normed)) if is_gated else layer(normed)


class RMSNorm(nn.Module):
    """The norm x / rms(x) over the last dim, times a learned weight.

    Args:
        shape: Shape of the weight; the last dim is normalised.
        eps: Summand of the mean square.
        divided: Axis -> dim of the weight that its ranks divide; None: every rank has the weight whole.
    """

    def __init__(self, *shape: int, eps: float, divided: Mapping[str, int] | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.eps, self.divided = eps, divided or {}

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        """A weight of one, with which the norm begins as a plain normalisation."""
        return {"weight": ParameterSpec(value=1.0, divided=self.divided)}

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `x`; the result has its dtype."""
        return (rms_normalise(at_least_fp32(x), self.eps) * local(self.weight)).to(x.dtype)

    def prepared(self) -> PreparedNorm:
        """The norm of one rank for decoding."""
        return PreparedNorm(self.weight.detach(), self.eps)


class QueryKeyNorm(nn.Module):
    """The norm x / rms(x) of queries and keys, times a learned number per head of keys that the head and its queries share.

    Source: A. Henry et al., "Query-key normalization for transformers" (2020).

    Args:
        num_heads: Number of heads H of keys; queries have as many or several times as many.
        head_size: Head size K.
        eps: Summand of the mean square.
    """

    def __init__(self, num_heads: int, head_size: int, *, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads))
        self.head_size, self.eps = head_size, eps

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        """A weight of one: the length begins as the square root of the head size, that of numbers of unit variance."""
        return {"weight": ParameterSpec(value=1.0, divided={"tp": 0})}

    @property
    def radius(self) -> Tensor:
        """Length of every query and key [H]."""
        return local(self.weight) * math.sqrt(self.head_size)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises queries or keys [..., any multiple of H, K]; the result has their dtype."""
        lengths = local(self.weight)[:, None, None]
        return (rms_normalise(at_least_fp32(x), self.eps).unflatten(-2, (len(lengths), -1)) * lengths).flatten(-3, -2).to(x.dtype)


def rms_normalise(x: Tensor, eps: float) -> Tensor:
    """Normalises over the last dim, without a weight."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)

