"""The rank grid of a config, and batch arithmetic: global batch = micro batch x microbatches x data-parallel ranks, any two given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from phase8.config.describe import describe_value
from phase8.config.schema import ParallelSection, TrainSection
from phase8.errors import ConfigError
from phase8.topology import Topology, build_topology


@dataclass(frozen=True)
class BatchShape:
    """The number of sequences of a step and its division into microbatches.

    Args:
        global_batch_size: Sequences per optimizer step, over all ranks.
        micro_batch_size: Sequences per forward of one rank.
        num_microbatches: Forwards per step and rank (gradient accumulation steps).
        data_parallel_size: Ranks that read different sequences.
    """

    global_batch_size: int
    micro_batch_size: int
    num_microbatches: int
    data_parallel_size: int


def count_token_ranks(parallel: ParallelSection, *, world_size: int) -> int:
    """The number of ranks that read different tokens; at least 1, also where the degrees do not divide the world."""
    return max(world_size // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size), 1)


def run_topology(parallel: ParallelSection, *, world_size: int, suits: Callable[[int], bool] = lambda world_size: True) -> Topology:
    """The rank grid of a config on a number of processes.

    Args:
        parallel: Section with the degrees.
        world_size: Number of processes.
        suits: As for `build_topology`.

    Raises:
        TopologyError: The degrees do not fit the number of processes.
    """
    return build_topology(
        world_size=world_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        tensor_parallel_size=parallel.tensor_parallel_size,
        expert_parallel_size=parallel.expert_parallel_size,
        suits=suits,
    )


def batch_shape(train: TrainSection, parallel: ParallelSection, *, data_parallel_size: int) -> BatchShape:
    """The batch of a config on a number of data-parallel ranks.

    Raises:
        ConfigError: The sizes disagree or do not divide.
    """
    total, count = train.global_batch_size, parallel.num_microbatches
    micro = None if train.micro_batch_size == "auto" else train.micro_batch_size  # before it is chosen: the largest possible one
    if total is None:
        if micro is None or count is None:
            raise ConfigError(
                f"train.global_batch_size is null, which needs both train.micro_batch_size {describe_value(micro)} and "
                f"parallel.num_microbatches {describe_value(count)}; give any two of the three."
            )
        total = micro * count * data_parallel_size
    if total % data_parallel_size:
        raise ConfigError(
            f"train.global_batch_size {total} is not a multiple of the data-parallel size {data_parallel_size}; "
            f"use {-(-total // data_parallel_size) * data_parallel_size}, for example."
        )
    per_rank = total // data_parallel_size
    if micro is None:
        micro = per_rank // (count or 1)
    if count is None:
        count = per_rank // micro
    if micro * count != per_rank:
        raise ConfigError(
            f"train.global_batch_size {total} is not train.micro_batch_size {describe_value(train.micro_batch_size)} x "
            f"parallel.num_microbatches {describe_value(parallel.num_microbatches)} x data-parallel size {data_parallel_size}; "
            "give any two of the three and leave the other null."
        )
    return BatchShape(total, micro, count, data_parallel_size)
