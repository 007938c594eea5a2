"""One block: x + mixer(norm(x)), then x + feed_forward(norm(x))."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from phase8.config.schema import ModelSection
from phase8.distributed.collectives import Axis
from phase8.model.attention import AttentionState, CausalAttention
from phase8.model.feed_forward import build_feed_forward
from phase8.model.mixer import MixerState, Phase8Mixer
from phase8.model.norm import RMSNorm

BlockState = MixerState | AttentionState
BlockOutput = tuple[Tensor, BlockState | None, Mapping[str, Tensor]]


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

    @staticmethod
    def auxiliary_losses(model: ModelSection) -> tuple[str, ...]:
        """Names of all auxiliary losses that blocks of a model return; a pipeline stage knows them even if its own blocks have none."""
        return ()

    def forward(self, x: Tensor, angles: Tensor, starts: Tensor | None = None, state: BlockState | None = None) -> BlockOutput:
        """Residual stream, state, and auxiliary losses.

        Returns:
            The stream [B, T, D] after the block, with several ranks its own tokens [n, D]; the state to carry on (None without `state`);
            and by name scalars to be minimised beside the main loss. Each is a sum over the tokens of this rank, like the main loss, and
            the step divides it by the same number of targets.
        """
        if self.is_recomputed_inside and torch.is_grad_enabled():
            return recomputed(self._forward, x, angles, starts, state)
        return self._forward(x, angles, starts, state)

    def _forward(self, x: Tensor, angles: Tensor, starts: Tensor | None, state: BlockState | None) -> BlockOutput:
        if self.recompute == "selective" and torch.is_grad_enabled():
            y, state = recomputed(self._mix, x, angles, starts, state)
        else:
            y, state = self._mix(x, angles, starts, state)
        x = x + y
        return x + self.feed_forward(self.feed_forward_norm(x)), state, {}

    def _mix(self, x: Tensor, angles: Tensor, starts: Tensor | None, state: BlockState | None) -> tuple[Tensor, BlockState | None]:
        return self.mixer(self.mixer_norm(x), angles, starts, state)


def recomputed(function: Callable[..., Any], *arguments: object) -> Any:
    """What the function returns, which backward computes again."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)  # nothing is random
