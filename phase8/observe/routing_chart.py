"""The load of experts as a heat map: a row for each expert of each layer, a column for each stretch of steps."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator
from numpy.typing import NDArray

from phase8.observe.charts import Theme
from phase8.observe.routing import RoutingHistory

_MAX_COLUMNS = 200
_MAX_LABELS = 12
_MOST = 2.0  # times an even share; more has the same colour
# Blue: fewer tokens than an even share, grey: as many, orange: more. The colours stand on light and on dark pages.
_COLOURS = LinearSegmentedColormap.from_list("load", ["#2f6bde", "#b9bec6", "#d9730d"])


def draw_load(axes: Axes, theme: Theme, history: RoutingHistory) -> None:
    """Draws the load of every expert over the steps, as a multiple of an even share.

    Args:
        axes: Axes to draw into.
        theme: Colours of labels.
        history: Routing of the steps.
    """
    num_layers, num_experts = history.load.shape[1:]
    relative = num_experts * history.load.reshape(len(history.steps), -1)
    first, last = float(history.steps[0]), float(history.steps[-1])
    extent = (first - 0.5, last + 0.5, num_layers * num_experts - 0.5, -0.5)
    axes.imshow(means_of_stretches(relative).T, cmap=_COLOURS, vmin=0, vmax=_MOST, aspect="auto", interpolation="nearest", extent=extent)
    for border in range(1, num_layers):
        axes.axhline(border * num_experts - 0.5, color=theme.surface, linewidth=1.5)
    every = -(-num_layers // _MAX_LABELS)
    shown = range(0, num_layers, every)
    axes.yaxis.set_major_locator(FixedLocator([place * num_experts + (num_experts - 1) / 2 for place in shown]))
    axes.yaxis.set_major_formatter(FixedFormatter([f"layer {history.layers[place]}" for place in shown]))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(visible=False)
    axes.set_xlabel("step")


def means_of_stretches(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over stretches of rows, so that no more rows remain than a picture shows; a missing value does not count."""
    if len(values) <= _MAX_COLUMNS:
        return values
    return np.array([np.nanmean(stretch, axis=0) for stretch in np.array_split(values, _MAX_COLUMNS)])
