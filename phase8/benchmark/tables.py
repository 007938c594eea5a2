"""Results of benchmarks as lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from phase8.accelerator import is_accelerator
from phase8.benchmark.blocks import BLOCKS, LengthSpeed, speed_ratio
from phase8.benchmark.ladder import RungSpeed, total_gain
from phase8.benchmark.throughput import Measurement, Throughput
from phase8.formatting import format_bytes, format_count, format_ratio, format_seconds

NOTHING = "-"
LADDER_HEADER = (
    f"{'rung':14} {'tok/s':>12} {'gain':>8} {'step':>9} {'data wait':>10} {'peak memory':>12} {'MFU':>7} {'warm-up':>10} {'gradients':>10}"
)
LENGTHS_HEADER = f"{'T':>9} {'batch':>6} {'phase8 tok/s':>14} {'recompute':>10} {'transformer tok/s':>18} {'recompute':>10} {'ratio':>8}"


def ladder_line(rung: RungSpeed) -> str:
    """One rung, under `LADDER_HEADER`."""
    found = rung.measurement.throughput
    if found is None:
        return f"{rung.name:14} {rung.measurement.reason}"
    return (
        f"{rung.name:14} {found.tokens_per_second:12,.0f} {_gain(rung.gain):>8} {format_seconds(found.step_seconds):>9} "
        f"{format_ratio(found.data_wait_ratio):>10} {peak_memory(found):>12} {_mfu(found):>7} {format_seconds(found.warmup_seconds):>10} "
        f"{NOTHING if rung.deviation is None else format_ratio(rung.deviation):>10}"
    )


def total_line(rungs: Sequence[RungSpeed]) -> str:
    """Gain of the whole ladder as one line."""
    measured = [rung.name for rung in rungs if rung.measurement.throughput is not None]
    if len(measured) < 2:
        return "total          not available: fewer than two rungs were measured"
    return f"{'total':14} {'':12} {_gain(total_gain(rungs)):>8}  {measured[-1]} over {measured[0]}"


def block_lines(blocks: Mapping[str, Measurement]) -> Iterator[str]:
    """Both blocks side by side."""
    ours, theirs = (blocks[block].throughput for block in BLOCKS)
    yield f"{'':16} {BLOCKS[0]:>14} {BLOCKS[1]:>14} {'ratio':>8}"
    for name, figure, show in (
        ("tok/s", lambda found: found.tokens_per_second, lambda found: f"{found.tokens_per_second:,.0f}"),
        ("step", lambda found: None, lambda found: format_seconds(found.step_seconds)),
        ("MFU", lambda found: found.mfu, _mfu),
        ("peak memory", lambda found: found.peak_memory_bytes if _measures_memory(found) else None, peak_memory),
        ("parameters", lambda found: found.num_parameters, lambda found: format_count(found.num_parameters)),
        ("data wait", lambda found: None, lambda found: format_ratio(found.data_wait_ratio)),
        ("warm-up", lambda found: None, lambda found: format_seconds(found.warmup_seconds)),
    ):
        shown = [NOTHING if found is None else show(found) for found in (ours, theirs)]
        figures = [None if found is None else figure(found) for found in (ours, theirs)]
        ratio = NOTHING if None in figures else _gain(figures[0] / figures[1])
        yield f"{name:16} {shown[0]:>14} {shown[1]:>14} {ratio:>8}"
    yield from (f"{block}: {measurement.reason}" for block, measurement in blocks.items() if measurement.reason is not None)


def fact_lines(measurements: Iterable[Measurement]) -> Iterator[str]:
    """Device and implementations of each block's last measurement, which has the most techniques switched on."""
    last = {found.block: found for measurement in measurements if (found := measurement.throughput) is not None}
    for block, found in last.items():
        yield f"{block}: {found.facts['device']}; {found.facts['mixer']}"


def length_line(row: LengthSpeed) -> str:
    """Both blocks at one length, under `LENGTHS_HEADER`."""
    ours, theirs = (row.blocks[block] for block in BLOCKS)
    return (
        f"{row.sequence_length:9,} {row.batch_size:6} {speed(ours):>14} {_recompute(ours):>10} {speed(theirs):>18} {_recompute(theirs):>10} "
        f"{_gain(speed_ratio(row.blocks)):>8}"
    )


def speed(measurement: Measurement) -> str:
    """Tokens per second, or the reason why there are none."""
    return measurement.reason if measurement.throughput is None else f"{measurement.throughput.tokens_per_second:,.0f}"


def peak_memory(found: Throughput) -> str:
    """Peak memory of a GPU; a CPU process only knows the peak of its largest run."""
    return format_bytes(found.peak_memory_bytes) if _measures_memory(found) else NOTHING


def _measures_memory(found: Throughput) -> bool:
    return is_accelerator(found.device_type)


def _recompute(measurement: Measurement) -> str:
    return NOTHING if measurement.throughput is None else measurement.throughput.recompute


def _mfu(found: Throughput) -> str:
    return NOTHING if found.mfu is None else format_ratio(found.mfu)


def _gain(gain: float | None) -> str:
    return NOTHING if gain is None else f"{gain:.3g}x"
