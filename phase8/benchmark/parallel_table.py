"""Layouts of several ranks side by side, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from phase8.benchmark.parallel import LayoutSpeed
from phase8.formatting import format_bytes, format_seconds

NOTHING = "-"
LAYOUTS_HEADER = (
    f"{'layout':24} {'ranks':>5} {'batch':>6} {'micro':>8} {'tok/s':>10} {'per rank':>10} {'relative':>9} {'ceiling':>8} {'of it':>7} "
    f"{'step':>9} {'peak memory':>12} {'planned':>10} {'in all':>10}"
)


def layout_line(row: LayoutSpeed) -> str:
    """One row, under `LAYOUTS_HEADER`."""
    shape, found = row.shape, row.found
    if shape is None or found is None:
        return f"{row.layout.name:24} {row.layout.world_size:5} {row.reason}"
    micro = f"{shape.micro_batch_size} x {shape.num_microbatches}"
    of_ceiling = None if row.relative is None or row.ceiling is None else row.relative / row.ceiling
    return (
        f"{row.layout.name:24} {row.layout.world_size:5} {shape.global_batch_size:6} {micro:>8} {row.tokens_per_second:10,.0f} "
        f"{row.tokens_per_second_per_rank:10,.0f} {_share(row.relative):>9} {_share(row.ceiling):>8} {_share(of_ceiling):>7} "
        f"{format_seconds(found.step_seconds):>9} {_bytes(found.peak_memory_bytes):>12} {format_bytes(row.planned_bytes):>10} "
        f"{format_seconds(row.seconds):>10}"
    )


def host_lines(rows: Sequence[LayoutSpeed]) -> Iterator[str]:
    """Host memory of the layouts that offload to it."""
    for row in rows:
        if row.found is not None and row.planned_host_bytes:
            yield (
                f"{row.layout.name}: {_bytes(row.found.host_bytes)} of the host in use after the steps, largest resident set "
                f"{format_bytes(row.found.peak_resident_bytes)}; planned {format_bytes(row.planned_host_bytes)}, code and libraries apart"
            )


def device_lines(rows: Sequence[LayoutSpeed]) -> Iterator[str]:
    """Device and implementations of the last layout that ran."""
    found = [row.found for row in rows if row.found is not None]
    if found:
        yield f"{found[-1].facts['device']}; {found[-1].facts['mixer']}"


def _share(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _bytes(value: int | None) -> str:
    return NOTHING if value is None else format_bytes(value)
