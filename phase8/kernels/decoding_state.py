"""What one token of a mixer is computed with: numbers that depend on parameters alone, the place of the token, and the state that it writes.

Shapes: B sequences, H heads of queries, J heads of keys and values, K head size, W window, G global tokens, S = G + W slots, R rank of a gate.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from phase8.config.values import SiluOfValues
from phase8.kernels.decay_and_gate import DecayAndGate
from phase8.kernels.window_ring import RingPlace, ring_place


@dataclass(frozen=True)
class TokenPlace:
    """The places of one token of each sequence, the same for all layers.

    Args:
        position: Number of tokens before it in its sequence, int64 [B].
        cos: Cosines of the rotary angles [B, K/2].
        sin: Sines of the same.
        longest: Largest position, if the host may know it; None: the device alone knows.
        rings: Places in the rings of keys and values by window, as far as a layer has asked for them.
    """

    position: Tensor
    cos: Tensor
    sin: Tensor
    longest: int | None = None
    rings: dict[int, RingPlace] = field(default_factory=dict)

    def ring(self, window: int, *, global_tokens: int, dtype: torch.dtype) -> RingPlace:
        """The places in the ring of a window, computed for the first layer that has it; arguments as of `ring_place`."""
        if window not in self.rings:
            self.rings[window] = ring_place(self.position, window=window, global_tokens=global_tokens, dtype=dtype, longest=self.longest)
        return self.rings[window]


@dataclass(frozen=True)
class GreenConstants:
    """Constants of the Green chain.

    Args:
        energy: Energy [H].
        eta: Imaginary part of the energy [H].
        hopping: Squared hopping [H].
        decay_mix: Weights of the factor on the decay [H, 2]; None: the decay is not modulated.
        gate_mix: Weights of the term of the gate [H, 2]; None: the gate is not modulated.
    """

    energy: Tensor
    eta: Tensor
    hopping: Tensor
    decay_mix: Tensor | None
    gate_mix: Tensor | None


@dataclass(frozen=True)
class GlobalConstants:
    """Constants of the global path.

    Args:
        decay_and_gate: What the scalars of a head become.
        chain: The Green chain; None: there is none.
        norm_weight: Weight of the norm of what the recurrence returns [H, K].
        skip: Share of a token's value that is added before the norm [H]; None: none.
    """

    decay_and_gate: DecayAndGate
    chain: GreenConstants | None
    norm_weight: Tensor
    skip: Tensor | None = None


@dataclass(frozen=True)
class MixerConstants:
    """Constants of a mixer.

    Args:
        taps: Taps of the convolution [taps, (H + 2 J) K], fp32 or wider; None: there is no convolution.
        scale: Length of local queries, then of keys, over the root of the head size [H + J]; None: they keep their length.
        beta: Inverse temperature of the `lorentz` score [H]; None: `dot` score.
        global_path: Those of the global path; None: there is none.
        gate_up: Second weight of a gate per channel, whose bottleneck the mixer is given [H K, R]; None: the gate is among the scalars.
        window: Window W; 0: no local path.
        global_tokens: Global tokens G.
        num_heads: Heads H of queries.
        num_key_heads: Heads J of keys and values; with a global path or the `lorentz` score as many as of queries.
        has_silu: Whether queries and keys of the global path go through SiLU.
        has_rotary: Whether queries and keys of the window have rotary positions.
        eps: Summand of the mean squares.
        silu_of_values: Which values go through SiLU.
    """

    taps: Tensor | None
    scale: Tensor | None
    beta: Tensor | None
    global_path: GlobalConstants | None
    gate_up: Tensor | None
    window: int
    global_tokens: int
    num_heads: int
    num_key_heads: int
    has_silu: bool
    has_rotary: bool
    eps: float
    silu_of_values: SiluOfValues = "none"


@dataclass(frozen=True)
class MixerStepState:
    """The state of B sequences, in memory that stays where it is.

    Args:
        convolution: Last taps - 1 inputs of the convolution [B, taps - 1, (H + 2 J) K].
        keys: Keys of the slots [B, S, J, K]; None without a window.
        values: Values of the slots.
        memory: State of the recurrence [B, H, K, K]; None without a global path.
        green: State of the chain [B, H, 2]; None without a chain.
        arrivals: Zeros, in which the programs of a kernel count themselves during a step, int32 [B, H].
    """

    convolution: Tensor
    keys: Tensor | None
    values: Tensor | None
    memory: Tensor | None
    green: Tensor | None
    arrivals: Tensor

    def take_over(self, other: MixerStepState) -> None:
        """Copies a state of a smaller window that has not been full yet."""
        for mine, its in zip(vars(self).values(), vars(other).values(), strict=True):
            if mine is not None:
                mine[:, : its.shape[1]] = its
