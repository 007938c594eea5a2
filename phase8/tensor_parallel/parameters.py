"""What a parameter starts from, how tensor parallelism divides it, and the part of it that a rank computes with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from phase8.distributed.collectives import Axis


@dataclass(frozen=True)
class ParameterSpec:
    """Initial value of a parameter, its decay group and its division.

    Args:
        std: Standard deviation of normal random values; 0: no random values.
        value: What the random values are added to; a number or a tensor of the parameter's global shape.
        decay: Weight decay applies. True for the matrices of linear layers.
        shard_dim: Dim that the tensor-parallel ranks divide among them; None: each has it whole.
    """

    std: float = 0.0
    value: float | Tensor = 0.0
    decay: bool = False
    shard_dim: int | None = None


def local(parameter: Tensor) -> Tensor:
    """The part of a parameter that this rank computes with, differentiable.

    A parameter that every rank has whole sees only the tokens or the heads of its rank: its gradient is a summand, which has to be said
    here. Without it the replicas drift apart, and no error is raised.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    if parameter.placements == (Replicate(),):
        return parameter.to_local(grad_placements=[Partial()])
    return parameter.to_local()


def divided(parameter: nn.Parameter, spec: ParameterSpec, axis: Axis, *, device: torch.device) -> nn.Parameter:
    """An uninitialised parameter on a device: plain on an axis of one rank, else a DTensor that holds this rank's part.

    Args:
        parameter: Of the global shape, on the meta device.
        spec: Its spec.
        axis: Of tensor parallelism.
        device: Where.
    """
    if axis.mesh is None:
        return nn.Parameter(torch.empty_like(parameter, device=device))
    placement = Replicate() if spec.shard_dim is None else Shard(spec.shard_dim)
    part = torch.empty_like(own_part(parameter, spec, axis), device=device)
    whole = DTensor.from_local(part, axis.mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride())
    return nn.Parameter(whole)


def own_part(value: Tensor, spec: ParameterSpec, axis: Axis) -> Tensor:
    """This rank's part of a tensor of a parameter's global shape, as `torch.chunk` cuts it: the last parts may be smaller or empty."""
    if spec.shard_dim is None or axis.size == 1:
        return value
    parts = value.chunk(axis.size, spec.shard_dim)
    return parts[axis.index] if axis.index < len(parts) else value.narrow(spec.shard_dim, 0, 0)


def inverse_softplus(x: float) -> float:
    """The y with softplus(y) = x."""
    return math.log(math.expm1(x))
