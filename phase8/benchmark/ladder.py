"""The ladder of `tools/benchmark.py speed`: what each technique adds on top of those before it, measured in one run on one machine.

A rung is a few config keys. If this machine lacks a technique, or its run was not finite, the rung is listed with the reason and the
next rung is built without it. The deviation of a rung's gradients from those of the rung before is measured with its speed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from phase8.accelerator import is_accelerator, records_steps
from phase8.benchmark.data import on_random_tokens
from phase8.benchmark.throughput import Measurement, Throughput, measure_alone
from phase8.config.auto import without_auto
from phase8.config.load import with_settings
from phase8.config.schema import RunConfig
from phase8.errors import ConfigError, DivergenceError
from phase8.kernels.backends import kernel_backend, select_kernels
from phase8.kernels.toolchain import missing_cpp_compiler

MAX_WORKERS = 4


@dataclass(frozen=True)
class Rung:
    """One technique.

    Args:
        name: Name in the table.
        settings: Config keys, added to those of the rungs before it.
        missing: Returns why the rung cannot be measured, given the device and the settings so far; None: it can.
    """

    name: str
    settings: Mapping[str, object]
    missing: Callable[[torch.device, Mapping[str, object]], str | None] = lambda device, settings: None


@dataclass(frozen=True)
class RungSpeed:
    """A measured rung, or one that is missing.

    Args:
        name: Name of the rung.
        measurement: Its speed, or why there is none.
        gain: Speed relative to the last rung that was measured; None: there is none.
        deviation: Largest difference of two gradient norms from those of that rung, over the norm of all gradients. Rounding contributes (in
            bf16 a lot on small models), and so would a wrong kernel.
    """

    name: str
    measurement: Measurement
    gain: float | None
    deviation: float | None


def climb(config: RunConfig, *, device: torch.device, num_steps: int, use_compile: bool = True) -> Iterator[RungSpeed]:
    """Measures the rungs one after the other, each when its result is requested.

    Args:
        config: The model and the batch; the keys of the rungs are overridden.
        device: Device to train on.
        num_steps: Measured steps of each rung.
        use_compile: Whether to measure the rungs that compile.

    Raises:
        ConfigError: The config itself cannot run.
    """
    ladder = rungs(config, use_compile=use_compile)
    settings = dict(ladder[0].settings)  # also when the first rung does not fit into memory
    last: Throughput | None = None
    with on_random_tokens(config) as config:
        for rung in ladder:
            reason = rung.missing(device, settings)
            measurement = Measurement(None, f"not available: {reason}")
            if reason is None:
                changed = {**settings, **rung.settings}
                measurement = _measure_rung(config, changed, device=device, num_steps=num_steps, is_first=last is None)
            gain = deviation = None
            if measurement.throughput is not None:
                settings |= rung.settings
                if last is not None:
                    gain = measurement.throughput.tokens_per_second / last.tokens_per_second
                    deviation = gradient_deviation(measurement.throughput.gradients, last.gradients)
                last = measurement.throughput
            yield RungSpeed(rung.name, measurement, gain, deviation)


def rungs(config: RunConfig, *, use_compile: bool) -> tuple[Rung, ...]:
    """The ladder from bottom to top."""
    num_workers = without_auto(config).data.num_workers or min(MAX_WORKERS, max((os.cpu_count() or 1) // 2, 1))
    return (
        Rung(
            "eager fp32",
            {
                "precision.dtype": "fp32",
                "data.num_workers": 0,
                "data.pin_memory": False,
                "train.compile.enabled": False,
                "train.cuda_graphs": False,
                "train.kernels": "reference",
            },
        ),
        Rung("+ loader", {"data.num_workers": num_workers, "data.pin_memory": True}),
        Rung("+ bf16", {"precision.dtype": "bf16"}),
        Rung(
            "+ compile",
            {"train.compile.enabled": True, "train.compile.mode": "default"},
            _missing_compiler if use_compile else lambda device, settings: "switched off by --no-use-compile",
        ),
        Rung("+ kernels", {"train.kernels": "auto"}, _missing_kernels),
        Rung("+ CUDA graphs", {"train.cuda_graphs": True}, _missing_graphs),
    )


def total_gain(speeds: Sequence[RungSpeed]) -> float | None:
    """Speed of the last measured rung over that of the first; None if fewer than two were measured."""
    measured = [speed.measurement.throughput for speed in speeds if speed.measurement.throughput is not None]
    return measured[-1].tokens_per_second / measured[0].tokens_per_second if len(measured) > 1 else None


def gradient_deviation(gradients: Mapping[str, float], expected: Mapping[str, float]) -> float:
    """Largest difference of two norms with the same name, over the norm of all expected gradients."""
    return max(abs(gradients[name] - norm) for name, norm in expected.items()) / math.hypot(*expected.values())


def _measure_rung(
    config: RunConfig, settings: Mapping[str, object], *, device: torch.device, num_steps: int, is_first: bool
) -> Measurement:
    """Measures a rung. An error on the first rung is the user's to correct and is raised; on a later rung it becomes the result."""
    try:
        return measure_alone(with_settings(config, settings), device=device, num_steps=num_steps)
    except (ConfigError, DivergenceError) as error:
        if is_first:
            raise
        return Measurement(None, f"not available: {error}" if isinstance(error, ConfigError) else f"wrong: {error}")


def _missing_compiler(device: torch.device, settings: Mapping[str, object]) -> str | None:
    return None if is_accelerator(device.type) else missing_cpp_compiler()


def _missing_kernels(device: torch.device, settings: Mapping[str, object]) -> str | None:
    select_kernels("auto", device)  # the rungs before it chose the references; each run chooses anew
    backend = kernel_backend(device)
    return None if backend.name == "triton" else backend.reason


def _missing_graphs(device: torch.device, settings: Mapping[str, object]) -> str | None:
    return None if records_steps(device.type) else "CUDA graphs need a GPU"
