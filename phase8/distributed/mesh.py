"""The rank grid as torch sees it: one DeviceMesh over all ranks, and the axes that parts of the model are given."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from phase8.distributed.collectives import ALONE, Axis
from phase8.distributed.peer_memory import peer_memory
from phase8.topology import Topology

# dp is two axes: ranks of one `shard` group divide parameters and optimizer among them, those along `replicate` hold the same.
_DIM_NAMES = ("pp", "replicate", "shard", "cp", "tp")


@dataclass(frozen=True)
class Mesh:
    """The grid and this rank's place in it.

    Args:
        topology: The degrees.
        device_mesh: Over all ranks; None: one process.
        pp: Pipeline stages.
        replicate: Data-parallel ranks that hold the same shards.
        shard: Data-parallel ranks that hold different shards.
        tp: Tensor parallelism.
    """

    topology: Topology
    device_mesh: DeviceMesh | None
    pp: Axis
    replicate: Axis
    shard: Axis
    tp: Axis

    @property
    def rank(self) -> int:
        """Of this process in the world."""
        return 0 if self.device_mesh is None else dist.get_rank()

    @property
    def data_parallel_index(self) -> int:
        """Position among the ranks that read different sequences."""
        return self.replicate.index * self.shard.size + self.shard.index

    @property
    def data_mesh(self) -> DeviceMesh | None:
        """The data-parallel part, replicate x shard; None without a process group."""
        return None if self.device_mesh is None else self.device_mesh["replicate", "shard"]


def first_and_last_stage(mesh: Mesh) -> dist.ProcessGroup | None:
    """The two ranks at the ends of this rank's pipeline; on the stages between them None. All ranks must call it at the same time."""
    assert mesh.device_mesh is not None  # several stages are several ranks
    own = None
    for ranks in mesh.device_mesh.mesh.flatten(1).T.tolist():
        group = dist.new_group([ranks[0], ranks[-1]])
        own = group if mesh.rank in (ranks[0], ranks[-1]) else own
    return own


def build_mesh(topology: Topology, *, device_type: str, shard_size: int, async_tensor_parallel: bool = False) -> Mesh:
    """The mesh of a topology; of one process alone, without a process group.

    Args:
        topology: Its world size is that of the process group.
        device_type: `cpu` or `cuda`.
        shard_size: Data-parallel ranks that divide parameters and optimizer among them; divides the data-parallel size.
        async_tensor_parallel: Tensor-parallel GPUs exchange tokens through each other's memory.

    Raises:
        ConfigError: They should, but do not reach it.
    """
    if topology.world_size == 1 and not dist.is_initialized():
        return Mesh(topology, None, ALONE, ALONE, ALONE, ALONE)
    replicas = topology.data_parallel_size // shard_size
    shape = (topology.pipeline_parallel_size, replicas, shard_size, topology.context_parallel_size, topology.tensor_parallel_size)
    device_mesh = init_device_mesh(device_type, shape, mesh_dim_names=_DIM_NAMES)
    axes = {name: Axis(device_mesh[name]) if size > 1 else ALONE for name, size in zip(_DIM_NAMES, shape, strict=True)}
    tp = axes["tp"]
    if async_tensor_parallel and device_type == "cuda" and tp.size > 1:
        peer_memory(tp.group.group_name)
        tp = replace(tp, has_peer_memory=True)
    return Mesh(topology, device_mesh, axes["pp"], axes["replicate"], axes["shard"], tp)
