"""The stateless order: every window once per epoch, and the same order for ever."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from phase8.data.blend import BlendTable
from phase8.data.sampler import ORDER_VERSION, SampleOrder, count_windows, evenly_spread_windows

GOLDEN = Path(__file__).parent / "golden" / f"sample_order_v{ORDER_VERSION}.json"


def order(seed: int = 1234, num_windows=(50,), weights=(1,)) -> SampleOrder:
    return SampleOrder(seed=seed, num_windows=num_windows, blend=BlendTable(weights))


def test_first_thousand_samples_are_the_recorded_ones():
    """On a deliberate change of the order raise ORDER_VERSION and record a new file beside the old one."""
    golden = json.loads(GOLDEN.read_text())
    recorded = order(golden["seed"], golden["num_windows"], golden["weights"])
    assert len(golden["samples"]) == 1000
    assert [list(recorded.locate(n)) for n in range(1000)] == golden["samples"]


def test_windows_are_cut_with_one_token_shared_and_the_rest_dropped():
    assert [count_windows(tokens, 4) for tokens in (0, 1, 4, 5, 8, 9, 12, 13)] == [0, 0, 0, 1, 1, 2, 2, 3]
    for num_tokens in range(60):
        windows = count_windows(num_tokens, 7)
        assert windows == 0 or (windows - 1) * 7 + 8 <= num_tokens
        assert windows * 7 + 8 > num_tokens


@pytest.mark.parametrize("num_windows", [1, 2, 3, 50, 257])
def test_each_window_comes_once_per_epoch_and_epochs_differ(num_windows):
    shuffled = order(num_windows=(num_windows,))
    epochs = [[shuffled.locate(epoch * num_windows + i)[1] for i in range(num_windows)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(num_windows)) for epoch in epochs)
    if num_windows >= 50:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
        assert epochs[0] != sorted(epochs[0])


def test_each_source_of_a_blend_goes_through_its_own_epochs():
    shuffled = order(num_windows=(10, 35, 10), weights=(3, 2, 1))
    seen = [[], [], []]
    for n in range(6 * 70):
        source, window = shuffled.locate(n)
        seen[source].append(window)
    assert [len(windows) for windows in seen] == [210, 140, 70]
    for windows, size in zip(seen, (10, 35, 10), strict=True):
        for first in range(0, len(windows), size):
            assert sorted(windows[first : first + size]) == list(range(size))
    assert seen[0][:10] != seen[2][:10]


def test_seeds_differ_and_nothing_else_is_remembered():
    first, again, other = order(1), order(1), order(2)
    assert [first.locate(n) for n in range(50)] == [again.locate(n) for n in reversed(range(50))][::-1]
    assert [first.locate(n) for n in range(50)] != [other.locate(n) for n in range(50)]


def test_sample_numbers_far_beyond_any_run_are_instant():
    source, window = order(num_windows=(10**9,)).locate(10**17)
    assert source == 0 and 0 <= window < 10**9


def test_evaluation_windows_are_evenly_spread_and_in_file_order():
    assert evenly_spread_windows(5, num_windows=(50,), blend=BlendTable([1])) == [(0, 0), (0, 10), (0, 20), (0, 30), (0, 40)]
    spread = evenly_spread_windows(40, num_windows=(1000, 13, 4), blend=BlendTable([2, 1, 1]))
    assert spread == sorted(set(spread))
    assert Counter(source for source, _ in spread) == {0: 20, 1: 10, 2: 4}
    assert [window for source, window in spread if source == 2] == [0, 1, 2, 3]
    windows = [window for source, window in spread if source == 0]
    assert {after - before for before, after in pairwise(windows)} == {50}


def test_every_source_of_an_evaluation_has_a_window_however_small_its_weight():
    assert evenly_spread_windows(4, num_windows=(50, 50), blend=BlendTable([1000, 1])) == [(0, 0), (0, 12), (0, 25), (0, 37), (1, 0)]


def test_evaluation_of_more_than_there_is_takes_each_window_once():
    assert evenly_spread_windows(100, num_windows=(3,), blend=BlendTable([1])) == [(0, 0), (0, 1), (0, 2)]


def test_epochs_are_the_share_of_its_windows_that_each_data_set_has_delivered():
    blended = order(num_windows=(50, 8), weights=(3, 1))
    assert blended.epochs(0) == [0, 0]
    assert blended.epochs(40) == [30 / 50, 10 / 8]
    assert order(num_windows=(50,)).epochs(75) == [1.5]
