"""One token of each of B sequences through a mixture of experts, without a look at what the tokens have chosen.

Few tokens read the weights of their choices alone; more tokens than that are computed by every expert, and what nobody has chosen does not count:
either way shapes are fixed.

Shapes: k choices of a token, E experts, F width of an expert, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.model.norm import PreparedNorm

# Logits [B, E] to scores [B, E], chosen experts [B, k] and their weights [B, k].
Choose = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


class ExpertsOfTokens(Protocol):
    """The experts of a layer, for few tokens."""

    num_experts: int

    def of_chosen(self, x: Tensor, chosen: Tensor) -> Tensor:
        """What the chosen experts [B, k] make of tokens [B, D]: [B, k, D]."""

    def of_all(self, x: Tensor) -> Tensor:
        """What every expert makes of tokens [B, D]: [E, B, D]."""


@dataclass(frozen=True)
class PreparedExperts:
    """Experts whose weights have the dtype of the tokens.

    Args:
        gate: Weights of the gates [E, F, D].
        up: Weights up [E, F, D].
        down: Weights down [E, D, F].
    """

    gate: Tensor
    up: Tensor
    down: Tensor

    @property
    def num_experts(self) -> int:
        """The number of experts."""
        return len(self.gate)

    def of_chosen(self, x: Tensor, chosen: Tensor) -> Tensor:
        """What the chosen experts make of tokens."""
        gate, up, down = (weight[chosen] for weight in (self.gate, self.up, self.down))  # [B, k, ...]
        x = x[:, None, :, None]
        return (down @ (F.silu(gate @ x) * (up @ x)))[..., 0]

    def of_all(self, x: Tensor) -> Tensor:
        """What every expert makes of tokens."""
        return (F.silu(x @ self.gate.mT) * (x @ self.up.mT)) @ self.down.mT


@dataclass(frozen=True)
class ExpertsStep:
    """A mixture of experts for decoding.

    Args:
        score: Maps tokens [B, D] to logits of the experts [B, E], fp32 or wider.
        choose: Chooses experts.
        experts: The experts.
        shared: Experts that compute all tokens; None: there are none.
    """

    score: Callable[[Tensor], Tensor]
    choose: Choose
    experts: ExpertsOfTokens
    shared: Callable[[Tensor], Tensor] | None

    def __call__(self, x: Tensor) -> Tensor:
        """Maps tokens [B, D] to [B, D]."""
        _, chosen, weights = self.choose(self.score(x))
        y = self._by_chosen(x, chosen, weights) if chosen.numel() < self.experts.num_experts else self._by_all(x, chosen, weights)
        return y if self.shared is None else y + self.shared(x)

    def after_norm(self, norm: PreparedNorm, x: Tensor, summand: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream [B, D] after a summand, and the experts of its norm."""
        x, normed = norm(x, summand)
        return x, self(normed)

    def _by_chosen(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return (self.experts.of_chosen(x, chosen) * weights[..., None]).sum(1).to(x.dtype)

    def _by_all(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        of_all = torch.zeros(len(x), self.experts.num_experts, dtype=weights.dtype, device=x.device).scatter_(1, chosen, weights)
        return (self.experts.of_all(x) * of_all.T[..., None]).sum(0).to(x.dtype)
