"""Curves of the report page: SVG whose coordinates are stretched over the card, with labels in HTML, which are not.

A chart is drawn once for each axis (tokens, steps, time); the page shows one of them. What a pointer reads off is written as text beside the
drawing (`ChartData`), so that the page's script formats and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

import numpy as np

from phase8.formatting import format_count
from phase8.observe.history import Places, Series, smooth, thin_out

AXES = ("tokens", "steps", "seconds")
_SIZE = 1000  # units of the drawing in both directions
_MAX_POINTS = 700  # of a curve
_MAX_READINGS = 400  # of a pointer, for each curve
_TIME_UNITS = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))
_NEAR_THE_EDGE = 0.012
_ROOM = 1.012  # for the last dot of a curve


@dataclass(frozen=True)
class Curve:
    """A curve of a chart.

    Args:
        label: Its name.
        colour: Name of its colour in the page, without `--`.
        places: Where its values stand.
        values: The values; NaN: none.
        style: `noisy`: faint, with its moving average; `points`: a dot for each value.
    """

    label: str
    colour: str
    places: Places
    values: Series
    style: Literal["noisy", "line", "points"] = "line"


@dataclass(frozen=True)
class Mark:
    """Something that happened, marked on every chart.

    Args:
        kind: `restart`, `rollback` or `skipped`.
        steps: Steps after which it happened.
    """

    kind: str
    steps: Series


@dataclass(frozen=True)
class Chart:
    """A chart.

    Args:
        heading: Its name.
        unit: What the values are.
        curves: The curves.
        limits: Lower and upper end of the value axis.
        format_value: How a value is written.
        references: Values to compare with, by name: dashed lines.
        is_wide: Whether it is a main chart, larger than others, which has more ticks and names the marks.
    """

    heading: str
    unit: str
    curves: Sequence[Curve]
    limits: tuple[float, float]
    format_value: Callable[[float], str]
    references: Mapping[str, float] = field(default_factory=dict)
    is_wide: bool = False


@dataclass(frozen=True)
class Span:
    """What the horizontal axes of a page show, the same on all its charts.

    Args:
        largest: Last value of each axis, by its name; the first is 0.
        places: Places of the steps of the run to which marks belong.
    """

    largest: Mapping[str, float]
    places: Places

    @classmethod
    def of(cls, runs: Sequence[Places]) -> Span:
        """The span of some runs; the first one has the marks."""
        ends = {axis: [float(values[-1]) for run in runs if (values := axis_of(run, axis)).size] for axis in AXES}
        return cls({axis: _ROOM * max([1e-9, *values]) for axis, values in ends.items()}, runs[0])


def axis_of(places: Places, axis: str) -> Series:
    """The places on an axis."""
    return {"tokens": places.tokens, "steps": places.steps, "seconds": places.seconds}[axis]


def limits_from_zero(*values: Series) -> tuple[float, float]:
    """Limits from 0 to a little above the largest values; a single spike does not flatten the rest."""
    finite = np.concatenate([each[np.isfinite(each)] for each in values])
    return 0.0, max(1.1 * float(np.quantile(finite, 0.99)), 1e-9) if finite.size else 1.0


def draw(chart: Chart, span: Span, marks: Sequence[Mark]) -> str:
    """The chart as HTML, without its heading."""
    drawings = "\n".join(_on_axis(chart, span, marks, axis) for axis in AXES)
    ticks = "".join(
        f'<span class="y" style="top:{100 - 100 * share:.2f}%">{escape(format_count(value))}</span>'
        for value, share in _ticks(*chart.limits, most=4 + 2 * chart.is_wide)
    )
    empty = "" if any(np.isfinite(curve.values).any() for curve in chart.curves) else '<p class="absent">no finite value was recorded</p>'
    return f'<div class="plot"><div class="ys">{ticks}</div>\n{drawings}\n<div class="cross"></div>{empty}</div>'


def readings(curve: Curve, format_value: Callable[[float], str]) -> dict[str, object]:
    """What a pointer reads off a curve: places on each axis, and the value of each as text."""
    count = len(curve.values)
    rows = np.arange(count) if count <= _MAX_READINGS else np.unique(np.linspace(0, count - 1, _MAX_READINGS).round().astype(int))
    places = {axis: [float(f"{place:.6g}") for place in axis_of(curve.places, axis)[rows]] for axis in AXES}
    return {**places, "text": [format_value(value) if np.isfinite(value) else "–" for value in curve.values[rows]]}


def _on_axis(chart: Chart, span: Span, marks: Sequence[Mark], axis: str) -> str:
    """The drawing on one horizontal axis, with the labels of this axis."""
    largest = span.largest[axis]
    scale, name = next((size, unit) for least, size, unit in _TIME_UNITS if largest >= least) if axis == "seconds" else (1, axis)
    label = {"tokens": "training tokens", "steps": "step"}.get(axis, f"{name} in steps")
    heights = (_SIZE - _SIZE * share for _, share in _ticks(*chart.limits, most=4 + 2 * chart.is_wide))
    lines = "".join(f'<path class="grid" d="M0 {height:.1f}H{_SIZE}"/>' for height in heights)
    shapes = [*_mark_shapes(span, marks, axis), *_reference_shapes(chart)]
    for curve in chart.curves:
        shapes += _curve_shapes(curve, chart.limits, axis_of(curve.places, axis) / largest)
    ticks = "".join(
        f'<span class="x" style="left:{100 * share:.2f}%">{escape(format_count(value))}</span>' for value, share in _ticks(0, largest / scale, most=5)
    )
    svg = f'<svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none" role="img" aria-label="{escape(chart.heading)} over {escape(label)}">'
    return (
        f'<div class="on-{axis}">{svg}{lines}{"".join(shapes)}</svg>'
        f'{_reference_labels(chart)}{_cut_label(chart, axis, largest)}<div class="xs">{ticks}</div><div class="xlabel">{escape(label)}</div></div>'
    )


def _curve_shapes(curve: Curve, limits: tuple[float, float], x: Series) -> Iterator[str]:
    colour = f'style="stroke:var(--{curve.colour})"'
    if curve.style == "points" or len(curve.values) == 1:
        # A value outside is drawn at the edge, where the label says what it is.
        share = np.clip(_share(curve.values, limits), _NEAR_THE_EDGE, 1 - _NEAR_THE_EDGE)
        finite = np.isfinite(share)
        yield f'<path class="thin" {colour} d="{_path(x[finite], share[finite])}"/>'
        dots = "".join(f"M{_SIZE * a:.1f} {_SIZE - _SIZE * b:.1f}h0" for a, b in zip(x[finite], share[finite], strict=True))
        yield f'<path class="dots" {colour} d="{dots}"/>'
        return
    if curve.style == "noisy":
        yield f'<path class="faint" {colour} d="{_thin_path(x, _share(curve.values, limits))}"/>'
    values = smooth(curve.values) if curve.style == "noisy" else curve.values
    yield f'<path class="line" {colour} d="{_thin_path(x, _share(values, limits))}"/>'


def _thin_path(x: Series, share: Series) -> str:
    return _path(*thin_out(x, share, most=_MAX_POINTS))


def _path(x: Series, share: Series) -> str:
    """The data of an SVG path; a NaN interrupts it."""
    parts, is_down = [], False
    for place, height in zip(_SIZE * x, _SIZE - _SIZE * np.clip(share, -1, 2), strict=True):
        is_finite = bool(np.isfinite(height))
        if is_finite:
            parts.append(f"{'L' if is_down else 'M'}{place:.1f} {height:.1f}")
        is_down = is_finite
    return "".join(parts)


def _share(values: Series, limits: tuple[float, float]) -> Series:
    low, high = limits
    return (values - low) / (high - low)


def _mark_shapes(span: Span, marks: Sequence[Mark], axis: str) -> Iterator[str]:
    for mark in marks:
        places = _SIZE * axis_of(span.places.at(mark.steps), axis) / span.largest[axis]
        stroke = f"V{_SIZE}" if mark.kind != "skipped" else f"v{_SIZE // 20}"
        if places.size:
            data = "".join(f"M{place:.1f} 0{stroke}" for place in places)
            yield f'<path class="mark {escape(mark.kind)}" d="{data}"/>'


def _reference_shapes(chart: Chart) -> Iterator[str]:
    for share in (_share(np.array([value]), chart.limits)[0] for value in chart.references.values()):
        yield f'<path class="reference" d="M0 {_SIZE - _SIZE * np.clip(share, -1, 2):.1f}H{_SIZE}"/>'


def _reference_labels(chart: Chart) -> str:
    """The names of the references at the right, where a falling curve leaves room; close ones are moved apart."""
    labels, floor = [], -1.0
    for name, value in sorted(chart.references.items(), key=lambda each: each[1]):
        share = max(float(_share(np.array([value]), chart.limits)[0]), floor)
        if 0 <= share <= 1:
            labels.append(f'<span class="name" style="bottom:{100 * share:.2f}%">{escape(name)} {escape(chart.format_value(value))}</span>')
        floor = share + 0.08
    return f'<div class="names">{"".join(labels)}</div>'


def _cut_label(chart: Chart, axis: str, largest: float) -> str:
    """The largest value that is cut off, at its place or as near as its text has room; empty if none is."""
    cut = [(float(np.nanmax(curve.values)), curve) for curve in chart.curves if np.isfinite(curve.values).any()]
    value, curve = max(cut, key=lambda each: each[0], default=(-np.inf, None))
    if curve is None or value <= chart.limits[1]:
        return ""
    at = int(np.nanargmax(curve.values))
    share = float(axis_of(curve.places, axis)[at]) / largest
    text = f"▲ up to {chart.format_value(value)} at step {int(curve.places.steps[at]):,}"
    return f'<span class="cut" style="left:clamp(0%,{100 * share:.2f}%,100% - {len(text)}ch)">{escape(text)}</span>'


def _ticks(low: float, high: float, *, most: int) -> list[tuple[float, float]]:
    """Round values between two ends, each with its share of the way."""
    from matplotlib.ticker import MaxNLocator  # late: see `write_report`

    if not high > low:
        return []
    values = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    margin = 1e-9 * (high - low)
    return [(float(value), float((value - low) / (high - low))) for value in values if low - margin <= value <= high + margin]
