"""Clipping by the global gradient norm; the optimizer applies it, so that no extra pass over the gradients is needed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from phase8.accelerator import CPU

_FEW = 16  # rows that are not worth it
_ROW = 1 << 16  # numbers whose norm one core of a host takes at a time
EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


def gradient_norm(gradients: Iterable[Tensor | None]) -> Tensor:
    """The global norm of all gradients, a scalar on their device; None, the gradient of a parameter without one, does not count."""
    return torch.nn.utils.get_total_norm([part for gradient in gradients if gradient is not None for part in _parts(gradient)])


def _parts(gradient: Tensor) -> list[Tensor]:
    """Tensors whose norm is that of a gradient: of a large one on a host the norms of rows, since torch takes a norm there on one core."""
    if gradient.device.type != CPU or gradient.numel() < _FEW * _ROW or not gradient.is_contiguous():
        return [gradient]
    flat = gradient.view(-1)
    whole = flat.numel() // _ROW * _ROW
    return [torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1), flat[whole:]]


def clipping_divisor(norm: Tensor, *, max_norm: float) -> Tensor:
    """The divisor that brings gradients of global norm `norm` to at most `max_norm` (0: no limit), an fp32 scalar on the device."""
    if max_norm == 0:
        return torch.ones_like(norm, dtype=torch.float32)
    return ((norm.float() + EPS) / max_norm).clamp(min=1.0)


def step_clipped(optimizer: torch.optim.Optimizer, norm: Tensor, *, max_norm: float, counts: Tensor) -> None:
    """Takes an optimizer step with clipped gradients, or skips it, without reading anything back from the device.

    Torch's fused optimizers divide gradients and skip steps themselves, as its gradient scaler asks them to.

    Args:
        optimizer: Fused optimizer.
        norm: Norm from `gradient_norm`.
        max_norm: Largest global norm; 0: no clipping.
        counts: Scalar on the device; False: weights and optimizer state stay as they are.
    """
    device = optimizer.param_groups[0]["params"][0].device  # the host, where the optimizer is offloaded
    # These wait for the device, and so for gradients that are on their way to the host.
    optimizer.grad_scale = clipping_divisor(norm, max_norm=max_norm).to(device)
    optimizer.found_inf = (~counts).float().to(device)
    optimizer.step()
