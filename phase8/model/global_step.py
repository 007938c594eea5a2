"""One token of the global path for each of B sequences. Shapes: H heads, K head size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phase8.kernels.dtypes import at_least_fp32
from phase8.kernels.recurrence_step import delta_rule_step, green_step, linear_attention_step
from phase8.model.decay_and_gate import DecayAndGate, bounded_potential
from phase8.model.norm import PreparedNorm


@dataclass(frozen=True)
class ChainStep:
    """The chain for one token of each of B sequences.

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

    def __call__(self, u: Tensor, state: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Runs the chain over a raw potential [B, H], writes its state [B, H, 2], and returns what it adds, as `GreenChain` does."""
        g = green_step(bounded_potential(u), self.energy, self.eta, self.hopping, state)
        decay, gate = (None if mix is None else (g * mix).sum(-1) for mix in (self.decay_mix, self.gate_mix))
        return decay, gate


@dataclass(frozen=True)
class GlobalStep:
    """The global path for one token of each sequence, with weights that are prepared once.

    Args:
        decay_and_gate: What the scalars become.
        chain: The Green chain; None: there is none.
        norm: Norm of what the recurrence returns.
    """

    decay_and_gate: DecayAndGate
    chain: ChainStep | None
    norm: PreparedNorm

    def __call__(
        self, scalars: Tensor, channels: Tensor | None, q: Tensor, k: Tensor, v: Tensor, memory: Tensor, green: Tensor | None
    ) -> Tensor:
        """The summand for the local path [B, H, K], in the dtype of the memory.

        Args:
            scalars: Numbers of each head, fp32 [B, H, scalars per head].
            channels: Logits of a gate per channel [B, H, K]; None: the gate is among the scalars.
            q: Query [B, H, K].
            k: Key [B, H, K].
            v: Value [B, H, K].
            memory: State of the recurrence [B, H, K, K], written in place.
            green: State of the chain [B, H, 2], written in place; None without the chain.
        """
        chain, state = self.chain, green
        run = None if chain is None or state is None else (lambda u: chain(u, state))
        log_decay, gate, rate = self.decay_and_gate.of(scalars, channels, run)
        q, k, v = (at_least_fp32(part) for part in (q, k, v))
        y = linear_attention_step(q, k, v, log_decay, memory) if rate is None else delta_rule_step(q, k, v, log_decay, rate, memory)
        return gate * self.norm(y)
