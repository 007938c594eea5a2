"""The Green scan as one operator. It is opaque to the compiler, so complex numbers never enter a compiled graph; only g is saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phase8.kernels.backends import uses_triton
from phase8.kernels.limits import MAX_SCANNED
from phase8.kernels.reference import green_scan as reference


def _takes_triton(x: Tensor) -> bool:
    """Whether a potential [B, T, H] or g [B, T, H, 2] is scanned by the kernel, which steps over a potential in place and writes a g without gaps."""
    num_scanned = x.shape[1] * max(x.stride(1), 2 * x.shape[2])
    return uses_triton(x) and x.dtype == torch.float32 and x.numel() > 0 and num_scanned < MAX_SCANNED


@torch.library.custom_op("phase8::green_scan", mutates_args=())
def _forward(
    potential: Tensor, energy: Tensor, eta: Tensor, hopping: Tensor, starts: Tensor | None, initial_state: Tensor | None
) -> Tensor:
    if _takes_triton(potential):
        from phase8.kernels.gpu import green_scan as gpu

        return gpu.green_scan(potential, energy, eta, hopping, starts, initial_state)
    # Contiguous for any strides of the potential, as the fake promises to the compiler.
    return reference.green_scan(potential, energy, eta, hopping, starts, initial_state).contiguous()


@torch.library.custom_op("phase8::green_scan_backward", mutates_args=())
def _backward(grad: Tensor, g: Tensor, hopping: Tensor, starts: Tensor | None, initial_state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of potential [B, T, H], of energy, eta and hopping [3, H], and of initial_state [B, H, 2]."""
    if _takes_triton(g):
        from phase8.kernels.gpu import green_scan_backward as gpu

        return gpu.green_scan_backward(grad, g, hopping, starts, initial_state)
    dpotential, denergy, deta, dhopping, dinitial = reference.green_scan_backward(grad, g, hopping, starts, initial_state)
    # clone: an operator may not return two views of one tensor.
    layout = torch.contiguous_format
    return dpotential.clone(memory_format=layout), torch.stack((denergy, deta, dhopping)), dinitial.clone(memory_format=layout)


@_forward.register_fake
def _(potential: Tensor, energy: Tensor, eta: Tensor, hopping: Tensor, starts: Tensor | None, initial_state: Tensor | None) -> Tensor:
    return potential.new_empty((*potential.shape, 2))


@_backward.register_fake
def _(grad: Tensor, g: Tensor, hopping: Tensor, starts: Tensor | None, initial_state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return g.new_empty(g.shape[:-1]), g.new_empty((3, *hopping.shape)), g.new_empty((g.shape[0], *g.shape[2:]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, _, hopping, starts, initial_state = inputs
    ctx.save_for_backward(output, hopping, starts, initial_state)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    g, hopping, starts, initial_state = ctx.saved_tensors
    dpotential, dscalars, dinitial = _backward(grad, g, hopping, starts, initial_state)
    return dpotential, *dscalars.unbind(0), None, None if initial_state is None else dinitial


_forward.register_autograd(_autograd, setup_context=_setup_context)


def green_scan_backward(
    grad: Tensor, g: Tensor, hopping: Tensor, starts: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients without autograd: of potential [B, T, H], of energy, eta and hopping [3, H], and of initial_state; arguments as in the reference."""
    return _backward(grad, g, hopping, starts, initial_state)


def green_scan(
    potential: Tensor, energy: Tensor, eta: Tensor, hopping: Tensor, starts: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The causal Green function g and the state to carry on; arguments and shapes as in the reference of the same name.

    Returns:
        g [B, T, H, 2] and its last token [B, H, 2].
    """
    g = _forward(potential, energy, eta, hopping, starts, initial_state)
    return g, g[:, -1]
