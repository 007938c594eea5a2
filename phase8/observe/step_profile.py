"""Profile of training steps: time by kernel, what exchanges between ranks take and how much of it nothing hides, and a trace of the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent, FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from phase8.accelerator import is_accelerator, synchronize
from phase8.durable import storage_errors
from phase8.terminal import ESCAPED

MAX_ROWS = 60
MAX_NAME_CHARACTERS = 120
# What names of kernels and copies that move numbers between ranks contain: those of NCCL, and of copies from one GPU to another.
EXCHANGES = ("nccl", "memcpy ptop")
# A CUDA graph runs every kernel in a stream of its own, of hundreds; groups of ranks have fewer.
MAX_STREAMS = 8


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


@dataclass(frozen=True)
class ExchangeTime:
    """The exchanges between ranks that a stream of the device runs with one kernel.

    Args:
        name: Name of the kernel.
        stream: Number of the stream: each group of ranks has its own. None: all streams together, of a step that is one CUDA graph.
        seconds_per_step: Time in which they run, waiting for other ranks included.
        exposed_seconds: The part of it in which nothing else runs; several exchanges share it equally.
        calls_per_step: Number of them.
    """

    name: str
    stream: int | None
    seconds_per_step: float
    exposed_seconds: float
    calls_per_step: float


# Name, stream, beginning and end of a kernel.
Span = tuple[str, int, float, float]


@dataclass(frozen=True)
class StepProfile:
    """Where the time of a step goes.

    Args:
        kernels: The longest first.
        seconds: From the first kernel to the end of the last one, a step; 0 on a CPU, and so are the others.
        exchange_seconds: Time of a step in which an exchange between ranks runs, alone or not. An exchange that waits for another rank runs.
        exposed_seconds: The part of it in which nothing else runs.
        idle_seconds: Time in which nothing runs.
        profiler: What recorded it, for the trace.
        exchanges: The exchanges between ranks, what leaves most exposed first.
    """

    kernels: list[KernelTime]
    profiler: profile | None = field(default=None, repr=False, compare=False)
    seconds: float = 0.0
    exchange_seconds: float = 0.0
    exposed_seconds: float = 0.0
    idle_seconds: float = 0.0
    exchanges: Sequence[ExchangeTime] = ()

    def describe(self) -> str:
        """Exchanges and gaps in one line."""
        return (
            f"{1e3 * self.exchange_seconds:.2f} ms of exchanges between ranks, {1e3 * self.exposed_seconds:.2f} ms of them exposed, "
            f"{1e3 * self.idle_seconds:.2f} ms with nothing to do, of {1e3 * self.seconds:.2f} ms"
        )

    def write_trace(self, path: Path) -> None:
        """Writes what ran when, as chrome://tracing and Perfetto read it, *.json.gz.

        Raises:
            StorageError: The file cannot be written.
        """
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.profiler is not None:
                self.profiler.export_chrome_trace(str(path))


def profile_steps(take_steps: Callable[[], object], *, device: torch.device, num_steps: int) -> StepProfile:
    """Measures some steps.

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
        if on_accelerator and _is_on_device(event):
            rows.append(KernelTime(event.key, event.self_device_time_total / 1e6 / num_steps, event.count / num_steps))
        elif not on_accelerator:
            rows.append(KernelTime(event.key, event.self_cpu_time_total / 1e6 / num_steps, event.count / num_steps))
    kernels = sorted(rows, key=lambda row: -row.seconds_per_step)
    if not on_accelerator:
        return StepProfile(kernels, profiler)
    spans = [
        (event.name, event.device_resource_id, event.time_range.start / 1e6 / num_steps, event.time_range.end / 1e6 / num_steps)
        for event in profiler.events() or ()
        if _is_on_device(event)
    ]
    return StepProfile(kernels, profiler, *shares(spans), exchanges=exchange_times(spans, num_steps=num_steps))


def _is_on_device(event: FunctionEvent | FunctionEventAvg) -> bool:
    return event.device_type != DeviceType.CPU and not event.is_user_annotation


def shares(spans: Iterable[Span]) -> tuple[float, float, float, float]:
    """Divides the time of kernels, which may overlap.

    Returns:
        From the first beginning to the last end; the time in which exchanges run; in which nothing but exchanges; in which nothing at all.
    """
    whole = exchanged = exposed = idle = 0.0
    for passed, others, exchanges in _intervals(spans):
        whole += passed
        exchanged += passed if exchanges else 0.0
        exposed += passed if exchanges and not others else 0.0
        idle += 0.0 if exchanges or others else passed
    return whole, exchanged, exposed, idle


def exchange_times(spans: Sequence[Span], *, num_steps: int) -> list[ExchangeTime]:
    """Divides what exchanges leave exposed among them, the largest part first."""
    calls: Counter[tuple[str, int | None]] = Counter((name, stream) for name, stream, *_ in spans if _is_exchange(name))
    num_streams = Counter(name for name, _ in calls)
    seconds: Counter[tuple[str, int | None]] = Counter()
    exposed: Counter[tuple[str, int | None]] = Counter()
    for passed, others, exchanges in _intervals(spans):
        for each in exchanges:
            seconds[each] += passed
            exposed[each] += 0.0 if others else passed / len(exchanges)
    for counter in (calls, seconds, exposed):
        for name, stream in [each for each in counter if num_streams[each[0]] > MAX_STREAMS]:
            counter[name, None] += counter.pop((name, stream))
    times = [ExchangeTime(*each, seconds[each], exposed[each], count / num_steps) for each, count in calls.items()]
    return sorted(times, key=lambda each: -each.exposed_seconds)


def _intervals(spans: Iterable[Span]) -> Iterator[tuple[float, int, list[tuple[str, int]]]]:
    """Length of each interval in which the same kernels run, the number of those that exchange nothing, and name and stream of the exchanges."""
    # +1 and -1 where a kernel begins and ends.
    changes: list[tuple[float, int, str, int]] = []
    for name, stream, begin, end in spans:
        changes += [(begin, 1, name, stream), (end, -1, name, stream)]
    others, before = 0, None
    running: Counter[tuple[str, int]] = Counter()
    for time, change, name, stream in sorted(changes):
        if before is not None and time > before:
            yield time - before, others, [each for each, count in running.items() if count]
        before = time
        if _is_exchange(name):
            running[name, stream] += change
        else:
            others += change


def _is_exchange(name: str) -> bool:
    return any(part in name.lower() for part in EXCHANGES)


def _exchange_lines(exchanges: Sequence[ExchangeTime]) -> list[str]:
    if not exchanges:
        return []
    head = f"{'ms/step':>9} {'exposed':>9} {'calls/step':>10} {'stream':>6}  exchange"
    return [
        head,
        *(
            f"{1e3 * each.seconds_per_step:9.3f} {1e3 * each.exposed_seconds:9.3f} {each.calls_per_step:10.1f} "
            f"{'all' if each.stream is None else each.stream:>6}"
            f"  {each.name[:MAX_NAME_CHARACTERS]}"
            for each in exchanges
        ),
    ]


def write_profile(path: Path, found: StepProfile, *, title: str, step_seconds: float | None = None) -> None:
    """Writes the table.

    Args:
        path: The file; its directory is created.
        found: From `profile_steps`.
        title: First line.
        step_seconds: Duration of a step measured without the profiler, if it is known.

    Raises:
        StorageError: The file cannot be written.
    """
    rows: Sequence[KernelTime] = found.kernels
    busy = sum(row.seconds_per_step for row in rows)
    whole = "" if step_seconds is None else f" of {1e3 * step_seconds:.2f} ms without the profiler ({100 * busy / step_seconds:.0f} %)"
    lines = [
        title,
        f"{1e3 * busy:.2f} ms in kernels per step{whole}",
        found.describe() if found.seconds else "",
        *_exchange_lines(found.exchanges),
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
