"""Rotary positions: each pair of channels of q and k turns by an angle proportional to the position.

Source: J. Su et al., "RoFormer" (2021); S. Chen et al., "Extending context window" (2023), for linear scaling; the models of Llama 3.1 for theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phase8.config.rope_scaling import UNSCALED, RopeScaling
from phase8.kernels.dtypes import at_least_fp32


def rotary_frequencies(head_size: int, *, base: float, rope_scaling: RopeScaling = UNSCALED, device: torch.device) -> Tensor:
    """Angle per token of every pair of channels in radians, fp64 [K/2]."""
    frequencies = base ** (-torch.arange(0, head_size, 2, dtype=torch.float64, device=device) / head_size)
    if rope_scaling.type == "none":
        return frequencies
    divided = frequencies / rope_scaling.factor
    if rope_scaling.type == "linear":
        return divided
    turns = rope_scaling.original_sequence_length * frequencies / (2 * torch.pi)
    low, high = rope_scaling.low_frequency_factor, rope_scaling.high_frequency_factor
    return divided.lerp(frequencies, ((turns - low) / (high - low)).clamp(0, 1))


def rotary_angles(
    num_tokens: int, head_size: int, *, base: float, rope_scaling: RopeScaling = UNSCALED, first_position: int, device: torch.device
) -> Tensor:
    """Angles of every position, fp32 [T, K/2]; the frequencies are computed in fp64 so that far positions keep their phase."""
    frequencies = rotary_frequencies(head_size, base=base, rope_scaling=rope_scaling, device=device)
    positions = torch.arange(first_position, first_position + num_tokens, dtype=torch.float64, device=device)
    return torch.remainder(positions[:, None] * frequencies, 2 * torch.pi).float()


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """`x` [B, T, H, K] turned by `angles` [T, K/2]; channel i pairs with channel i + K/2."""
    first, second = at_least_fp32(x).chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)
