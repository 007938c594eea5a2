"""Training speed of a config, measured by training it for a few steps with the trainer itself.

The clock runs from the end of one step to the end of the next, so it includes everything a user waits for: data, forward, backward, the
optimizer and the record of the step. A step ends at its one synchronisation with the device, where the loss is read. The part of the
optimizer still in flight then falls into the next step, so the sum is complete.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from phase8.accelerator import give_back_memory
from phase8.checkpoint.state import MODEL_PREFIX
from phase8.config.auto import without_auto
from phase8.config.load import with_settings
from phase8.config.schema import RunConfig
from phase8.model.flops import training_flops_per_token
from phase8.observe.metrics import MetricsWriter, StepMetrics
from phase8.observe.progress import Progress
from phase8.observe.step_profile import profile_steps, write_profile
from phase8.plan.whole_config import count_parameters, shapes_only
from phase8.tensor_parallel.linear import Linear
from phase8.terminal import make_console
from phase8.train.build import Run, build_run
from phase8.train.device import device_name
from phase8.train.signals import StopRequest
from phase8.train.trainer import Trainer

WARMUP_STEPS = 3  # they include compilation and the recording of the CUDA graph
PROFILED_STEPS = 3


@dataclass(frozen=True)
class Throughput:
    """Medians over the measured steps.

    Args:
        device: Name of the device.
        device_type: Type of the device.
        torch_version: Version of torch.
        block: `phase8` or `transformer`.
        num_parameters: Parameters of the model.
        sequence_length: T.
        batch_size: Sequences of a step.
        recompute: What backward recomputed.
        num_steps: Measured steps.
        tokens_per_second: Training speed.
        step_seconds: From the end of a step to the end of the next.
        data_wait_ratio: Share of the step spent waiting for data.
        mfu: Model FLOP/s over the device's peak; None: unknown.
        peak_memory_bytes: Peak of the whole run; on a CPU that of the process, earlier runs included.
        warmup_seconds: Duration of the warm-up steps.
        first_loss: Loss of the first step, before any update.
        gradients: Norm of the gradient of each linear of the mixers, over all layers, in the last warm-up step. Equal norms show that
            two runs computed the same.
        facts: Facts of the run's banner: device, implementations, batch, planned memory.
    """

    device: str
    device_type: str
    torch_version: str
    block: str
    num_parameters: int
    sequence_length: int
    batch_size: int
    recompute: str
    num_steps: int
    tokens_per_second: float
    step_seconds: float
    data_wait_ratio: float
    mfu: float | None
    peak_memory_bytes: int
    warmup_seconds: float
    first_loss: float
    gradients: dict[str, float]
    facts: dict[str, str]


@dataclass(frozen=True)
class Measurement:
    """A throughput, or the reason why there is none.

    Args:
        throughput: The measurement; None: there is none.
        reason: Why there is none; None if there is one.
    """

    throughput: Throughput | None
    reason: str | None = None


class StepClock(MetricsWriter):
    """A metrics writer that also remembers when each step ended."""

    def __init__(self, directory: Path):
        super().__init__(directory, resume_step=0)
        self.steps: list[StepMetrics] = []
        self.ends: list[float] = []

    def begin(self) -> None:
        """Starts the clock."""
        self.ends = [time.perf_counter()]

    def log_step(self, metrics: StepMetrics) -> None:
        """Remembers the time and records a training step."""
        self.ends.append(time.perf_counter())
        self.steps.append(metrics)
        super().log_step(metrics)

    @property
    def durations(self) -> list[float]:
        """Seconds from the end of a step to the end of the next, the first one from `begin`."""
        return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]


def measure_throughput(config: RunConfig, *, device: torch.device, num_steps: int, profile_to: Path | None = None) -> Throughput:
    """Trains in a temporary run directory, without evaluation, report or checkpoints.

    Args:
        config: The config to train; its length, learning rate and everything that interrupts steps are overridden.
        device: Device to train on.
        num_steps: Measured steps, after a warm-up of `WARMUP_STEPS`.
        profile_to: File for the kernels of `PROFILED_STEPS` further steps.

    Raises:
        DivergenceError: A loss or a gradient was not finite, so the speed means nothing.
    """
    with tempfile.TemporaryDirectory() as output_dir:
        total_steps = WARMUP_STEPS + num_steps + PROFILED_STEPS
        run = build_run(undisturbed(config, output_dir, num_steps=total_steps), device=device, resume="none", console=silence())
        progress = Progress(total_steps=total_steps, start_step=0, log_every_n_steps=total_steps, console=run.console)
        with (
            run.lock,
            StepClock(run.directory.path) as clock,
            progress,
            closing(Trainer(run, clock, progress, lambda step, doing: None)) as trainer,
        ):
            _wake(run)
            norms = _watch_gradients(run)
            clock.begin()
            trainer.train_until(WARMUP_STEPS, StopRequest())
            gradients = {name: norm.item() for name, norm in norms.items()}
            trainer.train_until(WARMUP_STEPS + num_steps, StopRequest())
            found = _figures(run, clock, gradients=gradients)
            if profile_to is not None:
                profile = profile_steps(lambda: trainer.train_until(total_steps, StopRequest()), device=device, num_steps=PROFILED_STEPS)
                write_profile(profile_to, profile, title=f"{found.block} on {found.device}", step_seconds=found.step_seconds)
    return found


def measure_alone(config: RunConfig, *, device: torch.device, num_steps: int, profile_to: Path | None = None) -> Measurement:
    """Runs `measure_throughput` as if in a new process: releases compiled code and GPU memory, and reports out-of-memory as a result."""
    measurement = _measure_or_run_out(config, device=device, num_steps=num_steps, profile_to=profile_to)
    # Only here has the frame that holds model and optimizer ended, also when memory ran out.
    if config.train.compile.enabled:
        torch.compiler.reset()
    gc.collect()
    give_back_memory(device.type)
    return measurement


def _measure_or_run_out(config: RunConfig, *, device: torch.device, num_steps: int, profile_to: Path | None) -> Measurement:
    try:
        return Measurement(measure_throughput(config, device=device, num_steps=num_steps, profile_to=profile_to))
    except torch.OutOfMemoryError:
        return Measurement(None, "out of memory")


def undisturbed(config: RunConfig, output_dir: str, *, num_steps: int) -> RunConfig:
    """The same training without interruptions between its steps, without learning-rate warm-up, and with no automatic settings."""
    config = without_auto(config)
    settings = {
        "run.output_dir": output_dir,
        "optim.learning_rate": 1e-5,
        "optim.schedule": "constant",
        "optim.warmup_steps": 0,
        "optim.decay_steps": None,
        "optim.gradient_clip_norm": 1e9 if config.optim.gradient_clip_norm else 0.0,  # the same work, gradients unchanged
        "train.num_steps": num_steps,
        "train.stop_at_step": None,
        "train.evaluate_every_n_steps": 0,
        "train.anomaly.policy": "stop",
        "train.anomaly.spike_deviations": None,
        "checkpoint.every_n_steps": 0,
        "checkpoint.asynchronous": False,
        "observe.tensorboard": False,
        "observe.report": False,
        "observe.sample_prompt": None,
    }
    return with_settings(config, settings)


def _mixer_linears(config: RunConfig) -> dict[str, list[str]]:
    """The linear layers of the mixers: the names of the weights of those of one name in all blocks."""
    model = shapes_only(config)
    names = [name for name, module in model.blocks["0"].mixer.named_modules() if isinstance(module, Linear)]
    return {name: [f"blocks.{layer}.mixer.{name}.weight" for layer in model.blocks] for name in names}


def _wake(run: Run) -> None:
    """Gives linears of the mixers that begin at zero some weights, the same ones on one kind of device.

    With zero weights the backward of the mixer computes only zeros, and a wrong kernel would not show in the gradients.
    """
    state = run.engine.state()
    generator = torch.Generator(state[MODEL_PREFIX + "embedding.weight"].device).manual_seed(0)
    with torch.no_grad():
        for name in itertools.chain(*_mixer_linears(run.config).values()):
            weight = state[MODEL_PREFIX + name]
            if not weight.any():
                weight.normal_(std=run.config.model.init_std, generator=generator)


def _watch_gradients(run: Run) -> dict[str, Tensor]:
    """Returns a mapping that the last warm-up step fills with the gradient norm of each linear of the mixers, over all layers.

    That step is the one that a CUDA graph records; with a graph, later steps fill the mapping again.
    """
    norms: dict[str, Tensor] = {}
    linears = _mixer_linears(run.config)

    def measure(gradients: Mapping[str, Tensor]) -> None:
        if run.position.step != WARMUP_STEPS - 1:
            return
        for name, weights in linears.items():
            norms[name] = torch.nn.utils.get_total_norm([gradients[weight] for weight in weights])

    run.engine.watch_gradients(measure)
    return norms


def _figures(run: Run, clock: StepClock, *, gradients: dict[str, float]) -> Throughput:
    durations, steps = clock.durations[WARMUP_STEPS:], clock.steps[WARMUP_STEPS:]
    seconds = statistics.median(durations)
    tokens_per_second = run.shape.global_batch_size * run.config.model.sequence_length / seconds
    flops_per_second = training_flops_per_token(run.config.model) * tokens_per_second
    return Throughput(
        device=device_name(run.device),
        device_type=run.device.type,
        torch_version=str(torch.__version__),
        block=run.config.model.block,
        num_parameters=count_parameters(shapes_only(run.config)),
        sequence_length=run.config.model.sequence_length,
        batch_size=run.shape.global_batch_size,
        recompute=run.config.train.recomputation,
        num_steps=len(steps),
        tokens_per_second=tokens_per_second,
        step_seconds=seconds,
        data_wait_ratio=statistics.median(step.data_wait_seconds / duration for step, duration in zip(steps, durations, strict=True)),
        mfu=None if run.peak_flops is None else flops_per_second / run.peak_flops,
        peak_memory_bytes=steps[-1].peak_memory_bytes,
        warmup_seconds=sum(clock.durations[:WARMUP_STEPS]),
        first_loss=clock.steps[0].loss,
        gradients=gradients,
        facts=dict(run.facts),
    )


def silence() -> Console:
    """A console that prints nothing and costs the same everywhere, since it is no terminal."""
    return make_console(quiet=True, force_terminal=False)
