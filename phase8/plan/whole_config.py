"""Plans for a whole config: the shapes of its model, and the memory of each pipeline stage."""

from __future__ import annotations

import math

import torch

from phase8.config.auto import without_auto
from phase8.config.batch import batch_shape, run_topology
from phase8.config.pipeline import pipeline_of
from phase8.config.schema import RunConfig
from phase8.config.validate import MODEL_SECTIONS, refuse_problems
from phase8.model.model import LanguageModel, build_model
from phase8.optim.state import declared_for
from phase8.plan.chunks import chunk_parameters
from phase8.plan.rank_memory import StageMemory, Workload, plan_each_stage
from phase8.precision.policy import COMPUTE_DTYPES, number_format
from phase8.zero.fsdp import gathered_dtype


def shapes_only(config: RunConfig) -> LanguageModel:
    """Builds the model on the meta device, where every parameter has its shape and no memory.

    Raises:
        ConfigError: No model can be built from the config.
    """
    refuse_problems(config, about=MODEL_SECTIONS)
    return build_model(config.model, dtype=COMPUTE_DTYPES[config.precision.dtype], device=torch.device("meta"))


def count_parameters(model: torch.nn.Module) -> int:
    """The number of parameters; a shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def num_parameters(config: RunConfig) -> int:
    """The number of parameters of the model, found without building all its layers.

    Raises:
        ConfigError: No model can be built from the config.
    """
    refuse_problems(config, about=MODEL_SECTIONS)
    whole = chunk_parameters(config.model, range(config.model.num_layers))
    return sum(times * math.prod(parameter.shape) for parameter, times in whole.counted_parameters)


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of the tensors of a checkpoint, from all ranks: weights, buffers and the optimizer's state, each once.

    Raises:
        ConfigError: No model can be built from the config.
    """
    model, declare = shapes_only(config), declared_for(config.optim)
    tensors = {id(tensor): tensor.nbytes for tensor in model.state_dict(keep_vars=True).values()}
    states = (
        state.num_bytes(parameter.numel(), parameter_bytes=parameter.element_size())
        for name, parameter in model.named_parameters()
        for state in declare(name, parameter.shape).tensors
    )
    return sum(tensors.values()) + sum(states)


def plan_stages(config: RunConfig, *, world_size: int, device_type: str, device_bytes: int | None = None) -> tuple[StageMemory, ...]:
    """The memory of each pipeline stage.

    Args:
        config: Config from which a model can be built; `auto` settings count as with `train.tuning: off`; `settle` chooses them as a run would.
        world_size: Number of ranks.
        device_type: Type of device.
        device_bytes: Memory of the device; None: a large device.

    Raises:
        ConfigError: Ranks, stages or batch do not fit together.
    """
    config = without_auto(config)
    topology = run_topology(config.parallel, world_size=world_size)
    dtype, is_divided = COMPUTE_DTYPES[config.precision.dtype], topology.num_token_ranks > 1 or config.zero.offload_params != "none"
    return plan_each_stage(
        Workload(
            model=config.model.model_copy(update={"sequence_length": config.model.sequence_length // topology.context_parallel_size}),
            train=config.train,
            zero=config.zero,
            pipeline=pipeline_of(config.parallel),
            topology=topology,
            shape=batch_shape(config.train, config.parallel, data_parallel_size=topology.data_parallel_size),
            dtype=dtype,
            gathered_dtype=gathered_dtype(config.zero, dtype, torch.float32) if is_divided else torch.float32,
            number_format=number_format(config.precision),
            packed=config.data.reset_at_document_boundaries,
            declare_state=declared_for(config.optim),
            device_type=device_type,
            saves_aside=config.checkpoint.asynchronous,
            async_tensor_parallel=config.parallel.async_tensor_parallel,
            device_bytes=device_bytes,
        )
    )
