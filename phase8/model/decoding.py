"""The model for one new token of each of several sequences, over a state that is written in place.

Every layer prepares its step once: weights are cast and joined, what depends on parameters alone is computed. A step reads the tokens and their
positions from the device and looks at nothing on the host, so that a CUDA graph can replay it at any position.

Shapes: B sequences, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from phase8.kernels.decoding_state import MixerStepState, TokenPlace
from phase8.kernels.rotary import angles_at
from phase8.model.mixer_step import MixerStep
from phase8.model.norm import PreparedNorm
from phase8.tensor_parallel.linear import PreparedLinear


class FeedForwardStep(Protocol):
    """A feed-forward for decoding."""

    def after_norm(self, norm: PreparedNorm, x: Tensor, summand: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream [B, D] after a summand, and the feed-forward of its norm [B, D]."""


@dataclass(frozen=True)
class BlockStep:
    """A block for one token of each sequence.

    Args:
        mixer_norm: Norm of the mixer's input.
        mixer: The mixer.
        feed_forward_norm: Norm of the feed-forward's input.
        feed_forward: The feed-forward.
        embedding_scalar: Factor of the embedding's output in the block's input [1]; None: it is not added.
    """

    mixer_norm: PreparedNorm
    mixer: MixerStep
    feed_forward_norm: PreparedNorm
    feed_forward: FeedForwardStep
    embedding_scalar: Tensor | None = None

    def __call__(
        self, x: Tensor, summand: Tensor | None, place: TokenPlace, state: MixerStepState, embedded: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The residual stream [B, D] and what is still to be added to it, which the norm that follows does; x and summand as the last result."""
        if self.embedding_scalar is not None:
            of_embedding = embedded * self.embedding_scalar
            summand = of_embedding if summand is None else summand + of_embedding
        x, summand = self.mixer(self.mixer_norm, x, summand, place, state)
        return self.feed_forward.after_norm(self.feed_forward_norm, x, summand)


@dataclass(frozen=True)
class ModelStep:
    """A whole model for one token of each sequence.

    Args:
        head_size: Head size K.
        frequencies: Angle of the rotary positions from one token to the next [K/2].
        capacity: Tokens of a sequence that the transformer has room for; the Phase 8 block has room for any number.
        embedding: Vectors of the token ids, in the dtype of the residual stream [V, D].
        blocks: The blocks.
        norm: Final norm.
        head: The output head, with a weight [V, D].
    """

    head_size: int
    frequencies: Tensor
    capacity: int
    embedding: Tensor
    blocks: tuple[BlockStep, ...]
    norm: PreparedNorm
    head: PreparedLinear

    def empty_states(self, batch_size: int) -> list[MixerStepState]:
        """The state of every block before the first token of each sequence."""
        options = {"head_size": self.head_size, "dtype": self.embedding.dtype, "device": self.embedding.device}
        return [block.mixer.empty_state(batch_size, **options) for block in self.blocks]

    def with_capacity(self, capacity: int) -> ModelStep:
        """The same step of a transformer with another capacity."""

        def enlarged(mixer: MixerStep) -> MixerStep:
            return replace(mixer, constants=replace(mixer.constants, window=capacity))

        return replace(self, capacity=capacity, blocks=tuple(replace(block, mixer=enlarged(block.mixer)) for block in self.blocks))

    def __call__(self, tokens: Tensor, position: Tensor, states: Sequence[MixerStepState], *, longest: int | None = None) -> Tensor:
        """Reads one token of each sequence, and writes the states.

        Args:
            tokens: Token ids [B].
            position: Number of tokens before each in its sequence, int64 [B].
            states: State of every block.
            longest: As in `TokenPlace`.

        Returns:
            Logits of the next token, fp32 [B, V].
        """
        angles = angles_at(position, self.frequencies)
        place = TokenPlace(position, angles.cos(), angles.sin(), longest)
        embedded = F.embedding(tokens, self.embedding)
        x, summand = embedded, None
        for block, state in zip(self.blocks, states, strict=True):
            x, summand = block(x, summand, place, state, embedded)
        return self.norm.then(self.head, x, summand)[1].float()
