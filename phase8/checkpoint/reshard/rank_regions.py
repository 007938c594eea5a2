"""The region of each checkpoint tensor that each rank of a layout holds. Plain numbers, no tensors.

The ranks of each axis divide a tensor as its parameter declares; then the shards divide each part. Ranks that share experts are among the shards.
A region that several ranks hold is assigned to the first of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from phase8.division import DividedShape, Place, Region, whole_region
from phase8.topology import Topology


@dataclass(frozen=True)
class TensorForm:
    """The parameter and the shape of a checkpoint tensor.

    Args:
        parameter: Name of the parameter that the tensor is, or to whose optimizer state it belongs.
        shape: Whole shape of the tensor.
        is_divided: Whether it is shaped and divided like the parameter; otherwise one rank has all of it.
    """

    parameter: str
    shape: list[int]
    is_divided: bool = True


def regions_by_rank(
    tensors: Mapping[str, TensorForm], stages: Sequence[Mapping[str, DividedShape]], topology: Topology
) -> dict[int, dict[str, Region]]:
    """The regions in each rank's files: rank -> tensor name -> region. Ranks without a region of their own are left out.

    Args:
        tensors: Checkpoint tensors by name; each one's parameter is in a stage.
        stages: Parameters of each pipeline stage; a parameter of several stages counts for the first of them.
        topology: Topology of the ranks; the shards are its data-parallel axis.
    """
    found: dict[int, dict[str, Region]] = {rank: {} for rank in range(topology.world_size)}
    for name, tensor in tensors.items():
        stage = next(index for index, parameters in enumerate(stages) if tensor.parameter in parameters)
        for position, region in _regions(tensor, stages[stage][tensor.parameter], topology):
            found[topology.rank({"pp": stage, **position})][name] = region
    return {rank: regions for rank, regions in found.items() if regions}


def _regions(tensor: TensorForm, declared: DividedShape, topology: Topology) -> Iterator[tuple[dict[str, int], Region]]:
    """Yields each non-empty region with its position on the axes that divide it; an empty or undivided tensor is one region."""
    whole = whole_region(tensor.shape)
    if not tensor.is_divided or declared.is_whole or whole.num_elements == 0 or not tensor.shape:
        yield {}, whole
        return
    axes = {axis: topology.degrees[axis] for axis in declared.divided if axis in topology.degrees}
    for *indices, shard in itertools.product(*map(range, axes.values()), range(topology.data_parallel_size)):
        position = dict(zip(axes, indices, strict=True))
        places = {axis: Place(axes[axis], index) for axis, index in position.items()}
        places["ep"] = Place(topology.expert_parallel_size, shard % topology.expert_parallel_size)
        region = declared.held(places, Place(topology.data_parallel_size, shard))
        if region.num_elements > 0:
            yield {**position, "dp": shard}, region
