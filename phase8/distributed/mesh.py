"""The rank grid as torch represents it: a DeviceMesh over all ranks, and its axes, which are passed to the parts of the model.

Where ranks share experts, a second DeviceMesh over the same ranks places the parameters of experts, because ZeRO divides these over fewer ranks
than all other parameters; torch slices no mesh that has both (ADR 19).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain, combinations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from phase8.accelerator import reaches_peers
from phase8.distributed.collectives import ALONE, Axis
from phase8.distributed.peer_memory import peer_memory
from phase8.shared_sequence import SequenceSlice
from phase8.topology import AxisName, Topology


@dataclass(frozen=True)
class Mesh:
    """The rank grid, with this rank's place on each axis.

    Args:
        topology: Topology with the degrees.
        device_mesh: DeviceMesh of all ranks; None: one process.
        pp: Axis of the pipeline stages.
        replicate: Axis of ranks that read different tokens and hold the same shards.
        shard: Axis of ranks that read different tokens and hold different shards.
        ep: Axis of ranks that share experts, which are some of those that read different tokens.
        cp: Axis of ranks that share each sequence, which are some of those that read different tokens.
        tp: Axis of tensor parallelism.
        expert_mesh: DeviceMesh of all ranks for the parameters of experts; None: they are divided like all others.
    """

    topology: Topology
    device_mesh: DeviceMesh | None
    pp: Axis = ALONE
    replicate: Axis = ALONE
    shard: Axis = ALONE
    ep: Axis = ALONE
    cp: Axis = ALONE
    tp: Axis = ALONE
    expert_mesh: DeviceMesh | None = None

    def axes(self, names: Iterable[AxisName]) -> tuple[Axis, ...]:
        """The axes of a set such as `topology.TOKENS`, in the order of the set."""
        by_name = {
            AxisName.PIPELINE: self.pp,
            AxisName.REPLICATE: self.replicate,
            AxisName.SHARD: self.shard,
            AxisName.EXPERT: self.ep,
            AxisName.CONTEXT: self.cp,
            AxisName.TENSOR: self.tp,
        }
        return tuple(by_name[name] for name in names)

    @property
    def rank(self) -> int:
        """Rank of this process in the world."""
        return 0 if self.device_mesh is None else dist.get_rank()

    @property
    def data_parallel_index(self) -> int:
        """Position of this rank among those that read different sequences."""
        return self.topology.coordinates(self.rank)["dp"]

    @property
    def own_slice(self) -> SequenceSlice:
        """This rank's slice of each sequence that it reads."""
        return SequenceSlice(self.cp.index, self.cp.size)

    def data_mesh(self, *, is_summed_late: bool) -> DeviceMesh | None:
        """The ranks that read different tokens, as FSDP wants them; None without a process group.

        Args:
            is_summed_late: FSDP keeps sums over microbatches on the device until the last one.
        """
        return None if self.device_mesh is None else _for_fsdp(self.device_mesh, is_summed_late)

    @property
    def expert_replicate(self) -> Axis:
        """The ranks that hold the same parts of the same experts; this rank alone where ranks do not share experts."""
        if self.expert_mesh is None or self.expert_mesh["replicate"].size() == 1:
            return ALONE
        return Axis(self.expert_mesh["replicate"])

    def expert_data_mesh(self, *, is_summed_late: bool) -> DeviceMesh | None:
        """The ranks that hold the same experts, as `data_mesh`; None where ranks do not share experts."""
        return None if self.expert_mesh is None else _for_fsdp(self.expert_mesh, is_summed_late)


def _for_fsdp(grid: DeviceMesh, is_summed_late: bool) -> DeviceMesh:
    """The dims replicate x shard, or shard alone.

    FSDP sums over replicas last. Until then, even if a rank is the only one, it keeps what each block has to sum, on the device: of offloaded
    parameters it would else add every microbatch up on the host.
    """
    return grid["replicate", "shard"] if is_summed_late or grid["replicate"].size() > 1 else grid["shard"]


def first_and_last_stage(mesh: Mesh) -> dist.ProcessGroup | None:
    """The group of the first and the last rank of this pipeline; None on the stages between them. A collective of all ranks."""
    assert mesh.device_mesh is not None  # several stages are several ranks
    own = None
    for ranks in mesh.device_mesh.mesh.flatten(1).T.tolist():
        group = dist.new_group([ranks[0], ranks[-1]])
        own = group if mesh.rank in (ranks[0], ranks[-1]) else own
    return own


def groups_of_holders(mesh: Mesh) -> Callable[[DTensor, frozenset[str]], dist.ProcessGroup]:
    """Makes the groups of this rank with those that hold the other parts of a parameter, for every set of axes that may divide one.

    A collective of all ranks, of all pipeline stages.

    Returns:
        A function that gives the group for a parameter and the names of the axes.
    """
    groups: dict[tuple[bool, frozenset[str]], dist.ProcessGroup] = {}
    for has_experts, grid in ((False, mesh.device_mesh), (True, mesh.expert_mesh)):
        if grid is None:
            continue
        names = grid.mesh_dim_names
        assert names is not None  # `build_mesh` names all dims
        dividing = [name for name, size in zip(names, grid.shape, strict=True) if size > 1 and name not in (AxisName.PIPELINE, AxisName.REPLICATE)]
        for axes in chain.from_iterable(combinations(dividing, number) for number in range(1, len(dividing) + 1)):
            order = [names.index(name) for name in (*(name for name in names if name not in axes), *axes)]
            size = math.prod(grid.shape[names.index(name)] for name in axes)
            for ranks in grid.mesh.permute(order).reshape(-1, size).tolist():
                group = dist.new_group(ranks)
                if mesh.rank in ranks:
                    groups[has_experts, frozenset(axes)] = group
    return lambda parameter, axes: groups[AxisName.EXPERT in (parameter.device_mesh.mesh_dim_names or ()), axes]


def build_mesh(topology: Topology, *, device_type: str, shard_size: int, async_tensor_parallel: bool = False) -> Mesh:
    """Builds the mesh of a topology; a single process needs no process group for it.

    Args:
        topology: Topology with the world size of the process group.
        device_type: Type of device.
        shard_size: Number of ranks that divide parameters and optimizer among them; it divides the ranks that read different tokens.
        async_tensor_parallel: Whether tensor-parallel GPUs exchange tokens through each other's memory.

    Raises:
        ConfigError: `async_tensor_parallel` is set, but the GPUs do not reach each other's memory.
    """
    if topology.world_size == 1 and not dist.is_initialized():
        return Mesh(topology, None)
    sizes = topology.axis_sizes(shard_size=shard_size)
    device_mesh = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(map(str, sizes)))
    axes = {str(name): Axis(device_mesh[name]) for name, size in sizes.items() if size > 1}
    if topology.context_parallel_size > 1:
        axes[str(AxisName.CONTEXT)] = _context_axis(topology, device_type)
    mesh = Mesh(topology, device_mesh, **axes)
    if topology.expert_parallel_size > 1:
        mesh = _with_experts(mesh, device_type, shard_size)
    if async_tensor_parallel and reaches_peers(device_type) and mesh.tp.size > 1:
        peer_memory(mesh.tp.group.group_name)
        return replace(mesh, tp=replace(mesh.tp, has_peer_memory=True))
    return mesh


def _with_experts(mesh: Mesh, device_type: str, shard_size: int) -> Mesh:
    """The mesh with a second one for the parameters of experts."""
    sizes = mesh.topology.expert_axis_sizes(shard_size=shard_size)
    expert_mesh = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(map(str, sizes)))
    places = expert_mesh["ep", "tp"] if mesh.tp.size > 1 else None
    return replace(mesh, expert_mesh=expert_mesh, ep=Axis(expert_mesh["ep"], places=places))


def _context_axis(topology: Topology, device_type: str) -> Axis:
    """The ranks that share this rank's sequences. Their groups cut across replicate and shard, so they are no dim of the mesh of all ranks."""
    groups = sorted({tuple(topology.group(rank, AxisName.CONTEXT)) for rank in range(topology.world_size)})
    own, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in groups])
    return Axis(DeviceMesh.from_group(own, device_type, mesh_dim_names=(str(AxisName.CONTEXT),)))
