"""Training speed of a config, measured by training it for a few steps."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass

import torch
from rich.console import Console

from phase8.config.schema import RunConfig
from phase8.observe.metrics import read_metrics
from phase8.plan.dry_run import count_parameters
from phase8.train.build import build_run
from phase8.train.device import device_name
from phase8.train.loop import train

WARMUP_STEPS = 3


@dataclass(frozen=True)
class Throughput:
    """Medians over the measured steps.

    Args:
        device: Name of the device.
        torch_version: Of torch.
        block: `phase8` or `transformer`.
        num_parameters: Of the model.
        num_steps: Measured steps.
        tokens_per_second: Training speed.
        step_seconds: Duration of a step.
        data_wait_ratio: Share of it spent waiting for data.
        mfu: Model FLOP/s over the device's peak; None: unknown.
        peak_memory_bytes: Of the whole run.
    """

    device: str
    torch_version: str
    block: str
    num_parameters: int
    num_steps: int
    tokens_per_second: float
    step_seconds: float
    data_wait_ratio: float
    mfu: float | None
    peak_memory_bytes: int


def measure_throughput(config: RunConfig, *, device: torch.device, num_steps: int) -> Throughput:
    """Trains in a temporary run directory, without evaluation, report or checkpoints in between, and reads its metrics.

    Args:
        config: What to train; its length and everything that would interrupt the steps are overridden.
        device: Where.
        num_steps: Measured steps, after a warm-up of `WARMUP_STEPS`.
    """
    with tempfile.TemporaryDirectory() as output_dir:
        quiet = config.model_copy(
            update={
                "run": config.run.model_copy(update={"output_dir": output_dir}),
                "optim": config.optim.model_copy(update={"warmup_steps": 0, "decay_steps": None}),
                "train": config.train.model_copy(
                    update={"num_steps": WARMUP_STEPS + num_steps, "stop_at_step": None, "evaluate_every_n_steps": 0}
                ),
                "checkpoint": config.checkpoint.model_copy(update={"every_n_steps": 0}),
                "observe": config.observe.model_copy(update={"tensorboard": False, "report": False, "sample_prompt": None}),
            }
        )
        run = build_run(quiet, device=device, resume="none", console=Console(quiet=True))
        train(run, resume_command="")
        records = read_metrics(run.directory.path / "metrics.jsonl")[WARMUP_STEPS:]
    mfu = [record["mfu"] for record in records if record["mfu"] is not None]
    return Throughput(
        device=device_name(device),
        torch_version=str(torch.__version__),
        block=config.model.block,
        num_parameters=count_parameters(run.model),
        num_steps=len(records),
        tokens_per_second=statistics.median(record["tokens_per_second"] for record in records),
        step_seconds=statistics.median(record["step_seconds"] for record in records),
        data_wait_ratio=statistics.median(record["data_wait_seconds"] / record["step_seconds"] for record in records),
        mfu=statistics.median(mfu) if mfu else None,
        peak_memory_bytes=records[-1]["peak_memory_bytes"],
    )
