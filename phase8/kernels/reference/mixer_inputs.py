"""The inputs of the mixer's two paths: the projections after convolution, rotation and normalisation.

With c the causal convolution of the projections: the global path reads n = c / rms(c) as queries and keys, or the same of silu(c); the local
path reads them turned by their position, as they are (`dot` score) or scaled to a length of their head (`lorentz`, or a norm of queries and
keys); both read the same values, c or silu(c).

Shapes: B batch, T tokens, H heads, K head size; 3: queries, keys, values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.kernels.causal_convolution import causal_convolution
from phase8.kernels.dtypes import at_least_fp32
from phase8.kernels.rotary import rotate


class MixerInputs(NamedTuple):
    """Each [B, T, H, K].

    Args:
        local_q: Queries of the window.
        local_k: Keys of the window.
        global_q: Queries of the recurrence.
        global_k: Keys of the recurrence.
        v: Values of both.
    """

    local_q: Tensor
    local_k: Tensor
    global_q: Tensor
    global_k: Tensor
    v: Tensor


def mixer_inputs(
    qkv: Tensor,
    weight: Tensor | None,
    angles: Tensor,
    radius: Tensor | None,
    *,
    eps: float,
    silu: bool = False,
    silu_values: bool = False,
    starts: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[MixerInputs, Tensor]:
    """Convolution, rotation and normalisation.

    Args:
        qkv: Projections [B, T, 3, H, K].
        weight: Taps of the convolution of each channel, the last one for the token itself [3 H K, taps]; None: no convolution.
        angles: Rotary angles of the positions [T, K/2].
        radius: Length to which local queries and keys are scaled, per head [H]; None: they keep their length.
        eps: Added to the mean squares.
        silu: Whether queries and keys of the global path pass through SiLU before they are normalised.
        silu_values: Whether values pass through SiLU.
        starts: True where a token begins a document, whose convolution sees nothing before it [B, T]; None: nowhere.
        initial_state: The taps - 1 projections before the first token [B, taps - 1, 3 H K]; None: 0.

    Returns:
        The inputs, and the last taps - 1 projections [B, taps - 1, 3 H K].
    """
    x = qkv.flatten(2)
    convolved, state = (x, x[:, :0]) if weight is None else causal_convolution(x, weight, starts, initial_state)
    q, k, v = convolved.unflatten(2, qkv.shape[2:]).unbind(2)
    global_q, global_k = (F.rms_norm(F.silu(part) if silu else part, part.shape[-1:], eps=eps) for part in (q, k))
    local_q, local_k = (_turned(part, angles, radius, eps) for part in (q, k))
    return MixerInputs(local_q, local_k, global_q, global_k, F.silu(v) if silu_values else v), state


def _turned(x: Tensor, angles: Tensor, radius: Tensor | None, eps: float) -> Tensor:
    """Rotated by the positions and, with a radius, scaled to that length."""
    x = rotate(x, angles)
    if radius is None:
        return x
    scale = radius[:, None] * x.shape[-1] ** -0.5
    return (F.rms_norm(at_least_fp32(x), x.shape[-1:], eps=eps) * scale).to(x.dtype)


def mixer_inputs_backward(
    gradients: MixerInputs,
    qkv: Tensor,
    weight: Tensor | None,
    angles: Tensor,
    radius: Tensor | None,
    *,
    eps: float,
    silu: bool = False,
    silu_values: bool = False,
    starts: Tensor | None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of qkv, weight and radius, without autograd; arguments as in the forward.

    With an initial state the first one is that of the projections before the first token and of qkv, [B, taps - 1 + T, 3, H, K].
    """
    x = qkv.flatten(2)
    convolved = x if weight is None else causal_convolution(x, weight, starts, initial_state)[0]
    q, k, v = at_least_fp32(convolved).unflatten(2, qkv.shape[2:]).unbind(2)
    dlocal_q, dlocal_k, dglobal_q, dglobal_k, dv = (at_least_fp32(gradient) for gradient in gradients)
    dq, dradius_q = _backward_of_one(q, dlocal_q, dglobal_q, angles, radius, eps=eps, silu=silu)
    dk, dradius_k = _backward_of_one(k, dlocal_k, dglobal_k, angles, radius, eps=eps, silu=silu)
    dv = dv * _silu_slope(v) if silu_values else dv
    dconvolved = torch.stack((dq, dk, dv), dim=2).flatten(2)
    dradius = None if radius is None else (dradius_q + dradius_k).to(radius.dtype)
    if weight is None:
        return dconvolved.to(qkv.dtype).view(qkv.shape), None, dradius
    if initial_state is not None:
        num_before = initial_state.shape[1]
        x, dconvolved = torch.cat((initial_state.to(x.dtype), x), dim=1), F.pad(dconvolved, (0, 0, num_before, 0))
        starts = None if starts is None else F.pad(starts, (num_before, 0))
    dx, dweight = _convolution_backward(dconvolved, at_least_fp32(x), at_least_fp32(weight), starts)
    return dx.to(qkv.dtype).unflatten(2, qkv.shape[2:]), dweight.to(weight.dtype), dradius


def _backward_of_one(
    x: Tensor, dlocal: Tensor, dglobal: Tensor, angles: Tensor, radius: Tensor | None, *, eps: float, silu: bool
) -> tuple[Tensor, Tensor | float]:
    """Gradients of queries or keys before normalisation [B, T, H, K], and of the radius [H]; a rotation's adjoint turns back."""
    turned_back = rotate(dlocal, -angles)
    dradius: Tensor | float = 0.0
    dnormal = dglobal
    if silu:
        dx_global = _before_normalisation(F.silu(x), dglobal, eps) * _silu_slope(x)
        dnormal = torch.zeros_like(dglobal)
    if radius is not None:
        scale = x.shape[-1] ** -0.5
        dradius = (x * _reciprocal_rms(x, eps) * turned_back).sum((0, 1, 3)) * scale
        dnormal = dnormal + turned_back * (radius[:, None] * scale)
    dx = _before_normalisation(x, dnormal, eps)
    if silu:
        dx = dx + dx_global
    return dx if radius is not None else dx + turned_back, dradius


def _silu_slope(x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


def _before_normalisation(x: Tensor, dnormal: Tensor, eps: float) -> Tensor:
    """Gradient of x from that of x / rms(x)."""
    reciprocal = _reciprocal_rms(x, eps)
    normal = x * reciprocal
    return reciprocal * (dnormal - normal * (normal * dnormal).mean(-1, keepdim=True))


def _reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def _convolution_backward(dy: Tensor, x: Tensor, weight: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of the inputs [B, T, C] and of the taps [C, taps]."""
    length, taps = x.shape[1], weight.shape[1]
    dx = dy * weight[:, -1]
    dweight = [(dy * x).sum((0, 1))]
    connected = None if starts is None else torch.ones_like(starts)
    for distance in range(1, min(taps, length)):
        # The gradient from token t + distance to token t.
        term = dy[:, distance:]
        if connected is not None:
            connected = connected & ~F.pad(starts, (distance - 1, 0))[:, :length]
            term = term * connected[:, distance:, None]
        dx = dx + F.pad(term * weight[:, -1 - distance], (0, 0, 0, distance))
        dweight.append((term * x[:, : length - distance]).sum((0, 1)))
    dweight += [torch.zeros_like(dweight[0])] * (taps - len(dweight))
    return dx, torch.stack(dweight[::-1], dim=1)
