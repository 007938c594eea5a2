"""Checks a plan by building one rank of each pipeline stage, without memory, on a fake process group: the state that a run of any size holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from phase8.config.batch import run_topology
from phase8.config.schema import RunConfig
from phase8.config.validate import validate
from phase8.distributed.mesh import build_mesh
from phase8.distributed.placement import held_part
from phase8.errors import Phase8Error
from phase8.plan.candidates import remedy_for
from phase8.plan.rank_memory import StageMemory, fullest
from phase8.plan.settle import Settled, lacking_room, settle
from phase8.plan.whole_config import plan_stages
from phase8.precision.policy import compute_dtype
from phase8.train.engine.train_state import build_chunks
from phase8.zero.fsdp import shard_size


class CheckedPlan(NamedTuple):
    """What a run would choose, and what its ranks would hold.

    Args:
        settled: The config with the settings that a run would choose by plan, and the GPU for which they are.
        stages: The plan of every stage.
        too_large: A sentence about settings, chosen or explicit, that need more memory than the GPU has; None: there is room.
    """

    settled: Settled
    stages: tuple[StageMemory, ...]
    too_large: str | None


def check_plan(config: RunConfig, *, world_size: int) -> CheckedPlan:
    """The plan of every stage with the settings of a run, after building its first rank as a run of `world_size` processes would.

    Args:
        config: Any config; explicit settings are obeyed, `auto` ones chosen by plan.
        world_size: Number of ranks of the run; this process acts as one after the other.

    Raises:
        ConfigError: The config cannot run on that many ranks.
        Phase8Error: A rank holds something other than planned.
    """
    validate(config, world_size=world_size)
    settled = settle(config, world_size=world_size)
    planned = plan_stages(settled.config, world_size=world_size, device_type=settled.device.type, device_bytes=settled.device.total_bytes)
    for stage in planned:
        rank = stage.stage * world_size // len(planned)
        built = _count_built(settled.config, world_size=world_size, rank=rank)
        if built != stage.num_parameters:
            raise Phase8Error(
                f"rank {rank}, the first of pipeline stage {stage.stage}, holds {built:,} parameters, but {stage.num_parameters:,} are planned; "
                "the planner does not know how this model is divided, so report it."
            )
    return CheckedPlan(settled, planned, settled.too_large or _too_large(config, settled, planned, world_size))


def _too_large(config: RunConfig, settled: Settled, planned: Sequence[StageMemory], world_size: int) -> str | None:
    """A sentence about the stages that need more memory than the GPU has, or None."""
    lacking = lacking_room(planned, settled.device)
    if lacking is None:
        return None
    most = fullest(planned).memory.total_bytes
    return f"{lacking}; {remedy_for(config, settled.config, settled.device, world_size=world_size, planned_bytes=most)}."


def _count_built(config: RunConfig, *, world_size: int, rank: int) -> int:
    """Number of parameters that a rank holds between steps, in a world where only this rank exists."""
    topology = run_topology(config.parallel, world_size=world_size)
    size = shard_size(config.zero, num_token_ranks=topology.num_token_ranks)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        mesh = build_mesh(topology, device_type="cpu", shard_size=size)
        chunks = build_chunks(config, mesh=mesh, device=torch.device("meta"), dtype=compute_dtype(config.precision))
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    finally:
        dist.destroy_process_group()
    return sum(held_part(each).numel() for each in parameters)
