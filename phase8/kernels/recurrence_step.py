"""One token of the recurrences, whose state is updated in place: what the kernels of whole sequences compute, without chunks.

Shapes: B sequences, H heads, K key size, V value size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_attention_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, memory: Tensor) -> Tensor:
    """One token of gated linear attention.

    Args:
        q: Query [B, H, K], like all that follows in the dtype of the memory.
        k: Key [B, H, K].
        v: Value [B, H, V].
        log_decay: Logarithm of the decay, not positive [B, H].
        memory: State before the token [B, H, K, V]; after the call it is that after the token.

    Returns:
        y [B, H, V].
    """
    decay = log_decay.exp()[..., None]
    written = (1 - decay) * k.shape[-1] ** -0.5 * v
    read = (q[..., None, :] @ memory)[..., 0, :]
    return _write(memory, q, k, written, decay, read)


def delta_rule_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, memory: Tensor) -> Tensor:
    """One token of the gated delta rule.

    Args:
        q: As for `linear_attention_step`, like k, v and log_decay.
        k: Key.
        v: Value.
        log_decay: Logarithm of the decay.
        beta: Share of what the key holds that is replaced, over the squared length of the key [B, H].
        memory: As for `linear_attention_step`.

    Returns:
        y [B, H, V].
    """
    decay = log_decay.exp()[..., None]
    read, held = (torch.stack((q, k), dim=-2) @ memory).unbind(-2)  # the memory is read once
    return _write(memory, q, k, beta[..., None] * (v - decay * held), decay, read)


def green_step(potential: Tensor, energy: Tensor, eta: Tensor, hopping: Tensor, state: Tensor) -> Tensor:
    """One token of the Green scan.

    Args:
        potential: a [B, H].
        energy: E [H].
        eta: Imaginary part of the energy [H].
        hopping: Squared coupling b2 to the previous token [H].
        state: g of the token before [B, H, 2]; after the call it is that of the token.

    Returns:
        g [B, H, 2], the state itself.
    """
    real = energy - potential - hopping * state[..., 0]
    imaginary = eta - hopping * state[..., 1]
    return state.copy_(torch.stack((real, -imaginary), dim=-1) / (real.square() + imaginary.square())[..., None])


def _write(memory: Tensor, q: Tensor, k: Tensor, written: Tensor, decay: Tensor, read: Tensor) -> Tensor:
    """Decays the memory, adds k written^T, and returns what q reads of it, from what it read before."""
    memory.mul_(decay[..., None]).addcmul_(k[..., None], written[..., None, :])
    return decay * read + (q * k).sum(-1, keepdim=True) * written
