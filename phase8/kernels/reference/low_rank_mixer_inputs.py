"""The inputs of the mixer's two paths from the bottlenecks of low-rank q, k and v, in plain torch.

Shapes: B batch, T tokens, H heads, K head size, R rank; 3: queries, keys, values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.kernels.dtypes import at_least_fp32
from phase8.kernels.reference.mixer_inputs import MixerInputs, mixer_inputs, mixer_inputs_backward


def low_rank_mixer_inputs(
    bottlenecks: Tensor,
    ups: list[Tensor],
    taps: Tensor | None,
    angles: Tensor,
    radius: Tensor | None,
    *,
    num_heads: int,
    eps: float,
    silu: bool = False,
    silu_values: bool = False,
    starts: Tensor | None = None,
) -> MixerInputs:
    """Products with the up weights, then convolution, rotation and normalisation.

    Args:
        bottlenecks: Those of q, of k and of v [B, T, 3 R].
        ups: Weights of q, k and v [H K, R] each, cast to the dtype of the bottlenecks.
        taps: Taps of the convolution of each channel, the last one for the token itself [3 H K, taps]; None: no convolution.
        angles: Rotary angles of the positions [T, K/2].
        radius: Length to which local queries and keys are scaled, per head [H]; None: they keep their length.
        num_heads: H.
        eps: Added to the mean squares.
        silu: Whether queries and keys of the global path pass through SiLU before they are normalised.
        silu_values: Whether values pass through SiLU.
        starts: True where a token begins a document, whose convolution sees nothing before it [B, T]; None: nowhere.

    Returns:
        The inputs.
    """
    qkv = _projected(bottlenecks, ups, num_heads)
    return mixer_inputs(qkv, taps, angles, radius, eps=eps, silu=silu, silu_values=silu_values, starts=starts)[0]


def _projected(bottlenecks: Tensor, ups: list[Tensor], num_heads: int) -> Tensor:
    """q, k and v [B, T, 3, H, K]."""
    parts = (F.linear(h, up.to(h.dtype)) for h, up in zip(bottlenecks.chunk(3, dim=-1), ups, strict=True))
    return torch.stack([part.unflatten(2, (num_heads, -1)) for part in parts], dim=2)


def low_rank_mixer_inputs_backward(
    gradients: MixerInputs,
    bottlenecks: Tensor,
    ups: list[Tensor],
    taps: Tensor | None,
    angles: Tensor,
    radius: Tensor | None,
    *,
    num_heads: int,
    eps: float,
    silu: bool,
    silu_values: bool,
    starts: Tensor | None,
) -> tuple[Tensor, list[Tensor], Tensor | None, Tensor | None]:
    """Gradients of bottlenecks, up weights, taps and radius, without autograd; arguments as in the forward."""
    wide, ups_wide = at_least_fp32(bottlenecks), [at_least_fp32(up) for up in ups]
    qkv = _projected(wide, ups_wide, num_heads)
    dqkv, dtaps, dradius = mixer_inputs_backward(
        gradients, qkv, taps, angles, radius, eps=eps, silu=silu, silu_values=silu_values, starts=starts
    )
    parts = [part.flatten(0, 1) for part in dqkv.flatten(3).unbind(2)]
    dbottlenecks = torch.cat([part @ up for part, up in zip(parts, ups_wide, strict=True)], dim=-1).to(bottlenecks.dtype)
    dups = [(part.T @ h.flatten(0, 1)).to(up.dtype) for part, h, up in zip(parts, wide.chunk(3, dim=-1), ups, strict=True)]
    return dbottlenecks.view(bottlenecks.shape), dups, dtaps, dradius
