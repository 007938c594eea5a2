"""Who holds the others up. In every step all ranks wait for each other, so their step times are the same: what a rank does alone shows it.

| slow | measured by | as a ratio |
|---|---|---|
| device | a fixed piece of work on each rank by itself: matrix products, and copies that no cache holds | over the median of the ranks |
| data | how long the rank waited for its data in a step | the step over what it would take with the median wait |

The probe takes a few ms on a GPU. What it does not see: a slow link, and a host that launches kernels too slowly.

    N  width of the matrices        S  elements that are copied
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

NUM_TRIALS = 3


@dataclass(frozen=True, kw_only=True)
class ProbeWork:
    """What every rank does by itself.

    Args:
        width: N of the matrices [N, N].
        num_products: How many are multiplied, one after the other.
        num_copied: S elements of a tensor [S].
        num_copies: How often it is copied.
        dtype: Of all of them.
    """

    width: int
    num_products: int
    num_copied: int
    num_copies: int
    dtype: torch.dtype


# At the rated speed of an H100 about 2 and 0.5 ms; 260 MB, which between steps are free: activations need more.
GPU_WORK = ProbeWork(width=4096, num_products=8, num_copied=2**25, num_copies=8, dtype=torch.bfloat16)
# On a CPU core about 5 and 1 ms.
CPU_WORK = ProbeWork(width=256, num_products=3, num_copied=2**20, num_copies=4, dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class RankTimes:
    """What one rank measured, in seconds.

    Args:
        host: Name of its host.
        probe: The probe alone.
        data_wait: Waiting for the data of a step.
        step: The whole step, this wait included.
    """

    host: str
    probe: float
    data_wait: float
    step: float


@dataclass(frozen=True, kw_only=True)
class StragglerReport:
    """Which rank is slowest, and why; its fields are those of an event in `metrics.jsonl`.

    Args:
        slowest_rank: Whoever has the largest ratio, which is near 1 where nobody is slow.
        slowest_host: Its host.
        ratio: How many times longer than a rank like the median it needs.
        cause: Whether its device or its data make it so.
        probe_seconds: Of the slowest rank.
        median_probe_seconds: Over the ranks; of an even number of them the lower of the two in the middle.
        data_wait_seconds: Of the slowest rank.
        median_data_wait_seconds: As above.
    """

    slowest_rank: int
    slowest_host: str
    ratio: float
    cause: Literal["device", "data"]
    probe_seconds: float
    median_probe_seconds: float
    data_wait_seconds: float
    median_data_wait_seconds: float

    def describe(self) -> str:
        """One line for people."""
        who = f"slowest is rank {self.slowest_rank} on {self.slowest_host}, {self.ratio:.2f} times the median"
        if self.cause == "device":
            return f"{who}: its device took {1e3 * self.probe_seconds:.2f} ms for what takes {1e3 * self.median_probe_seconds:.2f} ms elsewhere"
        return f"{who}: it waited {self.data_wait_seconds:.3f} s for data, others {self.median_data_wait_seconds:.3f} s"


def probe_ranks(
    device: torch.device, *, data_wait_seconds: float, step_seconds: float, work: ProbeWork | None = None
) -> StragglerReport:
    """Measures every rank by itself; a collective of all ranks, between steps. The report is the same on every rank.

    Args:
        device: Of this rank.
        data_wait_seconds: How long this rank waited for data in the last step, or on average in the last ones.
        step_seconds: How long the same step took, this wait included.
        work: Of the probe; None: what fits the device.
    """
    if work is None:
        work = GPU_WORK if device.type == "cuda" else CPU_WORK
    if dist.is_initialized():
        dist.barrier()  # from here on nobody computes or sends for anybody else
    own = RankTimes(host=platform.node(), probe=_probe_seconds(device, work), data_wait=data_wait_seconds, step=step_seconds)
    if not dist.is_initialized():
        return summarise([own])
    times = [own] * dist.get_world_size()
    dist.all_gather_object(times, own)
    return summarise(times)


def summarise(times: Sequence[RankTimes]) -> StragglerReport:
    """The slowest of the ranks.

    Args:
        times: Of each rank, in order.
    """
    probe, data_wait = (_low_median(values) for values in ([each.probe for each in times], [each.data_wait for each in times]))
    device_ratios = [each.probe / probe for each in times]
    data_ratios = [_data_ratio(each, data_wait) for each in times]
    rank = max(range(len(times)), key=lambda rank: max(device_ratios[rank], data_ratios[rank]))
    slowest = times[rank]
    return StragglerReport(
        slowest_rank=rank,
        slowest_host=slowest.host,
        ratio=max(device_ratios[rank], data_ratios[rank]),
        cause="data" if data_ratios[rank] > device_ratios[rank] else "device",
        probe_seconds=slowest.probe,
        median_probe_seconds=probe,
        data_wait_seconds=slowest.data_wait,
        median_data_wait_seconds=data_wait,
    )


def _data_ratio(times: RankTimes, median_wait: float) -> float:
    """How many times longer a step is because this rank waits for data longer than others do: a wait that is short beside it is none."""
    useful = times.step - max(0.0, times.data_wait - median_wait)
    return times.step / useful if useful > 0 else math.inf


def _low_median(values: Sequence[float]) -> float:
    """Of two ranks the faster one is what the other is compared with."""
    return sorted(values)[(len(values) - 1) // 2]


@torch.no_grad()
def _probe_seconds(device: torch.device, work: ProbeWork) -> float:
    """The best of several trials, after one that loads what the device needs."""
    matrix = torch.linspace(-1.0, 1.0, work.width**2, device=device).view(work.width, work.width).to(work.dtype)
    product = torch.empty_like(matrix)
    source = torch.ones(work.num_copied, device=device, dtype=work.dtype)
    copy = torch.empty_like(source)

    def do_work() -> None:
        for _ in range(work.num_products):
            torch.mm(matrix, matrix, out=product)
        for _ in range(work.num_copies):
            copy.copy_(source)

    timed = _timed_on_gpu if device.type == "cuda" else _timed
    do_work()
    return min(timed(do_work) for _ in range(NUM_TRIALS))


def _timed(do_work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    do_work()
    return time.perf_counter() - begin


def _timed_on_gpu(do_work: Callable[[], None]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    do_work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
