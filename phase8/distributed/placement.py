"""Tensors that are divided over ranks: the part of a rank, and the whole tensor gathered from the parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard

from phase8.distributed.mesh import Mesh
from phase8.division import Place, Region, region_of_rank, whole_region
from phase8.topology import STAGE, AxisName


def placed_like(part: Tensor, whole: Tensor) -> Tensor:
    """A DTensor, shaped and divided like `whole`, of which `part` is this rank's part; where `whole` is a plain tensor, `part` itself.

    The result shares the memory of `part`, which may lie on the host while the ranks compute on GPUs; `DTensor.from_local` would copy it there.
    """
    if not isinstance(whole, DTensor):
        return part
    return DTensor(part, whole._spec, requires_grad=False)


def placed(part: Tensor, shape: torch.Size, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A DTensor of which `part` is this rank's part; it may lie on the host while the ranks compute on GPUs.

    Args:
        part: The part.
        shape: Shape of the whole tensor.
        mesh: Mesh of the ranks that divide it.
        placements: Placement along each dim of the mesh.
    """
    form = TensorMeta(shape, torch.empty(shape, device="meta").stride(), part.dtype)
    return DTensor(part, DTensorSpec(mesh, tuple(placements), tensor_meta=form), requires_grad=False)


def held_part(whole: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, sharing its memory; a plain tensor is held whole."""
    return whole.to_local() if isinstance(whole, DTensor) else whole


def is_of_divided_experts(whole: Tensor) -> bool:
    """Whether a tensor holds experts that ranks share, of which each rank has some."""
    return isinstance(whole, DTensor) and AxisName.EXPERT in (whole.device_mesh.mesh_dim_names or ())


def is_held_once(whole: Tensor) -> bool:
    """Whether no other rank holds this rank's part of a tensor; False where that is not known."""
    if not isinstance(whole, DTensor):
        return not dist.is_initialized() or dist.get_world_size() == 1
    return not any(placement.is_replicate() and size > 1 for placement, size in zip(whole.placements, whole.device_mesh.shape, strict=True))


def own_region(whole: Tensor) -> Region:
    """The region of a tensor that this rank holds.

    FSDP2 divides what tensor parallelism has left of a dim, and calls that a strided shard. Torch's own arithmetic for it is wrong by some rows
    where the parts of tensor-parallel ranks have different sizes, as those of a vocabulary may.
    """
    region = whole_region(whole.shape)
    if not isinstance(whole, DTensor):
        return region
    mesh, place = whole.device_mesh, whole.device_mesh.get_coordinate()
    assert place is not None  # no rank has tensors of other ranks
    axes = [axis for axis, placement in enumerate(whole.placements) if not placement.is_replicate()]
    for axis in sorted(axes, key=lambda axis: isinstance(whole.placements[axis], _StridedShard)):
        region = region_of_rank(region, whole.placements[axis].dim, Place(mesh.size(axis), place[axis]))
    return region


@torch.no_grad()
def gathered(tensors: dict[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Gathers whole tensors; those that were divided are in host memory. A collective of all ranks.

    Args:
        tensors: Tensors by name, the same names on every rank.
        keep: Whether this rank gets the tensors; a rank with False takes part and gets an empty dict.
    """
    whole = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            device = torch.device(tensor.device_mesh.device_type)
            found = placed_like(tensor.to_local().to(device), tensor).full_tensor()
            tensor = found.cpu() if keep else found
        if keep:
            whole[name] = tensor
    return whole


@torch.no_grad()
def collected(tensors: dict[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """Gathers the whole tensors of all pipeline stages on rank 0, and an empty dict on every other rank; a collective of all ranks.

    Args:
        tensors: Tensors by name, the same names on every rank of a stage. One that several stages have comes from the first of them.
        mesh: Mesh of the ranks.
    """
    is_leader = all(axis.index == 0 for axis in mesh.axes(STAGE))  # the first rank of each stage
    own = gathered(tensors, keep=is_leader)
    if mesh.pp.size == 1 or not is_leader:
        return own
    forms: list[dict[str, tuple[torch.Size, torch.dtype]]] = [{} for _ in range(mesh.pp.size)]
    dist.all_gather_object(forms, {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}, group=mesh.pp.group)
    leaders = dist.get_process_group_ranks(mesh.pp.group)
    for stage in range(1, mesh.pp.size):
        for name, (shape, dtype) in forms[stage].items():
            if any(name in earlier for earlier in forms[:stage]):
                continue
            if mesh.pp.index == 0:
                own[name] = torch.empty(shape, dtype=dtype)
                dist.recv(own[name], leaders[stage], group=mesh.pp.group)
            elif mesh.pp.index == stage:
                dist.send(own[name].cpu().contiguous(), leaders[0], group=mesh.pp.group)
    return own if mesh.pp.index == 0 else {}
