"""One block: x + mixer(norm(x)), then x + feed_forward(norm(x))."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from phase8.config.model_section import ModelSection
from phase8.distributed.collectives import ALONE, Axis
from phase8.exchanges import Exchanges, SliceExchange
from phase8.model.attention import AttentionState, CausalAttention
from phase8.model.decoding import BlockStep
from phase8.model.embedding_scalar import EmbeddingScalar
from phase8.model.feed_forward import build_feed_forward
from phase8.model.mixer import Phase8Mixer
from phase8.model.mixer_state import MixerState
from phase8.model.mixture_of_experts import MixtureOfExperts
from phase8.model.norm import RMSNorm
from phase8.precision.formats import OPERAND_DTYPE, NumberFormat

BlockState = MixerState | AttentionState
# Runs a part of a block: called with the part and its arguments, it returns what the part returns.
Run = Callable[..., Any]
BlockOutput = tuple[Tensor, BlockState | None, Mapping[str, Tensor]]


class Block(nn.Module):
    """The Phase 8 block or the transformer block; they differ in the mixer only.

    Args:
        model: Model section with the kind of block and the widths.
        layer: Number of the layer in the model.
        axis: Axis of tensor parallelism.
        number_format: Format that computes the products of the linear layers.
        context: Axis of the ranks that share each sequence.
        expert: Axis of the ranks that share the experts of a layer.
    """

    def __init__(
        self,
        model: ModelSection,
        layer: int,
        *,
        axis: Axis,
        number_format: NumberFormat = OPERAND_DTYPE,
        context: Axis = ALONE,
        expert: Axis = ALONE,
    ):
        super().__init__()
        self.embedding_scalar = EmbeddingScalar() if model.embedding_scalars else None
        self.mixer_norm = RMSNorm(model.d_model, eps=model.norm_eps)
        self.has_rotary = model.has_rotary[layer]
        self.mixer = (
            Phase8Mixer(model.of_window(model.window_sizes[layer]), axis=axis, number_format=number_format, context=context)
            if model.block == "phase8"
            else CausalAttention(model, axis=axis, number_format=number_format, context=context)
        )
        self.feed_forward_norm = RMSNorm(model.d_model, eps=model.norm_eps)
        self.feed_forward = (
            MixtureOfExperts(model, axis=axis, number_format=number_format, context=context, expert=expert)
            if model.has_experts[layer]
            else build_feed_forward(model, axis=axis, number_format=number_format)
        )
        # Three functions run the block's call, the body of that call, and the mixer with its norm; recomputation.py replaces them.
        self.run_outside: Run = call
        self.run_inside: Run = call
        self.run_mixer: Run = call

    @property
    def fetches_little(self) -> bool:
        """Whether what the block exchanges with other slices of a sequence is small, so that a recomputation keeps it instead of exchanging again."""
        return isinstance(self.mixer, Phase8Mixer)

    def exchanges(self, *, recompute: str, is_divided: bool) -> Exchanges:
        """The exchanges of mixer and feed-forward; those of a recomputed forward come first in backward.

        Args:
            recompute: Mode: `none`, `full` (all of the block), `selective` (mixer and its norm) or `budget` (on one tensor-parallel rank only).
            is_divided: Whether tensor-parallel ranks divide the block, which is then recomputed around its call, with all its exchanges.
        """
        mixer = self.mixer.exchanges()
        block = mixer.then(self.feed_forward.exchanges())
        repeated = {"full": block.repeated, "selective": mixer.repeated}.get(recompute, ())
        if self.fetches_little and (recompute == "selective" or not is_divided):
            repeated = tuple(each for each in repeated if not isinstance(each, SliceExchange))
        return replace(block, backward=repeated + block.backward)

    def prepared(self, dtype: torch.dtype, *, capacity: int) -> BlockStep:
        """The block of one rank for decoding with a residual stream of a dtype; `capacity` as for `CausalAttention`."""
        if isinstance(self.mixer, CausalAttention):
            mixer = self.mixer.prepared(dtype, has_rotary=self.has_rotary, capacity=capacity)
        else:
            mixer = self.mixer.prepared(dtype, has_rotary=self.has_rotary)
        scalar = None if self.embedding_scalar is None else self.embedding_scalar.prepared(dtype)
        return BlockStep(self.mixer_norm.prepared(), mixer, self.feed_forward_norm.prepared(), self.feed_forward.prepared(dtype), scalar)

    @staticmethod
    def auxiliary_losses(model: ModelSection) -> tuple[str, ...]:
        """Names of all auxiliary losses that blocks of a model return; a pipeline stage knows them even if its own blocks have none."""
        return MixtureOfExperts.auxiliary_losses(model)

    def learn_from_routing(self, measured: Tensor, is_valid: Tensor) -> None:
        """Makes the router of a block with experts take account of a step.

        Args:
            measured: What the layer measured in the step, summed over the global batch [E + 3].
            is_valid: Scalar on the device; False: the step does not count.
        """
        if isinstance(self.feed_forward, MixtureOfExperts):
            self.feed_forward.learn_from_routing(measured, is_valid)

    def forward(
        self, x: Tensor, angles: Tensor, starts: Tensor | None = None, state: BlockState | None = None, embedded: Tensor | None = None
    ) -> BlockOutput:
        """Applies the block to the residual stream.

        Args:
            x: Residual stream [B, T, D], with several ranks the own tokens [n, D].
            angles: Rotary angles [T, K/2].
            starts: True where a token begins a document [B, T]; None: nowhere.
            state: State after the earlier pieces of the sequence; None: it begins here.
            embedded: Output of the embedding, shaped as `x`, which a block with an embedding scalar adds.

        Returns:
            The stream [B, T, D] after the block, with several ranks the own tokens [n, D]; the state for the next piece (None without
            `state`); and the auxiliary losses by name, scalars that are minimised together with the main loss. Each is a sum over the
            tokens of this rank, like the main loss, and the step divides it by the same number of targets. A layer with experts also
            returns what it measures, as `ROUTING`.
        """
        return self.run_inside(self._forward, x, angles, starts, state, embedded)

    def _forward(self, x: Tensor, angles: Tensor, starts: Tensor | None, state: BlockState | None, embedded: Tensor | None) -> BlockOutput:
        if self.embedding_scalar is not None:
            x = self.embedding_scalar(x, embedded)
        y, state = self.run_mixer(self._mix, x, angles, starts, state)
        x = x + y
        y = self.feed_forward_norm(x)
        if not isinstance(self.feed_forward, MixtureOfExperts):
            return x + self.feed_forward(y), state, {}
        y, measured = self.feed_forward(y, len(angles))
        return x + y, state, measured

    def _mix(self, x: Tensor, angles: Tensor, starts: Tensor | None, state: BlockState | None) -> tuple[Tensor, BlockState | None]:
        angles = angles if self.has_rotary else torch.zeros_like(angles)
        return self.mixer(self.mixer_norm(x), angles, starts, state)


def call(function: Callable[..., Any], *arguments: object) -> Any:
    """Calls the function and returns what it returns: the default `Run`."""
    return function(*arguments)
