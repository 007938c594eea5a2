"""The timeline of a pipeline schedule as a picture: a row for each stage, a box for each action, idle time in between.

Where the boxes would be too narrow to see, three windows are drawn instead of the whole: the begin with the warm-up, as much around the middle,
where the schedule repeats itself, and the end with the cool-down.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator

from phase8.formatting import format_count
from phase8.observe.charts import LIGHT, style_axes
from phase8.observe.schedule_text import Box

# Colours from the first to the last chunk: mixed between a dark and a light end.
_SHADES = {
    "forward": ("#1f5fbf", "#9cc3f5"),
    "backward": ("#c2560a", "#f9bf85"),
    "backward_input": ("#c2560a", "#f9bf85"),
    "backward_weight": ("#1b7f5a", "#8fd6b8"),
}
_NAMES = {"forward": "forward", "backward": "backward", "backward_input": "backward, input", "backward_weight": "backward, weights"}
_IDLE = "#e6e9ee"
_ROW_HEIGHT = 0.8  # share of a row; the rest is the gap to the next row
_INCHES_PER_ROW = 0.6
_MIN_WIDTH, _MAX_WIDTH = 10.0, 18.0  # inches
_BOX_WIDTH = 0.24  # inches of the shortest box, if the picture may be that wide
_LEAST_BOX_WIDTH = 0.08  # inches of the shortest box; where it would be narrower, windows are drawn
_GAP = 0.35  # inches between windows
_EDGE = 0.8  # points between boxes; less between short boxes, so that it is not taken for idle time
_INCHES_PER_NAME = 1.9  # width of a column of the legend
_BESIDE = {"textcoords": "offset points", "color": LIGHT.muted}
_MAX_FONT, _MIN_FONT = 9.0, 4.5  # points


class Window(NamedTuple):
    """A stretch of time that is drawn.

    Args:
        start: Its begin.
        end: Its end.
        left: Where it begins in the picture, in units of time.
    """

    start: float
    end: float
    left: float


def windows_of(makespan: float, *, visible: float, gap: float) -> list[Window]:
    """The whole timeline, or where no more than `visible` of it can be shown, its begin, middle and end, apart by `gap`."""
    if makespan <= visible:
        return [Window(0.0, makespan, 0.0)]
    length = (visible - 2 * gap) / 3
    starts = (0.0, (makespan - length) / 2, makespan - length)
    return [Window(start, start + length, place * (length + gap)) for place, start in enumerate(starts)]


def _within(boxes: Sequence[Box], windows: Sequence[Window]) -> list[Box]:
    """The parts of the boxes inside the windows, where these stand in the picture."""
    return [
        box._replace(start=max(box.start, window.start) - window.start + window.left, end=min(box.end, window.end) - window.start + window.left)
        for window in windows
        for box in boxes
        if min(box.end, window.end) - max(box.start, window.start) > 1e-6 * (box.end - box.start)
    ]


def schedule_png(boxes: Sequence[Box], *, title: str, subtitle: str, notes: Sequence[str]) -> bytes:
    """Draws the timeline as a PNG.

    Args:
        boxes: Boxes of all stages.
        title: Title of the picture.
        subtitle: Summary below the title.
        notes: A few words on each stage, at the right of its row.
    """
    makespan, shortest = max(box.end for box in boxes), min(box.end - box.start for box in boxes)
    width = min(max(_BOX_WIDTH * makespan / shortest, _MIN_WIDTH), _MAX_WIDTH)
    visible = min(makespan, shortest * _MAX_WIDTH / _LEAST_BOX_WIDTH)  # units of time
    windows = windows_of(makespan, visible=visible, gap=visible * _GAP / width)
    figure = Figure(
        figsize=(width + 2, _INCHES_PER_ROW * len(notes) + 1.9),
        dpi=150,
        layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12),
        facecolor=LIGHT.surface,
    )
    axes = figure.add_subplot()
    style_axes(axes, LIGHT, font_size=10.5)
    axes.grid(False)
    axes.set_xlim(0, visible)
    axes.set_ylim(len(notes) - 0.5, -0.5)
    axes.set_yticks(range(len(notes)), [f"stage {stage}" for stage in range(len(notes))])
    _set_ticks(axes, windows)
    axes.set_xlabel("time", loc="right")
    num_chunks = max(box.chunk for box in boxes) + 1
    shown = _within(boxes, windows)
    _draw_idle(axes, windows, len(notes))
    _draw_boxes(axes, shown, num_chunks, edge=min(_EDGE, 0.06 * 72 * width * shortest / visible))
    _write_numbers(axes, shown, num_chunks, points_per_unit=72 * width / visible)
    for stage, note in enumerate(notes):
        axes.annotate(note, (1, stage), xytext=(8, 0), xycoords=("axes fraction", "data"), **_BESIDE, va="center", linespacing=1.35, fontsize=9.5)
    axes.set_title(title, loc="left", color=LIGHT.ink, fontsize=14, fontweight="bold", pad=34)
    axes.annotate(subtitle, (0, 1), xytext=(0, 14), xycoords="axes fraction", **_BESIDE, fontsize=11)
    _add_legend(figure, boxes, num_chunks)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _shade(box_kind: str, chunk: int, num_chunks: int) -> tuple[float, ...]:
    dark, light = (to_rgb(colour) for colour in _SHADES[box_kind])
    share = chunk / (num_chunks - 1) if num_chunks > 1 else 0.35
    return tuple(a + share * (b - a) for a, b in zip(dark, light, strict=True))


def _set_ticks(axes: Axes, windows: Sequence[Window]) -> None:
    """Labels the time in each window, and marks with dots that time is left out between two."""
    most = max(12 // len(windows), 2)
    places, labels = [], []
    for window in windows:
        locator = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], integer=windows[-1].end >= 12)
        for value in locator.tick_values(window.start, window.end):
            if window.start <= value <= window.end:
                places.append(value - window.start + window.left)
                labels.append(format_count(value) if len(windows) == 1 else f"{value:,.4g}")
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_major_formatter(FixedFormatter(labels))
    for before, after in pairwise(windows):
        middle = (before.left + before.end - before.start + after.left) / 2
        axes.annotate("⋯", (middle, 0.5), xycoords=("data", "axes fraction"), ha="center", va="center", color=LIGHT.muted, fontsize=16)


def _draw_idle(axes: Axes, windows: Sequence[Window], num_stages: int) -> None:
    """Draws a pale band behind each row, which remains visible where a stage is idle."""
    bands = [
        Rectangle((window.left, stage - _ROW_HEIGHT / 2), window.end - window.start, _ROW_HEIGHT) for stage in range(num_stages) for window in windows
    ]
    axes.add_collection(PatchCollection(bands, facecolor=_IDLE, linewidth=0))


def _draw_boxes(axes: Axes, boxes: Sequence[Box], num_chunks: int, *, edge: float) -> None:
    patches = [Rectangle((box.start, box.stage - _ROW_HEIGHT / 2), box.end - box.start, _ROW_HEIGHT) for box in boxes]
    colours = [_shade(box.kind, box.chunk, num_chunks) for box in boxes]
    axes.add_collection(PatchCollection(patches, facecolor=colours, edgecolor=LIGHT.surface, linewidth=edge))


def _write_numbers(axes: Axes, boxes: Sequence[Box], num_chunks: int, *, points_per_unit: float) -> None:
    """Writes the microbatch into each box that has room for it."""
    digits = max(len(str(box.microbatch)) for box in boxes)
    for box in boxes:
        points = points_per_unit * (box.end - box.start) / (0.62 * digits + 0.35)
        if points < _MIN_FONT:
            continue
        red, green, blue = _shade(box.kind, box.chunk, num_chunks)
        ink = LIGHT.ink if 0.299 * red + 0.587 * green + 0.114 * blue > 0.6 else LIGHT.surface
        look = {"ha": "center", "va": "center", "fontsize": min(points, _MAX_FONT), "color": ink}
        axes.text((box.start + box.end) / 2, box.stage, str(box.microbatch), **look)


def _add_legend(figure: Figure, boxes: Sequence[Box], num_chunks: int) -> None:
    kinds = [kind for kind in _SHADES if any(box.kind == kind for box in boxes)]
    handles = [
        Patch(facecolor=_shade(kind, chunk, num_chunks), label=_NAMES[kind] + (f", chunk {chunk}" if num_chunks > 1 else ""))
        for kind in kinds
        for chunk in range(num_chunks)
    ]
    handles.append(Patch(facecolor=_IDLE, label="idle"))
    num_columns = min(len(handles), int(figure.get_figwidth() / _INCHES_PER_NAME))
    figure.legend(handles=handles, loc="outside lower center", ncols=num_columns, frameon=False, labelcolor=LIGHT.ink, fontsize=10, handlelength=1.2)
