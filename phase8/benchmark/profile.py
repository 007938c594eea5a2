"""Time of a training step by kernel, as a table of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from phase8.accelerator import is_accelerator, synchronize
from phase8.durable import storage_errors
from phase8.terminal import ESCAPED

MAX_ROWS = 60
MAX_NAME_CHARACTERS = 120


@dataclass(frozen=True)
class KernelTime:
    """One kernel of a GPU, or one operator of torch on the CPU.

    Args:
        name: Name given by the profiler.
        seconds_per_step: Time in the kernel itself, without the operators it calls.
        calls_per_step: Number of calls.
    """

    name: str
    seconds_per_step: float
    calls_per_step: float


def profile_steps(take_steps: Callable[[], None], *, device: torch.device, num_steps: int) -> list[KernelTime]:
    """Measures the kernels of some steps, the longest first.

    Args:
        take_steps: Trains for `num_steps` steps.
        device: Device to train on.
        num_steps: Number of steps, by which the times are divided.
    """
    on_accelerator = is_accelerator(device.type)
    synchronize(device)  # waits for the optimizer of the step before
    activity = ProfilerActivity.__members__.get(device.type.upper(), ProfilerActivity.PrivateUse1)
    with profile(activities=[activity]) as profiler:
        take_steps()
        synchronize(device)
    rows = []
    for event in profiler.key_averages():
        if on_accelerator and event.device_type != DeviceType.CPU and not event.is_user_annotation:
            rows.append(KernelTime(event.key, event.self_device_time_total / 1e6 / num_steps, event.count / num_steps))
        elif not on_accelerator:
            rows.append(KernelTime(event.key, event.self_cpu_time_total / 1e6 / num_steps, event.count / num_steps))
    return sorted(rows, key=lambda row: -row.seconds_per_step)


def write_profile(path: Path, rows: Sequence[KernelTime], *, title: str, step_seconds: float) -> None:
    """Writes the table.

    Args:
        path: The file; its directory is created.
        rows: From `profile_steps`.
        title: First line.
        step_seconds: Duration of a step measured without the profiler.

    Raises:
        StorageError: The file cannot be written.
    """
    busy = sum(row.seconds_per_step for row in rows)
    lines = [
        title,
        f"{1e3 * busy:.2f} ms in kernels per step of {1e3 * step_seconds:.2f} ms without the profiler ({100 * busy / step_seconds:.0f} %)",
        "",
        f"{'share':>7} {'ms/step':>9} {'calls/step':>10}  name",
    ]
    for row in rows[:MAX_ROWS]:
        share = 100 * row.seconds_per_step / busy if busy else 0.0
        lines.append(f"{share:5.1f} % {1e3 * row.seconds_per_step:9.3f} {row.calls_per_step:10.1f}  {row.name[:MAX_NAME_CHARACTERS]}")
    if len(rows) > MAX_ROWS:
        rest = sum(row.seconds_per_step for row in rows[MAX_ROWS:])
        lines.append(f"{100 * rest / busy:5.1f} % {1e3 * rest:9.3f} {'':10}  ({len(rows) - MAX_ROWS} more)")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors=ESCAPED)
