"""Blends: never a whole sample from the target ratio."""

from __future__ import annotations

import random

import numpy as np
import pytest

from phase8.data.blend import MAX_PERIOD, BlendTable, integer_weights
from phase8.errors import DataError


def weights_to_try() -> list[list[int]]:
    generator = random.Random(0)
    cases = [[1], [7], [1, 1], [1, 2], [70, 20, 10], [1, 999], [1, 1, 1, 997], [500, 499, 1], [1] * 64, [2**i for i in range(10)]]
    for num_sources in (2, 3, 4, 8, 16, 33, 64):
        cases.append([generator.randint(1, 100) for _ in range(num_sources)])
        cases.append([max(1, int(1000 * generator.random() ** 8)) for _ in range(num_sources)])
        cases.append([1] * (num_sources - 1) + [3000])
    return cases


@pytest.mark.parametrize("weights", weights_to_try(), ids=lambda weights: f"{len(weights)}-{sum(weights)}")
def test_every_prefix_is_within_tijdemans_bound_of_the_ratio(weights):
    """The bound 1 - 1 / (2K - 2) in integers: |count * P - w * n| * (2K - 2) <= (2K - 3) * P, which is below one sample."""
    table = BlendTable(weights)
    num_sources, total = len(weights), sum(weights)
    samples = min(2 * total, 10_000)
    order = np.array([table.locate(n)[0] for n in range(samples)])
    counts = np.cumsum(order[:, None] == np.arange(num_sources), axis=0)
    n = np.arange(1, samples + 1)[:, None]
    deviation = np.abs(counts * total - np.array(weights) * n)
    assert (deviation < total).all()
    assert (deviation * max(1, 2 * num_sources - 2) <= max(0, 2 * num_sources - 3) * total).all()


@pytest.mark.parametrize("weights", [[3], [1, 1], [70, 20, 10], [6, 4, 9], [5, 1, 1, 1, 1, 1]])
def test_each_source_counts_its_own_samples_without_gap(weights):
    table = BlendTable(weights)
    seen = [0] * len(weights)
    for n in range(5 * table.period):
        if n % table.period == 0:
            assert seen == [n // table.period * weight for weight in table.weights]
        assert table.counts(n) == seen
        source, own = table.locate(n)
        assert own == seen[source]
        seen[source] += 1
    far = 10**15 * table.period
    assert table.locate(far + 1) == (table.locate(1)[0], 10**15 * table.weights[table.locate(1)[0]] + table.locate(1)[1])


def test_only_ratios_matter():
    assert BlendTable([700, 200, 100]).weights == (7, 2, 1)
    assert BlendTable([700, 200, 100]).period == 10
    assert BlendTable([5]).period == 1 and BlendTable([5]).locate(12345) == (0, 12345)


def test_golden_order():
    """Never changes: the order of every blended run depends on it."""
    assert [BlendTable([5, 3, 2]).locate(n)[0] for n in range(20)] == [0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1, 0, 2, 0, 1]


@pytest.mark.parametrize("weights", [[], [0], [1, 0], [1, -2], [1.5, 2], [True, 2], ["1"]])
def test_weights_that_are_no_positive_integers_are_refused(weights):
    with pytest.raises(DataError, match="one whole number of at least 1"):
        BlendTable(weights)


def test_period_is_bounded():
    assert BlendTable([99_999, 1]).period == 100_000
    assert BlendTable([10**12, 3 * 10**12]).period == 4
    with pytest.raises(DataError, match=r"sum to 100001 .* at most 100000 is allowed"):
        BlendTable([100_000, 1])


DECIMAL_WEIGHTS = {
    (0.3, 0.7): [3, 7],
    (3, 7): [3, 7],
    (30, 70.0): [3, 7],
    (0.1, 0.2, 0.7): [1, 2, 7],
    (1e-3, 1): [1, 1000],
    (0.333, 0.333, 0.334): [333, 333, 334],
    (2.5, 1): [5, 2],
    (0.3,): [1],
    (5e-324, 1e-323): [1, 2],
    (0.333333, 0.666667): [33_333, 66_667],
    (0.3333333, 0.3333333, 0.3333334): [33_333, 33_333, 33_334],
    (1 / 3, 1 / 3, 1 / 3): [1, 1, 1],
    (5e-324, 1, 1e12): [1, 1, 99_998],
    (0.1234567, 0.8765433): [6_173, 43_827],
    (0.2000001, 0.7999999): [1, 4],
}


@pytest.mark.parametrize(("weights", "whole"), DECIMAL_WEIGHTS.items(), ids=str)
def test_decimal_weights_are_exact_as_they_are_written(weights, whole):
    assert integer_weights(weights) == whole


@pytest.mark.parametrize("weights", [[0.0], [1, -0.5], [float("nan")], [float("inf"), 1], [True, 2.0], ["1"]])
def test_weights_that_are_no_positive_numbers_are_refused(weights):
    with pytest.raises(DataError, match="one number above 0"):
        integer_weights(weights)


def test_decimal_weights_of_too_many_digits_are_rounded_to_the_nearest_shares():
    generator = random.Random(0)
    for num_sources in (2, 3, 7, 64):
        weights = [generator.random() for _ in range(num_sources)]
        table = BlendTable(integer_weights(weights))
        for weight, share in zip(weights, table.weights, strict=True):
            assert abs(weight / sum(weights) - share / table.period) < 1 / MAX_PERIOD


@pytest.mark.parametrize("weights", [[200_000, 2], [200_000.0, 2]], ids=str)
def test_whole_weights_of_too_long_a_period_are_refused_as_they_were_given(weights):
    with pytest.raises(DataError) as refusal:
        integer_weights(weights)
    assert f"blend weights {weights} sum to 100001 after division by their common divisor" in str(refusal.value)


def test_decimal_weights_that_leave_the_largest_nothing_are_refused():
    with pytest.raises(DataError, match="at most 100000 is allowed") as refusal:
        integer_weights([1] * 30_000 + [0.001] * 30_000)
    assert len(str(refusal.value)) < 300
