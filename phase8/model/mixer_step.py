"""One token of the Phase 8 mixer for each of several sequences: prepared weights, and a state of constant size that is written in place.

It computes what `Phase8Mixer.forward` computes for a piece of one token, without what only pieces need.

Shapes: B sequences, D model width, H heads of queries, J heads of keys and values, K head size, R rank of a gate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from phase8.kernels.decoding_product import normed_product
from phase8.kernels.decoding_state import MixerConstants, MixerStepState, TokenPlace
from phase8.kernels.mixer_step import mixer_step
from phase8.kernels.window_ring import fill_ring
from phase8.model.mixer_state import MixerState
from phase8.model.norm import PreparedNorm

# The residual stream [B, D]; q, k and v together [B, (H + 2 J) K]; the scalars of the heads; the bottleneck of a gate per channel [B, R].
Projected = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class SeparateProjections:
    """The linear layers before the mixer.

    Args:
        qkv: Maps the mixer's input [B, D] to q, k and v together [B, (H + 2 J) K].
        scalars: Maps it to the scalars of the heads, in fp32; None without a global path.
        gate: Maps it to the bottleneck of a gate per channel [B, R]; None: the gate is among the scalars.
    """

    qkv: Callable[[Tensor], Tensor]
    scalars: Callable[[Tensor], Tensor] | None = None
    gate: Callable[[Tensor], Tensor] | None = None

    def __call__(self, norm: PreparedNorm, x: Tensor, summand: Tensor | None) -> Projected:
        """The residual stream after a summand, and the outputs of the layers for its norm."""
        if self.scalars is None:
            return *norm.then(self.qkv, x, summand), None, None
        x, normed = norm(x, summand)
        return x, self.qkv(normed), self.scalars(normed), None if self.gate is None else self.gate(normed)


@dataclass(frozen=True)
class JointProjections:
    """The same layers of a dense mixer as one product, whose results are not rounded; on a GPU, where every launch counts.

    Args:
        weight: Weights of q, k and v, of the bottleneck of the gates, and of the scalars, joined [F, D].
        num_scalars: Scalars of all heads.
        rank: Width R of the bottleneck; 0: the gate is among the scalars.
    """

    weight: Tensor
    num_scalars: int
    rank: int

    def __call__(self, norm: PreparedNorm, x: Tensor, summand: Tensor | None) -> Projected:
        """The residual stream after a summand, and the outputs of the layers for its norm, in fp32."""
        x, y = normed_product(x, summand, norm.weight, norm.eps, self.weight, is_wide=True)
        qkv, gate, scalars = y.split((len(self.weight) - self.rank - self.num_scalars, self.rank, self.num_scalars), dim=1)
        return x, qkv, scalars, gate if self.rank else None


@dataclass(frozen=True)
class MixerStep:
    """The mixer for one token of each sequence.

    Args:
        project: The linear layers before it.
        constants: What is computed between the linear layers.
        out: Maps both paths [B, H K] to the summand for the residual stream.
    """

    project: SeparateProjections | JointProjections
    constants: MixerConstants
    out: Callable[[Tensor], Tensor]

    def empty_state(self, batch_size: int, *, head_size: int, dtype: torch.dtype, device: torch.device) -> MixerStepState:
        """The state before the first token."""
        constants = self.constants
        heads, key_heads = (constants.num_heads, head_size), (constants.num_key_heads, head_size)

        def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch_size, *shape, dtype=of, device=device)

        num_taps, wide = 1 if constants.taps is None else len(constants.taps), torch.promote_types(dtype, torch.float32)
        slots, path = constants.global_tokens + constants.window, constants.global_path
        return MixerStepState(
            zeros(num_taps - 1, (heads[0] + 2 * key_heads[0]) * head_size),
            zeros(slots, *key_heads) if constants.window else None,
            zeros(slots, *key_heads) if constants.window else None,
            None if path is None else zeros(*heads, head_size, of=wide),
            None if path is None or path.chain is None else zeros(heads[0], 2, of=wide),
            zeros(heads[0], of=torch.int32),
        )

    def fill(self, state: MixerStepState, rows: Tensor, read: MixerState) -> None:
        """Copies the states of sequences that have been read to the rows with these numbers [n]."""
        state.convolution[rows] = read.convolution
        if state.keys is not None and state.values is not None and read.window is not None:
            fill_ring(state.keys, state.values, rows, read.window, window=self.constants.window)
        if state.memory is not None and read.global_path is not None:
            state.memory[rows] = read.global_path.memory
        if state.green is not None and read.global_path is not None:
            state.green[rows] = read.global_path.green

    def __call__(self, norm: PreparedNorm, x: Tensor, summand: Tensor | None, place: TokenPlace, state: MixerStepState) -> tuple[Tensor, Tensor]:
        """The residual stream [B, D] after a summand, and the next one from its norm; it writes the state."""
        x, qkv, scalars, gate = self.project(norm, x, summand)
        return x, self.out(mixer_step(qkv, scalars, gate, self.constants, state, place))
