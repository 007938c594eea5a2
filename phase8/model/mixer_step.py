"""One token of the Phase 8 mixer for each of several sequences: prepared weights, and a state of constant size that is written in place.

It computes what `Phase8Mixer.forward` computes for a piece of one token, without what only pieces need.

Shapes: B sequences, D model width, H heads of queries, J heads of keys and values, K head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from phase8.kernels.decoding_state import MixerConstants, MixerStepState, TokenPlace
from phase8.kernels.mixer_step import mixer_step
from phase8.kernels.window_ring import fill_ring
from phase8.model.mixer_state import MixerState


@dataclass(frozen=True)
class MixerStep:
    """The mixer for one token of each sequence.

    Args:
        project: Maps the mixer's input [B, D] to q, k and v together [B, (H + 2 J) K].
        project_scalars: Maps it to the scalars of the heads, in fp32; None without a global path.
        project_gate: Maps it to a gate per channel [B, H K]; None: the gate is among the scalars.
        constants: What is computed between the linear layers.
        out: Maps both paths [B, H K] to the summand for the residual stream.
    """

    project: Callable[[Tensor], Tensor]
    project_scalars: Callable[[Tensor], Tensor] | None
    project_gate: Callable[[Tensor], Tensor] | None
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

    def __call__(self, x: Tensor, place: TokenPlace, state: MixerStepState) -> Tensor:
        """Maps the normalised residual stream [B, D] to the summand for it, and writes the state."""
        scalars = None if self.project_scalars is None else self.project_scalars(x)
        channels = None if self.project_gate is None else self.project_gate(x)
        return self.out(mixer_step(self.project(x), scalars, channels, self.constants, state, place))
