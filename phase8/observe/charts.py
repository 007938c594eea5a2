"""`loss.png`, and the look that all pictures share: drawn with matplotlib's objects and no global state."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from phase8.formatting import format_count
from phase8.observe.history import History, loss_limits, smooth, thin_out

_MAX_POINTS = 1600


@dataclass(frozen=True)
class Theme:
    """Colours of a chart.

    Args:
        ink: Titles.
        muted: Labels and ticks.
        grid: Grid lines and the axis.
        surface: What lies behind.
        train: Training curves.
        validation: Validation curve.
    """

    ink: str
    muted: str
    grid: str
    surface: str
    train: str
    validation: str


LIGHT = Theme(ink="#1b1f24", muted="#667080", grid="#e3e7ec", surface="#ffffff", train="#2f6bde", validation="#d9730d")


def loss_png(history: History, *, title: str, reference_losses: Mapping[str, float]) -> bytes:
    """The loss chart as a picture of its own, light, 1600 by 900 pixels."""
    figure = Figure(figsize=(10, 5.625), dpi=160, layout=ConstrainedLayoutEngine(w_pad=0.2, h_pad=0.2), facecolor=LIGHT.surface)
    axes = figure.add_subplot()
    style_axes(axes, LIGHT, font_size=11)
    draw_loss(axes, LIGHT, history, reference_losses)
    axes.set_title(title, loc="left", color=LIGHT.ink, fontsize=14, fontweight="bold", pad=38, parse_math=False)
    if axes.get_legend_handles_labels()[0]:
        legend = {"loc": "lower left", "bbox_to_anchor": (0, 1.03), "borderaxespad": 0, "borderpad": 0, "handlelength": 1.6}
        axes.legend(ncols=2, frameon=False, labelcolor=LIGHT.muted, fontsize=11, **legend)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def style_axes(axes: Axes, theme: Theme, *, font_size: float) -> None:
    """The look all charts share: horizontal grid, no box, quiet ticks."""
    axes.set_facecolor("none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.grid)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.muted, labelsize=font_size, length=0, pad=5)
    axes.xaxis.label.set(color=theme.muted, fontsize=font_size)
    axes.yaxis.label.set(color=theme.muted, fontsize=font_size)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))


def draw_loss(axes: Axes, theme: Theme, history: History, reference_losses: Mapping[str, float]) -> None:
    """Training loss, faint and smoothed, validation points and known losses to compare with, over tokens."""
    smoothed, validation_tokens = smooth(history.loss), history.places.at(history.validation_steps).tokens
    axes.plot(*thin_out(history.tokens, history.loss, most=_MAX_POINTS), color=theme.train, alpha=0.28, linewidth=0.9)
    axes.plot(*thin_out(history.tokens, smoothed, most=_MAX_POINTS), color=theme.train, linewidth=2, label="train", solid_capstyle="round")
    if len(history.tokens) == 1:
        axes.plot(history.tokens, history.loss, "o", color=theme.train, markersize=5, clip_on=False)
    if history.validation_loss.size:
        axes.plot(
            validation_tokens,
            history.validation_loss,
            color=theme.validation,
            linewidth=1.6,
            marker="o",
            markersize=4.5,
            markeredgecolor=theme.surface,
            markeredgewidth=0.8,
            label="validation",
        )
    if not np.isfinite([*history.loss, *history.validation_loss]).any():
        _draw_absence(axes, theme)
    low, high = loss_limits(history.loss, history.validation_loss, reference_losses)
    axes.set_ylim(low, high)
    axes.set_xlim(0, max([1.0, *history.tokens[-1:], *validation_tokens[-1:]]) * 1.015)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss, nats per token")
    _draw_references(axes, theme, reference_losses)
    highest = max(history.loss[np.isfinite(history.loss)], default=0.0)
    if highest > high:
        axes.text(0.012, 0.985, f"▲ up to {highest:.2f}", transform=axes.transAxes, ha="left", va="top", color=theme.muted, fontsize=10)


def _draw_absence(axes: Axes, theme: Theme) -> None:
    axes.text(0.5, 0.3, "no finite value was recorded", transform=axes.transAxes, ha="center", va="center", color=theme.muted)
    axes.set_ylim(0, 1)


def _draw_references(axes: Axes, theme: Theme, reference_losses: Mapping[str, float]) -> None:
    """Dashed lines with their names at the right end, where a falling curve leaves room above."""
    low, high = axes.get_ylim()
    label_floor = low
    for name, loss in sorted(reference_losses.items(), key=lambda item: item[1]):
        axes.axhline(loss, color=theme.muted, linewidth=1, linestyle=(0, (4, 3)))
        label_height = max(loss + 0.012 * (high - low), label_floor)
        axes.text(
            0.995,
            label_height,
            f"{name} {loss:.2f}",
            transform=axes.get_yaxis_transform(),
            horizontalalignment="right",
            verticalalignment="bottom",
            color=theme.muted,
            fontsize=axes.yaxis.label.get_fontsize(),
            parse_math=False,
            bbox={"facecolor": theme.surface, "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
        label_floor = label_height + 0.07 * (high - low)
