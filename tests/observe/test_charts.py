from __future__ import annotations

from functools import partial
from xml.etree import ElementTree

import matplotlib
import numpy as np

from phase8.observe.charts import draw_series, loss_limits, render_svg, thin_out


def test_the_first_plunge_does_not_squash_the_curve():
    loss = 3 + np.exp(-np.arange(2000) / 100)
    loss[:10] = 12.0
    low, high = loss_limits(loss, np.array([]), {})
    assert 2.5 < low < 3 and 3.5 < high < 4


def test_references_and_late_evaluations_are_inside_the_limits():
    loss = np.full(100, 3.0)
    low, high = loss_limits(loss, np.array([9.0, 3.5, 4.2]), {"unigram entropy": 6.71, "floor": 1.9})
    assert low < 1.9 and 6.71 < high < 8
    low, high = loss_limits(loss, np.array([9.0, 3.5, 4.2]), {})
    assert low < 3 and 4.2 < high < 5


def test_limits_exist_without_any_finite_value():
    assert loss_limits(np.array([np.nan]), np.array([np.nan]), {}) == (0.0, 1.0)


def test_a_long_curve_is_thinned_but_keeps_every_spike():
    x, y = np.arange(100_000.0), np.zeros(100_000)
    y[[0, 31_415, 99_999]] = [5, 7, -3]
    y[500:900] = np.nan
    thin_x, thin_y = thin_out(x, y)
    assert len(thin_x) <= 1600
    assert (np.diff(thin_x) > 0).all()
    assert {(0.0, 5.0), (31_415.0, 7.0), (99_999.0, -3.0)} <= set(zip(thin_x, thin_y, strict=True))
    assert np.isnan(thin_y).any()


def test_an_svg_takes_its_colours_from_the_page_and_its_labels_stay_text():
    draw = partial(draw_series, steps=np.arange(1.0, 101), values=np.full(100, 6e-4), is_noisy=False)
    svg = render_svg(draw, name="rate", width=420, height=225)
    root = ElementTree.fromstring(svg.replace("xlink:", ""))
    assert root.attrib["viewBox"] == "0 0 420 225"
    assert "var(--chart-train)" in svg and "var(--chart-muted)" in svg
    assert "#0" not in svg.replace("#000000", "").replace('href="#', "").replace("url(#", "")
    assert {"0.0006", "step", "100"} <= {element.text for element in root.iter("text")}
    assert svg == render_svg(draw, name="rate", width=420, height=225)


def test_drawing_leaves_matplotlibs_global_settings_alone():
    before = dict(matplotlib.rcParams)
    render_svg(partial(draw_series, steps=np.arange(3.0), values=np.arange(3.0)), name="x", width=400, height=200)
    assert dict(matplotlib.rcParams) == before
