"""A learned number of a block with which the embedding's output is added to the residual stream before the block.

Source: K. Jordan et al., modded-nanoGPT (2024), "x0 lambdas".

Shapes: N tokens of this rank, in any number of dims; D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from phase8.tensor_parallel.parameters import ParameterSpec, local


class EmbeddingScalar(nn.Module):
    """The number s of a block whose input is x + s * e, where e is the output of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        """A number that begins at zero, with which the block is one without it."""
        return {"weight": ParameterSpec(value=0.0)}

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """The input [N, D] of the block, from the stream after the block before it and the output of the embedding."""
        return torch.addcmul(x, embedded, local(self.weight).to(x.dtype))

    def prepared(self, dtype: torch.dtype) -> Tensor:
        """The number for decoding with a residual stream of a dtype [1]."""
        return self.weight.detach().to(dtype)
