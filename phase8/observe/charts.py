"""The curves of a run, drawn with matplotlib's objects and no global state.

One function per chart draws into given axes with a given theme. `loss.png` takes fixed colours. The page takes SVG whose colours are
placeholders, replaced by CSS variables: the browser then draws the same chart for light and for dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from phase8.observe.formatting import format_count
from phase8.observe.history import History, Series, smooth

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
_CSS = Theme(ink="#010203", muted="#020304", grid="#030405", surface="#040506", train="#050607", validation="#060708")


def loss_png(history: History, *, title: str, reference_losses: Mapping[str, float]) -> bytes:
    """The loss chart as a picture of its own, light, 1600 by 900 pixels."""
    figure = Figure(figsize=(10, 5.625), dpi=160, layout=ConstrainedLayoutEngine(w_pad=0.2, h_pad=0.2), facecolor=LIGHT.surface)
    axes = figure.add_subplot()
    style_axes(axes, LIGHT, font_size=11)
    draw_loss(axes, LIGHT, history, reference_losses)
    axes.set_title(title, loc="left", color=LIGHT.ink, fontsize=14, fontweight="bold", pad=38)
    if axes.get_legend_handles_labels()[0]:
        legend = {"loc": "lower left", "bbox_to_anchor": (0, 1.03), "borderaxespad": 0, "borderpad": 0, "handlelength": 1.6}
        axes.legend(ncols=2, frameon=False, labelcolor=LIGHT.muted, fontsize=11, **legend)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def render_svg(draw: Callable[[Axes, Theme], None], *, name: str, width: int, height: int) -> str:
    """Draw a chart as an SVG element for a page that defines the theme's colours as CSS variables `--chart-<colour>`.

    Args:
        draw: Draws into the axes.
        name: Name of the chart, unique in the page.
        width: In CSS pixels at natural size; the element scales with its container.
        height: In CSS pixels, as `width`.
    """
    # The salt makes element ids depend on the chart alone, so reports are reproducible and charts in one page do not share ids.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained", facecolor="none")
        axes = figure.add_subplot()
        style_axes(axes, _CSS, font_size=11)
        draw(axes, _CSS)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    # matplotlib's style element would apply to the whole page; the page has these rules itself.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    # Hundredths of a pixel are enough for a path.
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    for colour, placeholder in asdict(_CSS).items():
        svg = svg.replace(placeholder, f"var(--chart-{colour})")
    return svg


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
    smoothed = smooth(history.loss)
    axes.plot(*thin_out(history.tokens, history.loss), color=theme.train, alpha=0.28, linewidth=0.9)
    axes.plot(*thin_out(history.tokens, smoothed), color=theme.train, linewidth=2, label="train", solid_capstyle="round")
    if len(history.tokens) == 1:
        axes.plot(history.tokens, history.loss, "o", color=theme.train, markersize=5, clip_on=False)
    if history.validation_loss.size:
        axes.plot(
            history.validation_tokens_seen,
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
    axes.set_xlim(0, max([1.0, *history.tokens[-1:], *history.validation_tokens_seen[-1:]]) * 1.015)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss, nats per token")
    _draw_references(axes, theme, reference_losses)


def draw_series(axes: Axes, theme: Theme, steps: Series, values: Series, *, is_noisy: bool = True) -> None:
    """One figure over the steps; a noisy one faint, with its moving average."""
    if is_noisy:
        axes.plot(*thin_out(steps, values), color=theme.train, alpha=0.25, linewidth=0.8)
    axes.plot(*thin_out(steps, smooth(values) if is_noisy else values), color=theme.train, linewidth=1.8, solid_capstyle="round")
    if len(steps) == 1:
        axes.plot(steps, values, "o", color=theme.train, markersize=5, clip_on=False)
    finite = values[np.isfinite(values)]
    if finite.size:
        # A single spike must not flatten the rest of the curve.
        axes.set_ylim(0, max(1.1 * float(np.quantile(finite, 0.99)), 1e-9))
    else:
        _draw_absence(axes, theme)
    axes.set_xlim(0, max([1.0, *steps[-1:]]))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("step")


def loss_limits(loss: Series, validation_loss: Series, reference_losses: Mapping[str, float]) -> tuple[float, float]:
    """Limits of the loss axis: they cut off the initial drop from the untrained loss, which would flatten the rest.

    The references and the validation losses of the second half are always inside.
    """
    smoothed = smooth(loss)[np.isfinite(loss)]
    validation = validation_loss[np.isfinite(validation_loss)]
    inside = [*reference_losses.values(), *validation[len(validation) // 2 :]]
    if smoothed.size:
        inside += [float(np.nanquantile(loss, 0.001)), float(np.quantile(smoothed, 0.98))]
    if not inside:
        return 0.0, 1.0
    low, high = min(inside), max(inside)
    margin = max(0.06 * (high - low), 0.1)
    return max(0.0, low - margin), high + margin


def thin_out(x: Series, y: Series) -> tuple[Series, Series]:
    """A curve with no more points than a picture can show; minimum and maximum of each stretch are kept, and with them spikes."""
    if len(x) <= _MAX_POINTS:
        return x, y
    keep: list[int] = []
    for stretch in np.array_split(np.arange(len(x)), _MAX_POINTS // 2):
        finite = stretch[np.isfinite(y[stretch])]
        extremes = {int(finite[np.argmin(y[finite])]), int(finite[np.argmax(y[finite])])} if finite.size else {int(stretch[0])}
        keep.extend(sorted(extremes))
    return x[keep], y[keep]


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
            bbox={"facecolor": theme.surface, "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
        label_floor = label_height + 0.07 * (high - low)
