"""Clipping by the global gradient norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def clip_gradients(parameters: Iterable[nn.Parameter], *, max_norm: float) -> Tensor:
    """Scales all gradients in place so that their global norm is at most `max_norm`.

    Args:
        parameters: Those with a gradient count.
        max_norm: Largest norm; 0: measure only.

    Returns:
        The norm before clipping, a scalar on the device.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in with_gradient])
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(with_gradient, max_norm, norm)
    return norm
