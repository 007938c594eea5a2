"""Linear layers divided over the ranks of a tensor-parallel axis; fp32 master weights, cast to the dtype of the input.

Outside the layers a rank holds its own n tokens with all features; between a column and a row layer it holds all N = n * ranks tokens with
its part of the features.

| layer | weight of a rank | x | y | forward | backward |
|---|---|---|---|---|---|
| column | rows [F / ranks, D] | [n, D] | [N, F / ranks] | all-gather x, multiply | all-gather x again, multiply, reduce-scatter dx |
| row | columns [D, F / ranks] | [N, F / ranks] | [n, D] | multiply, reduce-scatter y | all-gather dy, multiply |
| low-rank column | down whole, up by rows | [n, D] | [N, F / ranks] | down, all-gather the bottleneck, up | the same in reverse |
| low-rank row | down by columns, up whole | [N, F / ranks] | [n, D] | down, reduce-scatter the bottleneck, up | the same in reverse |

Source: M. Shoeybi et al., "Megatron-LM" (2019); V. Korthikanti et al., "Reducing activation recomputation" (2022). A low-rank
pair exchanges a bottleneck of R numbers per token instead of D, and no rank repeats another's work.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase8.distributed.collectives import Axis, gather_tokens, scatter_tokens
from phase8.exchanges import Exchanges, gathered, scattered
from phase8.kernels.decoding_product import product
from phase8.kernels.dtypes import at_least_fp32
from phase8.precision.formats import OPERAND_DTYPE, NumberFormat
from phase8.tensor_parallel.parameters import ParameterSpec, local
from phase8.tensor_parallel.products import gathered_product, plain_product, scattered_product, wide_product


@dataclass(frozen=True)
class PreparedLinear:
    """The product y = x W^T for decoding, where each token would wait for casts and copies of weights that are the same every time.

    Args:
        weight: Weight in the dtype of x [F, D].
    """

    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Maps [B, D] to [B, F]."""
        return product(x, self.weight)


@dataclass(frozen=True)
class PreparedLowRank:
    """The products y = up(down(x)) of n low-rank layers for decoding; layers of several widths are one, whose weight up has them on its diagonal.

    Args:
        down: Weights down, joined [n R, D].
        up: Weights up, stacked [n, F, R].
    """

    down: Tensor
    up: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Maps [B, D] to [B, n F]."""
        if len(self.up) == 1:
            return F.linear(F.linear(x, self.down), self.up[0])
        bottlenecks = F.linear(x, self.down).unflatten(1, (len(self.up), -1)).transpose(0, 1)
        return (bottlenecks @ self.up.mT).transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class PreparedWide:
    """The product of a `WideLinear` for decoding; the weight is fp32 or wider, or on a GPU has the dtype of x."""

    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Maps [B, D] to fp32 or wider [B, F]."""
        return wide_product(x, self.weight)


class Linear(nn.Module):
    """The layer y = x W^T without bias, token by token.

    Args:
        in_features: Width of x.
        out_features: Width of y.
        std: Standard deviation of the initial weights; 0: all weights are zero.
        divided: Axis -> dim of the weight that its ranks divide; None: every rank has the weight whole.
        number_format: Format that computes the product.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        std: float,
        divided: Mapping[str, int] | None = None,
        number_format: NumberFormat = OPERAND_DTYPE,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.in_features, self.out_features, self.std = in_features, out_features, std
        self.divided, self.number_format = divided or {}, number_format
        self.is_rounded = True  # what computes with the weight in another way says so

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        """Normal values with weight decay."""
        return {"weight": ParameterSpec(std=self.std, decay=True, divided=self.divided, is_rounded=self.is_rounded)}

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in_features] to [..., out_features of this rank]."""
        return plain_product(x, local(self.weight).to(x.dtype), self.number_format)

    def prepared(self, dtype: torch.dtype) -> PreparedLinear:
        """The layer of one rank for decoding with inputs of a dtype."""
        return PreparedLinear(held(dtype, self))

    def extra_repr(self) -> str:
        """The widths over all ranks together, for `print(model)`."""
        return f"{self.in_features} -> {self.out_features}"


class ColumnParallelLinear(Linear):
    """The layer y = x W^T with the rows of W, and so the features of y, divided over the ranks; `JointColumnLinear` gathers x and computes y.

    Args:
        in_features: Width of x.
        out_features: Width of y over all ranks together.
        std: Standard deviation of the initial weights.
    """

    def __init__(self, in_features: int, out_features: int, *, std: float):
        super().__init__(in_features, out_features, std=std, divided={"tp": 0})


class RowParallelLinear(Linear):
    """The layer y = x W^T with the columns of W divided over the ranks, like the features of x; y holds the own tokens.

    Args:
        in_features: Width of x over all ranks together.
        out_features: Width of y.
        std: Standard deviation of the initial weights.
        axis: Axis of tensor parallelism.
        number_format: Format that computes the product.
    """

    def __init__(self, in_features: int, out_features: int, *, std: float, axis: Axis, number_format: NumberFormat):
        super().__init__(in_features, out_features, std=std, divided={"tp": 1}, number_format=number_format)
        self.axis = axis

    def exchanges(self) -> Exchanges:
        """The scatter of the output. A recomputation that ends with this layer does not repeat it, because backward needs only the input."""
        return replace(scattered(self.out_features), repeated=())

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in_features of this rank] of all tokens to [..., out_features] of the own tokens."""
        return scattered_product(x, local(self.weight).to(x.dtype), self.axis, self.number_format)


class LowRankColumn(nn.Module):
    """The layer y = up(down(x)): a column-parallel weight of rank R as the product of two thin matrices.

    The standard deviations are chosen so that the product has the variance of a dense weight of standard deviation `std`, and the
    bottleneck of an input of unit variance has unit variance.

    Args:
        in_features: Width of x.
        out_features: Width of y over all ranks together.
        rank: Width R of the bottleneck.
        std: Standard deviation of the entries of the product; 0: `up` starts at zero.
    """

    def __init__(self, in_features: int, out_features: int, *, rank: int, std: float):
        super().__init__()
        self.down = Linear(in_features, rank, std=1 / math.sqrt(in_features))
        self.up = ColumnParallelLinear(rank, out_features, std=std * math.sqrt(in_features / rank))


class LowRankRow(nn.Module):
    """The layer y = up(down(x)) as a row-parallel layer, whose ranks sum and scatter at the bottleneck.

    Args:
        in_features: Width of x over all ranks together.
        out_features: Width of y.
        rank: Width R of the bottleneck.
        std: Standard deviation of the entries of the product; 0: `up` starts at zero.
        axis: Axis of tensor parallelism.
        number_format: Format that computes the products.
    """

    def __init__(self, in_features: int, out_features: int, *, rank: int, std: float, axis: Axis, number_format: NumberFormat):
        super().__init__()
        self.down = RowParallelLinear(in_features, rank, std=1 / math.sqrt(in_features), axis=axis, number_format=number_format)
        self.up = Linear(rank, out_features, std=std * math.sqrt(in_features / rank), number_format=number_format)

    def exchanges(self) -> Exchanges:
        """The scatter of the bottleneck; a recomputation repeats it, because `up` keeps the bottleneck for backward."""
        return scattered(self.down.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in_features of this rank] of all tokens to [..., out_features] of the own tokens."""
        return self.up(self.down(x))

    def prepared(self, dtype: torch.dtype) -> PreparedLowRank:
        """The layer of one rank for decoding with inputs of a dtype."""
        return PreparedLowRank(held(dtype, self.down), held(dtype, self.up)[None])

    def finish(self, bottleneck: Tensor) -> Tensor:
        """Computes the layer from `down` on, from this rank's summand of the bottleneck of all tokens [..., R]; result as of `forward`."""
        return self.up(scatter_tokens(bottleneck, self.down.axis))


class WideLinear(Linear):
    """The layer y = x W^T in fp32 whatever the dtype of x, for results that are too sensitive to be rounded to that dtype."""

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        """As of a linear layer, but for a weight that is not rounded."""
        return {"weight": replace(super().parameter_specs()["weight"], is_rounded=False)}

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in_features] to fp32 or wider [..., out_features of this rank]."""
        return wide_product(x, local(self.weight))

    def prepared(self, dtype: torch.dtype) -> PreparedWide:
        """The layer of one rank for decoding with inputs of a dtype."""
        weight = self.weight.detach()
        is_narrow = weight.device.type != "cpu" and dtype.itemsize <= 2  # as `wide_product` chooses
        return PreparedWide(weight.to(dtype) if is_narrow else for_few_tokens(at_least_fp32(weight)))


def column_linear(in_features: int, out_features: int, *, rank: int, std: float) -> ColumnParallelLinear | LowRankColumn:
    """A dense column-parallel layer, or the low-rank pair when `rank` is not 0; `JointColumnLinear` runs it."""
    if rank:
        return LowRankColumn(in_features, out_features, rank=rank, std=std)
    return ColumnParallelLinear(in_features, out_features, std=std)


def row_linear(
    in_features: int, out_features: int, *, rank: int, std: float, axis: Axis, number_format: NumberFormat
) -> RowParallelLinear | LowRankRow:
    """A dense row-parallel layer, or the low-rank pair when `rank` is not 0."""
    if rank:
        return LowRankRow(in_features, out_features, rank=rank, std=std, axis=axis, number_format=number_format)
    return RowParallelLinear(in_features, out_features, std=std, axis=axis, number_format=number_format)


@dataclass(frozen=True)
class JointColumnLinear:
    """Several column-parallel layers of the same input, computed together by one gather and one matrix product.

    It is not a Module: its owner registers the layers, so that their parameters keep their own names in checkpoints.

    Args:
        layers: Layers of one input, either all dense or all low-rank.
        axis: Axis of tensor parallelism.
        number_format: Format that computes the products.
    """

    layers: tuple[ColumnParallelLinear | LowRankColumn, ...]
    axis: Axis
    number_format: NumberFormat

    def __call__(self, x: Tensor) -> Tensor:
        """Computes the outputs of the layers, concatenated.

        Args:
            x: Input of the layers [..., in_features]; with several ranks, its own tokens.

        Returns:
            Outputs of all tokens [..., sum of the layers' out_features of this rank].
        """
        if isinstance(self.layers[0], LowRankColumn):
            # Multiplying by the zeros of a block-diagonal matrix costs less than copying separate results together: such products wait for memory.
            ups = torch.block_diag(*(local(layer.up.weight).to(x.dtype) for layer in self.layers))
            return plain_product(self.bottlenecks(x), ups, self.number_format)
        return gathered_product(x, _joint_weight(x.dtype, *self.layers), self.axis, self.number_format)

    def bottlenecks(self, x: Tensor) -> Tensor:
        """Computes the bottlenecks of low-rank layers for all tokens, concatenated [..., R * layers]; x as in the call."""
        weight = _joint_weight(x.dtype, *(layer.down for layer in self.layers))
        return gather_tokens(plain_product(x, weight, self.number_format), self.axis)

    def prepared(self, dtype: torch.dtype) -> PreparedLinear | PreparedLowRank:
        """The layers of one rank for decoding with inputs of a dtype.

        Parameters of that dtype that are not trained become views of the joined weight, which keep their values: memory holds it once.
        """
        if isinstance(self.layers[0], LowRankColumn):
            ups = [layer.up.weight.detach().to(dtype) for layer in self.layers]
            is_even = len({len(up) for up in ups}) == 1
            joined = torch.stack(ups) if is_even else torch.block_diag(*ups)[None]
            return PreparedLowRank(held(dtype, *(layer.down for layer in self.layers)), joined)
        return PreparedLinear(held(dtype, *self.layers))

    def exchanges(self) -> Exchanges:
        """The gather of the input, repeated in backward, for dense layers; the gather of the bottlenecks for low-rank layers."""
        if isinstance(self.layers[0], LowRankColumn):
            return gathered(sum(layer.down.out_features for layer in self.layers))
        once = gathered(self.layers[0].in_features)
        return replace(once, backward=once.forward + once.backward)


def _joint_weight(dtype: torch.dtype, *layers: Linear) -> Tensor:
    weights = [local(layer.weight).to(dtype) for layer in layers]
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled() and _are_neighbours(weights):
        return weights[0].as_strided((sum(map(len, weights)), weights[0].shape[1]), weights[0].stride())
    return torch.cat(weights)


def _are_neighbours(weights: list[Tensor]) -> bool:
    """Whether weights are parts of one joined weight already, one after the other, as `JointColumnLinear.prepared` leaves them."""
    return all(
        before.untyped_storage().data_ptr() == after.untyped_storage().data_ptr()
        and before.stride() == after.stride()
        and before.storage_offset() + len(before) * before.stride(0) == after.storage_offset()
        for before, after in itertools.pairwise(weights)
    )


def for_few_tokens(weight: Tensor) -> Tensor:
    """The same weight [F, D] in the layout that products with few tokens read fastest: on a CPU, in fp32, all outputs of an input side by side."""
    is_turned = weight.device.type == "cpu" and weight.dtype.itemsize >= 4
    return weight.t().contiguous().t() if is_turned else weight


def held(dtype: torch.dtype, *layers: Linear) -> Tensor:
    """The weights of layers of one rank, joined, for few tokens; those of the layers become views of them if they have the dtype, untrained."""
    joined = for_few_tokens(_joint_weight(dtype, *layers).detach() if len(layers) > 1 else layers[0].weight.detach().to(dtype))
    for layer, part in zip(layers, joined.split([len(layer.weight) for layer in layers]), strict=True):
        # A recorded training step, or an optimizer that has joined parameters, finds them by their address.
        if layer.weight.dtype == dtype and not layer.weight.requires_grad:
            layer.weight.data = part
    return joined
