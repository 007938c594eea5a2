"""The rank grid as torch represents it: one DeviceMesh over all ranks, and its axes, which are passed to the parts of the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from phase8.distributed.collectives import ALONE, Axis
from phase8.distributed.peer_memory import peer_memory
from phase8.topology import READERS, AxisName, Topology


@dataclass(frozen=True)
class Mesh:
    """The rank grid, with this rank's place on each axis.

    Args:
        topology: Topology with the degrees.
        device_mesh: DeviceMesh of all ranks; None: one process.
        pp: Axis of the pipeline stages.
        replicate: Axis of data-parallel ranks that hold the same shards.
        shard: Axis of data-parallel ranks that hold different shards.
        ep: Axis of data-parallel ranks that hold different experts; one rank so far.
        cp: Axis of ranks that share each sequence; one rank so far.
        tp: Axis of tensor parallelism.
    """

    topology: Topology
    device_mesh: DeviceMesh | None
    pp: Axis = ALONE
    replicate: Axis = ALONE
    shard: Axis = ALONE
    ep: Axis = ALONE
    cp: Axis = ALONE
    tp: Axis = ALONE

    def axes(self, names: Iterable[AxisName]) -> tuple[Axis, ...]:
        """The axes of a set such as `topology.READERS`, in the order of the set."""
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
        index = 0
        for axis in self.axes(READERS):
            index = index * axis.size + axis.index
        return index

    @property
    def data_mesh(self) -> DeviceMesh | None:
        """The data-parallel part of the mesh, replicate x shard; None without a process group."""
        return None if self.device_mesh is None else self.device_mesh["replicate", "shard"]


def first_and_last_stage(mesh: Mesh) -> dist.ProcessGroup | None:
    """The group of the first and the last rank of this pipeline; None on the stages between them. A collective of all ranks."""
    assert mesh.device_mesh is not None  # several stages are several ranks
    own = None
    for ranks in mesh.device_mesh.mesh.flatten(1).T.tolist():
        group = dist.new_group([ranks[0], ranks[-1]])
        own = group if mesh.rank in (ranks[0], ranks[-1]) else own
    return own


def build_mesh(topology: Topology, *, device_type: str, shard_size: int, async_tensor_parallel: bool = False) -> Mesh:
    """Builds the mesh of a topology; a single process needs no process group for it.

    Args:
        topology: Topology with the world size of the process group.
        device_type: Type of device, `cpu` or `cuda`.
        shard_size: Number of data-parallel ranks that divide parameters and optimizer among them; it divides the data-parallel size.
        async_tensor_parallel: Whether tensor-parallel GPUs exchange tokens through each other's memory.

    Raises:
        ConfigError: `async_tensor_parallel` is set, but the GPUs do not reach each other's memory.
    """
    if topology.world_size == 1 and not dist.is_initialized():
        return Mesh(topology, None)
    sizes = topology.axis_sizes(shard_size=shard_size)
    device_mesh = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(map(str, sizes)))
    mesh = Mesh(topology, device_mesh, **{str(name): Axis(device_mesh[name]) for name, size in sizes.items() if size > 1})
    if async_tensor_parallel and device_type == "cuda" and mesh.tp.size > 1:
        peer_memory(mesh.tp.group.group_name)
        return replace(mesh, tp=replace(mesh.tp, has_peer_memory=True))
    return mesh
