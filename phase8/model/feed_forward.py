"""The gated feed-forward of a block.

Source: N. Shazeer, "GLU variants improve transformer" (2020).
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from phase8.config.schema import ModelSection
from phase8.model.linear import build_linear, joint_linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), dense or with low-rank linears.

    Args:
        model: Widths, `ffn` and rank.
    """

    def __init__(self, model: ModelSection):
        super().__init__()
        width, inner = model.d_model, model.feed_forward_width
        rank = model.low_rank_rank if model.ffn == "low_rank_swiglu" else 0
        self.gate = build_linear(width, inner, rank=rank, std=model.init_std)
        self.up = build_linear(width, inner, rank=rank, std=model.init_std)
        # Two residual branches a layer: their sum keeps its variance when each is scaled so.
        self.down = build_linear(inner, width, rank=rank, std=model.init_std / math.sqrt(2 * model.num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        gate, up = joint_linear(x, self.gate, self.up).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
