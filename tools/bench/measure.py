"""Shared code of the kernel benchmarks: nothing is timed unless its tests pass; times from GPU events; tables and JSON.

A door names its cases, grouped by what is compared, and calls `benchmark`. The first case of a group is the project's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phase8.errors import Phase8Error
from phase8.formatting import format_bytes
from phase8.kernels.backends import kernel_backend, select_kernels
from phase8.terminal import output_is_the_product

ROOT = Path(__file__).resolve().parents[2]
WARMUP_RUNS = 5
HEAD_START_CYCLES = 10_000_000  # an idle GPU spins for about 5 ms, so that everything is enqueued before the first kernel starts
FLUSH_BYTES = 256 * 1024**2  # more than any L2 cache
COPY_BYTES = 2 * 1024**3
MATMUL_SIZE = 8192
GREEN_TESTS = "not machine_code"  # the assembler's output is the same on every machine: continuous integration checks it


class BenchmarkError(Phase8Error):
    """A kernel that cannot be measured; the message says why."""


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Args:
        group: The operation; cases of a group are compared.
        name: The implementation.
        run: Runs it once; None: not available here.
        num_bytes: Bytes that must be read and written at least; 0: not bound by memory.
        num_flops: Number of useful operations; 0: not bound by arithmetic.
        reason: Why it is not available.
    """

    group: str
    name: str
    run: Callable[[], object] | None
    num_bytes: int = 0
    num_flops: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Ceilings:
    """The rates that the GPU reaches on large copies and on a large bf16 matmul, in this run.

    Args:
        bytes_per_second: Bytes read and written together.
        flops_per_second: Rate of the tensor cores.
    """

    bytes_per_second: float
    flops_per_second: float


@dataclass(frozen=True)
class Figures:
    """Figures of one timed case; None where a figure does not apply.

    Args:
        group: As in the case.
        name: As in the case.
        milliseconds: Median time.
        percentiles: 10th and 90th percentile of the time.
        gigabytes_per_second: Achieved rate for the bytes that must be moved.
        teraflops_per_second: Achieved rate of useful operations.
        share_of_ceiling: The larger of the two rates over what the GPU reaches.
        speed_ratio: Time over that of the first case of the group.
        peak_extra_bytes: Memory allocated in addition to what was allocated before.
        reason: Why it was not timed.
    """

    group: str
    name: str
    milliseconds: float | None = None
    percentiles: tuple[float, float] | None = None
    gigabytes_per_second: float | None = None
    teraflops_per_second: float | None = None
    share_of_ceiling: float | None = None
    speed_ratio: float | None = None
    peak_extra_bytes: int | None = None
    reason: str = ""


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=100, help="timed runs of each case (default: %(default)s)")
    options.add_argument("--json", action="store_true", help="print one JSON object; the table goes to stderr")
    return options


def benchmark(kernel: str, arguments: argparse.Namespace, make_cases: Callable[[argparse.Namespace, torch.device], Sequence[Case]]) -> int:
    """Runs a benchmark inside `run_door`; returns the exit code.

    Args:
        kernel: Name of the kernel.
        arguments: Arguments from a parser made by `parser`; all of them are reported.
        make_cases: The cases for these arguments, checked against each other where that is cheap.
    """
    show = partial(print, file=sys.stderr if arguments.json else sys.stdout, flush=True)
    with output_is_the_product():
        device = _gpu(kernel)
        require_green(kernel)
        facts = _facts(kernel, device)
        for name, value in facts.items():
            show(f"{name:8s} {value}")
        cases, ceilings = make_cases(arguments, device), measure_ceilings(device)
        copy, matmul = ceilings.bytes_per_second / 1e12, ceilings.flops_per_second / 1e12
        show(f"{'ceilings':8s} copy {copy:.2f} TB/s, bf16 matmul {matmul:.0f} TFLOP/s\n{_HEADER}")
        results: list[Figures] = []
        for case in cases:
            results.append(_figures(case, ceilings, device, repeats=arguments.repeats, measured=results))
            show(_line(results[-1]))
        if arguments.json:
            shape = {name: value for name, value in vars(arguments).items() if name != "json"}
            print(json.dumps({**facts, "arguments": shape, "ceilings": asdict(ceilings), "results": [asdict(result) for result in results]}))
    return 0


def require_green(kernel: str) -> None:
    """Runs the tests of a kernel on this machine.

    Raises:
        BenchmarkError: A test fails, or there are no tests.
    """
    files = sorted(str(path) for path in (ROOT / "tests/kernels").glob(f"test_{kernel}*.py"))
    if not files:
        raise BenchmarkError(f"{kernel} is not timed, since it has no tests: tests/kernels/test_{kernel}*.py.")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", GREEN_TESTS, *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise BenchmarkError(f"{kernel} is not timed, since its tests are red:\n{(done.stdout + done.stderr)[-2000:]}")


def require_close(what: str, found: Tensor, expected: Tensor, *, tolerance: float) -> None:
    """Compares a result at the size that is timed.

    Raises:
        BenchmarkError: The largest difference exceeds `tolerance` times the largest expected value.
    """
    expected = expected.to(found.device)
    error = ((found.to(expected.dtype) - expected).abs().max() / expected.abs().max()).item()
    if not error <= tolerance:
        raise BenchmarkError(f"{what} is off by {error:.1e} of its largest value, where {tolerance:.0e} is allowed; it is not timed.")


def measure_ceilings(device: torch.device) -> Ceilings:
    """The rates that this GPU reaches now."""
    source, target = torch.empty(2, COPY_BYTES, dtype=torch.uint8, device=device)
    x = torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16, device=device)
    copy, product = (statistics.median(time_runs(run, device, repeats=20)) for run in (lambda: target.copy_(source), lambda: x @ x))
    return Ceilings(2 * COPY_BYTES / copy * 1e3, 2 * MATMUL_SIZE**3 / product * 1e3)


def time_runs(run: Callable[[], object], device: torch.device, *, repeats: int) -> list[float]:
    """Milliseconds of each run on a GPU with a flushed L2 cache, without the time that Python takes to launch it."""
    for _ in range(WARMUP_RUNS):
        run()
    flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        flushed.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in events]


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Peak memory that a run allocates in addition to what is allocated, its result included."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def _gpu(kernel: str) -> torch.device:
    if not torch.cuda.is_available():
        raise BenchmarkError(f"{kernel} is timed on a GPU only, and torch finds none.")
    device = torch.device("cuda", torch.cuda.current_device())
    select_kernels("auto", device)
    backend = kernel_backend(device)
    if backend.name != "triton":
        raise BenchmarkError(f"{kernel} does not run in Triton here: {backend.reason}.")
    return device


def _facts(kernel: str, device: torch.device) -> dict[str, str]:
    return {
        "kernel": kernel,
        "device": torch.cuda.get_device_name(device),
        "versions": f"torch {torch.__version__}, {kernel_backend(device).reason}",
    }


def _figures(case: Case, ceilings: Ceilings, device: torch.device, *, repeats: int, measured: Sequence[Figures]) -> Figures:
    if case.run is None:
        return Figures(case.group, case.name, reason=case.reason)
    times, peak = time_runs(case.run, device, repeats=repeats), peak_extra_bytes(case.run, device)
    median, (low, *_, high) = statistics.median(times), statistics.quantiles(times, n=10)
    rates = (case.num_bytes / median * 1e3, case.num_flops / median * 1e3)
    first = next((result.milliseconds for result in measured if result.group == case.group and result.milliseconds is not None), median)
    return Figures(
        case.group,
        case.name,
        milliseconds=median,
        percentiles=(low, high),
        gigabytes_per_second=rates[0] / 1e9 or None,
        teraflops_per_second=rates[1] / 1e12 or None,
        share_of_ceiling=max(rates[0] / ceilings.bytes_per_second, rates[1] / ceilings.flops_per_second) or None,
        speed_ratio=median / first,
        peak_extra_bytes=peak,
    )


_HEADER = f"{'':44s} {'ms':>9s} {'10-90 %':>19s} {'GB/s':>7s} {'TFLOP/s':>8s} {'ceiling':>8s} {'time':>7s} {'memory':>10s}"


def _line(result: Figures) -> str:
    label = f"{result.group}: {result.name}"
    if result.milliseconds is None or result.percentiles is None or result.peak_extra_bytes is None:
        return f"{label:44s} {result.reason}"

    def number(value: Any, form: str) -> str:
        return "" if value is None else form.format(value)

    low, high = result.percentiles
    return (
        f"{label:44s} {result.milliseconds:9.4f} {f'{low:.4f}-{high:.4f}':>19s} {number(result.gigabytes_per_second, '{:.0f}'):>7s} "
        f"{number(result.teraflops_per_second, '{:.1f}'):>8s} {number(result.share_of_ceiling, '{:.1%}'):>8s} "
        f"{number(result.speed_ratio, '{:.2f}x'):>7s} {format_bytes(result.peak_extra_bytes):>10s}"
    )
