"""The short causal convolution on q, k and v, by which a head sees the last few tokens before attention and recurrence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from phase8.exchanges import NO_EXCHANGES, Exchanges, fetched
from phase8.kernels.causal_convolution import causal_convolution
from phase8.tensor_parallel.parameters import ParameterSpec, local


class ShortConvolution(nn.Module):
    """A causal depthwise convolution that starts as the identity; with one tap it is the identity and has no parameter.

    Args:
        num_channels: Channels of k, which v has too, over all tensor-parallel ranks together.
        num_taps: Number of tokens that each output sees.
        num_ranks: Number of tensor-parallel ranks, which divide the channels.
        queries_per_key: Heads of q for each head of k. The weight has a row of channels for each of them, and those of k and v.
        head_size: Channels of a head.
    """

    def __init__(self, num_channels: int, num_taps: int, *, num_ranks: int, head_size: int, queries_per_key: int = 1):
        super().__init__()
        self.num_channels, self.num_taps, self.num_ranks = num_channels, num_taps, num_ranks
        self.queries_per_key, self.head_size = queries_per_key, head_size
        if num_taps > 1:
            self.weight = nn.Parameter(torch.empty(queries_per_key + 2, num_channels, num_taps))

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        """The identity: the last tap is 1, every other 0. Weight decay is off, because it would pull the identity towards zero."""
        if self.num_taps == 1:
            return {}
        identity = torch.zeros(self.queries_per_key + 2, self.num_channels, self.num_taps)
        identity[..., -1] = 1
        return {"weight": ParameterSpec(value=identity, divided={"tp": 1})}

    def exchanges(self) -> Exchanges:
        """The exchange of the inputs before a slice of a sequence."""
        return fetched(self._num_all_channels, before=self.num_taps - 1) if self.num_taps > 1 else NO_EXCHANGES

    @property
    def flops_per_token(self) -> int:
        """FLOPs per token of a forward, for all channels."""
        return 2 * self._num_all_channels * self.num_taps if self.num_taps > 1 else 0

    def empty_state(self, batch_size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The state before the first token, zeros [B, taps - 1, C]."""
        return torch.zeros(batch_size, self.num_taps - 1, self._num_all_channels // self.num_ranks, dtype=dtype, device=device)

    @property
    def taps(self) -> Tensor | None:
        """The taps of the C channels of this rank [C, taps]; None with one tap."""
        if self.num_taps == 1:
            return None
        weight = local(self.weight)
        if self.queries_per_key == 1:
            return weight.flatten(0, 1)
        # The heads of q that share a head of k stand side by side.
        q = weight[:-2].unflatten(1, (-1, self.head_size)).transpose(0, 1).flatten(0, 2)
        return torch.cat((q, weight[-2:].flatten(0, 1)))

    @property
    def _num_all_channels(self) -> int:
        """Channels of q, k and v, over all ranks."""
        return (self.queries_per_key + 2) * self.num_channels

    def forward(self, x: Tensor, starts: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Maps [B, T, C] to [B, T, C], and returns the state for the next piece of the sequence."""
        if self.taps is None:
            return x, x[:, :0]
        return causal_convolution(x, self.taps, starts, state)
