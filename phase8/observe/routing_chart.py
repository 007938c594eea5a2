"""The load of experts as a heat map in the report page: a row for each expert of each layer, a column for each stretch of steps."""

from __future__ import annotations

import io
from base64 import b64encode

import numpy as np
from numpy.typing import NDArray

from phase8.observe.curves import AXES, Span, axis_of
from phase8.observe.history import Places
from phase8.observe.routing import RoutingHistory

# Blue: fewer tokens than an even share, grey: as many, orange: more. The colours stand on light and on dark pages.
FEWER, EVEN, MORE = "#2f6bde", "#b9bec6", "#d9730d"
_MAX_COLUMNS = 200
_MAX_LABELS = 6  # that have room in a small chart
_MAX_BORDERED = 12  # layers; borders between more would cover what they divide
_MOST = 2.0  # times an even share; more has the same colour


def draw_load(history: RoutingHistory, places: Places, span: Span) -> str:
    """The heat map as HTML: the load of every expert, as a multiple of an even share.

    Args:
        history: Routing of the steps.
        places: Where these steps stand.
        span: What the horizontal axes of the page show.
    """
    num_layers, num_experts = history.load.shape[1:]
    relative = num_experts * history.load.reshape(len(history.steps), -1)
    source = f"data:image/png;base64,{b64encode(_picture(means_of_stretches(relative).T)).decode()}"
    style = ""
    for axis in AXES:
        first, last = (float(axis_of(places, axis)[end]) / span.largest[axis] for end in (0, -1))
        style += f"--{axis}-left:{100 * first:.2f}%;--{axis}-width:{max(100 * (last - first), 0.5):.2f}%;"
    every = -(-num_layers // _MAX_LABELS)
    labels = "".join(
        f'<span class="y" style="top:{100 * (place + 0.5) / num_layers:.2f}%">layer {history.layers[place]}</span>'
        for place in range(0, num_layers, every)
    )
    bordered = range(1, num_layers if num_layers <= _MAX_BORDERED else 0)
    borders = "".join(f'<i class="border" style="top:{100 * border / num_layers:.2f}%"></i>' for border in bordered)
    image = f'<img src="{source}" style="{style}" alt="load of each expert of each layer">'
    return f'<div class="plot heat"><div class="ys">{labels}</div>{image}{borders}<div class="cross"></div></div>'


def means_of_stretches(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over stretches of rows, so that no more rows remain than a picture shows; a missing value does not count."""
    if len(values) <= _MAX_COLUMNS:
        return values
    return np.array([np.nanmean(stretch, axis=0) for stretch in np.array_split(values, _MAX_COLUMNS)])


def _picture(relative: NDArray[np.float64]) -> bytes:
    """A PNG with a pixel for each value."""
    from matplotlib.colors import LinearSegmentedColormap  # late: see `write_report`
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, relative, format="png", cmap=LinearSegmentedColormap.from_list("load", [FEWER, EVEN, MORE]), vmin=0, vmax=_MOST)
    return buffer.getvalue()
