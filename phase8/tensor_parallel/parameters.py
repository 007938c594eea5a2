"""Initial value of a parameter, its division by tensor parallelism, and the part of it that a rank computes with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from phase8.distributed.collectives import ALONE, Axis
from phase8.division import part


@dataclass(frozen=True)
class ParameterSpec:
    """Initial value of a parameter, its decay group and its division.

    Args:
        std: Standard deviation of normal random values; 0: no random values.
        value: Mean of the random values; a number, or a tensor that expands to the parameter's global shape.
        decay: Whether weight decay applies; True for the matrices of linear layers.
        divided: Axis -> dim that the ranks of the axis divide; along any other axis each rank has the parameter whole. `shard` is the dim
            that ZeRO divides, the first one if it is not named.
        is_rounded: Whether its layer rounds it to the dtype of the residual stream before anything else, so that its gradient is rounded too.
    """

    std: float = 0.0
    value: float | Tensor = 0.0
    decay: bool = False
    divided: Mapping[str, int] = field(default_factory=dict)
    is_rounded: bool = False


def local(parameter: Tensor) -> Tensor:
    """The part of a parameter that this rank computes with, differentiable.

    A parameter that every rank has whole sees only the tokens or the heads of its rank, so its gradient is a summand (`Partial`). Without
    that placement the replicas would drift apart without an error.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    if parameter.placements == (Replicate(),):
        return parameter.to_local(grad_placements=[Partial()])
    return parameter.to_local()


def divided(parameter: nn.Parameter, spec: ParameterSpec, axis: Axis, *, device: torch.device, expert: Axis = ALONE) -> nn.Parameter:
    """An uninitialised parameter on a device: a plain one where no ranks divide layers, else a DTensor that holds this rank's part.

    Args:
        parameter: Parameter of the global shape on the meta device.
        spec: Spec of the parameter.
        axis: Axis of tensor parallelism.
        device: Device of the result.
        expert: Axis of the ranks that share experts.

    Raises:
        TypeError: The spec names an axis whose ranks do not divide parameters.
    """
    if unknown := spec.divided.keys() - {"tp", "ep", "shard"}:
        raise TypeError(f"ranks of {sorted(unknown)} do not divide parameters; those of tp, ep and shard do")
    mesh = axis.mesh
    if "ep" in spec.divided and expert.mesh is not None:
        mesh = expert.mesh if expert.places is None else expert.places
    if mesh is None:
        return nn.Parameter(torch.empty_like(parameter, device=device))
    assert mesh.mesh_dim_names is not None  # `build_mesh` names all dims
    placements = [Shard(spec.divided[name]) if name in spec.divided else Replicate() for name in mesh.mesh_dim_names]
    own = torch.empty_like(own_part(parameter, spec, axis, expert), device=device)
    whole = DTensor.from_local(own, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())
    return nn.Parameter(whole)


def own_part(value: Tensor, spec: ParameterSpec, axis: Axis, expert: Axis = ALONE) -> Tensor:
    """This rank's part of a tensor of a parameter's global shape.

    Args:
        value: Tensor of the global shape.
        spec: Spec of the parameter.
        axis: Axis of tensor parallelism.
        expert: Axis of the ranks that share experts.
    """
    for name, of in (("ep", expert), ("tp", axis)):
        if name in spec.divided and of.size > 1:
            own = part(value.shape[spec.divided[name]], of.size, of.index)
            value = value.narrow(spec.divided[name], own.start, len(own))
    return value


def inverse_softplus(x: float) -> float:
    """The y for which softplus(y) = x."""
    return math.log(math.expm1(x))
