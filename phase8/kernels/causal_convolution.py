"""Causal depthwise convolution of a few taps along the sequence: y_t = sum_j w_j x_{t - (taps - 1) + j}.

Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.kernels.running_sum import running_sum


def causal_convolution(
    x: Tensor, weight: Tensor, starts: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes the convolution and the inputs to carry on.

    Args:
        x: Input [B, T, C].
        weight: Taps of each channel, the last one for the token itself [C, taps].
        starts: True where a token begins a document: earlier tokens count as 0 for it and for what follows [B, T].
        initial_state: The taps - 1 inputs before the first token [B, taps - 1, C]; None: 0.

    Returns:
        y [B, T, C] and the last taps - 1 inputs [B, taps - 1, C]; with an initial state, those of earlier documents than the last are 0.
    """
    length, taps = x.shape[1], weight.shape[1]
    weight = weight.to(x.dtype)
    padded = F.pad(x, (0, 0, taps - 1, 0)) if initial_state is None else torch.cat((initial_state.to(x.dtype), x), dim=1)
    final_state = padded[:, length:] if starts is None or initial_state is None else inputs_to_carry(padded[:, length:], starts)
    # Computed as shifted products: the compiler fuses them with their surroundings, and a CPU takes a seventh of the time of torch's convolution,
    # which has the tokens last in memory, as all that follows would.
    columns = weight.t().contiguous()
    y = x * columns[-1]
    connected = None if starts is None else torch.ones_like(starts)
    for distance in range(1, taps):
        earlier = padded[:, taps - 1 - distance :][:, :length]
        if connected is not None:
            # Token t is connected to t - distance while none of t, ..., t - distance + 1 begins a document.
            connected = connected & ~F.pad(starts, (distance - 1, 0))[:, :length]
            earlier = earlier * connected[..., None]
        y = torch.addcmul(y, earlier, columns[-1 - distance])
    return y, final_state


def inputs_to_carry(last: Tensor, starts: Tensor) -> Tensor:
    """The inputs to carry on, 0 where a later token begins a document: the next piece does not know of it.

    Args:
        last: The last taps - 1 inputs, carried ones among them where the piece is shorter [B, taps - 1, C].
        starts: True where a token of this piece begins a document [B, T].
    """
    later = running_sum(starts, from_end=True) - starts.int()
    later = torch.cat(((later[:, :1] + starts[:, :1]).expand(-1, last.shape[1]), later), dim=1)
    return last * (later[:, starts.shape[1] :] == 0)[..., None]
