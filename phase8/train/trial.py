"""A trial of a config: a few training steps on random tokens, which measure step time and device memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import torch

from phase8.accelerator import give_back_memory
from phase8.config.batch import BatchShape, batch_shape
from phase8.config.schema import RunConfig
from phase8.data.microbatch import Microbatch, stand_in
from phase8.distributed.mesh import Mesh
from phase8.observe.memory import peak_memory_bytes, reset_peak_memory
from phase8.train.engine.protocol import BuildEngine, TrainingEngine

# A step of more microbatches is extrapolated linearly from a step of few microbatches and a step of this many.
MOST_MICROBATCHES = 3
MEASURED_STEPS = 3
OUT_OF_MEMORY = "out of memory"
# Bytes a second with which weights and states are made in host memory, and its pages locked: 93 GiB took 178 s, one H200, 16 cores, 2026-11-30.
_HOST_BYTES_MADE = 0.55e9


@dataclass(frozen=True)
class Trial:
    """The measurements of a trial.

    Args:
        step_seconds: Duration of a step of all microbatches; it is extrapolated where there are more than MOST_MICROBATCHES.
        tokens_per_second: Throughput of all ranks together.
        peak_bytes: Largest size of this rank's tensors on the device at one time.
        seconds: Duration of the trial.
    """

    step_seconds: float
    tokens_per_second: float
    peak_bytes: int
    seconds: float


def trial_seconds(config: RunConfig, step_seconds: float, *, host_bytes: int) -> float:
    """The duration of a trial in one process, without compilation: what lies on the host is made, then there are as many slow steps as measured ones.

    Args:
        config: Config of the trial.
        step_seconds: Duration of a step of all microbatches.
        host_bytes: Planned host memory.
    """
    shape = batch_shape(config.train, config.parallel, data_parallel_size=1)
    return host_bytes / _HOST_BYTES_MADE + 2 * MEASURED_STEPS * step_seconds * min(1.0, MOST_MICROBATCHES / shape.num_microbatches)


def run_trial(config: RunConfig, *, mesh: Mesh, device: torch.device, build_engine: BuildEngine) -> Trial | str:
    """Trains for a few steps as a run would, without data, metrics or checkpoints; returns the reason as text where it cannot.

    The trial frees all that it allocated and compiled.

    Args:
        config: Config without `auto` settings.
        mesh: Mesh of the ranks, which all take part.
        device: Device of this rank.
        build_engine: Function that builds the engine.
    """
    begin = time.perf_counter()
    trial = _try(config, mesh, device, build_engine, begin)
    # Only now has the frame that held model and optimizer ended, also after running out of memory.
    torch.compiler.reset()
    _give_back_memory(device)
    return trial


def _try(config: RunConfig, mesh: Mesh, device: torch.device, build_engine: BuildEngine, begin: float) -> Trial | str:
    shape = batch_shape(config.train, config.parallel, data_parallel_size=mesh.topology.data_parallel_size)
    reset_peak_memory(device)
    try:
        engine = build_engine(config, mesh=mesh, device=device)
        try:
            seconds = _whole_step_seconds(engine, config, shape)
        finally:
            engine.end()
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    except RuntimeError as error:
        if not config.train.compile.enabled:
            raise
        return f"cannot be compiled ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"
    tokens = shape.global_batch_size * config.model.sequence_length
    return Trial(seconds, tokens / seconds, peak_memory_bytes(device), time.perf_counter() - begin)


def _whole_step_seconds(engine: TrainingEngine, config: RunConfig, shape: BatchShape) -> float:
    """The duration of a step of all microbatches."""
    mesh, device = engine.mesh, engine.device
    microbatch = _random_microbatch(config, shape.micro_batch_size, mesh, device)

    def step_seconds(num_microbatches: int) -> float:
        with closing(engine):
            seconds = _median_step_seconds(engine, [microbatch] * num_microbatches)
            engine.evaluate([microbatch])  # an evaluation needs memory in addition to that of a recording
            return seconds

    fewest = 1 if mesh.pp.size == 1 else shape.num_microbatches
    most = min(shape.num_microbatches, max(MOST_MICROBATCHES, fewest))
    seconds = step_seconds(most)
    if shape.num_microbatches == most:
        return seconds
    _give_back_memory(device)  # frees the recording: a run has only one
    one = step_seconds(fewest)
    return one + (shape.num_microbatches - fewest) * (seconds - one) / (most - fewest)


def _give_back_memory(device: torch.device) -> None:
    gc.collect()
    give_back_memory(device.type)


def _random_microbatch(config: RunConfig, batch_size: int, mesh: Mesh, device: torch.device) -> Microbatch:
    empty = stand_in(
        batch_size,
        config.model.sequence_length,
        reset_at_document_boundaries=config.data.reset_at_document_boundaries,
        own_slice=mesh.own_slice,
    )
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(config.model.vocab_size, empty.tokens.shape, generator=generator) for _ in range(2))
    return replace(empty, tokens=tokens, targets=targets, num_valid=tokens.numel()).to(device)


def _median_step_seconds(engine: TrainingEngine, batch: Sequence[Microbatch]) -> float:
    take_step = partial(engine.update, batch, learning_rate=1e-9, gradient_clip_norm=1.0)
    for _ in range(engine.num_slow_updates):
        take_step()
    durations = []
    for _ in range(MEASURED_STEPS):
        begin = time.perf_counter()
        take_step()  # the step ends when the loss is on the host
        durations.append(time.perf_counter() - begin)
    return statistics.median(durations)
