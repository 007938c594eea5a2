"""The picture of a schedule, by its pixels: areas are durations, shades are chunks, idle time can be seen."""

import io

import numpy as np
import pytest
from matplotlib.image import imread

from phase8.observe.schedule_chart import Window, schedule_png, windows_of
from phase8.observe.schedule_text import Box

IDLE = "#e6e9ee"


def draw(boxes, num_stages):
    png = schedule_png(boxes, title="title", subtitle="subtitle", notes=["note"] * num_stages)
    return (imread(io.BytesIO(png))[..., :3] * 255).round().astype(int)


def area(picture, colour):
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(picture - wanted).max(-1) <= 1).sum())


def one_row(num_chunks):
    """Each chunk forward for 1, then idle for 4, then each backward for 3."""
    forwards = [Box(0, chunk, chunk + 1, "forward", 0, chunk) for chunk in range(num_chunks)]
    backwards = [Box(0, num_chunks + 4 + 3 * chunk, num_chunks + 7 + 3 * chunk, "backward", 0, chunk) for chunk in range(num_chunks)]
    return forwards + backwards


def test_areas_are_durations_and_chunks_have_shades():
    picture = draw(one_row(2), 1)
    dark_forward, light_forward = area(picture, "#1f5fbf"), area(picture, "#9cc3f5")
    dark_backward, light_backward, idle = area(picture, "#c2560a"), area(picture, "#f9bf85"), area(picture, IDLE)
    assert dark_forward == pytest.approx(light_forward, rel=0.1)
    assert dark_backward == pytest.approx(light_backward, rel=0.1)
    assert dark_backward == pytest.approx(3 * dark_forward, rel=0.1)
    assert idle == pytest.approx(4 * dark_forward, rel=0.1)


def test_halves_of_a_backward_are_told_apart():
    boxes = [Box(0, 0, 1, "forward", 0, 0), Box(0, 1, 2, "backward_input", 0, 0), Box(1, 2, 3, "backward_weight", 0, 0)]
    colours = {tuple(pixel) for pixel in draw(boxes, 2).reshape(-1, 3)[::7].tolist()}
    green = {(r, g, b) for r, g, b in colours if g > r + 30 and g > b + 10}
    orange = {(r, g, b) for r, g, b in colours if r > g + 50 and g > b + 30}
    assert green and orange


def digit_ink(num_microbatches):
    """White pixels at half the height of a row of forwards, less those above the numbers, which are the gaps between the boxes."""
    picture = draw([Box(0, m, m + 1, "forward", m, 0) for m in range(num_microbatches)], 1)
    blue = picture[..., 2] - picture[..., 0] > 100
    rows = np.flatnonzero(blue.sum(1) > 0.4 * picture.shape[1])
    columns = np.flatnonzero(blue[rows[0] + 1])
    middle, above = (picture[rows[len(rows) * share // 10], columns[0] : columns[-1]].min(-1) for share in (5, 2))
    return int((middle > 150).sum() - (above > 150).sum())


def test_numbers_are_written_where_they_have_room():
    assert digit_ink(20) > 20
    assert digit_ink(100) > 100
    assert digit_ink(180) == digit_ink(1000) == 0


@pytest.mark.parametrize("num_chunks", [1, 12])
def test_pictures_have_a_size_that_can_be_looked_at(num_chunks):
    height, width, _ = draw([Box(s, m, m + 1, "forward", m, m % num_chunks) for s in range(3) for m in range(600)], 3).shape
    assert 1500 <= width <= 3200 and 500 <= height <= 1500


def test_a_long_schedule_is_drawn_in_windows_and_a_short_one_whole():
    assert windows_of(10.0, visible=10.0, gap=1.0) == [Window(0.0, 10.0, 0.0)]
    begin, middle, end = windows_of(1000.0, visible=32.0, gap=1.0)
    assert begin == Window(0.0, 10.0, 0.0) and middle == Window(495.0, 505.0, 11.0) and end == Window(990.0, 1000.0, 22.0)


def test_windows_show_the_begin_the_middle_and_the_end_of_every_row():
    boxes = [Box(stage, m, m + 1, "forward" if m < 1500 else "backward", m, 0) for stage in range(2) for m in range(3000)]
    picture = draw(boxes, 2)
    blue, orange = picture[..., 2] - picture[..., 0] > 60, picture[..., 0] - picture[..., 2] > 60
    (row,) = np.flatnonzero(blue[:, : picture.shape[1] // 3].sum(1) > 0.1 * picture.shape[1])[:1]
    columns = np.flatnonzero(blue[row + 1] | orange[row + 1])
    gaps = np.flatnonzero(np.diff(columns) > 20)
    first, second, third = np.split(columns, gaps + 1)
    assert len(gaps) == 2 and len(first) == pytest.approx(len(third), rel=0.05) == pytest.approx(len(second), rel=0.05)
    assert blue[row + 1, first].all() and orange[row + 1, third].all()
    assert blue[row + 1, second].sum() == pytest.approx(orange[row + 1, second].sum(), rel=0.1)
