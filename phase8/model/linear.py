"""Linear layers: fp32 master weights cast to the dtype of the input, dense or as a low-rank pair."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase8.kernels.reference.dtypes import at_least_fp32
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


class WideLinear(Linear):
    """y = x W^T in fp32 whatever the dtype of x: what it feeds is too sensitive to be rounded to that dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> fp32 or wider [..., out_features]."""
        if x.device.type == "cpu" or x.element_size() > 2:
            return F.linear(at_least_fp32(x), self.weight)
        return _WideProduct.apply(x.flatten(0, -2), self.weight.to(x.dtype)).unflatten(0, x.shape[:-1])


class _WideProduct(torch.autograd.Function):
    """x W^T of half-precision matrices in fp32: matrix units accumulate in fp32 anyway, and x need not be widened in memory first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)
        return grad @ weight, grad.T @ x


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


def joint_linear(x: Tensor, *layers: Linear | LowRankLinear) -> Tensor:
    """The outputs of several layers of the same input, concatenated: one matrix product instead of one each.

    Args:
        x: Their input [..., in_features].
        layers: All dense, or all low-rank.

    Returns:
        [..., sum of their out_features].
    """
    if isinstance(layers[0], LowRankLinear):
        bottlenecks = joint_linear(x, *(layer.down for layer in layers)).chunk(len(layers), dim=-1)
        return torch.cat([layer.up(bottleneck) for layer, bottleneck in zip(layers, bottlenecks, strict=True)], dim=-1)
    return F.linear(x, torch.cat([layer.weight.to(x.dtype) for layer in layers]))


def build_linear(in_features: int, out_features: int, *, rank: int, std: float) -> Linear | LowRankLinear:
    """A dense linear layer, or the low-rank pair when `rank` is not 0."""
    if rank:
        return LowRankLinear(in_features, out_features, rank=rank, std=std)
    return Linear(in_features, out_features, std=std)
