"""Computes where the next token of each sequence stands, on the device, once for all layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from phase8.config.model_section import ModelSection
from phase8.kernels.decoding_state import TokenPlace
from phase8.kernels.rotary import angles_at, rotary_frequencies
from phase8.kernels.window_ring import ring_place


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
        angles = angles_at(position, self._frequencies)
        rings = {w: ring_place(position, window=w, global_tokens=self._global_tokens, dtype=self._dtype) for w in self._windows}
        return TokenPlace(position, angles.cos(), angles.sin(), rings)
