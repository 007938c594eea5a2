"""One rank of each pipeline stage, built without memory on a process group that only pretends: what a run of any size would hold."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from phase8.config.batch import run_topology
from phase8.config.schema import RunConfig
from phase8.config.validate import validate
from phase8.distributed.mesh import build_mesh
from phase8.distributed.placement import held_part
from phase8.errors import Phase8Error
from phase8.plan.rank_memory import StageMemory
from phase8.plan.whole_config import plan_stages
from phase8.precision.policy import compute_dtype
from phase8.train.engine.train_state import build_chunks
from phase8.zero.fsdp import shard_size


def check_stages(config: RunConfig, *, world_size: int, device_type: str = "cuda") -> tuple[StageMemory, ...]:
    """The plan of every stage, after its first rank was built as a run of `world_size` processes would build it.

    Args:
        config: Any config.
        world_size: Ranks of the run; this process is one after the other.
        device_type: Where the run would compute; here nothing is computed.

    Raises:
        ConfigError: The config cannot run on so many ranks.
        Phase8Error: A rank holds something else than planned.
    """
    validate(config, world_size=world_size)
    planned = plan_stages(config, world_size=world_size, device_type=device_type)
    for stage in planned:
        rank = stage.stage * world_size // len(planned)
        built = _count_built(config, world_size=world_size, rank=rank)
        if built != stage.num_parameters:
            raise Phase8Error(
                f"rank {rank}, the first of pipeline stage {stage.stage}, holds {built:,} parameters, but {stage.num_parameters:,} are planned; "
                "the planner does not know how this model is divided, so report it."
            )
    return planned


def _count_built(config: RunConfig, *, world_size: int, rank: int) -> int:
    """Parameters that a rank holds between steps, in a world of which only this rank exists."""
    topology = run_topology(config.parallel, world_size=world_size)
    size = shard_size(config.zero, data_parallel_size=topology.data_parallel_size)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        mesh = build_mesh(topology, device_type="cpu", shard_size=size)
        chunks = build_chunks(config, mesh=mesh, device=torch.device("meta"), dtype=compute_dtype(config.precision))
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    finally:
        dist.destroy_process_group()
    return sum(held_part(each).numel() for each in parameters)
