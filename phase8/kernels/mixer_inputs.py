"""The inputs of the mixer's two paths as one operator: each projection is read once, each input written once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.kernels.backends import uses_triton
from phase8.kernels.causal_convolution import inputs_to_carry
from phase8.kernels.reference import mixer_inputs as reference
from phase8.kernels.reference.mixer_inputs import MixerInputs

# Pieces of a sequence that are shorter, as in decoding, take one plain step: a kernel would gain nothing.
SHORTEST_PIECE = 64


@torch.library.custom_op("phase8::mixer_inputs", mutates_args=())
def _forward(
    qkv: Tensor, weight: Tensor | None, angles: Tensor, radius: Tensor | None, starts: Tensor | None, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if uses_triton(qkv) and qkv.dtype != torch.float64:
        from phase8.kernels.gpu.mixer_inputs import prepare

        return prepare(qkv, weight, angles, radius, starts, eps, silu)
    inputs, _ = reference.mixer_inputs(qkv, weight, angles, radius, eps=eps, silu=silu, starts=starts)
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in inputs)


@torch.library.custom_op("phase8::mixer_inputs_backward", mutates_args=())
def _backward(
    gradients: list[Tensor],
    qkv: Tensor,
    weight: Tensor | None,
    angles: Tensor,
    radius: Tensor | None,
    starts: Tensor | None,
    eps: float,
    silu: bool,
) -> list[Tensor]:
    if uses_triton(qkv) and qkv.dtype != torch.float64:
        from phase8.kernels.gpu.mixer_inputs_backward import prepare_backward

        return prepare_backward(gradients, qkv, weight, angles, radius, starts, eps, silu)
    found = reference.mixer_inputs_backward(MixerInputs(*gradients), qkv, weight, angles, radius, eps=eps, silu=silu, starts=starts)
    return [x.contiguous() for x in found if x is not None]


@_forward.register_fake
def _(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = (*qkv.shape[:2], *qkv.shape[3:])
    return tuple(qkv.new_empty(shape) for _ in MixerInputs._fields)


@_backward.register_fake
def _(gradients: list[Tensor], qkv: Tensor, weight: Tensor | None, angles: Tensor, radius: Tensor | None, *rest: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (qkv, weight, radius) if x is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    qkv, weight, angles, radius, starts = ctx.saved_tensors
    found = iter(_backward(list(gradients), qkv, weight, angles, radius, starts, ctx.eps, ctx.silu))
    dqkv = next(found)
    dweight = None if weight is None else next(found)
    return dqkv, dweight, None, None if radius is None else next(found), None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def mixer_inputs(
    qkv: Tensor,
    weight: Tensor | None,
    angles: Tensor,
    radius: Tensor | None,
    *,
    eps: float,
    silu: bool = False,
    starts: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[MixerInputs, Tensor]:
    """Convolution, rotation and normalisation; arguments and results as in the reference of the same name."""
    is_short = initial_state is not None and qkv.shape[1] < SHORTEST_PIECE
    if qkv.device.type == "cpu" or is_short:
        # Decoding is short; on a CPU, autograd keeps what the operator's backward would recompute.
        return reference.mixer_inputs(qkv, weight, angles, radius, eps=eps, silu=silu, starts=starts, initial_state=initial_state)
    if initial_state is not None and weight is not None:
        return _of_piece(qkv, weight, angles, radius, eps=eps, silu=silu, starts=starts, initial_state=initial_state)
    num_carried = 0 if weight is None else weight.shape[1] - 1
    return MixerInputs(*_forward(qkv, weight, angles, radius, starts, eps, silu)), qkv.flatten(2)[:, qkv.shape[1] - num_carried :]


def _of_piece(
    qkv: Tensor, weight: Tensor, angles: Tensor, radius: Tensor | None, *, eps: float, silu: bool, starts: Tensor | None, initial_state: Tensor
) -> tuple[MixerInputs, Tensor]:
    """The operator for a piece of a sequence: the carried projections are tokens before it, whose results are dropped."""
    num_carried = weight.shape[1] - 1
    padded = torch.cat((initial_state.to(qkv.dtype).unflatten(2, qkv.shape[2:]), qkv), dim=1)
    padded_starts = None if starts is None else F.pad(starts, (num_carried, 0))
    inputs = _forward(padded, weight, F.pad(angles, (0, 0, num_carried, 0)), radius, padded_starts, eps, silu)
    flat = padded.flatten(2)
    state = flat[:, qkv.shape[1] :] if starts is None else inputs_to_carry(flat, starts)
    return MixerInputs(*(x[:, num_carried:].contiguous() for x in inputs)), state
