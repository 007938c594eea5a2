"""One block: x + mixer(norm(x)), then x + feed_forward(norm(x))."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from phase8.config.schema import ModelSection
from phase8.distributed.collectives import Axis
from phase8.exchanges import Exchanges
from phase8.model.attention import AttentionState, CausalAttention
from phase8.model.feed_forward import build_feed_forward
from phase8.model.mixer import MixerState, Phase8Mixer
from phase8.model.norm import RMSNorm

BlockState = MixerState | AttentionState


class Block(nn.Module):
    """The Phase 8 block, or the transformer's; they differ in the mixer only.

    Args:
        model: Which block, and its widths.
        layer: Which layer of the model it is.
        axis: Of tensor parallelism.
        recompute: Activations recomputed in backward: `full` (all) or `selective` (the mixer's); otherwise none by the block itself.
    """

    def __init__(self, model: ModelSection, layer: int, *, axis: Axis, recompute: str = "none"):
        super().__init__()
        self.mixer_norm = RMSNorm(model.d_model, eps=model.norm_eps)
        self.mixer = Phase8Mixer(model, window=model.window_sizes[layer], axis=axis) if model.block == "phase8" else CausalAttention(model, axis=axis)
        self.feed_forward_norm = RMSNorm(model.d_model, eps=model.norm_eps)
        self.feed_forward = build_feed_forward(model, axis=axis)
        self.recompute = recompute
        # A block recomputes itself where it can: torch.compile then sees what backward does not need again, the last matrix product.
        # Torch 2.11 would keep what an autograd.Function in there returns, and tensor-parallel layers are such functions.
        self.is_recomputed_inside = recompute == "full" and axis.size == 1
        self.is_recomputed_outside = recompute == "full" and axis.size > 1

    def exchanges(self, *, recompute: str) -> Exchanges:
        """Those of mixer and feed-forward; backward begins with what it recomputes.

        Args:
            recompute: `none`, `full` (all of the block), `selective` (mixer and its norm) or `budget` (on one tensor-parallel rank only).
        """
        mixer = self.mixer.exchanges()
        block = mixer.then(self.feed_forward.exchanges())
        repeated = {"full": block.repeated, "selective": mixer.repeated}.get(recompute, ())
        return replace(block, backward=repeated + block.backward)

    def forward(
        self, x: Tensor, angles: Tensor, starts: Tensor | None = None, state: BlockState | None = None
    ) -> tuple[Tensor, BlockState | None]:
        """Residual stream [B, T, D] after the block, with several ranks its own tokens [n, D]; and the state to carry on (None without `state`)."""
        if self.is_recomputed_inside and torch.is_grad_enabled():
            return recomputed(self._forward, x, angles, starts, state)
        return self._forward(x, angles, starts, state)

    def _forward(self, x: Tensor, angles: Tensor, starts: Tensor | None, state: BlockState | None) -> tuple[Tensor, BlockState | None]:
        if self.recompute == "selective" and torch.is_grad_enabled():
            y, state = recomputed(self._mix, x, angles, starts, state)
        else:
            y, state = self._mix(x, angles, starts, state)
        x = x + y
        return x + self.feed_forward(self.feed_forward_norm(x)), state

    def _mix(self, x: Tensor, angles: Tensor, starts: Tensor | None, state: BlockState | None) -> tuple[Tensor, BlockState | None]:
        return self.mixer(self.mixer_norm(x), angles, starts, state)


def recomputed(function: Callable[..., Any], *arguments: object) -> Any:
    """What the function returns, which backward computes again."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)  # nothing is random
