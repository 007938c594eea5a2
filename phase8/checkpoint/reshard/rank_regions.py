"""Which rank of a layout holds which region of each tensor of a checkpoint. Plain numbers, no tensors.

What tensor parallelism divides is cut along the dim its parameter says, then everything by dim 0 over the shards, both as `torch.chunk` cuts:
regions of ceil(size / number) elements, the last ones smaller or empty. What several ranks hold is assigned to the first of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from phase8.checkpoint.regions import Region, whole_region
from phase8.topology import Topology


@dataclass(frozen=True)
class Division:
    """A parameter as its model declares it.

    Args:
        shape: Of all of it.
        shard_dim: What the tensor-parallel ranks divide; None: each has it whole.
    """

    shape: list[int]
    shard_dim: int | None


@dataclass(frozen=True)
class TensorForm:
    """A tensor of a checkpoint.

    Args:
        parameter: The one it is, or is the optimizer's state of.
        shape: Of all of it.
        is_divided: It is shaped like the parameter and divided as that is; False: one rank has all of it.
    """

    parameter: str
    shape: list[int]
    is_divided: bool = True


def regions_by_rank(
    tensors: Mapping[str, TensorForm], stages: Sequence[Mapping[str, Division]], topology: Topology
) -> dict[int, dict[str, Region]]:
    """What each rank's files hold: rank -> tensor name -> region. Ranks that hold nothing of their own are left out.

    Args:
        tensors: By name; every parameter is in a stage.
        stages: The parameters of each pipeline stage; of those in several, the first stage counts.
        topology: The ranks; the shards are its data-parallel axis.
    """
    ranks = {tuple(topology.coordinates(rank)[axis] for axis in ("pp", "dp", "tp")): rank for rank in range(topology.world_size)}
    found: dict[int, dict[str, Region]] = {rank: {} for rank in range(topology.world_size)}
    for name, tensor in tensors.items():
        stage = next(index for index, parameters in enumerate(stages) if tensor.parameter in parameters)
        for shard, tensor_rank, region in _regions(tensor, stages[stage][tensor.parameter], topology):
            found[ranks[stage, shard, tensor_rank]][name] = region
    return {rank: regions for rank, regions in found.items() if regions}


def _regions(tensor: TensorForm, division: Division, topology: Topology) -> Iterator[tuple[int, int, Region]]:
    """(shard, tensor-parallel rank, region) of each region that has elements; all of a tensor without elements, or that is not divided."""
    whole = whole_region(tensor.shape)
    if not tensor.is_divided or math.prod(tensor.shape) == 0 or not tensor.shape:
        yield 0, 0, whole
        return
    for tensor_rank in range(1 if division.shard_dim is None else topology.tensor_parallel_size):
        own = whole if division.shard_dim is None else chunk(whole, division.shard_dim, topology.tensor_parallel_size, tensor_rank)
        for shard in range(topology.data_parallel_size):
            region = chunk(own, 0, topology.data_parallel_size, shard)
            if math.prod(region.shape) > 0:
                yield shard, tensor_rank, region


def chunk(region: Region, dim: int, number: int, index: int) -> Region:
    """One of the pieces into which `torch.chunk` cuts a region along a dim; empty at the end of the region where there are fewer."""
    size = region.shape[dim]
    length = -(-size // number)
    begin = min(index * length, size)
    offsets, shape = list(region.offsets), list(region.shape)
    offsets[dim] += begin
    shape[dim] = min(length, size - begin)
    return Region(offsets, shape)
