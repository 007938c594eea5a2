"""The charts of an ablation: held-out loss against tokens, time and position, and the distance of each variant from the reference variant."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from phase8.formatting import format_count
from phase8.observe.charts import LIGHT, style_axes
from phase8.observe.history import Series

# The colours of Okabe and Ito, which most people with colour blindness can tell apart; their yellow is too pale on white and left out.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
_REFERENCE_STYLE = {"color": LIGHT.ink, "linestyle": "-"}
# The steep drop before this share of the tokens would flatten the rest of the curve.
_SHOWN_FROM_SHARE = 0.2

Curve = Mapping[int, float | None]  # tokens seen, or end of a range of positions -> loss; None: not finite
_Lines = Mapping[str, tuple[Series, Series]]  # places [N] and losses [S, N] of each variant


def validation_png(curves: Mapping[str, Mapping[int, Curve]], *, reference: str, speeds: Mapping[str, float]) -> bytes:
    """Draws the chart: for each variant the mean over its seeds, in a band from the smallest to the largest.

    Args:
        curves: By variant and seed.
        reference: Variant to which the second panel is relative, seed by seed; without its curves there is none.
        speeds: Tokens per second of each variant, for the last panel; one whose speed is not known is missing there.
    """
    losses, relative, styles = _lines(curves, reference)
    timed = {name: (tokens / speeds[name], values) for name, (tokens, values) in losses.items() if speeds.get(name)}
    num_panels = 1 + bool(relative) + bool(timed)
    figure = _figure(num_panels)
    first = _add_losses(figure, losses, relative, styles, reference=reference, num_panels=num_panels, x="training tokens")
    for axes, shown in zip(figure.axes, (losses, relative), strict=False):
        _limit(axes, shown, from_share=_SHOWN_FROM_SHARE)
    if timed:
        last = figure.add_subplot(num_panels, 1, num_panels)
        _draw(last, timed, styles)
        _limit(last, timed, from_share=_SHOWN_FROM_SHARE)
        last.set_ylabel("held-out loss, nats per token")
        last.set_xlabel("seconds of one device: tokens over the median speed, with other runs side by side")
    _add_legend(figure, first, losses)
    return _png(figure)


def positions_png(curves: Mapping[str, Mapping[int, Curve]], *, reference: str) -> bytes:
    """Draws the loss by position in the sequence, as `validation_png` that against tokens.

    Args:
        curves: By variant and seed: losses by the end of their range of positions.
        reference: Variant to which the second panel is relative.
    """
    losses, relative, styles = _lines(curves, reference)
    figure = _figure(num_panels := 1 + bool(relative))
    x = "end of the range of positions in the sequence"
    first = _add_losses(figure, losses, relative, styles, reference=reference, num_panels=num_panels, x=x)
    for axes, shown in zip(figure.axes, (losses, relative), strict=False):
        _limit(axes, shown, from_share=0)
    _add_legend(figure, first, losses)
    return _png(figure)


def _lines(curves: Mapping[str, Mapping[int, Curve]], reference: str) -> tuple[_Lines, _Lines, dict[str, Mapping[str, object]]]:
    """Losses, differences to the reference where there are any, and the style of each variant."""
    others = {name: seeds for name, seeds in curves.items() if name != reference}
    styles = {name: {"color": _COLOURS[i % len(_COLOURS)], "linestyle": _DASHES[i // len(_COLOURS) % len(_DASHES)]} for i, name in enumerate(others)}
    styles[reference] = _REFERENCE_STYLE
    relative = {name: _relative(seeds, curves[reference]) for name, seeds in others.items()} if reference in curves else {}
    return {name: _aligned(seeds) for name, seeds in curves.items()}, {name: each for name, each in relative.items() if each[0].size}, styles


def _figure(num_panels: int) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15)
    return Figure(figsize=(11, 4.5 * num_panels), dpi=150, layout=layout, facecolor=LIGHT.surface)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _add_losses(
    figure: Figure, losses: _Lines, relative: _Lines, styles: Mapping[str, Mapping[str, object]], *, reference: str, num_panels: int, x: str
) -> Axes:
    """Adds the panel of losses, which is returned, and that of differences, if there are any."""
    first = figure.add_subplot(num_panels, 1, 1)
    _draw(first, losses, styles)
    first.set_ylabel("held-out loss, nats per token")
    first.set_xlabel(x)
    if relative:
        second = figure.add_subplot(num_panels, 1, 2, sharex=first)
        second.axhline(0, color=LIGHT.ink, linewidth=1.2)
        _draw(second, relative, styles)
        second.set_ylabel(f"difference to {reference}, %")
        second.set_xlabel(x)
    return first


def _aligned(seeds: Mapping[int, Curve]) -> tuple[Series, Series]:
    """Tokens [N] at which every seed was evaluated, and the losses [S, N]; a missing loss is NaN."""
    tokens = sorted(set.intersection(*(set(curve) for curve in seeds.values()))) if seeds else []
    return np.array(tokens, dtype=np.float64), np.array([[curve[n] for n in tokens] for curve in seeds.values()], dtype=np.float64)


def _relative(seeds: Mapping[int, Curve], reference: Mapping[int, Curve]) -> tuple[Series, Series]:
    """Losses in per cent above the reference's, over the seeds that both variants have; shaped as in `_aligned`."""
    common = seeds.keys() & reference.keys()
    grid = set.intersection(*(seeds[seed].keys() & reference[seed].keys() for seed in common)) if common else set()
    tokens, losses = _aligned({seed: {n: seeds[seed][n] for n in grid} for seed in sorted(common)})
    _, expected = _aligned({seed: {n: reference[seed][n] for n in grid} for seed in sorted(common)})
    return tokens, 100 * (losses / expected - 1)


def _draw(axes: Axes, lines: _Lines, styles: Mapping[str, Mapping[str, object]]) -> None:
    style_axes(axes, LIGHT, font_size=11)
    for name, (tokens, values) in lines.items():
        style, mean = styles[name], values.mean(0)
        axes.plot(tokens, mean, label=name, linewidth=1.8, marker="o", markersize=2.5, **style)
        if len(values) > 1:
            axes.fill_between(tokens, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0)


def _limit(axes: Axes, lines: _Lines, *, from_share: float) -> None:
    """Sets a logarithmic axis of tokens, seconds or positions; the other axis shows everything from a share of the last one on."""
    last = max(tokens[-1] for tokens, _ in lines.values())
    first = min(tokens[0] for tokens, _ in lines.values())
    axes.set_xscale("log")
    axes.set_xlim(max(first / 1.03, 0.5 * from_share * last), last * 1.03)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
    shown = np.concatenate([values[:, tokens >= from_share * last].ravel() for tokens, values in lines.values()])
    finite = shown[np.isfinite(shown)]
    if finite.size:
        margin = max(0.05 * (finite.max() - finite.min()), 1e-3)
        axes.set_ylim(finite.min() - margin, finite.max() + margin)


def _add_legend(figure: Figure, axes: Axes, losses: _Lines) -> None:
    """Writes the names beside the panels, each with its last loss, the lowest loss first."""
    last = {name: values.mean(0)[-1] for name, (_, values) in losses.items()}
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = sorted(handles, key=lambda name: (not np.isfinite(last[name]), last[name]))
    labels = [f"{last[name]:.3f}  {name}" if np.isfinite(last[name]) else f"not finite  {name}" for name in names]
    look = {"loc": "outside right upper", "frameon": False, "labelcolor": LIGHT.ink, "fontsize": 10.5, "handlelength": 3.5}
    figure.legend([handles[name] for name in names], labels, **look)
