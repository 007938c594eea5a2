"""Charts of the page, by the coordinates of their paths: 1000 units in both directions, the origin at the top left."""

from __future__ import annotations

import re

import numpy as np
import pytest

from phase8.observe.curves import Chart, Curve, Mark, Span, draw, limits_from_zero, readings
from phase8.observe.history import Places


def places_of(steps):
    steps = np.asarray(steps, dtype=np.float64)
    return Places(steps, 100 * steps, 0.5 * steps**2)


def drawing(curves, *, limits=(0.0, 10.0), marks=(), span=None, **changes):
    chart = Chart("Loss", "nats", curves, limits, "{:.1f}".format, **changes)
    return draw(chart, span or Span.of([curves[0].places]), marks)


def on(axis, html):
    """The drawing on one axis."""
    (part,) = [part for part in html.split('<div class="on-') if part.startswith(axis)]
    return part


def points(html, kind):
    """The points of the one path of a class."""
    (data,) = re.findall(rf'<path class="{kind}" [^>]*d="([^"]*)"', html)
    return [tuple(map(float, pair.split(" "))) for pair in re.findall(r"[ML]([-\d.]+ [-\d.]+)", data)]


@pytest.mark.parametrize(("axis", "shares"), [("steps", [0.25, 0.5, 1]), ("tokens", [0.25, 0.5, 1]), ("seconds", [0.0625, 0.25, 1])])
def test_a_curve_stands_where_its_axis_says(axis, shares):
    html = on(axis, drawing([Curve("a", "c0", places_of([1, 2, 4]), np.array([10.0, 5.0, 0.0]))]))
    found = points(html, "line")
    np.testing.assert_allclose([x for x, _ in found], 1000 * np.array(shares) / 1.012, atol=0.1)
    assert [y for _, y in found] == [0, 500, 1000]


def test_a_missing_value_interrupts_the_curve():
    html = on("steps", drawing([Curve("a", "c0", places_of([1, 2, 3, 4]), np.array([1.0, np.nan, 3.0, 4.0]))]))
    (data,) = re.findall(r'class="line" [^>]*d="([^"]*)"', html)
    assert re.findall("[ML]", data) == ["M", "M", "L"] and "nan" not in html


def test_what_is_cut_off_is_said_and_an_evaluation_outside_does_not_vanish():
    loss = Curve("train", "c0", places_of([1, 2, 3]), np.array([12.25, 5.0, 4.0]))
    validation = Curve("validation", "c1", places_of([1, 3]), np.array([12.0, 4.0]), "points")
    html = on("steps", drawing([loss, validation]))
    assert re.search(r'class="cut" style="left:clamp\(0%,32\.94%,100% - 22ch\)">▲ up to 12\.2 at step 1<', html)
    (dots,) = re.findall(r'class="dots" [^>]*d="([^"]*)"', html)
    assert [tuple(map(float, dot.split(" "))) for dot in re.findall(r"M([\d. ]+)h0", dots)] == [(329.4, 12.0), (988.1, 600.0)]
    assert 'class="cut"' not in drawing([loss], limits=(0, 13))
    late = Curve("train", "c0", places_of([1, 2, 3]), np.array([1.0, 2.0, 99.0]))
    assert "clamp(0%,98.81%," in on("steps", drawing([late])) and "▲ up to 99.0 at step 3" in drawing([late])


def test_a_noisy_curve_keeps_its_spikes_beside_its_average():
    values = np.ones(5000)
    values[1234] = 9.0
    html = on("steps", drawing([Curve("a", "c0", places_of(np.arange(1, 5001)), values, "noisy")]))
    faint, line = points(html, "faint"), points(html, "line")
    assert min(y for _, y in faint) == 100 and min(y for _, y in line) > 800 and len(faint) <= 700 >= len(line)


def test_a_single_value_is_a_dot():
    assert 'class="dots"' in drawing([Curve("a", "c0", places_of([1]), np.array([5.0]))])


def test_marks_stand_on_every_axis():
    curve = Curve("a", "c0", places_of([1, 2, 3, 4]), np.ones(4))
    html = drawing([curve], marks=[Mark("restart", np.array([2.0])), Mark("skipped", np.array([4.0])), Mark("rollback", np.array([]))])
    for axis, place in (("steps", 0.5), ("tokens", 0.5), ("seconds", 0.25)):
        assert f'class="mark restart" d="M{1000 * place / 1.012:.1f} 0V1000"' in on(axis, html)
    assert html.count("mark skipped") == 3 and "rollback" not in html


def test_close_references_have_names_that_do_not_overlap():
    html = on("steps", drawing([Curve("a", "c0", places_of([1]), np.ones(1))], references={"b": 5.01, "a": 5.0, "outside": 50.0}))
    heights = [float(height) for height in re.findall(r'class="name" style="bottom:([\d.]+)%">[ab] 5.0', html)]
    assert heights[0] == 50 and heights[1] >= 58 and "outside" not in html


@pytest.mark.parametrize(("seconds", "label"), [(100, "seconds"), (1000, "minutes"), (10_000, "hours"), (1e6, "days")])
def test_time_has_a_unit_for_people(seconds, label):
    places = Places(np.array([1.0]), np.array([8.0]), np.array([float(seconds)]))
    assert f"{label} in steps" in drawing([Curve("a", "c0", places, np.ones(1))])


def test_a_pointer_reads_no_more_than_a_page_can_hold():
    found = readings(Curve("a", "c0", places_of(np.arange(1, 10_001)), np.arange(1.0, 10_001)), "{:.0f}".format)
    assert len(found["text"]) == len(found["steps"]) <= 400 and found["text"][0] == "1" and found["text"][-1] == "10000"
    assert found["text"] == [f"{step:.0f}" for step in found["steps"]]


def test_a_spike_does_not_flatten_a_chart():
    values = np.ones(1000)
    values[5] = 1000
    assert limits_from_zero(values) == (0, pytest.approx(1.1)) and limits_from_zero(np.array([np.nan])) == (0, 1)
