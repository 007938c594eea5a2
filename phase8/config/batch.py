"""Batch arithmetic: global batch = micro batch x microbatches x data-parallel ranks, any two given."""

from __future__ import annotations

from dataclasses import dataclass

from phase8.config.describe import describe_value
from phase8.config.schema import ParallelSection, TrainSection
from phase8.errors import ConfigError


@dataclass(frozen=True)
class BatchShape:
    """How many sequences a step has and how they are cut.

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


def batch_shape(train: TrainSection, parallel: ParallelSection, *, data_parallel_size: int) -> BatchShape:
    """The batch of a config on a number of data-parallel ranks.

    Raises:
        ConfigError: The sizes disagree or do not divide.
    """
    total, micro, count = train.global_batch_size, train.micro_batch_size, parallel.num_microbatches
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
