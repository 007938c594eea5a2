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
from phase8.precision.formats import NumberFormat
from phase8.tensor_parallel.linear import ColumnParallelLinear, JointColumnLinear, LowRankColumn, LowRankRow, RowParallelLinear
from phase8.tensor_parallel.parameters import local


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)).

    Args:
        model: Widths.
        axis: Of tensor parallelism.
        number_format: Computes the products.
    """

    def __init__(self, model: ModelSection, *, axis: Axis, number_format: NumberFormat):
        super().__init__()
        width, inner = model.d_model, model.feed_forward_width
        self.gate = ColumnParallelLinear(width, inner, std=model.init_std)
        self.up = ColumnParallelLinear(width, inner, std=model.init_std)
        self.down = RowParallelLinear(inner, width, std=_down_std(model), axis=axis, number_format=number_format)
        self.gate_and_up = JointColumnLinear((self.gate, self.up), axis, number_format)

    def exchanges(self) -> Exchanges:
        """The joint product of gate and up, and the output."""
        return self.gate_and_up.exchanges().then(self.down.exchanges())

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]; with several ranks, own tokens [n, D] -> [n, D]."""
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class LowRankSwiGLU(nn.Module):
    """The same of low-rank linears; what lies between their bottlenecks is one operator, which computes in the dtype of its operands.

    Args:
        model: Widths and rank.
        axis: Of tensor parallelism.
        number_format: Computes the products before and behind that operator.
    """

    def __init__(self, model: ModelSection, *, axis: Axis, number_format: NumberFormat):
        super().__init__()
        width, inner, rank = model.d_model, model.feed_forward_width, model.feed_forward_rank
        self.gate = LowRankColumn(width, inner, rank=rank, std=model.init_std)
        self.up = LowRankColumn(width, inner, rank=rank, std=model.init_std)
        self.down = LowRankRow(inner, width, rank=rank, std=_down_std(model), axis=axis, number_format=number_format)
        self.gate_and_up = JointColumnLinear((self.gate, self.up), axis, number_format)

    def exchanges(self) -> Exchanges:
        """The joint product of gate and up, and the output."""
        return self.gate_and_up.exchanges().then(self.down.exchanges())

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]; with several ranks, own tokens [n, D] -> [n, D]."""
        bottlenecks = self.gate_and_up.bottlenecks(x)
        gate, up, down = (local(linear.weight) for linear in (self.gate.up, self.up.up, self.down.down))
        return self.down.finish(low_rank_swiglu(bottlenecks, gate, up, down))


def build_feed_forward(model: ModelSection, *, axis: Axis, number_format: NumberFormat) -> SwiGLU | LowRankSwiGLU:
    """The feed-forward that the config asks for; arguments as above."""
    kind = LowRankSwiGLU if model.feed_forward_rank else SwiGLU
    return kind(model, axis=axis, number_format=number_format)


def _down_std(model: ModelSection) -> float:
    """Two residual branches a layer: their sum keeps its variance when each is scaled so."""
    return model.init_std / math.sqrt(2 * model.num_layers)
