"""Training speed of layouts of several ranks, each started by torchrun in turn, on the GPUs of this host.

What is compared is work per GPU: every rank has the same number of tokens per step, in microbatches of the same size. The reference of a
layout is the first single rank that was measured before it with that microbatch size and nothing offloaded.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from phase8.config.batch import BatchShape, batch_shape, run_topology
from phase8.config.load import config_to_mapping
from phase8.config.schema import RunConfig
from phase8.config.validate import validate
from phase8.data.staging import read_json, write_json
from phase8.durable import storage_errors
from phase8.errors import ConfigError, StorageError
from phase8.plan.dry_run import count_parameters, plan_run_memory, shapes_only
from phase8.train.benchmark import with_settings
from phase8.train.benchmark_data import on_random_tokens
from phase8.train.benchmark_layouts import Layout, layout_config, throughput_ceiling
from phase8.train.benchmark_rank import RankFigures

# Earlier than the layout's own time-out, so that the ranks still can say which of them hangs, and where.
STALL_SHARE = 0.7
FP32_BYTES_PER_OFFLOADED_PARAMETER = 16  # weight, gradient and two moments
_FIRST_ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?(?:rank \d+: ?)?(?:error: (.+)|((?:\w+\.)*\w*(?:Error|Exception|Exit)\b.*))$", re.MULTILINE)


@dataclass(frozen=True)
class Host:
    """Where layouts are measured and how.

    Args:
        rank_program: What torchrun starts, `launch/benchmark_rank.py`.
        device_type: `cpu` or `cuda`.
        num_devices: GPUs; of a CPU, as many as anybody asks for (None).
        timeout_seconds: For each layout, its start included.
    """

    rank_program: Path
    device_type: str
    num_devices: int | None
    timeout_seconds: float


@dataclass(frozen=True)
class Ranks:
    """What the ranks of a layout measured.

    Args:
        device: Name of the device of the first.
        torch_version: Of torch.
        step_seconds: Median of the first rank: all end a step together.
        data_wait_ratio: The largest.
        build_seconds: The largest.
        warmup_seconds: The largest.
        peak_memory_bytes: Of the device, of the largest rank.
        peak_resident_bytes: Of the processes, of the largest.
        host_bytes: That all together took of the host's memory; None: not known.
        facts: What the banner said.
    """

    device: str
    torch_version: str
    step_seconds: float
    data_wait_ratio: float
    build_seconds: float
    warmup_seconds: float
    peak_memory_bytes: int
    peak_resident_bytes: int
    host_bytes: int | None
    facts: dict[str, str]


@dataclass(frozen=True)
class LayoutSpeed:
    """One row.

    Args:
        layout: Name and settings.
        shape: The batch; None: the layout cannot run.
        found: What was measured, or None.
        reason: Why nothing was; None: it was.
        tokens_per_second: Of all ranks.
        tokens_per_second_per_rank: The same over the ranks.
        relative: That over the reference's; None: there is none.
        ceiling: What the bubble of a pipeline leaves of it; None: there is no pipeline.
        planned_bytes: Of the device of a rank; None: the planner does not know pipelines.
        planned_host_bytes: In the memory of the host, over all ranks; 0: nothing is offloaded.
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
    planned_bytes: int | None = None
    planned_host_bytes: int = 0
    seconds: float = 0.0


def measure_layouts(
    config: RunConfig, layouts: Sequence[Layout], *, sequences_per_rank: int, num_steps: int, host: Host, logs: Path
) -> Iterator[LayoutSpeed]:
    """Measures the layouts one after the other, each when it is asked for; one that fails does not stop those after it.

    Args:
        config: What is trained; the layout is overridden.
        layouts: In this order; a single rank first makes the others comparable.
        sequences_per_rank: Of a step.
        num_steps: Measured steps of each.
        host: Where.
        logs: Directory for what the processes print and leave, one below it for each layout.

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
            row = _row(changed, layout, shape, found, references, device_type=host.device_type, seconds=time.monotonic() - begin)
            if row.tokens_per_second_per_rank is not None and layout.world_size == 1 and changed.zero.offload_optimizer == "none":
                references.setdefault(shape.micro_batch_size, row.tokens_per_second_per_rank)
            yield row


def planned_device_bytes(config: RunConfig, *, world_size: int, device_type: str) -> int | None:
    """Memory of a rank's device by the planner; None for a pipeline, whose stages it does not know."""
    topology = run_topology(config.parallel, world_size=world_size)
    if topology.pipeline_parallel_size > 1:
        return None
    shape = batch_shape(config.train, config.parallel, data_parallel_size=topology.data_parallel_size)
    num_parameters = count_parameters(shapes_only(config))
    return plan_run_memory(
        config, num_parameters=num_parameters, micro_batch_size=shape.micro_batch_size, device_type=device_type, topology=topology
    ).total_bytes


def planned_host_bytes(config: RunConfig, *, world_size: int) -> int:
    """What offloading keeps in the memory of the host, over all ranks: everything the optimizer updates, divided from stage 1 on."""
    if config.zero.offload_optimizer == "none":
        return 0
    topology = run_topology(config.parallel, world_size=world_size)
    shards = 1 if config.zero.stage == 0 else (config.zero.shard_size or topology.data_parallel_size)
    return count_parameters(shapes_only(config)) * FP32_BYTES_PER_OFFLOADED_PARAMETER * topology.data_parallel_size // shards


def first_error(log: str) -> str:
    """The first sentence about an error in what the processes of a layout have printed."""
    found = _FIRST_ERROR.search(log)
    if found is None:
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        return f"the last words are: {lines[-1]}" if lines else "it has not said anything"
    return found[1] or found[2].partition(". ")[0]


def _check_devices(layout: Layout, host: Host) -> None:
    if host.num_devices is not None and layout.world_size > host.num_devices:
        raise ConfigError(f"layout {layout.name} needs {layout.world_size} GPUs, but this host has {host.num_devices}.")


def _row(
    config: RunConfig, layout: Layout, shape: BatchShape, found: Ranks | str, references: dict[int, float], *, device_type: str, seconds: float
) -> LayoutSpeed:
    ceiling = throughput_ceiling(config, num_microbatches=shape.num_microbatches)
    planned = planned_device_bytes(config, world_size=layout.world_size, device_type=device_type)
    on_host = planned_host_bytes(config, world_size=layout.world_size)
    known = {"ceiling": ceiling, "planned_bytes": planned, "planned_host_bytes": on_host, "seconds": seconds}
    if isinstance(found, str):
        return LayoutSpeed(layout, shape, None, found, **known)
    speed = shape.global_batch_size * config.model.sequence_length / found.step_seconds
    per_rank = speed / layout.world_size
    reference = references.get(shape.micro_batch_size)
    relative = None if reference is None else per_rank / reference
    return LayoutSpeed(layout, shape, found, None, speed, per_rank, relative, **known)


def _measure(config: RunConfig, layout: Layout, *, num_steps: int, host: Host, directory: Path) -> Ranks | str:
    """What torchrun and its ranks bring back, or why they do not."""
    timed = with_settings(config, {"parallel.timeout_seconds": STALL_SHARE * host.timeout_seconds})
    with storage_errors(directory):
        directory.mkdir(parents=True)
    write_json(directory / "config.json", config_to_mapping(timed))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={layout.world_size}", str(host.rank_program)]
    options = {"config": directory / "config.json", "directory": directory, "iterations": num_steps, "device": host.device_type}
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    log = directory / "log.txt"
    with storage_errors(log), log.open("wb") as file:
        # In a session of its own: Ctrl-C reaches this process alone, which then ends the ranks.
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
    """Ends torchrun and the ranks, which it gives sessions of their own, if they have not ended by themselves."""
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
        peak_memory_bytes=max(rank.peak_memory_bytes for rank in ranks),
        peak_resident_bytes=max(rank.peak_resident_bytes for rank in ranks),
        host_bytes=first.host_bytes,
        facts=first.facts,
    )
