"""The keyed permutation: a bijection, different for every key, the same for ever."""

from __future__ import annotations

import numpy as np
import pytest

from phase8.data.permutation import permute
from phase8.errors import DataError


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 2**16, 2**20 + 7])
def test_is_a_bijection(size):
    image = permute(np.arange(size), size=size, key=(1234, 0, 0))
    assert np.array_equal(np.sort(image), np.arange(size, dtype=np.uint64))


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 2**20 + 7, 2**45 + 1, 2**62])
def test_one_number_and_an_array_agree(size):
    indices = np.array([size * i // 50 for i in range(50)])
    image = permute(indices, size=size, key=(5, 6))
    assert [permute(int(index), size=size, key=(5, 6)) for index in indices] == image.tolist()
    assert [permute(index, size=size, key=(5, 6)) for index in indices] == image.tolist()


def test_every_part_of_the_key_matters():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 23, 4), (12, 3, 4), (-1, 0, 0), (2**64, 0, 0), (2**64 + 1, 0, 0), (0, 0)]
    images = {tuple(permute(np.arange(1000), size=1000, key=key).tolist()) for key in keys}
    assert len(images) == len(keys)


def test_golden_values():
    """These never change: the order of every run depends on them."""
    assert [permute(index, size=10, key=(1234, 0, 0)) for index in range(10)] == [1, 5, 7, 2, 8, 4, 6, 3, 9, 0]
    assert [permute(index, size=2**20 + 7, key=(1234, 1, 2)) for index in range(5)] == [392694, 220984, 168044, 872266, 822098]
    assert [permute(index, size=2**62, key=(7,)) for index in (0, 1, 2**62 - 1)] == [2057410345280103209, 1440977218005781824, 803239916611292384]


def test_looks_random():
    """Differences of neighbours and the place of each value over keys are uniform, by chi-squared at ten standard deviations."""
    size, keys = 101, 400
    images = np.stack([permute(np.arange(size), size=size, key=(key,)).astype(np.int64) for key in range(keys)])
    steps = np.bincount(((images[:, 1:] - images[:, :-1]) % size).ravel(), minlength=size)[1:]
    places = np.stack([np.bincount(images[:, i], minlength=size) for i in range(size)])
    for counts in (steps, places.ravel()):
        chi_squared = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert abs(chi_squared - counts.size) < 10 * np.sqrt(2 * counts.size)


def test_small_sizes_reach_every_order():
    orders = {tuple(permute(np.arange(4), size=4, key=(key,)).tolist()) for key in range(500)}
    assert len(orders) == 24


@pytest.mark.parametrize(("index", "size"), [(-1, 5), (5, 5), (0, 0), (0, -3), (0, 2**62 + 1), (np.array([0, 5]), 5), (np.array([-1]), 5)])
def test_out_of_range_is_refused(index, size):
    with pytest.raises(DataError, match="cannot permute"):
        permute(index, size=size, key=(0,))
