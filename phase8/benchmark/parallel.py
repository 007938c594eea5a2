"""Training speed of layouts of several ranks, measured one after the other on the GPUs of this host, each in processes of its own.

The compared figure is work per GPU: every rank has the same number of tokens per step, in microbatches of the same size. A layout's
reference is the first single rank measured before it with the same microbatch size and nothing offloaded.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phase8.benchmark.data import on_random_tokens
from phase8.benchmark.layouts import Layout, layout_config, throughput_ceiling
from phase8.benchmark.rank import RankFigures
from phase8.config.batch import BatchShape, batch_shape, run_topology
from phase8.config.load import config_to_mapping, with_settings
from phase8.config.schema import RunConfig
from phase8.config.validate import validate
from phase8.data.staging import read_json, write_json
from phase8.durable import storage_errors
from phase8.errors import ConfigError, StorageError
from phase8.plan.rank_memory import fullest
from phase8.plan.whole_config import plan_stages

# Shorter than the layout's own time-out, so that the ranks can still report which of them hangs, and where.
STALL_SHARE = 0.7
_FIRST_ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?(?:rank \d+: ?)?(?:error: (.+)|((?:\w+\.)*\w*(?:Error|Exception|Exit)\b.*))$", re.MULTILINE)


@dataclass(frozen=True)
class Host:
    """The host on which layouts are measured.

    Args:
        command: Returns the words that start a number of ranks of `launch/benchmark_rank.py`, without its options.
        device_type: Type of the devices.
        num_devices: Number of GPUs; None for a CPU, which takes any number of ranks.
        timeout_seconds: Limit for each layout, its start included.
    """

    command: Callable[[int], list[str]]
    device_type: str
    num_devices: int | None
    timeout_seconds: float


@dataclass(frozen=True)
class Ranks:
    """The measurements of all ranks of a layout.

    Args:
        device: Name of the first rank's device.
        torch_version: Version of torch.
        step_seconds: Median of the first rank, since all ranks end a step together.
        data_wait_ratio: Largest of all ranks.
        build_seconds: Largest of all ranks.
        warmup_seconds: Largest of all ranks.
        peak_memory_bytes: Device memory of the rank that needs most; None on a CPU.
        peak_resident_bytes: Resident set of the largest process.
        host_bytes: Host memory taken by all ranks together; None: unknown.
        facts: Facts of the banner.
    """

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


@dataclass(frozen=True)
class LayoutSpeed:
    """One row of the table.

    Args:
        layout: Name and settings.
        shape: The batch; None: the layout cannot run.
        found: The measurement, or None.
        reason: Why there is no measurement; None if there is one.
        tokens_per_second: Throughput of all ranks together.
        tokens_per_second_per_rank: Throughput divided by the number of ranks.
        relative: Throughput per rank over the reference's; None: there is no reference.
        ceiling: Upper bound of `relative` left by the bubble of a pipeline; None without a pipeline.
        planned_bytes: Planned device memory of the fullest rank.
        planned_host_bytes: Planned host memory that all ranks offload; 0: nothing is offloaded.
        seconds: Duration of the whole measurement, the start of the processes included.
    """

    layout: Layout
    shape: BatchShape | None
    found: Ranks | None
    reason: str | None
    tokens_per_second: float | None = None
    tokens_per_second_per_rank: float | None = None
    relative: float | None = None
    ceiling: float | None = None
    planned_bytes: int = 0
    planned_host_bytes: int = 0
    seconds: float = 0.0


def measure_layouts(
    config: RunConfig, layouts: Sequence[Layout], *, sequences_per_rank: int, num_steps: int, host: Host, logs: Path
) -> Iterator[LayoutSpeed]:
    """Measures the layouts one after the other, each when its result is requested; a layout that fails does not stop those after it.

    Args:
        config: What is trained; the layout is overridden.
        layouts: In this order; later layouts are compared with a single rank that comes first.
        sequences_per_rank: Sequences of a step per rank.
        num_steps: Measured steps of each layout.
        host: The host to measure on.
        logs: Directory for output and results of the processes, with one subdirectory for each layout.

    Raises:
        StorageError: `logs` cannot be written.
    """
    references: dict[int, float] = {}
    with on_random_tokens(config) as config:
        for number, layout in enumerate(layouts):
            begin = time.monotonic()
            try:
                changed = layout_config(config, layout, sequences_per_rank=sequences_per_rank)
                validate(changed, world_size=layout.world_size)
                _check_devices(layout, host)
            except ConfigError as error:
                yield LayoutSpeed(layout, None, None, error.problems[0])
                continue
            topology = run_topology(changed.parallel, world_size=layout.world_size)
            shape = batch_shape(changed.train, changed.parallel, data_parallel_size=topology.data_parallel_size)
            found = _measure(changed, layout, num_steps=num_steps, host=host, directory=logs / f"{number}-{layout.name}")
            row = _row(changed, layout, shape, found, references, device_type=host.device_type)
            yield replace(row, seconds=time.monotonic() - begin)


def torchrun(program: Path) -> Callable[[int], list[str]]:
    """The words by which torchrun starts a number of ranks of a program on this host."""
    # Without an address the ranks would meet under the name of the host, which not every host can look up.
    options = ["--standalone", "--local-addr=127.0.0.1"]
    return lambda num_ranks: [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc_per_node={num_ranks}", str(program)]


def planned_bytes(config: RunConfig, *, world_size: int, device_type: str) -> tuple[int, int]:
    """Planned device memory of the fullest rank, and planned host memory offloaded by all ranks."""
    stages = plan_stages(config, world_size=world_size, device_type=device_type)
    on_host = sum(stage.memory.host_bytes for stage in stages) * (world_size // len(stages))
    return fullest(stages).memory.total_bytes, on_host


def first_error(log: str) -> str:
    """The first error sentence in the output of a layout's processes."""
    found = _FIRST_ERROR.search(log)
    if found is None:
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        return f"the last words are: {lines[-1]}" if lines else "it has not said anything"
    return found[1] or found[2].partition(". ")[0]


def _check_devices(layout: Layout, host: Host) -> None:
    if host.num_devices is not None and layout.world_size > host.num_devices:
        raise ConfigError(f"layout {layout.name} needs {layout.world_size} GPUs, but this host has {host.num_devices}.")


def _row(
    config: RunConfig, layout: Layout, shape: BatchShape, found: Ranks | str, references: dict[int, float], *, device_type: str
) -> LayoutSpeed:
    """Joins measurement and plan; the first single rank with a microbatch size becomes the reference for that size."""
    ceiling = throughput_ceiling(config, num_microbatches=shape.num_microbatches)
    on_device, on_host = planned_bytes(config, world_size=layout.world_size, device_type=device_type)
    known = {"ceiling": ceiling, "planned_bytes": on_device, "planned_host_bytes": on_host}
    if isinstance(found, str):
        return LayoutSpeed(layout, shape, None, found, **known)
    speed = shape.global_batch_size * config.model.sequence_length / found.step_seconds
    per_rank = speed / layout.world_size
    if layout.world_size == 1 and config.zero.offload_optimizer == "none":
        references.setdefault(shape.micro_batch_size, per_rank)
    reference = references.get(shape.micro_batch_size)
    relative = None if reference is None else per_rank / reference
    return LayoutSpeed(layout, shape, found, None, speed, per_rank, relative, **known)


def _measure(config: RunConfig, layout: Layout, *, num_steps: int, host: Host, directory: Path) -> Ranks | str:
    """Runs torchrun and collects the figures of its ranks, or the reason why there are none."""
    timed = with_settings(config, {"parallel.timeout_seconds": STALL_SHARE * host.timeout_seconds})
    with storage_errors(directory):
        directory.mkdir(parents=True)
    write_json(directory / "config.json", config_to_mapping(timed))
    options = {"config": directory / "config.json", "directory": directory, "iterations": num_steps, "device": host.device_type}
    command = [*host.command(layout.world_size), *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    log = directory / "log.txt"
    with storage_errors(log), log.open("wb") as file:
        # The processes get a session of their own, so Ctrl-C reaches this process alone, which then ends the ranks.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(host.timeout_seconds)
        except subprocess.TimeoutExpired:
            return f"it was not done within {host.timeout_seconds:g} s; {first_error(log.read_text(errors='replace'))}"
        finally:
            _end(process, directory, layout.world_size)
    if process.returncode != 0:
        return first_error(log.read_text(encoding="utf-8", errors="replace"))
    return _together([_figures(directory / f"{rank}.json") for rank in range(layout.world_size)])


def _end(process: subprocess.Popen, directory: Path, world_size: int) -> None:
    """Ends torchrun and the ranks (which have sessions of their own) if they have not ended by themselves."""
    if process.poll() is not None:
        return
    process.kill()
    process.wait()
    for path in (directory / f"{rank}.pid" for rank in range(world_size)):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int(path.read_text()), signal.SIGKILL)


def _figures(path: Path) -> RankFigures:
    tree = read_json(path)
    if not isinstance(tree, dict):
        raise StorageError(f"{path} has gone, though its rank has left it there; keep others from the directory.")
    return RankFigures(**tree)


def _together(ranks: Sequence[RankFigures]) -> Ranks:
    first = ranks[0]
    return Ranks(
        device=first.device,
        torch_version=first.torch_version,
        step_seconds=first.step_seconds,
        data_wait_ratio=max(rank.data_wait_ratio for rank in ranks),
        build_seconds=max(rank.build_seconds for rank in ranks),
        warmup_seconds=max(rank.warmup_seconds for rank in ranks),
        peak_memory_bytes=None if first.peak_memory_bytes is None else max(rank.peak_memory_bytes for rank in ranks),
        peak_resident_bytes=max(rank.peak_resident_bytes for rank in ranks),
        host_bytes=first.host_bytes,
        facts=first.facts,
    )
