"""The gated feed-forward of a block.

Source: N. Shazeer, "GLU variants improve transformer" (2020).
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from phase8.config.schema import ModelSection
from phase8.distributed.collectives import Axis
from phase8.tensor_parallel.linear import column_linear, joint_linear, row_linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), dense or with low-rank linears.

    Args:
        model: Widths, `ffn` and rank.
        axis: Of tensor parallelism.
    """

    def __init__(self, model: ModelSection, *, axis: Axis):
        super().__init__()
        self.axis = axis
        width, inner = model.d_model, model.feed_forward_width
        rank = model.feed_forward_rank
        self.gate = column_linear(width, inner, rank=rank, std=model.init_std)
        self.up = column_linear(width, inner, rank=rank, std=model.init_std)
        # Two residual branches a layer: their sum keeps its variance when each is scaled so.
        self.down = row_linear(inner, width, rank=rank, std=model.init_std / math.sqrt(2 * model.num_layers), axis=axis)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]; with several ranks, own tokens [n, D] -> [n, D]."""
        gate, up = joint_linear(x, self.gate, self.up, axis=self.axis).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
