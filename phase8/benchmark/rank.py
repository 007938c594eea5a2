"""One rank of a benchmark: it trains for some steps with the trainer itself and writes its figures to a file."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from phase8.accelerator import is_accelerator
from phase8.benchmark.throughput import WARMUP_STEPS, StepClock, silence, undisturbed
from phase8.config.schema import RunConfig
from phase8.observe.memory import peak_memory_bytes
from phase8.observe.progress import Progress
from phase8.processes.bootstrap import World
from phase8.processes.host_memory import used_bytes
from phase8.train.build import build_run
from phase8.train.device import device_name
from phase8.train.signals import StopRequest
from phase8.train.trainer import Trainer


@dataclass(frozen=True)
class RankFigures:
    """What one rank measured.

    Args:
        rank: Its number.
        device: Name of its device.
        torch_version: Version of torch.
        step_seconds: Median over the measured steps, from the end of a step to the end of the next.
        data_wait_ratio: Share of the step spent waiting for data.
        build_seconds: Time until the model had its first weights and everything else was ready.
        warmup_seconds: Duration of the steps before the measured ones.
        peak_memory_bytes: Device memory while it trained; None on a CPU.
        peak_resident_bytes: Largest resident set of the process; whether page-locked memory counts depends on the driver.
        host_bytes: Host memory in use after the steps, less that in use before the model was built; None: unknown.
        facts: Facts of the run's banner.
    """

    rank: int
    device: str
    torch_version: str
    step_seconds: float
    data_wait_ratio: float
    build_seconds: float
    warmup_seconds: float
    peak_memory_bytes: int | None
    peak_resident_bytes: int
    host_bytes: int | None
    facts: dict[str, str]


def measure_rank(
    config: RunConfig, *, world: World, device: torch.device, num_steps: int, directory: Path, report: Callable[[int, str], None]
) -> RankFigures:
    """Trains without evaluation, report or checkpoints; a collective of all ranks.

    Args:
        config: The config to train; its length, learning rate and whatever interrupts steps are overridden.
        world: The place of this rank; the process group exists.
        device: Device of this rank.
        num_steps: Measured steps, after `WARMUP_STEPS`.
        directory: Directory for files of the ranks.
        report: Called with the current action of this rank and the step.

    Raises:
        DivergenceError: A loss or a gradient was not finite, so the speed means nothing.
    """
    used_before, begin = used_bytes(), time.perf_counter()
    config = undisturbed(config, str(directory), num_steps=WARMUP_STEPS + num_steps)
    run = build_run(config, device=device, resume="none", console=silence(), world_size=world.world_size)
    build_seconds = time.perf_counter() - begin
    progress = Progress(total_steps=config.train.num_steps, start_step=0, log_every_n_steps=config.train.num_steps, console=run.console)
    with (
        run.lock,
        StepClock(directory / f"rank-{world.rank}") as clock,
        progress,
        closing(Trainer(run, clock, progress, report)) as trainer,
    ):
        clock.begin()
        trainer.train_until(config.train.num_steps, StopRequest())
    used_after, seconds, steps = used_bytes(), clock.durations[WARMUP_STEPS:], clock.steps[WARMUP_STEPS:]
    return RankFigures(
        rank=world.rank,
        device=device_name(device),
        torch_version=str(torch.__version__),
        step_seconds=statistics.median(seconds),
        data_wait_ratio=statistics.median(step.data_wait_seconds / duration for step, duration in zip(steps, seconds, strict=True)),
        build_seconds=build_seconds,
        warmup_seconds=sum(clock.durations[:WARMUP_STEPS]),
        peak_memory_bytes=peak_memory_bytes(device) if is_accelerator(device.type) else None,
        peak_resident_bytes=peak_memory_bytes(torch.device("cpu")),
        host_bytes=None if used_before is None or used_after is None else used_after - used_before,
        facts=dict(run.facts),
    )
