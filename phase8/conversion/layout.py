"""The ranks for which a checkpoint is rewritten."""

from __future__ import annotations

from phase8.config.model_section import ModelSection
from phase8.config.schema import ParallelSection, RunConfig
from phase8.config.validate import validate
from phase8.conversion.options import ConversionOptions
from phase8.errors import ConfigError
from phase8.topology import Topology


def parallel_section(config: RunConfig, options: ConversionOptions) -> ParallelSection:
    """The parallel section of the target layout.

    Raises:
        ConfigError: The model does not support the layout.
    """
    T, P = options.tensor_parallel_size or 1, options.pipeline_parallel_size or 1
    stored = config.parallel  # it describes other ranks; only how their layers were divided matters here
    parallel = ParallelSection(
        tensor_parallel_size=T, pipeline_parallel_size=P, pipeline_schedule=stored.pipeline_schedule, pipeline_chunks=stored.pipeline_chunks
    )
    batch = RunConfig().train.model_copy(update={"global_batch_size": P, "micro_batch_size": 1})  # a batch that fits every schedule
    validate(RunConfig(model=config.model, parallel=parallel, train=batch), world_size=T * P)
    return parallel


def topology_of(parallel: ParallelSection, model: ModelSection, options: ConversionOptions) -> Topology:
    """The ranks of the target layout, whose parallel section is given.

    Raises:
        ConfigError: The ranks cannot share the experts of the model.
    """
    topology = Topology(
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        data_parallel_size=options.shards or 1,
        tensor_parallel_size=parallel.tensor_parallel_size,
        expert_parallel_size=options.expert_parallel_size or 1,
    )
    _check_experts(model, topology)
    return topology


def _check_experts(model: ModelSection, topology: Topology) -> None:
    """Refuses ranks that cannot share the experts of a model.

    Raises:
        ConfigError: The model has no experts, or the ranks do not divide them.
    """
    num_ranks = topology.expert_parallel_size
    if num_ranks > 1 and model.ffn != "moe":
        raise ConfigError(f"--expert-parallel-size is {num_ranks}, but model.ffn is {model.ffn} and has no experts; leave it out.")
    if num_ranks > 1 and model.num_experts % num_ranks:
        raise ConfigError(f"--expert-parallel-size {num_ranks} does not divide model.num_experts {model.num_experts}; choose a divisor.")
