"""The Green chain of a slice, which goes on from the slices before it: one exchange of maps forwards, one of gradients backwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phase8.context_parallel.green_map import gradient_before_slices, gradient_factor, green_map, value_after_slices
from phase8.distributed.collectives import Axis, start_gather
from phase8.kernels.green_scan import green_scan, green_scan_backward

# Real numbers that a rank tells the others about each head of a sequence: a 2 x 2 complex matrix forwards, two complex numbers backwards.
NUMBERS_OF_MAP, NUMBERS_OF_GRADIENT = 8, 4


def green_scan_of_slice(potential: Tensor, energy: Tensor, eta: Tensor, hopping: Tensor, starts: Tensor | None, axis: Axis) -> Tensor:
    """The Green function of this rank's slice [B, T, H, 2]; arguments as of `green_scan`, and the ranks that share the sequence."""
    return _GreenScanOfSlice.apply(potential, energy, eta, hopping, starts, axis)


class _GreenScanOfSlice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, potential: Tensor, energy: Tensor, eta: Tensor, hopping: Tensor, starts: Tensor | None, axis: Axis) -> Tensor:
        maps = start_gather(green_map(potential, energy, eta, hopping, starts)[None], axis)()
        entering = value_after_slices(maps[: axis.index])
        g, _ = green_scan(potential, energy, eta, hopping, starts, entering)
        ctx.axis = axis
        ctx.save_for_backward(g, hopping, starts, entering)
        return g

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        g, hopping, starts, entering = ctx.saved_tensors
        # What comes back from later slices is a gradient of this slice's last value. It is known once all have told what they add by themselves.
        _, _, added = green_scan_backward(grad, g, hopping, starts, entering)
        told = start_gather(torch.stack((added, gradient_factor(g, hopping, starts)))[None], ctx.axis)()
        later = told[ctx.axis.index + 1 :]
        grad = torch.cat((grad[:, :-1], grad[:, -1:] + gradient_before_slices(later[:, 0], later[:, 1])[:, None]), dim=1)
        dpotential, dscalars, _ = green_scan_backward(grad, g, hopping, starts, entering)
        return dpotential, *dscalars.unbind(0), None, None
