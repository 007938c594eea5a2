"""One token of the Phase 8 mixer for each of several sequences: prepared weights, and a state of constant size that is written in place.

It computes what `Phase8Mixer.forward` computes for a piece of one token, without what only pieces need.

Shapes: B sequences, D model width, H heads, K head size, W window, G global tokens, J = G + W slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.kernels.dtypes import at_least_fp32
from phase8.kernels.rotary import turn
from phase8.kernels.window_ring import fill_ring, ring_attention_step
from phase8.model.global_step import GlobalStep
from phase8.model.mixer_state import MixerState
from phase8.model.token_place import TokenPlace


@dataclass(frozen=True)
class MixerStepState:
    """The state of B sequences, in memory that stays where it is.

    Args:
        convolution: Last taps - 1 inputs of the convolution [B, taps - 1, 3 H K].
        keys: Keys of the slots [B, J, H, K]; None without a window.
        values: Values of the slots.
        memory: State of the recurrence [B, H, K, K]; None without a global path.
        green: State of the chain [B, H, 2]; None without a chain.
    """

    convolution: Tensor
    keys: Tensor | None
    values: Tensor | None
    memory: Tensor | None
    green: Tensor | None

    def take_over(self, other: MixerStepState) -> None:
        """Copies a state of a smaller window that has not been full yet."""
        for mine, its in zip(vars(self).values(), vars(other).values(), strict=True):
            if mine is not None:
                mine[:, : its.shape[1]] = its

    def fill(self, rows: Tensor, state: MixerState, *, window: int) -> None:
        """Copies the states of sequences that have been read to the rows with these numbers [n]; `window` is W."""
        self.convolution[rows] = state.convolution
        if self.keys is not None and self.values is not None and state.window is not None:
            fill_ring(self.keys, self.values, rows, state.window, window=window)
        if self.memory is not None and state.global_path is not None:
            self.memory[rows] = state.global_path.memory
        if self.green is not None and state.global_path is not None:
            self.green[rows] = state.global_path.green


@dataclass(frozen=True)
class MixerStep:
    """The mixer for one token of each sequence.

    Args:
        project: Maps the mixer's input [B, D] to q, k and v together [B, 3 H K].
        project_scalars: Maps it to the scalars of the heads, in fp32; None without a global path.
        project_gate: Maps it to a gate per channel [B, H K]; None: the gate is among the scalars.
        out: Maps both paths [B, H K] to the summand for the residual stream.
        taps: Taps of the convolution [taps, 3 H K], fp32 or wider; None: there is no convolution.
        scale: Length of local queries and keys over the root of the head size [H, 1]; None: they keep their length.
        beta: Inverse temperature of the `lorentz` score [H]; None: `dot` score.
        global_path: The global path; None: there is none.
        window: Window W; 0: no local path.
        global_tokens: Global tokens G.
        num_heads: Heads H.
        has_silu: Whether queries and keys of the global path go through SiLU.
        has_rotary: Whether queries and keys of the window have rotary positions.
        eps: Summand of the mean squares.
    """

    project: Callable[[Tensor], Tensor]
    project_scalars: Callable[[Tensor], Tensor] | None
    project_gate: Callable[[Tensor], Tensor] | None
    out: Callable[[Tensor], Tensor]
    taps: Tensor | None
    scale: Tensor | None
    beta: Tensor | None
    global_path: GlobalStep | None
    window: int
    global_tokens: int
    num_heads: int
    has_silu: bool
    has_rotary: bool
    eps: float

    def empty_state(self, batch_size: int, *, head_size: int, dtype: torch.dtype, device: torch.device) -> MixerStepState:
        """The state before the first token."""
        wide = torch.promote_types(dtype, torch.float32)
        heads = (self.num_heads, head_size)

        def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch_size, *shape, dtype=of, device=device)

        num_taps, slots = 1 if self.taps is None else len(self.taps), (self.global_tokens + self.window, *heads)
        has_memory, has_chain = self.global_path is not None, self.global_path is not None and self.global_path.chain is not None
        return MixerStepState(
            zeros(num_taps - 1, 3 * self.num_heads * head_size),
            zeros(*slots) if self.window else None,
            zeros(*slots) if self.window else None,
            zeros(*heads, head_size, of=wide) if has_memory else None,
            zeros(self.num_heads, 2, of=wide) if has_chain else None,
        )

    def __call__(self, x: Tensor, place: TokenPlace, state: MixerStepState) -> Tensor:
        """Maps the normalised residual stream [B, D] to the summand for it, and writes the state."""
        inputs = self._convolve(self.project(x), state.convolution).unflatten(1, (3, self.num_heads, -1))
        qk, v = inputs[:, :2], inputs[:, 2]
        y = None
        if self.window and state.keys is not None and state.values is not None:
            q, k = self._local(qk, place).unbind(1)
            y = ring_attention_step(q, k, v, state.keys, state.values, place.rings[self.window], self.beta)
        if self.global_path is not None and self.project_scalars is not None and state.memory is not None:
            q, k = F.rms_norm(F.silu(qk) if self.has_silu else qk, qk.shape[-1:], eps=self.eps).unbind(1)
            scalars = self.project_scalars(x).unflatten(1, (self.num_heads, -1))
            channels = None if self.project_gate is None else self.project_gate(x).view(v.shape)
            summand = self.global_path(scalars, channels, q, k, v, state.memory, state.green).to(v.dtype)
            y = summand if y is None else y + summand
        assert y is not None  # a mixer has at least one path
        return self.out(y.flatten(1))

    def _convolve(self, x: Tensor, before: Tensor) -> Tensor:
        """The convolution of one input [B, 3 H K] with those before it, which are moved up by one."""
        if self.taps is None:
            return x
        seen = torch.cat((before, x[:, None]), dim=1)
        before.copy_(seen[:, 1:])
        return (seen * self.taps).sum(1).to(x.dtype)

    def _local(self, qk: Tensor, place: TokenPlace) -> Tensor:
        """Queries and keys of the window [B, 2, H, K]."""
        if self.has_rotary:
            qk = turn(qk, place.cos, place.sin)
        if self.scale is None:
            return qk
        return (F.rms_norm(at_least_fp32(qk), qk.shape[-1:], eps=self.eps) * self.scale).to(qk.dtype)
