"""The model for one new token of each of several sequences, over a state that is written in place.

Every layer prepares its step once: weights are cast and joined, what depends on parameters alone is computed. A step reads the tokens and their
positions from the device and looks at nothing on the host, so that a CUDA graph can replay it at any position.

Shapes: B sequences, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from phase8.kernels.decoding_state import MixerStepState, TokenPlace
from phase8.kernels.rotary import angles_at
from phase8.model.mixer_step import MixerStep
from phase8.model.norm import PreparedNorm


@dataclass(frozen=True)
class BlockStep:
    """A block for one token of each sequence.

    Args:
        mixer_norm: Norm of the mixer's input.
        mixer: The mixer.
        feed_forward_norm: Norm of the feed-forward's input.
        feed_forward: Maps [B, D] to [B, D].
    """

    mixer_norm: PreparedNorm
    mixer: MixerStep
    feed_forward_norm: PreparedNorm
    feed_forward: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor, summand: Tensor | None, place: TokenPlace, state: MixerStepState) -> tuple[Tensor, Tensor]:
        """The residual stream [B, D] and what is still to be added to it, which the norm that follows does; arguments as the result of the last."""
        x, normed = self.mixer_norm(x, summand)
        x, normed = self.feed_forward_norm(x, self.mixer(normed, place, state))
        return x, self.feed_forward(normed)


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
        head: Weight of the output head [V, D].
    """

    head_size: int
    frequencies: Tensor
    capacity: int
    embedding: Tensor
    blocks: tuple[BlockStep, ...]
    norm: PreparedNorm
    head: Tensor

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
        x, summand = F.embedding(tokens, self.embedding), None
        for block, state in zip(self.blocks, states, strict=True):
            x, summand = block(x, summand, place, state)
        _, normed = self.norm(x, summand)
        return self.logits(normed)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of normalised hidden states [B, D], fp32 [B, V]."""
        return F.linear(hidden, self.head).float()
