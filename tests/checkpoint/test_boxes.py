from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phase8.checkpoint.boxes import Region, common_part, coverage_problem, overlap


def box(offsets: list[int], shape: list[int]) -> SimpleNamespace:
    return SimpleNamespace(offsets=offsets, shape=shape)


def test_row_shards_uneven_shards_and_a_grid_cover():
    assert coverage_problem([5, 2], [box([0, 0], [3, 2]), box([3, 0], [2, 2])]) is None
    assert coverage_problem([4, 6], [box([r, c], [2, 3]) for r in (0, 2) for c in (0, 3)]) is None
    assert coverage_problem([3], [box([0], [3]), box([3], [0])]) is None
    assert coverage_problem([], [box([], [])]) is None
    assert coverage_problem([0, 7], [box([0, 0], [0, 7])]) is None


def test_a_missing_shard_is_found():
    assert "4 of 6 elements" in coverage_problem([3, 2], [box([0, 0], [2, 2])])


def test_an_overlap_that_hides_a_gap_of_the_same_size_is_found():
    assert "overlap" in coverage_problem([4], [box([0], [2]), box([1], [2])])
    assert "overlap" in coverage_problem([], [box([], []), box([], [])])


def test_a_slice_outside_or_with_other_dims_is_found():
    assert "outside" in coverage_problem([4], [box([2], [4])])
    assert "number of dims" in coverage_problem([4], [box([0, 0], [4, 1])])
    assert "number of dims" in coverage_problem([4], [box([0], [4, 1])])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_agrees_with_counting_every_element(data: st.DataObject):
    shape = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    boxes = []
    for _ in range(data.draw(st.integers(1, 4))):
        offsets = [data.draw(st.integers(0, size)) for size in shape]
        boxes.append(box(offsets, [data.draw(st.integers(0, size - begin)) for size, begin in zip(shape, offsets, strict=True)]))
    counts = dict.fromkeys(itertools.product(*(range(size) for size in shape)), 0)
    for b in boxes:
        for index in itertools.product(*(range(o, o + s) for o, s in zip(b.offsets, b.shape, strict=True))):
            counts[index] += 1
    assert (coverage_problem(shape, boxes) is None) == all(count == 1 for count in counts.values())


@st.composite
def two_boxes(draw: st.DrawFn) -> tuple[list[int], Region, Region]:
    shape = draw(st.lists(st.integers(1, 5), min_size=0, max_size=3))

    def box() -> Region:
        ranges = [sorted(draw(st.lists(st.integers(0, size), min_size=2, max_size=2))) for size in shape]
        return Region([begin for begin, _ in ranges], [end - begin for begin, end in ranges])

    return shape, box(), box()


@given(two_boxes())
@settings(max_examples=300, deadline=None)
def test_the_common_part_is_what_both_boxes_hold(boxes: tuple[list[int], Region, Region]):
    shape, a, b = boxes
    numbers = torch.arange(math.prod(shape)).reshape(shape)
    cut = [numbers[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.shape, strict=True))] for box in (a, b)]
    shared = set(cut[0].flatten().tolist()) & set(cut[1].flatten().tolist())
    assert overlap(a, b) == bool(shared)
    if shared:
        here, there = common_part(a, b)
        assert torch.equal(cut[0][here], cut[1][there]) and set(cut[0][here].flatten().tolist()) == shared
