"""Numbers as people read them: three significant digits and a unit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_DECIMAL_SUFFIXES = ("", "k", "M", "B", "T")
_FLOP_UNITS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP", "YFLOP")
_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_count(count: float) -> str:
    """A count: `950`, `12.3k`, `9.83M`, `1.3B`, `2T`."""
    return "".join(_scaled(count, base=1000, units=_DECIMAL_SUFFIXES))


def format_flops(flops: float) -> str:
    """An amount of floating-point operations, `312 TFLOP`; a rate or a cost appends its own `/s` or `/token`."""
    return " ".join(_scaled(flops, base=1000, units=_FLOP_UNITS))


def format_bytes(num_bytes: float) -> str:
    """A size in binary units: `512 B`, `3.4 MiB`, `5.21 GiB`."""
    return " ".join(_scaled(num_bytes, base=1024, units=_BYTE_UNITS))


def format_ratio(ratio: float) -> str:
    """A share of one, in per cent: `41.2 %`, `0.4 %`."""
    return f"{100 * ratio:.1f} %"


def format_seconds(seconds: float) -> str:
    """A duration in its two largest units: `85 ms`, `12.3 s`, `3 min 12 s`, `2 h 05 min`, `3 d 04 h`."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def format_epochs(epochs: Mapping[str, float], *, max_sources: int | None = None) -> str:
    """Epochs of the sources of data by name: of one source `1.27`, of several `web 0.31, code 2.04`.

    Args:
        epochs: At least one source.
        max_sources: With more sources, only the most repeated ones are named, followed by the number of the rest.
    """
    if len(epochs) == 1:
        return "".join(f"{count:.2f}" for count in epochs.values())
    named = list(epochs.items())
    if max_sources is not None and len(named) > max_sources:
        named = sorted(named, key=lambda source: source[1], reverse=True)[:max_sources]
    num_others = len(epochs) - len(named)
    return ", ".join([*(f"{name} {count:.2f}" for name, count in named), *([f"{num_others} more"] if num_others else [])])


def _scaled(value: float, *, base: int, units: Sequence[str]) -> tuple[str, str]:
    """The number and the unit, chosen after rounding so that 999 999 is 1M and never 1000k."""
    if not math.isfinite(value):
        return str(value), units[0]
    power = 0
    while power < len(units) - 1 and abs(float(_three_digits(value / base**power))) >= base:
        power += 1
    return _three_digits(value / base**power), units[power]


def _three_digits(value: float) -> str:
    # From 1000 on (up to 1023 KiB, or beyond the last unit) %g would turn to exponents.
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
