"""The inputs of the mixer's two paths from the bottlenecks of low-rank q, k and v as one operator; q, k and v themselves are never in memory.

Shapes: B batch, T tokens, H heads, K head size, R rank; 3: queries, keys, values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phase8.kernels.backends import uses_triton
from phase8.kernels.dtypes import at_least_fp32
from phase8.kernels.reference import low_rank_mixer_inputs as reference
from phase8.kernels.reference.mixer_inputs import MixerInputs


def low_rank_mixer_inputs(
    bottlenecks: Tensor,
    ups: list[Tensor],
    taps: Tensor | None,
    angles: Tensor,
    radius: Tensor | None,
    *,
    num_heads: int,
    eps: float,
    silu: bool = False,
    silu_values: bool = False,
    starts: Tensor | None = None,
) -> MixerInputs:
    """Products, convolution, rotation and normalisation; arguments and results as in the reference of the same name.

    `limits.takes_bottlenecks` says for which sizes.
    """
    return MixerInputs(*_forward(bottlenecks, ups, taps, angles, radius, starts, num_heads, eps, silu, silu_values))


@torch.library.custom_op("phase8::low_rank_mixer_inputs", mutates_args=())
def _forward(
    bottlenecks: Tensor,
    ups: list[Tensor],
    taps: Tensor | None,
    angles: Tensor,
    radius: Tensor | None,
    starts: Tensor | None,
    num_heads: int,
    eps: float,
    silu: bool,
    silu_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if uses_triton(bottlenecks) and bottlenecks.dtype != torch.float64:
        from phase8.kernels.gpu.low_rank_mixer_inputs import prepare

        return prepare(bottlenecks, ups, taps, angles, radius, starts, num_heads, eps, silu, silu_values)
    inputs = reference.low_rank_mixer_inputs(
        bottlenecks, ups, taps, angles, radius, num_heads=num_heads, eps=eps, silu=silu, silu_values=silu_values, starts=starts
    )
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in inputs)


@torch.library.custom_op("phase8::low_rank_mixer_inputs_backward", mutates_args=())
def _backward(
    gradients: list[Tensor],
    bottlenecks: Tensor,
    ups: list[Tensor],
    taps: Tensor | None,
    angles: Tensor,
    radius: Tensor | None,
    starts: Tensor | None,
    num_heads: int,
    eps: float,
    silu: bool,
    silu_values: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the bottlenecks, and in one row, since an operator may not return views of one tensor, those of the weights in fp32 or wider.

    These are the up weights, the taps, and those of the radius that come from queries and from keys.
    """
    if uses_triton(bottlenecks) and bottlenecks.dtype != torch.float64:
        from phase8.kernels.gpu.low_rank_mixer_inputs_backward import prepare_backward

        return prepare_backward(gradients, bottlenecks, ups, taps, angles, radius, starts, num_heads, eps, silu, silu_values)
    dbottlenecks, dups, dtaps, dradius = reference.low_rank_mixer_inputs_backward(
        MixerInputs(*gradients), bottlenecks, ups, taps, angles, radius,
        num_heads=num_heads, eps=eps, silu=silu, silu_values=silu_values, starts=starts,
    )  # fmt: skip
    dradii = None if dradius is None else torch.stack((dradius, torch.zeros_like(dradius)))
    return dbottlenecks, torch.cat([at_least_fp32(x).flatten() for x in (*dups, dtaps, dradii) if x is not None])


@_forward.register_fake
def _(bottlenecks: Tensor, ups: list[Tensor], taps: Tensor | None, angles: Tensor, radius: Tensor | None, starts: Tensor | None, num_heads: int,
      *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape = (*bottlenecks.shape[:2], num_heads, ups[0].shape[0] // num_heads)
    return tuple(bottlenecks.new_empty(shape) for _ in MixerInputs._fields)


@_backward.register_fake
def _(gradients: list[Tensor], bottlenecks: Tensor, ups: list[Tensor], taps: Tensor | None, angles: Tensor, radius: Tensor | None,
      starts: Tensor | None, num_heads: int, *rest: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = torch.float64 if bottlenecks.dtype == torch.float64 else torch.float32
    num_sums = sum(_sizes(ups, taps, radius))
    return bottlenecks.new_empty(bottlenecks.shape), bottlenecks.new_empty(num_sums, dtype=dtype)


def _sizes(ups: list[Tensor], taps: Tensor | None, radius: Tensor | None) -> list[int]:
    """How many numbers of the row of gradients belong to each of the weights."""
    return [*(up.numel() for up in ups), 0 if taps is None else taps.numel(), 0 if radius is None else 2 * radius.numel()]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    bottlenecks, ups, taps, angles, radius, starts, ctx.num_heads, *ctx.fixed = inputs
    ctx.save_for_backward(bottlenecks, *ups, taps, angles, radius, starts)


def _autograd(ctx: Any, *gradients: Tensor) -> tuple[Tensor | list[Tensor] | None, ...]:
    bottlenecks, q, k, v, taps, angles, radius, starts = ctx.saved_tensors
    ups = [q, k, v]
    dbottlenecks, row = _backward(list(gradients), bottlenecks, ups, taps, angles, radius, starts, ctx.num_heads, *ctx.fixed)
    *dups, dtaps, dradii = row.split(_sizes(ups, taps, radius))
    dups = [gradient.view(up.shape).to(up.dtype) for gradient, up in zip(dups, ups, strict=True)]
    of_taps = None if taps is None else dtaps.view(taps.shape).to(taps.dtype)
    return dbottlenecks, dups, of_taps, None, None if radius is None else dradii.view(2, -1).sum(0).to(radius.dtype), None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
