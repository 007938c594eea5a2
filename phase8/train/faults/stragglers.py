"""Finds slow ranks. Ranks wait for each other in every step, so their step times are equal; only work that a rank does alone differs.

| slow | measured by | as a ratio |
|---|---|---|
| device | a fixed piece of work on each rank alone: matrix products, and copies larger than any cache | over the median of the ranks |
| data | time the rank waited for data in a step | the step over what it would take with the median wait |

The probe takes a few ms on a GPU. It does not detect a slow link, or a host that launches kernels too slowly.

    N  width of the matrices        S  elements that are copied
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist

from phase8 import accelerator

NUM_TRIALS = 3


@dataclass(frozen=True, kw_only=True)
class ProbeWork:
    """The work of the probe on every rank.

    Args:
        width: N of the matrices [N, N].
        num_products: Number of matrix products, one after the other.
        num_copied: S elements of a tensor [S].
        num_copies: Number of copies of it.
        dtype: Dtype of all tensors.
    """

    width: int
    num_products: int
    num_copied: int
    num_copies: int
    dtype: torch.dtype


# About 2 and 0.5 ms at the rated speed of an H100; the 260 MB are free between steps, because activations need more.
GPU_WORK = ProbeWork(width=4096, num_products=8, num_copied=2**25, num_copies=8, dtype=torch.bfloat16)
# On a CPU core about 5 and 1 ms.
CPU_WORK = ProbeWork(width=256, num_products=3, num_copied=2**20, num_copies=4, dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class RankTimes:
    """Measurements of one rank, in seconds.

    Args:
        host: Name of its host.
        probe: Duration of the probe.
        data_wait: Time waited for the data of a step.
        step: Duration of the whole step, this wait included.
    """

    host: str
    probe: float
    data_wait: float
    step: float


@dataclass(frozen=True, kw_only=True)
class StragglerReport:
    """The slowest rank and the cause; the fields are those of an event in `metrics.jsonl`.

    Args:
        slowest_rank: The rank with the largest ratio, which is near 1 if no rank is slow.
        slowest_host: Its host.
        ratio: Time that it needs over that of the median rank.
        cause: `device` or `data`.
        probe_seconds: Probe of the slowest rank.
        median_probe_seconds: Median over the ranks; for an even number, the lower one of the two in the middle.
        data_wait_seconds: Data wait of the slowest rank.
        median_data_wait_seconds: Median over the ranks, as above.
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
        """The report in one line."""
        who = f"slowest is rank {self.slowest_rank} on {self.slowest_host}, {self.ratio:.2f} times the median"
        if self.cause == "device":
            return f"{who}: its device took {1e3 * self.probe_seconds:.2f} ms for what takes {1e3 * self.median_probe_seconds:.2f} ms elsewhere"
        return f"{who}: it waited {self.data_wait_seconds:.3f} s for data, others {self.median_data_wait_seconds:.3f} s"


def probe_ranks(
    device: torch.device, *, data_wait_seconds: float, step_seconds: float, work: ProbeWork | None = None
) -> StragglerReport:
    """Measures every rank alone; a collective of all ranks, between steps. The report is the same on every rank.

    Args:
        device: Device of this rank.
        data_wait_seconds: Time that this rank waited for data in the last step, or on average over the last steps.
        step_seconds: Duration of the same step, this wait included.
        work: Work of the probe; None: chosen for the device.
    """
    if work is None:
        work = GPU_WORK if accelerator.is_accelerator(device.type) else CPU_WORK
    if dist.is_initialized():
        dist.barrier()  # from here on no rank computes or sends anything else
    own = RankTimes(host=platform.node(), probe=_probe_seconds(device, work), data_wait=data_wait_seconds, step=step_seconds)
    if not dist.is_initialized():
        return summarise([own])
    times = [own] * dist.get_world_size()
    dist.all_gather_object(times, own)
    return summarise(times)


def summarise(times: Sequence[RankTimes]) -> StragglerReport:
    """Finds the slowest rank.

    Args:
        times: Times of each rank, in order.
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
    """Step time over what it would be with the median data wait; waits that are short beside the step give a ratio near 1."""
    useful = times.step - max(0.0, times.data_wait - median_wait)
    return times.step / useful if useful > 0 else math.inf


def _low_median(values: Sequence[float]) -> float:
    """The lower median: with two ranks, the faster one is the reference for the other."""
    return sorted(values)[(len(values) - 1) // 2]


@torch.no_grad()
def _probe_seconds(device: torch.device, work: ProbeWork) -> float:
    """The best of several trials, after one warm-up trial."""
    matrix = torch.linspace(-1.0, 1.0, work.width**2, device=device).view(work.width, work.width).to(work.dtype)
    product = torch.empty_like(matrix)
    source = torch.ones(work.num_copied, device=device, dtype=work.dtype)
    copy = torch.empty_like(source)

    def do_work() -> None:
        for _ in range(work.num_products):
            torch.mm(matrix, matrix, out=product)
        for _ in range(work.num_copies):
            copy.copy_(source)

    timed = _timed_on_gpu if accelerator.has_kernels(device.type) else partial(_timed, device)
    do_work()
    return min(timed(do_work) for _ in range(NUM_TRIALS))


def _timed(device: torch.device, do_work: Callable[[], None]) -> float:
    accelerator.synchronize(device)
    begin = time.perf_counter()
    do_work()
    accelerator.synchronize(device)
    return time.perf_counter() - begin


def _timed_on_gpu(do_work: Callable[[], None]) -> float:
    begin, end = accelerator.timing_event(), accelerator.timing_event()
    begin.record()
    do_work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
