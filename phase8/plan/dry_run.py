"""What a config will do and cost, without training: topology, parameters, FLOPs, memory, batch, problems."""

from __future__ import annotations

import torch
from rich.console import Console

from phase8.config.batch import batch_shape, run_topology
from phase8.config.pipeline import pipeline_of
from phase8.config.schema import RunConfig
from phase8.config.validate import find_problems
from phase8.errors import ConfigError
from phase8.model.model import LanguageModel, build_model
from phase8.observe.banner import print_banner
from phase8.observe.devices import find_gpu
from phase8.plan.facts import Fact, batch_fact, communication_fact, memory_facts, model_facts, speed_fact
from phase8.plan.prediction import ASSUMED_GPU, predict_step
from phase8.plan.rank_memory import StageMemory, Workload, plan_each_stage
from phase8.plan.run_communication import plan_run_communication
from phase8.precision.policy import COMPUTE_DTYPES


def dry_run(config: RunConfig, *, world_size: int, console: Console) -> None:
    """Prints what a config would do on `world_size` processes.

    Raises:
        ConfigError: It could not run; raised after everything that can be said has been printed.
    """
    problems = find_problems(config, world_size=world_size)
    facts: list[Fact] = []
    # Each part is printed as far as the config allows: a topology that does not fit must not hide the size of the model.
    for describe in (_topology_facts, _batch_facts, _model_facts, _memory_facts, _communication_facts, _speed_facts):
        try:
            facts += describe(config, world_size)
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    print_banner(f"dry run: {config.run.name}, world size {world_size}", facts, console)
    if problems:
        raise ConfigError(problems)


def _topology_facts(config: RunConfig, world_size: int) -> list[Fact]:
    topology = run_topology(config.parallel, world_size=world_size)
    degrees = " x ".join(f"{axis} {degree}" for axis, degree in topology.degrees.items())
    last = ", ".join(f"{axis} {position}" for axis, position in topology.coordinates(world_size - 1).items())
    return [("topology", f"{degrees} = {world_size} ranks; rank 0 is first on every axis, rank {world_size - 1} is {last}")]


def _batch_facts(config: RunConfig, world_size: int) -> list[Fact]:
    shape = batch_shape(config.train, config.parallel, data_parallel_size=run_topology(config.parallel, world_size=world_size).data_parallel_size)
    steps = config.train.num_steps
    num_tokens = steps * shape.global_batch_size * config.model.sequence_length
    return [batch_fact(shape, sequence_length=config.model.sequence_length), ("run", f"{steps:,} steps, {num_tokens:,} tokens")]


def _model_facts(config: RunConfig, world_size: int) -> list[Fact]:
    return model_facts(config.model, num_parameters=count_parameters(shapes_only(config)))


def _memory_facts(config: RunConfig, world_size: int) -> list[Fact]:
    shapes_only(config)  # a model that can be built
    return memory_facts(plan_stages(config, world_size=world_size, device_type="cuda"))


def _communication_facts(config: RunConfig, world_size: int) -> list[Fact]:
    """Of the stage that sends most; on the others and on ranks with smaller parts it is less."""
    if world_size == 1:
        return []
    num_stages = config.parallel.pipeline_parallel_size
    ranks = range(0, world_size, max(world_size // num_stages, 1))
    plans = [plan_run_communication(config, world_size=world_size, rank=rank) for rank in ranks]
    return [communication_fact(*max(plans, key=lambda plan: sum(each.sent_bytes(plan[1].size(each.axis)) for each in plan[0])))]


def _speed_facts(config: RunConfig, world_size: int) -> list[Fact]:
    """On the GPU of this machine, or on an H100 where there is none that is known. References in plain torch are not predicted."""
    if config.train.kernels == "reference":
        return []
    own = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    known = own is not None and find_gpu(own) is not None
    predicted = predict_step(config, world_size, own if own is not None and known else ASSUMED_GPU)
    missing = "this machine has no GPU" if own is None else f"{own} is not known"
    return [
        speed_fact(
            tokens_per_second=predicted.tokens_per_second,
            mfu=predicted.mfu,
            run_seconds=predicted.seconds * config.train.num_steps,
            num_gpus=world_size,
            gpu=own if own is not None and known else f"{ASSUMED_GPU}, assumed because {missing}",
        )
    ]


def shapes_only(config: RunConfig) -> LanguageModel:
    """The model on the meta device: every parameter has its shape and no memory.

    Raises:
        ConfigError: No model can be built from the config.
    """
    unusable = [problem for problem in find_problems(config) if problem.startswith(("model.", "precision."))]
    if unusable:
        raise ConfigError(unusable)
    return build_model(config.model, dtype=COMPUTE_DTYPES[config.precision.dtype], device=torch.device("meta"))


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters, a shared one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def plan_stages(config: RunConfig, *, world_size: int, device_type: str, device_bytes: int | None = None) -> tuple[StageMemory, ...]:
    """The memory of each pipeline stage.

    Args:
        config: One from which a model can be built.
        world_size: Ranks.
        device_type: `cuda` or `cpu`.
        device_bytes: Memory that the device has; None: a large one.

    Raises:
        ConfigError: Ranks, stages or batch do not fit.
    """
    topology = run_topology(config.parallel, world_size=world_size)
    return plan_each_stage(
        Workload(
            model=config.model,
            train=config.train,
            zero=config.zero,
            pipeline=pipeline_of(config.parallel),
            topology=topology,
            shape=batch_shape(config.train, config.parallel, data_parallel_size=topology.data_parallel_size),
            dtype=COMPUTE_DTYPES[config.precision.dtype],
            packed=config.data.reset_at_document_boundaries,
            device_type=device_type,
            saves_aside=config.checkpoint.asynchronous,
            async_tensor_parallel=config.parallel.async_tensor_parallel,
            device_bytes=device_bytes,
        )
    )
