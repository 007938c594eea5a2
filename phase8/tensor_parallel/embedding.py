"""The token embedding with its vocabulary divided over the ranks.

Shapes: B batch, T tokens, N = B T, n own tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase8.distributed.collectives import Axis, scatter_tokens
from phase8.division import part
from phase8.exchanges import Exchanges, scattered
from phase8.tensor_parallel.parameters import ParameterSpec, local


class VocabularyParallelEmbedding(nn.Module):
    """One vector per token id; a rank holds the vectors of its share of the ids.

    Args:
        vocab_size: Vocabulary size V; a share is V / ranks ids rounded up, and the last shares may be smaller.
        width: Model width D.
        std: Standard deviation of the initial vectors.
        dtype: Dtype of the residual stream that begins here.
        axis: Axis of tensor parallelism.
    """

    def __init__(self, vocab_size: int, width: int, *, std: float, dtype: torch.dtype, axis: Axis):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        self.vocab_size, self.std, self.dtype, self.axis = vocab_size, std, dtype, axis

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        """Normal values without weight decay, under which rare tokens would fade between their occurrences."""
        return {"weight": ParameterSpec(std=self.std, divided={"tp": 0})}

    def exchanges(self) -> Exchanges:
        """The sum and scatter of the vectors that each rank finds."""
        return scattered(self.weight.shape[1])

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps token ids [B, T] to vectors [B, T, D]; with several ranks, to those of the own tokens [n, D]."""
        weight = local(self.weight)
        if self.axis.size == 1:
            return F.embedding(tokens, weight).to(self.dtype)
        own = tokens - first_id(self.vocab_size, self.axis)
        is_here = (own >= 0) & (own < weight.shape[0])
        found = F.embedding(own.where(is_here, 0), weight).to(self.dtype)
        return scatter_tokens(found.where(is_here[..., None], 0), self.axis)


def first_id(vocab_size: int, axis: Axis) -> int:
    """The first token id of this rank's share."""
    return part(vocab_size, axis.size, axis.index).start
