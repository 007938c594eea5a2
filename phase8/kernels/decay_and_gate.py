"""What the scalars of a head and token become in the global path: decay, gate and rate. H heads, K head size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

POTENTIAL_MAX = 2.0
# Runs the chain: raw potentials [..., H] to the log of the factor on the decay rate and the term added to the gate, each None without.
RunChain = Callable[[Tensor], tuple[Tensor | None, Tensor | None]]


def bounded_potential(u: Tensor) -> Tensor:
    """The potential of the chain from a raw one."""
    return POTENTIAL_MAX * torch.tanh(u / POTENTIAL_MAX)


@dataclass(frozen=True)
class DecayAndGate:
    """How the scalars of a head and token become decay, gate and rate.

    Args:
        decay_bias: Added to the decay step [H].
        gate_bias: Added to the logit of the gate [H].
        decay_floor: Lowest logarithm of the decay; None: no floor.
        delta_size: Head size, for the delta rule; None: gated linear attention.
        has_silu: Whether the gate is the SiLU of its logit, not the sigmoid.
    """

    decay_bias: Tensor
    gate_bias: Tensor
    decay_floor: float | None
    delta_size: int | None
    has_silu: bool = False

    def of(self, scalars: Tensor, channels: Tensor | None, chain: RunChain | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logarithm of the decay [..., H], gate [..., H, 1 or K], and rate [..., H] (None without the delta rule).

        Args:
            scalars: Numbers of each head [..., H, scalars per head], fp32.
            channels: Logits of a gate per channel [..., H, K]; None: the gate is among the scalars.
            chain: Function that runs the chain; None: there is none.
        """
        columns = iter(scalars.unbind(-1))
        step = next(columns) + self.decay_bias
        logits = (next(columns)[..., None] if channels is None else channels) + self.gate_bias[:, None]
        decay_factor = None
        if chain is not None:
            decay_factor, gate_term = chain(next(columns))
            logits = logits if gate_term is None else logits + gate_term[..., None]
        # Queries and keys are RMS-normalised: the squared length of a key is the head size.
        rate = None if self.delta_size is None else torch.sigmoid(next(columns)) / self.delta_size
        return self._log_decay(step, decay_factor), F.silu(logits) if self.has_silu else torch.sigmoid(logits), rate

    def _log_decay(self, step: Tensor, factor: Tensor | None) -> Tensor:
        """Logarithm of the decay from its step and the chain's logarithm of a factor on it.

        Source: with a floor, arXiv 2609.24797. The factor then is one on the odds, so that the floor holds, and for long memories that is the same.
        """
        if self.decay_floor is not None:
            return self.decay_floor * torch.sigmoid(step if factor is None else step + factor)
        log_decay = -F.softplus(step)
        return log_decay if factor is None else log_decay * torch.exp(factor)
