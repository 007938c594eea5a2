"""The communication of a rank in one training step of a whole config."""

from __future__ import annotations

from collections import Counter

import torch

from phase8.config.auto import without_auto
from phase8.config.batch import batch_shape, run_topology
from phase8.config.pipeline import pipeline_of
from phase8.config.schema import RunConfig
from phase8.config.validate import MODEL_SECTIONS, refuse_problems
from phase8.exchanges import AnyExchange
from phase8.plan.chunks import chunk_exchanges, chunk_parameters
from phase8.plan.communication import Collectives, Grid, Step, step_communication
from phase8.plan.stages import chunk_layers
from phase8.precision.policy import COMPUTE_DTYPES
from phase8.topology import AxisName
from phase8.zero.fsdp import gathered_dtype, shard_size


def plan_run_communication(config: RunConfig, *, world_size: int, rank: int) -> tuple[tuple[Collectives, ...], Grid]:
    """The collectives of a rank in a step, and the grid with the place of the rank.

    Raises:
        ConfigError: The config cannot run on that many ranks.
    """
    config = without_auto(config)
    refuse_problems(config, about=(*MODEL_SECTIONS, "parallel.", "zero.", "train.", "world size"), world_size=world_size)
    topology, pipeline, train = run_topology(config.parallel, world_size=world_size), pipeline_of(config.parallel), config.train
    place = topology.coordinates(rank)
    sizes = topology.axis_sizes(shard_size=shard_size(config.zero, num_token_ranks=topology.num_token_ranks))
    token_rank = place["dp"] * topology.context_parallel_size + place["cp"]
    grid = Grid(
        pipeline=sizes[AxisName.PIPELINE],
        replicate=sizes[AxisName.REPLICATE],
        shard=sizes[AxisName.SHARD],
        expert=topology.expert_parallel_size,
        context=topology.context_parallel_size,
        tensor=sizes[AxisName.TENSOR],
        stage=place["pp"],
        shard_index=token_rank % sizes[AxisName.SHARD],
        tensor_index=place["tp"],
        context_index=place["cp"],
        expert_index=token_rank % topology.expert_parallel_size,
    )
    shape = batch_shape(train, config.parallel, data_parallel_size=topology.data_parallel_size)
    compute = COMPUTE_DTYPES[config.precision.dtype]
    step = Step(
        num_microbatches=shape.num_microbatches,
        micro_batch_size=shape.micro_batch_size,
        compute_bytes=compute.itemsize,
        zero_stage=config.zero.stage,
        offload_params=config.zero.offload_params != "none",
        offload_gradients=config.zero.offload_gradients,
        gathered_bytes=gathered_dtype(config.zero, compute, torch.float32).itemsize,
    )
    recomputation = {"recompute": train.recompute, "recompute_every_n_layers": train.recompute_every_n_layers, "is_divided": grid.tensor > 1}
    chunks, exchanges = [], Counter[AnyExchange]()
    for layers in chunk_layers(config.model, pipeline, grid.stage):
        chunks.append(chunk_parameters(config.model, layers))
        exchanges.update(chunk_exchanges(config.model, layers, **recomputation))
    return step_communication(config.model, chunks, exchanges, step=step, grid=grid), grid
