from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phase8.division import DividedShape, Place, Region, common_region, overlap, padded_size, part, part_size, region_of_rank, whole_region


@pytest.mark.parametrize("num_parts", [1, 2, 3, 4, 7, 9])
@pytest.mark.parametrize("size", [0, 1, 6, 7, 8])
def test_parts_are_those_of_torch_chunk(size, num_parts):
    chunks = [list(chunk) for chunk in torch.arange(size).chunk(num_parts)]
    parts = [list(part(size, num_parts, index)) for index in range(num_parts)]
    assert [own for own in parts if own] == [chunk for chunk in chunks if chunk]
    assert all(0 <= part(size, num_parts, index).start <= size for index in range(num_parts))
    assert part_size(size, num_parts) == len(parts[0]) and padded_size(size, num_parts) == num_parts * len(parts[0])


def test_axes_divide_the_dims_that_a_parameter_declares():
    declared = DividedShape((5, 4, 6), {"ep": 0, "tp": 2})
    assert declared.region({}) == declared.region({"dp": Place(2, 1)}) == whole_region(declared.shape)
    assert declared.region({"tp": Place(4, 1)}) == Region([0, 0, 2], [5, 4, 2])
    own = declared.region({"tp": Place(4, 3), "ep": Place(2, 1)})
    assert own == Region([3, 0, 6], [2, 4, 0]) and own.num_elements == 0


def test_what_a_rank_has_is_divided_further():
    own = DividedShape((7, 3), {"tp": 0}).region({"tp": Place(2, 1)})
    assert [region_of_rank(own, 0, Place(2, index)) for index in range(2)] == [Region([4, 0], [2, 3]), Region([6, 0], [1, 3])]
    assert region_of_rank(own, 1, Place(2)) == Region([4, 0], [3, 2])


@st.composite
def two_boxes(draw: st.DrawFn) -> tuple[list[int], Region, Region]:
    shape = draw(st.lists(st.integers(1, 5), min_size=0, max_size=3))

    def region() -> Region:
        ranges = [sorted(draw(st.lists(st.integers(0, size), min_size=2, max_size=2))) for size in shape]
        return Region([begin for begin, _ in ranges], [end - begin for begin, end in ranges])

    return shape, region(), region()


@given(two_boxes())
@settings(max_examples=300, deadline=None)
def test_the_common_part_is_what_both_boxes_hold(regions: tuple[list[int], Region, Region]):
    shape, a, b = regions
    numbers = torch.arange(math.prod(shape)).reshape(shape)
    cut = [numbers[tuple(slice(o, o + n) for o, n in zip(region.offsets, region.shape, strict=True))] for region in (a, b)]
    shared = set(cut[0].flatten().tolist()) & set(cut[1].flatten().tolist())
    assert overlap(a, b) == bool(shared)
    if shared:
        here, there = common_region(a, b)
        assert torch.equal(cut[0][here], cut[1][there]) and set(cut[0][here].flatten().tolist()) == shared
