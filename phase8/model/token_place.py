"""Where the next token of each sequence stands, on the device: the same for all layers, and computed once for each token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from phase8.config.model_section import ModelSection
from phase8.kernels.rotary import angles_at, rotary_frequencies
from phase8.kernels.window_ring import RingPlace, ring_place


@dataclass(frozen=True)
class TokenPlace:
    """The places of one token of each of B sequences.

    Args:
        position: Number of tokens before it in its sequence, int64 [B].
        cos: Cosines of the rotary angles [B, 1, 1, K/2].
        sin: Sines of the same.
        rings: Places in the rings of keys and values, for each window.
    """

    position: Tensor
    cos: Tensor
    sin: Tensor
    rings: Mapping[int, RingPlace]


class TokenPlaces:
    """Computes the places of tokens from their positions.

    Args:
        model: Model section.
        windows: Windows of the layers; 0: a layer has none.
        dtype: Dtype of the residual stream.
        device: Device of the positions.
    """

    def __init__(self, model: ModelSection, windows: Iterable[int], *, dtype: torch.dtype, device: torch.device):
        self._frequencies = rotary_frequencies(model.head_width, base=model.rope_base, device=device)
        self._windows, self._dtype = sorted(set(windows) - {0}), dtype
        self._global_tokens = model.global_tokens if model.block == "phase8" else 0

    def __call__(self, position: Tensor) -> TokenPlace:
        """The places of the tokens at these positions, int64 [B]."""
        angles = angles_at(position, self._frequencies)[:, None, None]
        rings = {w: ring_place(position, window=w, global_tokens=self._global_tokens, dtype=self._dtype) for w in self._windows}
        return TokenPlace(position, angles.cos(), angles.sin(), rings)
