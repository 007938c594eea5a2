"""Linear layers: fp32 master weights cast to the dtype of the input, dense or as a low-rank pair."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase8.model.parameters import ParameterSpec


class Linear(nn.Module):
    """y = x W^T without bias.

    Args:
        in_features: Width of x.
        out_features: Width of y.
        std: Standard deviation of the initial weights; 0: zero.
    """

    def __init__(self, in_features: int, out_features: int, *, std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.std = std

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        """Normal values; decayed."""
        return {"weight": ParameterSpec(std=self.std, decay=True)}

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return F.linear(x, self.weight.to(x.dtype))

    def extra_repr(self) -> str:
        """Shapes for `print(model)`."""
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"


class LowRankLinear(nn.Module):
    """y = up(down(x)): a weight of rank R as the product of two thin ones.

    The standard deviations are chosen so that the product has the variance of a dense weight of standard deviation `std`, and the
    bottleneck of an input of unit variance has unit variance.

    Args:
        in_features: Width of x.
        out_features: Width of y.
        rank: Width R of the bottleneck.
        std: Standard deviation of the entries of the product; 0: `up` starts at zero.
    """

    def __init__(self, in_features: int, out_features: int, *, rank: int, std: float):
        super().__init__()
        self.down = Linear(in_features, rank, std=1 / math.sqrt(in_features))
        self.up = Linear(rank, out_features, std=std * math.sqrt(in_features / rank))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.up(self.down(x))


def build_linear(in_features: int, out_features: int, *, rank: int, std: float) -> Linear | LowRankLinear:
    """A dense linear layer, or the low-rank pair when `rank` is not 0."""
    if rank:
        return LowRankLinear(in_features, out_features, rank=rank, std=std)
    return Linear(in_features, out_features, std=std)
