"""The inputs of the mixer's two paths as one operator: each projection is read once, each input written once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phase8.kernels.backends import keeps_for_backward, uses_triton
from phase8.kernels.causal_convolution import inputs_to_carry
from phase8.kernels.reference import mixer_inputs as reference
from phase8.kernels.reference.mixer_inputs import MixerInputs

# Pieces of a sequence that are shorter, as in decoding, take one plain step: a kernel would gain nothing.
SHORTEST_PIECE = 64


@torch.library.custom_op("phase8::mixer_inputs", mutates_args=())
def _forward(
    qkv: Tensor,
    weight: Tensor | None,
    angles: Tensor,
    radius: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    eps: float,
    silu: bool,
    silu_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if uses_triton(qkv) and qkv.dtype != torch.float64:
        from phase8.kernels.gpu.mixer_inputs import prepare

        return prepare(qkv, weight, angles, radius, starts, initial_state, eps, silu, silu_values)
    inputs, _ = reference.mixer_inputs(
        qkv, weight, angles, radius, eps=eps, silu=silu, silu_values=silu_values, starts=starts, initial_state=initial_state
    )
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in inputs)


@torch.library.custom_op("phase8::mixer_inputs_backward", mutates_args=())
def _backward(
    gradients: list[Tensor],
    qkv: Tensor,
    weight: Tensor | None,
    angles: Tensor,
    radius: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    eps: float,
    silu: bool,
    silu_values: bool,
) -> list[Tensor]:
    if uses_triton(qkv) and qkv.dtype != torch.float64:
        from phase8.kernels.gpu.mixer_inputs_backward import prepare_backward

        return prepare_backward(gradients, qkv, weight, angles, radius, starts, initial_state, eps, silu, silu_values)
    found = reference.mixer_inputs_backward(
        MixerInputs(*gradients), qkv, weight, angles, radius,
        eps=eps, silu=silu, silu_values=silu_values, starts=starts, initial_state=initial_state,
    )  # fmt: skip
    return [x.contiguous() for x in found if x is not None]


@_forward.register_fake
def _(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = (*qkv.shape[:2], *qkv.shape[3:])
    return tuple(qkv.new_empty(shape) for _ in MixerInputs._fields)


@_backward.register_fake
def _(
    gradients: list[Tensor],
    qkv: Tensor,
    weight: Tensor | None,
    angles: Tensor,
    radius: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    num_before = 0 if initial_state is None else initial_state.shape[1]
    dqkv = qkv.new_empty(qkv.shape[0], num_before + qkv.shape[1], *qkv.shape[2:])
    return [dqkv, *(x.new_empty(x.shape) for x in (weight, radius) if x is not None)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, weight, angles, radius, starts, initial_state, *ctx.fixed = inputs
    ctx.save_for_backward(qkv, weight, angles, radius, starts, initial_state)


def _autograd(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    qkv, weight, angles, radius, starts, initial_state = ctx.saved_tensors
    found = iter(_backward(list(gradients), qkv, weight, angles, radius, starts, initial_state, *ctx.fixed))
    dqkv, dinitial = next(found), None
    if initial_state is not None:
        num_before = initial_state.shape[1]
        dqkv, dinitial = dqkv[:, num_before:], dqkv[:, :num_before].flatten(2)
    dweight = None if weight is None else next(found)
    return dqkv, dweight, None, None if radius is None else next(found), None, dinitial, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


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
    """Convolution, rotation and normalisation; arguments and results as in the reference of the same name."""
    is_short = initial_state is not None and qkv.shape[1] < SHORTEST_PIECE
    run = reference.mixer_inputs if keeps_for_backward(qkv) or is_short else _by_operator
    return run(qkv, weight, angles, radius, eps=eps, silu=silu, silu_values=silu_values, starts=starts, initial_state=initial_state)


def _by_operator(
    qkv: Tensor,
    weight: Tensor | None,
    angles: Tensor,
    radius: Tensor | None,
    *,
    eps: float,
    silu: bool,
    silu_values: bool,
    starts: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[MixerInputs, Tensor]:
    num_carried = 0 if weight is None else weight.shape[1] - 1
    last = qkv.flatten(2)[:, max(0, qkv.shape[1] - num_carried) :]
    if initial_state is None or weight is None:
        return MixerInputs(*_forward(qkv, weight, angles, radius, starts, None, eps, silu, silu_values)), last
    initial_state = initial_state.to(qkv.dtype)
    last = torch.cat((initial_state, last), dim=1)[:, last.shape[1] :]
    carried = last if starts is None else inputs_to_carry(last, starts)
    return MixerInputs(*_forward(qkv, weight, angles, radius, starts, initial_state.contiguous(), eps, silu, silu_values)), carried
