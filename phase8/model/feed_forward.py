"""The gated feed-forward of a block, dense or of low rank.

Source: N. Shazeer, "GLU variants improve transformer" (2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase8.config.model_section import ModelSection
from phase8.distributed.collectives import Axis
from phase8.exchanges import Exchanges
from phase8.kernels.decoding_product import gated
from phase8.kernels.low_rank_swiglu import low_rank_swiglu
from phase8.model.norm import PreparedNorm
from phase8.precision.formats import NumberFormat
from phase8.tensor_parallel.linear import ColumnParallelLinear, JointColumnLinear, LowRankColumn, LowRankRow, RowParallelLinear
from phase8.tensor_parallel.parameters import local


@dataclass(frozen=True)
class GatedStep:
    """A gated feed-forward for decoding, dense or of low rank.

    Args:
        gate_and_up: Maps [B, D] to gate and up together [B, 2 F].
        down: Maps [B, F] to [B, D].
    """

    gate_and_up: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """Maps tokens [B, D] to [B, D]."""
        return self.down(gated(self.gate_and_up(x)))

    def after_norm(self, norm: PreparedNorm, x: Tensor, summand: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream [B, D] after a summand, and the feed-forward of its norm."""
        x, y = norm.then(self.gate_and_up, x, summand, is_gated=True)
        return x, self.down(y)


class SwiGLU(nn.Module):
    """The dense feed-forward: down(silu(gate(x)) * up(x)).

    Args:
        model: Model section with the widths.
        axis: Axis of tensor parallelism.
        number_format: Format that computes the products.
        inner: Width between gate and down; None: that of the model's feed-forward.
    """

    def __init__(self, model: ModelSection, *, axis: Axis, number_format: NumberFormat, inner: int | None = None):
        super().__init__()
        width, inner = model.d_model, model.feed_forward_width if inner is None else inner
        self.gate = ColumnParallelLinear(width, inner, std=model.init_std)
        self.up = ColumnParallelLinear(width, inner, std=model.init_std)
        self.down = RowParallelLinear(inner, width, std=residual_std(model), axis=axis, number_format=number_format)
        self.gate_and_up = JointColumnLinear((self.gate, self.up), axis, number_format)

    def exchanges(self) -> Exchanges:
        """The exchanges of the joint product of gate and up, then of the output layer."""
        return self.gate_and_up.exchanges().then(self.down.exchanges())

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, T, D] to [B, T, D]; with several ranks, own tokens [n, D] to [n, D]."""
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def prepared(self, dtype: torch.dtype) -> GatedStep:
        """The feed-forward of one rank for decoding with inputs of a dtype."""
        return GatedStep(self.gate_and_up.prepared(dtype), self.down.prepared(dtype))


class LowRankSwiGLU(nn.Module):
    """The feed-forward of low-rank linears. One operator computes all between their bottlenecks, in the dtype of its operands.

    Args:
        model: Model section with widths and rank.
        axis: Axis of tensor parallelism.
        number_format: Format that computes the products before and after that operator.
    """

    def __init__(self, model: ModelSection, *, axis: Axis, number_format: NumberFormat):
        super().__init__()
        width, inner, rank = model.d_model, model.feed_forward_width, model.feed_forward_rank
        self.gate = LowRankColumn(width, inner, rank=rank, std=model.init_std)
        self.up = LowRankColumn(width, inner, rank=rank, std=model.init_std)
        self.down = LowRankRow(inner, width, rank=rank, std=residual_std(model), axis=axis, number_format=number_format)
        self.gate_and_up = JointColumnLinear((self.gate, self.up), axis, number_format)
        for linear in (self.gate.up, self.up.up, self.down.down):
            linear.is_rounded = False  # the operator rounds weights, but not their gradients

    def exchanges(self) -> Exchanges:
        """The exchanges of the joint product of gate and up, then of the output layer."""
        return self.gate_and_up.exchanges().then(self.down.exchanges())

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, T, D] to [B, T, D]; with several ranks, own tokens [n, D] to [n, D]."""
        bottlenecks = self.gate_and_up.bottlenecks(x)
        gate, up, down = (local(linear.weight) for linear in (self.gate.up, self.up.up, self.down.down))
        return self.down.finish(low_rank_swiglu(bottlenecks, gate, up, down))

    def prepared(self, dtype: torch.dtype) -> GatedStep:
        """The feed-forward of one rank for decoding with inputs of a dtype."""
        return GatedStep(self.gate_and_up.prepared(dtype), self.down.prepared(dtype))


def build_feed_forward(model: ModelSection, *, axis: Axis, number_format: NumberFormat) -> SwiGLU | LowRankSwiGLU:
    """Builds the feed-forward that the config asks for, of low rank or dense; arguments as for the classes."""
    kind = LowRankSwiGLU if model.feed_forward_rank else SwiGLU
    return kind(model, axis=axis, number_format=number_format)


def residual_std(model: ModelSection) -> float:
    """Standard deviation of a feed-forward's last weights: the sum of all residual branches, two per layer, keeps its variance at any depth."""
    return model.init_std / math.sqrt(2 * model.num_layers)
