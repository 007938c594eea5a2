"""The gated feed-forward of a block, dense or of low rank.

Source: N. Shazeer, "GLU variants improve transformer" (2020).
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from phase8.config.schema import ModelSection
from phase8.distributed.collectives import Axis
from phase8.exchanges import Exchanges
from phase8.kernels.low_rank_swiglu import low_rank_swiglu
from phase8.tensor_parallel.linear import (
    ColumnParallelLinear,
    LowRankColumn,
    LowRankRow,
    RowParallelLinear,
    joint_bottlenecks,
    joint_exchanges,
    joint_linear,
)
from phase8.tensor_parallel.parameters import local


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)).

    Args:
        model: Widths.
        axis: Of tensor parallelism.
    """

    def __init__(self, model: ModelSection, *, axis: Axis):
        super().__init__()
        self.axis = axis
        width, inner = model.d_model, model.feed_forward_width
        self.gate = ColumnParallelLinear(width, inner, std=model.init_std)
        self.up = ColumnParallelLinear(width, inner, std=model.init_std)
        self.down = RowParallelLinear(inner, width, std=_down_std(model), axis=axis)

    def exchanges(self) -> Exchanges:
        """The joint product of gate and up, and the output."""
        return joint_exchanges(self.gate, self.up).then(self.down.exchanges())

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]; with several ranks, own tokens [n, D] -> [n, D]."""
        gate, up = joint_linear(x, self.gate, self.up, axis=self.axis).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class LowRankSwiGLU(nn.Module):
    """The same of low-rank linears; what lies between their bottlenecks is one operator.

    Args:
        model: Widths and rank.
        axis: Of tensor parallelism.
    """

    def __init__(self, model: ModelSection, *, axis: Axis):
        super().__init__()
        self.axis = axis
        width, inner, rank = model.d_model, model.feed_forward_width, model.feed_forward_rank
        self.gate = LowRankColumn(width, inner, rank=rank, std=model.init_std)
        self.up = LowRankColumn(width, inner, rank=rank, std=model.init_std)
        self.down = LowRankRow(inner, width, rank=rank, std=_down_std(model), axis=axis)

    def exchanges(self) -> Exchanges:
        """The joint product of gate and up, and the output."""
        return joint_exchanges(self.gate, self.up).then(self.down.exchanges())

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]; with several ranks, own tokens [n, D] -> [n, D]."""
        bottlenecks = joint_bottlenecks(x, self.gate, self.up, axis=self.axis)
        gate, up, down = (local(linear.weight) for linear in (self.gate.up, self.up.up, self.down.down))
        return self.down.finish(low_rank_swiglu(bottlenecks, gate, up, down))


def build_feed_forward(model: ModelSection, *, axis: Axis) -> SwiGLU | LowRankSwiGLU:
    """The feed-forward that the config asks for; arguments as above."""
    return LowRankSwiGLU(model, axis=axis) if model.feed_forward_rank else SwiGLU(model, axis=axis)


def _down_std(model: ModelSection) -> float:
    """Two residual branches a layer: their sum keeps its variance when each is scaled so."""
    return model.init_std / math.sqrt(2 * model.num_layers)
