"""Linear layers divided over the ranks of a tensor-parallel axis; fp32 master weights, cast to the dtype of the input.

Between two divided layers the ranks hold different tokens; inside, all tokens and different features. n own tokens, N = n * ranks tokens.

| layer | weight of a rank | x | y | forward | backward |
|---|---|---|---|---|---|
| column | rows [F / ranks, D] | [n, D] | [N, F / ranks] | all-gather x, multiply | all-gather x again, multiply, reduce-scatter dx |
| row | columns [D, F / ranks] | [N, F / ranks] | [n, D] | multiply, reduce-scatter y | all-gather dy, multiply |
| low-rank column | down whole, up by rows | [n, D] | [N, F / ranks] | down, all-gather the bottleneck, up | the same in reverse |
| low-rank row | down by columns, up whole | [N, F / ranks] | [n, D] | down, reduce-scatter the bottleneck, up | the same in reverse |

Source: M. Shoeybi et al., "Megatron-LM" (2019); V. Korthikanti et al., "Reducing activation recomputation" (2022). The pairs exchange a
bottleneck of R numbers a token instead of D, and no rank repeats another's work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase8.distributed.collectives import Axis, gather_tokens, scatter_tokens, start_gather, start_scatter
from phase8.exchanges import Exchanges, gathered, scattered
from phase8.kernels.dtypes import at_least_fp32
from phase8.tensor_parallel.overlapped import gathered_product, scattered_product
from phase8.tensor_parallel.parameters import ParameterSpec, local


class Linear(nn.Module):
    """y = x W^T without bias, token by token.

    Args:
        in_features: Width of x.
        out_features: Width of y.
        std: Standard deviation of the initial weights; 0: zero.
        divided: Axis -> dim of the weight that its ranks divide; None: no ranks do.
    """

    def __init__(self, in_features: int, out_features: int, *, std: float, divided: Mapping[str, int] | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.std, self.divided = std, divided or {}

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        """Normal values; decayed."""
        return {"weight": ParameterSpec(std=self.std, decay=True, divided=self.divided)}

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features of this rank]."""
        return F.linear(x, local(self.weight).to(x.dtype))

    def extra_repr(self) -> str:
        """Shapes for `print(model)`, of all ranks together."""
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"


class ColumnParallelLinear(Linear):
    """y = x W^T with the rows of W, the columns of y, divided over the ranks; x holds all tokens. `joint_linear` gathers them.

    Args:
        in_features: Width of x.
        out_features: Width of y, of all ranks together.
        std: Standard deviation of the initial weights.
    """

    def __init__(self, in_features: int, out_features: int, *, std: float):
        super().__init__(in_features, out_features, std=std, divided={"tp": 0})


class RowParallelLinear(Linear):
    """y = x W^T with the columns of W divided over the ranks like those of x; y holds the own tokens.

    Args:
        in_features: Width of x, of all ranks together.
        out_features: Width of y.
        std: Standard deviation of the initial weights.
        axis: Of tensor parallelism.
    """

    def __init__(self, in_features: int, out_features: int, *, std: float, axis: Axis):
        super().__init__(in_features, out_features, std=std, divided={"tp": 1})
        self.axis = axis

    def exchanges(self) -> Exchanges:
        """The output is scattered; a recomputation that ends here leaves that out, for backward needs the input only."""
        return replace(scattered(self.weight.shape[0]), repeated=())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features of this rank], all tokens -> [..., out_features], own tokens."""
        if self.axis.has_peer_memory:
            return scattered_product(x.flatten(0, -2), local(self.weight).to(x.dtype), self.axis)
        return scatter_tokens(super().forward(x), self.axis)


class LowRankColumn(nn.Module):
    """y = up(down(x)): a column-parallel weight of rank R as the product of two thin ones.

    The standard deviations are chosen so that the product has the variance of a dense weight of standard deviation `std`, and the
    bottleneck of an input of unit variance has unit variance.

    Args:
        in_features: Width of x.
        out_features: Width of y, of all ranks together.
        rank: Width R of the bottleneck.
        std: Standard deviation of the entries of the product; 0: `up` starts at zero.
    """

    def __init__(self, in_features: int, out_features: int, *, rank: int, std: float):
        super().__init__()
        self.down = Linear(in_features, rank, std=1 / math.sqrt(in_features))
        self.up = ColumnParallelLinear(rank, out_features, std=std * math.sqrt(in_features / rank))


class LowRankRow(nn.Module):
    """The same product as a row-parallel layer, reduced at the bottleneck.

    Args:
        in_features: Width of x, of all ranks together.
        out_features: Width of y.
        rank: Width R of the bottleneck.
        std: Standard deviation of the entries of the product; 0: `up` starts at zero.
        axis: Of tensor parallelism.
    """

    def __init__(self, in_features: int, out_features: int, *, rank: int, std: float, axis: Axis):
        super().__init__()
        self.down = RowParallelLinear(in_features, rank, std=1 / math.sqrt(in_features), axis=axis)
        self.up = Linear(rank, out_features, std=std * math.sqrt(in_features / rank))

    def exchanges(self) -> Exchanges:
        """The bottleneck is scattered, and kept by `up`."""
        return scattered(self.down.weight.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features of this rank], all tokens -> [..., out_features], own tokens."""
        return self.up(self.down(x))

    def finish(self, bottleneck: Tensor) -> Tensor:
        """The rest of the layer where `down` has been applied elsewhere: summands of the ranks [..., R], all tokens -> as above."""
        return self.up(scatter_tokens(bottleneck, self.down.axis))


class WideLinear(Linear):
    """y = x W^T in fp32 whatever the dtype of x: what it feeds is too sensitive to be rounded to that dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> fp32 or wider [..., out_features of this rank]."""
        weight = local(self.weight)
        if x.device.type == "cpu" or x.element_size() > 2:
            return F.linear(at_least_fp32(x), weight)
        return _WideProduct.apply(x.flatten(0, -2), weight.to(x.dtype)).unflatten(0, x.shape[:-1])


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


def column_linear(in_features: int, out_features: int, *, rank: int, std: float) -> ColumnParallelLinear | LowRankColumn:
    """A dense column-parallel layer, or the low-rank pair when `rank` is not 0; `joint_linear` runs it."""
    if rank:
        return LowRankColumn(in_features, out_features, rank=rank, std=std)
    return ColumnParallelLinear(in_features, out_features, std=std)


def row_linear(in_features: int, out_features: int, *, rank: int, std: float, axis: Axis) -> RowParallelLinear | LowRankRow:
    """A dense row-parallel layer, or the low-rank pair when `rank` is not 0."""
    if rank:
        return LowRankRow(in_features, out_features, rank=rank, std=std, axis=axis)
    return RowParallelLinear(in_features, out_features, std=std, axis=axis)


def joint_linear(x: Tensor, *layers: ColumnParallelLinear | LowRankColumn, axis: Axis) -> Tensor:
    """The outputs of several column-parallel layers of the same input, concatenated: one gather and one matrix product for all.

    Args:
        x: Their input [..., in_features]; with several ranks, the own tokens of it.
        layers: All dense, or all low-rank.
        axis: Of tensor parallelism.

    Returns:
        [..., sum of their out_features of this rank], all tokens.
    """
    if isinstance(layers[0], LowRankColumn):
        # Zeros beside the blocks cost less than results that lie apart and are copied side by side: such products wait for memory.
        ups = torch.block_diag(*(local(layer.up.weight).to(x.dtype) for layer in layers))
        return F.linear(joint_bottlenecks(x, *layers, axis=axis), ups)
    weight = _joint_weight(x.dtype, *layers)
    if axis.size == 1:
        return F.linear(x, weight)
    return gathered_product(x, weight, axis) if axis.has_peer_memory else _GatheredProduct.apply(x, weight, axis)


def joint_exchanges(*layers: ColumnParallelLinear | LowRankColumn) -> Exchanges:
    """What `joint_linear` exchanges: dense layers gather their input, once more in backward; low-rank layers gather their bottlenecks."""
    if isinstance(layers[0], LowRankColumn):
        return gathered(sum(layer.down.weight.shape[0] for layer in layers))
    once = gathered(layers[0].weight.shape[1])
    return replace(once, backward=once.forward + once.backward)


def joint_bottlenecks(x: Tensor, *layers: LowRankColumn, axis: Axis) -> Tensor:
    """The bottlenecks of several low-rank layers of the same input, concatenated, of all tokens [..., R of each]; arguments as above."""
    return gather_tokens(F.linear(x, _joint_weight(x.dtype, *(layer.down for layer in layers))), axis)


def _joint_weight(dtype: torch.dtype, *layers: Linear) -> Tensor:
    return torch.cat([local(layer.weight).to(dtype) for layer in layers])


class _GatheredProduct(torch.autograd.Function):
    """gather_tokens(x) W^T that keeps the own tokens for backward and gathers again, while it computes the gradient of x.

    That gradient is then summed and scattered while the gradient of W is computed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, axis: Axis) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.axis = axis
        return F.linear(start_gather(x, axis)(), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        gathered = start_gather(x, ctx.axis)
        scattered = start_scatter(grad @ weight, ctx.axis)
        dweight = grad.T @ gathered()
        return scattered(), dweight, None
