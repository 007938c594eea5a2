from __future__ import annotations

import itertools
import random
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phase8.checkpoint.coverage import coverage_problem


def region(offsets: list[int], shape: list[int]) -> SimpleNamespace:
    return SimpleNamespace(offsets=offsets, shape=shape)


def test_row_shards_uneven_shards_and_a_grid_cover():
    assert coverage_problem([5, 2], [region([0, 0], [3, 2]), region([3, 0], [2, 2])]) is None
    assert coverage_problem([4, 6], [region([r, c], [2, 3]) for r in (0, 2) for c in (0, 3)]) is None
    assert coverage_problem([3], [region([0], [3]), region([3], [0])]) is None
    assert coverage_problem([], [region([], [])]) is None
    assert coverage_problem([0, 7], [region([0, 0], [0, 7])]) is None


def test_a_missing_shard_is_found():
    assert "4 of 6 elements" in coverage_problem([3, 2], [region([0, 0], [2, 2])])


def test_an_overlap_that_hides_a_gap_of_the_same_size_is_found():
    assert "overlap" in coverage_problem([4], [region([0], [2]), region([1], [2])])
    assert "overlap" in coverage_problem([], [region([], []), region([], [])])


def test_a_slice_outside_or_with_other_dims_is_found():
    assert "outside" in coverage_problem([4], [region([2], [4])])
    assert "number of dims" in coverage_problem([4], [region([0, 0], [4, 1])])
    assert "number of dims" in coverage_problem([4], [region([0], [4, 1])])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_agrees_with_counting_every_element(data: st.DataObject):
    shape = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    regions = []
    for _ in range(data.draw(st.integers(1, 4))):
        offsets = [data.draw(st.integers(0, size)) for size in shape]
        regions.append(region(offsets, [data.draw(st.integers(0, size - begin)) for size, begin in zip(shape, offsets, strict=True)]))
    counts = times_held(shape, regions)
    assert (coverage_problem(shape, regions) is None) == all(count == 1 for count in counts.values())


def times_held(shape: list[int], regions: list[SimpleNamespace]) -> dict[tuple[int, ...], int]:
    """How many regions hold each element of a tensor."""
    counts = dict.fromkeys(itertools.product(*(range(size) for size in shape)), 0)
    for b in regions:
        for index in itertools.product(*(range(o, o + s) for o, s in zip(b.offsets, b.shape, strict=True))):
            counts[index] += 1
    return counts


@st.composite
def tiling(draw: st.DrawFn) -> tuple[list[int], list[SimpleNamespace]]:
    """A tensor cut in two, a piece of it again, and so on: irregular, and of every kind that cuts can make."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    regions = [region([0] * len(shape), list(shape))]
    for _ in range(draw(st.integers(0, 8))):
        piece = regions.pop(draw(st.integers(0, len(regions) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        size = draw(st.integers(0, piece.shape[dim]))
        for begin, end in ((0, size), (size, piece.shape[dim])):
            offsets, sizes = list(piece.offsets), list(piece.shape)
            offsets[dim], sizes[dim] = offsets[dim] + begin, end - begin
            regions.append(region(offsets, sizes))
    return shape, draw(st.permutations(regions))


@settings(max_examples=300, deadline=None)
@given(tiling(), st.data())
def test_a_tiling_is_one_until_a_piece_is_moved_resized_repeated_or_lost(cut: tuple[list[int], list[SimpleNamespace]], data: st.DataObject):
    shape, regions = cut
    assert coverage_problem(shape, regions) is None
    number, dim = data.draw(st.integers(0, len(regions) - 1)), data.draw(st.integers(0, len(shape) - 1))
    piece, change = regions[number], data.draw(st.sampled_from(["move", "resize", "repeat", "lose"]))
    if change == "move":
        piece.offsets[dim] = data.draw(st.integers(0, shape[dim] - piece.shape[dim]))
    elif change == "resize":
        piece.shape[dim] = data.draw(st.integers(0, shape[dim] - piece.offsets[dim]))
    elif change == "repeat":
        regions = [*regions, piece]
    else:
        regions = [*regions[:number], *regions[number + 1 :]]
    counts = times_held(shape, regions)
    problem = coverage_problem(shape, regions)
    if problem is None:
        assert set(counts.values()) == {1}
    elif "overlap" in problem:
        assert max(counts.values()) > 1
    else:
        assert any(problem.endswith(f"the one at {list(element)}") for element, count in counts.items() if count == 0)


def grid(rows: int, columns: int) -> list[SimpleNamespace]:
    return [region([row, column], [1, 1]) for row in range(rows) for column in range(columns)]


MANY = {
    "rows": ([40_000, 7], [region([row, 0], [1, 7]) for row in range(40_000)]),
    "grid": ([200, 200], grid(200, 200)),
    "rows beside columns": (
        [20_000, 40_000],
        [region([n, 0], [1, 20_000]) for n in range(20_000)] + [region([0, 20_000 + n], [20_000, 1]) for n in range(20_000)],
    ),
    "the last of 64 dims": ([2] * 63 + [5000], [region([0] * 63 + [n], [2] * 63 + [1]) for n in range(5000)]),
}


@pytest.mark.parametrize(("shape", "regions"), MANY.values(), ids=MANY)
def test_thousands_of_slices_are_compared_in_seconds(shape: list[int], regions: list[SimpleNamespace]):
    """Each was compared with all others that a sweep met at the same time: 19 s, or hours."""
    begin = time.thread_time()
    assert coverage_problem(shape, regions) is None
    assert "none of them" in coverage_problem(shape, regions[:-1])
    assert "overlap" in coverage_problem(shape, [*regions, regions[77]])
    assert time.thread_time() - begin < 10  # a tenth of it on an idle core


def test_what_no_layout_writes_is_refused_soon():
    """Regions anywhere in 64 dims have more corners than there is memory."""
    generator = random.Random(0)
    regions = [
        region([generator.randrange(2) for _ in range(64)], [generator.randrange(1, 3) for _ in range(64)]) for _ in range(1000)
    ]
    begin = time.thread_time()
    assert "too many dims" in coverage_problem([4] * 64, regions)
    assert time.thread_time() - begin < 20


def test_messages_about_many_dims_are_short():
    huge = [10**18] * 64
    for problem in (coverage_problem(huge, [region(huge, huge)]), coverage_problem(huge, [region([0], huge)]), coverage_problem([1] * 64, [])):
        assert problem is not None and len(problem) < 500
