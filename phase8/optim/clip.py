"""Clipping by the global gradient norm, without a pass of its own over the gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The global norm of all gradients, a scalar on the device; parameters without a gradient do not count."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clipping_divisor(norm: Tensor, *, max_norm: float) -> Tensor:
    """What gradients of global norm `norm` are divided by so that it is at most `max_norm` (0: no limit), fp32 on the device."""
    if max_norm == 0:
        return torch.ones_like(norm, dtype=torch.float32)
    return ((norm.float() + EPS) / max_norm).clamp(min=1.0)


def step_clipped(optimizer: torch.optim.Optimizer, norm: Tensor, *, max_norm: float, counts: Tensor) -> None:
    """Takes an optimizer step with clipped gradients, or none; neither reads anything back from the device.

    Torch's fused optimizers divide gradients and skip steps themselves, as its gradient scaler asks them to.

    Args:
        optimizer: A fused one.
        norm: From `gradient_norm`.
        max_norm: Largest global norm; 0: no clipping.
        counts: False: leave weights and optimizer state alone (a scalar on the device).
    """
    device = optimizer.param_groups[0]["params"][0].device  # the host's when offloaded
    optimizer.grad_scale = clipping_divisor(norm, max_norm=max_norm).to(device)
    optimizer.found_inf = (~counts).float().to(device)
    optimizer.step()
