"""What a config will do and cost, without training: topology, parameters, FLOPs, memory, batch, problems."""

from __future__ import annotations

import torch
from rich.console import Console

from phase8.config.batch import batch_shape, run_topology
from phase8.config.schema import RunConfig
from phase8.config.validate import find_problems
from phase8.errors import ConfigError
from phase8.model.model import LanguageModel, build_model
from phase8.observe.banner import print_banner
from phase8.plan.activations import trace_activations
from phase8.plan.facts import Fact, batch_fact, memory_fact, model_facts
from phase8.plan.memory import Division, MemoryPlan, peak_activation_bytes, plan_memory
from phase8.precision.policy import COMPUTE_DTYPES
from phase8.topology import Topology
from phase8.zero.fsdp import shard_size

ONE_PROCESS = Topology()


def dry_run(config: RunConfig, *, world_size: int, console: Console) -> None:
    """Prints what a config would do on `world_size` processes.

    Raises:
        ConfigError: It could not run; raised after everything that can be said has been printed.
    """
    problems = find_problems(config, world_size=world_size)
    facts: list[Fact] = []
    # Each part is printed as far as the config allows: a topology that does not fit must not hide the size of the model.
    for describe in (_topology_facts, _batch_facts, _model_facts, _memory_facts):
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
    num_parameters, topology = count_parameters(shapes_only(config)), run_topology(config.parallel, world_size=world_size)
    shape = batch_shape(config.train, config.parallel, data_parallel_size=topology.data_parallel_size)
    name, memory = memory_fact(
        plan_run_memory(
            config, num_parameters=num_parameters, micro_batch_size=shape.micro_batch_size, device_type="cuda", topology=topology
        )
    )
    return [(f"{name} per rank", memory)]


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


def plan_run_memory(
    config: RunConfig, *, num_parameters: int, micro_batch_size: int, device_type: str, topology: Topology = ONE_PROCESS
) -> MemoryPlan:
    """The memory of a rank that trains a config on a `cpu` or `cuda` device, the activations traced."""
    dtype = COMPUTE_DTYPES[config.precision.dtype]
    model, train = config.model, config.train
    packed = config.data.reset_at_document_boundaries
    traced = trace_activations(model, dtype=dtype, micro_batch_size=micro_batch_size, packed=packed, device_type=device_type)
    num_recomputed = 0 if train.recompute == "none" else len(range(0, model.num_layers, train.recompute_every_n_layers))
    activations_bytes = peak_activation_bytes(
        num_layers=model.num_layers,
        num_recomputed=num_recomputed,
        block=traced.block,
        recomputed_block=traced.block_input if train.recompute == "full" else traced.block_without_mixer,
        head=traced.head,
    )
    zero = config.zero
    division = Division(
        num_tensor_ranks=topology.tensor_parallel_size,
        num_shard_ranks=shard_size(zero, data_parallel_size=topology.data_parallel_size),
        zero_stage=zero.stage,
        offload_optimizer=zero.offload_optimizer != "none",
        offload_params=zero.offload_params != "none",
    )
    return plan_memory(
        num_parameters=num_parameters, num_layers=model.num_layers, activations_bytes=activations_bytes, division=division
    )
