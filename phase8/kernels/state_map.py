"""What a slice of a sequence does to the state of a recurrence, as an affine map: slices on different ranks know each other by it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from phase8.kernels.gated_delta_rule import gated_delta_rule
from phase8.kernels.gated_linear_attention import added_state


class StateMap(NamedTuple):
    """What a slice of a sequence does to the state that enters it: S -> matrix S + added, exactly, whatever S is.

    Args:
        matrix: What the slice keeps of the state [B, H, K, K].
        added: What it adds [B, H, K, V].
    """

    matrix: Tensor
    added: Tensor

    def __call__(self, state: Tensor) -> Tensor:
        """The state after the slice."""
        return self.matrix @ state + self.added

    def then(self, later: StateMap) -> StateMap:
        """The map of this slice and the next one together."""
        return StateMap(later.matrix @ self.matrix, later(self.added))


class DecayMap(NamedTuple):
    """As `StateMap`, where the slice keeps a share of the state: S -> matrix * S + added.

    Args:
        matrix: The share of each head, K times [B, H, K, 1].
        added: What the slice adds [B, H, K, V].
    """

    matrix: Tensor
    added: Tensor

    def __call__(self, state: Tensor) -> Tensor:
        """The state after the slice."""
        return self.matrix * state + self.added

    def then(self, later: DecayMap) -> DecayMap:
        """The map of this slice and the next one together."""
        return DecayMap(later.matrix * self.matrix, later(self.added))


def state_after(kind: type[StateMap] | type[DecayMap], matrices: Tensor, added: Tensor) -> Tensor:
    """The state after slices of a kind, one after the other, from a state of zeros [B, H, K, V].

    Args:
        kind: What the slices are.
        matrices: Their matrices [n, B, H, K, K or 1]; n may be 0.
        added: What they add [n, B, H, K, V].
    """
    state = added[:0].sum(0)
    for matrix, add in zip(matrices, added, strict=True):
        state = kind(matrix, add)(state)
    return state


def decay_map(k: Tensor, v: Tensor, log_decay: Tensor, starts: Tensor | None = None) -> DecayMap:
    """The map of a slice, arguments as in `gated_linear_attention`: what it makes of no state, and what it keeps of one. Not differentiable."""
    added = added_state(k, v, log_decay, starts)
    keeps = log_decay.sum(1).exp()
    if starts is not None:
        keeps = keeps * ~starts.any(1, keepdim=True)
    return DecayMap(keeps[..., None, None].expand(*added.shape[:-1], 1), added)


def state_map(k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, starts: Tensor | None = None) -> StateMap:
    """The map of a slice of the gated delta rule, arguments as in `gated_delta_rule`; its gradient is the map that backward needs.

    The columns of a state do not meet: K of them, which begin as the identity and are offered no values, become the matrix, and V others what is
    added. Together they would be wider than the kernels take.
    """
    batch, _, num_heads, key_size = k.shape
    identity = torch.eye(key_size, dtype=torch.promote_types(k.dtype, torch.float32), device=k.device).expand(batch, num_heads, -1, -1)
    _, matrix = gated_delta_rule(k, k, torch.zeros_like(k), log_decay, beta, starts, identity)
    _, added = gated_delta_rule(k, k, v, log_decay, beta, starts)
    return StateMap(matrix, added)
