"""The rank grid: the division of a world of processes over pipeline, data, context and tensor axes, and the sets of axes to reduce over.

Rank numbers vary fastest along tp, then cp, dp, pp, so that tensor parallelism stays inside a node. Plain values, no torch.

The axes over which ranks communicate divide the same ranks in another way: dp x cp is replicate x shard, the ranks that read different tokens,
among which those along cp share their sequences, and those along ep share experts. For the parameters of experts, the same ranks are replicate x
shard x ep. Code that sums, counts or compares over ranks loops over one of these sets of axes, in its order; a new axis is added to the sets here.

| set | ranks along its axes |
|---|---|
| `TOKENS` | read different tokens: each counts its own targets and has a summand of every gradient |
| `LOSS` | have different summands of the loss |
| `HOLDERS` | hold different parts of the parameters, and so summands of a norm |
| `COPIES` | hold the same part of some parameters |
| `STAGE` | belong to one pipeline stage |
| `EVERYBODY` | make up the whole world |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from phase8.errors import TopologyError

AXES = ("pp", "dp", "cp", "tp")
# A remedy looks no farther than this many multiples of the degrees for a world size.
_FARTHEST = 16_384


class AxisName(StrEnum):
    """The axes over which ranks communicate, from the one of the farthest ranks to the one of the nearest.

    Ranks that read different tokens hold the same shards along `replicate` and different shards along `shard`. Ranks along `cp` are among them:
    they read different slices of the same sequences; and ranks along `ep`: they hold different experts.
    """

    PIPELINE = "pp"
    REPLICATE = "replicate"
    SHARD = "shard"
    EXPERT = "ep"
    CONTEXT = "cp"
    TENSOR = "tp"


TOKENS = (AxisName.REPLICATE, AxisName.SHARD)
LOSS = (AxisName.PIPELINE, *TOKENS)
HOLDERS = (AxisName.TENSOR, AxisName.SHARD, AxisName.PIPELINE)
COPIES = (AxisName.REPLICATE, AxisName.TENSOR)
STAGE = (*TOKENS, AxisName.TENSOR)
EVERYBODY = (*STAGE, AxisName.PIPELINE)


@dataclass(frozen=True)
class Topology:
    """The degrees of the four axes, and the rank numbers that follow from them.

    Args:
        pipeline_parallel_size: Degree of pp.
        data_parallel_size: Degree of dp.
        context_parallel_size: Degree of cp.
        tensor_parallel_size: Degree of tp.
        expert_parallel_size: Number of ranks along ep, which is a part of dp.
    """

    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    context_parallel_size: int = 1
    tensor_parallel_size: int = 1
    expert_parallel_size: int = 1

    @property
    def degrees(self) -> dict[str, int]:
        """Degree of each axis, slowest varying first."""
        return dict(
            zip(AXES, (self.pipeline_parallel_size, self.data_parallel_size, self.context_parallel_size, self.tensor_parallel_size), strict=True)
        )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pipeline_parallel_size * self.data_parallel_size * self.context_parallel_size * self.tensor_parallel_size

    @property
    def num_token_ranks(self) -> int:
        """Number of ranks that read different tokens, of one stage and place on tp."""
        return self.data_parallel_size * self.context_parallel_size

    def axis_sizes(self, *, shard_size: int) -> dict[AxisName, int]:
        """The number of ranks along each axis that divides the world, slowest varying first; cp and ep are parts of them.

        Args:
            shard_size: Number of ranks that divide parameters and optimizer among them, a divisor of `num_token_ranks`.
        """
        return {
            AxisName.PIPELINE: self.pipeline_parallel_size,
            AxisName.REPLICATE: self.num_token_ranks // shard_size,
            AxisName.SHARD: shard_size,
            AxisName.TENSOR: self.tensor_parallel_size,
        }

    def expert_axis_sizes(self, *, shard_size: int) -> dict[AxisName, int]:
        """As `axis_sizes`, as the parameters of experts see the world: ranks along ep are the nearest of those that divide all others among them.

        Args:
            shard_size: As above; a multiple of expert_parallel_size, or 1.
        """
        num_shards = max(shard_size // self.expert_parallel_size, 1)
        return {
            AxisName.PIPELINE: self.pipeline_parallel_size,
            AxisName.REPLICATE: self.num_token_ranks // (num_shards * self.expert_parallel_size),
            AxisName.SHARD: num_shards,
            AxisName.EXPERT: self.expert_parallel_size,
            AxisName.TENSOR: self.tensor_parallel_size,
        }

    def rank(self, coordinates: Mapping[str, int]) -> int:
        """The rank at a position; an axis that the position does not name counts as 0."""
        rank = 0
        for axis, degree in self.degrees.items():
            rank = rank * degree + coordinates.get(axis, 0)
        return rank

    def coordinates(self, rank: int) -> dict[str, int]:
        """The position of a rank on each axis."""
        position = {}
        for axis, degree in reversed(self.degrees.items()):
            rank, position[axis] = divmod(rank, degree)
        return {axis: position[axis] for axis in AXES}

    def group(self, rank: int, axis: str) -> list[int]:
        """The ranks, `rank` included, whose positions differ along one axis only, in the order of that axis."""
        stride = 1
        for name, degree in reversed(self.degrees.items()):
            if name == axis:
                first = rank - self.coordinates(rank)[axis] * stride
                return [first + index * stride for index in range(degree)]
            stride *= degree
        raise KeyError(axis)


def build_topology(
    *,
    world_size: int,
    pipeline_parallel_size: int,
    context_parallel_size: int,
    tensor_parallel_size: int,
    expert_parallel_size: int = 1,
    suits: Callable[[int], bool] = lambda world_size: True,
) -> Topology:
    """The topology of a world; data_parallel_size is inferred.

    Args:
        world_size: Number of ranks.
        pipeline_parallel_size: Degree of pp.
        context_parallel_size: Degree of cp.
        tensor_parallel_size: Degree of tp.
        expert_parallel_size: Number of ranks along ep.
        suits: Whether all else suits another world size; an error names sizes that do, if there are any.

    Raises:
        TopologyError: The degrees do not divide the world, or expert_parallel_size does not divide data_parallel_size.
    """
    model_ranks = pipeline_parallel_size * context_parallel_size * tensor_parallel_size
    if world_size < 1 or world_size % model_ranks:
        nearest = _nearest(world_size, model_ranks, suits) or _nearest(world_size, model_ranks, lambda each: True)
        planned = " or ".join(f"--world-size {each}" for each in nearest)
        raise TopologyError(
            f"world size {world_size} is not a positive multiple of parallel.tensor_parallel_size {tensor_parallel_size} x "
            f"parallel.context_parallel_size {context_parallel_size} x parallel.pipeline_parallel_size {pipeline_parallel_size} "
            f"= {model_ranks}; start {' or '.join(map(str, nearest))} processes (torchrun --nproc_per_node starts them, {planned} plans for them) "
            "or change the degrees."
        )
    data_parallel_size = world_size // model_ranks
    if data_parallel_size % expert_parallel_size:
        raise TopologyError(
            f"parallel.expert_parallel_size {expert_parallel_size} does not divide the data-parallel size {data_parallel_size} "
            f"(world size {world_size} / {model_ranks}); choose a divisor."
        )
    return Topology(pipeline_parallel_size, data_parallel_size, context_parallel_size, tensor_parallel_size, expert_parallel_size)


def _nearest(world_size: int, model_ranks: int, suits: Callable[[int], bool]) -> list[int]:
    """The nearest multiples of `model_ranks` below and above a world size that suit; those that are not there are left out."""
    below = max(world_size, 0) // model_ranks
    ways = (range(below, max(below - _FARTHEST, 0), -1), range(below + 1, below + 1 + _FARTHEST))
    found = [next((count * model_ranks for count in counts if suits(count * model_ranks)), None) for counts in ways]
    return [each for each in found if each is not None]
