"""The predicted speed of a config on GPUs of one kind."""

from __future__ import annotations

from dataclasses import dataclass

from phase8.config.batch import batch_shape, run_topology
from phase8.config.dotted import replaced
from phase8.config.pipeline import pipeline_of
from phase8.config.schema import RunConfig
from phase8.config.validate import find_problems
from phase8.model.flops import training_flops_per_token
from phase8.observe.devices import Gpu, find_gpu
from phase8.plan.chunks import chunk_parameters
from phase8.plan.optimizer_work import update_work
from phase8.plan.run_communication import plan_run_communication
from phase8.plan.stages import chunk_layers
from phase8.plan.throughput import StageWork, StepWork, optimizer_seconds, step_seconds

ASSUMED_GPU = "NVIDIA H100 80GB HBM3"
# A recorded step keeps memory of its own, so it must be faster by at least this share.
GAIN_OF_A_GRAPH = 1.02


@dataclass(frozen=True)
class StepPrediction:
    """Predicted speed of a training step.

    Args:
        seconds: Duration of a step.
        tokens_per_second: Throughput of all ranks together.
        mfu: Model FLOP/s over the peak of the GPUs.
        is_known: Whether the device is in the table of GPUs; otherwise the prediction is for an H100.
        optimizer_seconds: The part of a step in which the optimizer updates the weights.
    """

    seconds: float
    tokens_per_second: float
    mfu: float
    is_known: bool
    optimizer_seconds: float = 0.0


def predict_step(config: RunConfig, world_size: int, device_name: str | Gpu, *, host_ratio: float = 1.0) -> StepPrediction:
    """Predicts the speed of a config that runs with kernels on GPUs of one kind.

    Args:
        config: A config that can run on `world_size` ranks.
        world_size: Ranks.
        device_name: As torch reports it, or the bare name in any case: `h100`. An unknown device is
            predicted as if it were an H100, which is good enough to rank settings.
        host_ratio: Kernel launch time of the host over that of the host on which the constants were measured.

    Raises:
        ConfigError: The config cannot run on `world_size` ranks.
    """
    found = find_gpu(device_name) if isinstance(device_name, str) else device_name
    gpu = found or assumed_gpu()
    work = step_work(config, world_size=world_size)
    num_tokens = work.shape.global_batch_size * config.model.sequence_length
    seconds = step_seconds(work, gpu, host_ratio=host_ratio)
    peak = config.observe.peak_flops or gpu.peak_flops(work.dtype) or gpu.fp32 * 1e12
    mfu = training_flops_per_token(config.model) * num_tokens / seconds / (peak * world_size)
    updating = optimizer_seconds(work, gpu, host_ratio=host_ratio)
    return StepPrediction(seconds, num_tokens / seconds, mfu, is_known=found is not None, optimizer_seconds=updating)


def recorded_where_it_pays(config: RunConfig, world_size: int, device_name: str | Gpu) -> tuple[RunConfig, StepPrediction]:
    """The config and its prediction; the step is recorded as a CUDA graph where possible and predicted to be worth its memory.

    Args:
        config: A config that can run on `world_size` ranks, its step not recorded.
        world_size: Ranks.
        device_name: As for `predict_step`.
    """
    plain, recorded = predict_step(config, world_size, device_name), replaced(config, {"train.cuda_graphs": True})
    if not find_problems(recorded, world_size=world_size):
        prediction = predict_step(recorded, world_size, device_name)
        if prediction.tokens_per_second > GAIN_OF_A_GRAPH * plain.tokens_per_second:
            return recorded, prediction
    return config, plain


def assumed_gpu() -> Gpu:
    """The GPU that predictions assume when the real one is unknown."""
    gpu = find_gpu(ASSUMED_GPU)
    assert gpu is not None
    return gpu


def step_work(config: RunConfig, *, world_size: int) -> StepWork:
    """The computation and communication of a step.

    Raises:
        ConfigError: The config cannot run on that many ranks.
    """
    topology = run_topology(config.parallel, world_size=world_size)
    dtype = config.precision.dtype
    return StepWork(
        model=config.model,
        train=config.train,
        parallel=config.parallel,
        zero=config.zero,
        shape=batch_shape(config.train, config.parallel, data_parallel_size=topology.data_parallel_size),
        dtype="tf32" if dtype == "fp32" and config.precision.tf32 else dtype,
        fp8_layers=config.precision.fp8_layers(config.model.num_layers),
        pipeline=pipeline_of(config.parallel),
        stages=tuple(_stage_work(config, world_size, stage) for stage in _different_stages(config)),
    )


def _different_stages(config: RunConfig) -> list[int]:
    """One stage of each kind: inner stages with as many layers of the same kinds take equally long."""
    pipeline = pipeline_of(config.parallel)
    kinds_of_layers = config.model.layer_kinds
    kinds: dict[tuple[object, ...], int] = {}
    for stage in range(pipeline.num_stages):
        layers = [layer for each in chunk_layers(config.model, pipeline, stage) for layer in each]
        recomputed = sum(layer % config.train.recompute_every_n_layers == 0 for layer in layers)
        sorted_kinds = sorted(kinds_of_layers[layer] for layer in layers)
        kinds.setdefault((stage == 0, stage == pipeline.num_stages - 1, recomputed, *sorted_kinds), stage)
    return list(kinds.values())


def _stage_work(config: RunConfig, world_size: int, stage: int) -> StageWork:
    pipeline = pipeline_of(config.parallel)
    collectives, grid = plan_run_communication(config, world_size=world_size, rank=stage * world_size // pipeline.num_stages)
    layers = chunk_layers(config.model, pipeline, stage)
    chunks = [chunk_parameters(config.model, each) for each in layers]
    parameters = [counted for chunk in chunks for counted in chunk.counted_parameters]
    num_computed = sum(times * each.region(grid.places).num_elements for each, times in parameters)
    return StageWork(
        layers=tuple(layer for each in layers for layer in each),
        num_computed=num_computed,
        update=update_work(config.optim, config.model, chunks, grid),
        collectives=collectives,
        grid=grid,
    )
