"""Blending of several data sets by integer weights: which data set delivers sample n.

The order within one period of sum(weights) samples follows Tijdeman's rule: among the data sets that are owed at least
1 / (2K - 2) of a sample, the one with the earliest deadline. At every prefix no data set is then further than 1 - 1 / (2K - 2) samples
from its share, the best possible bound.

Source: R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import gcd, inf, lcm

import numpy as np

from phase8.config.describe import describe_value
from phase8.errors import DataError

MAX_PERIOD = 100_000


class BlendTable:
    """A table that finds the data set of sample n in constant time: one period of the order, with the count of each data set before it.

    Args:
        weights: One positive integer per data set; only their ratios matter.

    Attributes:
        weights: The weights divided by their greatest common divisor: samples of each data set per period.
        period: Sum of `weights`.

    Raises:
        DataError: There are no weights, a weight is not a positive integer, or the period is above 100,000.
    """

    def __init__(self, weights: Sequence[int]):
        if not weights or any(isinstance(weight, bool) or not isinstance(weight, int) or weight < 1 for weight in weights):
            raise DataError(f"blend weights {list(weights)} cannot be used; give one whole number of at least 1 per data set")
        divisor = gcd(*weights)
        self.weights = tuple(weight // divisor for weight in weights)
        self.period = sum(self.weights)
        if self.period > MAX_PERIOD:
            raise DataError(_too_long(weights, self.period))
        self._dataset, self._count_before = _tijdeman_period(self.weights)

    def locate(self, n: int) -> tuple[int, int]:
        """The data set that delivers sample `n`, and the number of that sample within the data set."""
        periods, position = divmod(n, self.period)
        dataset = int(self._dataset[position])
        return dataset, periods * self.weights[dataset] + int(self._count_before[position])

    def counts(self, n: int) -> list[int]:
        """How many of the first `n` samples each data set delivers."""
        periods, remainder = divmod(n, self.period)
        last = np.bincount(self._dataset[:remainder], minlength=len(self.weights))
        return [periods * weight + int(count) for weight, count in zip(self.weights, last, strict=True)]


def integer_weights(weights: Sequence[int | float]) -> list[int]:
    """The smallest whole numbers with the same ratios as the weights; decimal numbers count as written: 0.3 and 0.7 become 3 and 7.

    Decimal numbers of so many digits that their period would be above 100,000 are rounded to a period of 100,000.

    Raises:
        DataError: A weight is not a positive finite number, or whole numbers have a period above 100,000.
    """
    if any(isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < inf for weight in weights):
        raise DataError(f"blend weights {list(weights)} cannot be used; give one number above 0 per data set")
    # 0.3 has no exact binary form; its shortest spelling is what was meant.
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = gcd(*whole)
    whole = [weight // divisor for weight in whole]
    if sum(whole) <= MAX_PERIOD:
        return whole
    rounded = _rounded(whole)
    if all(weight.denominator == 1 for weight in exact) or min(rounded) < 1:  # the largest of thousands of weights is too small to give something up
        raise DataError(_too_long(weights, sum(whole)))
    return rounded


def _rounded(weights: Sequence[int]) -> list[int]:
    """The whole numbers of sum `MAX_PERIOD` nearest to the ratios of weights, by largest remainders; ties go to the first.

    None becomes 0. What very small weights gain is taken from the largest; every other share stays within 1 / `MAX_PERIOD` of its exact value.
    """
    total = sum(weights)
    result = [max(1, weight * MAX_PERIOD // total) for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: result[i] * total - weights[i] * MAX_PERIOD)
    for i in by_remainder[: max(0, MAX_PERIOD - sum(result))]:
        result[i] += 1
    result[weights.index(max(weights))] += MAX_PERIOD - sum(result)
    divisor = gcd(*result)
    return [weight // divisor for weight in result]


def _too_long(weights: Sequence[int | float], period: int) -> str:
    return (
        f"blend weights {describe_value(list(weights))} sum to {period} after division by their common divisor; at most {MAX_PERIOD} is "
        "allowed, so round them, for example to parts per thousand"
    )


def _tijdeman_period(weights: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The data set at each position of a period (int32), and how often it occurred before that position (int32).

    A data set of share w / P whose count is c is owed 1 / (2K - 2) of a sample from n = (c + 1 / (2K - 2)) P / w on (its release), and
    must be chosen by n = (c + 1 - 1 / (2K - 2)) P / w (its deadline), n counted from 1. Releases and deadlines rise with c, so a heap
    of future releases and a heap of deadlines of released data sets find the earliest deadline in O(P log K). Ties go to the first data set.
    """
    period, parts = sum(weights), max(1, 2 * len(weights) - 2)

    def release(dataset: int, count: int) -> int:
        return -(-(count * parts + 1) * period // (weights[dataset] * parts))

    def deadline(dataset: int, count: int) -> int:
        return ((count + 1) * parts - 1) * period // (weights[dataset] * parts)

    order, counts_before = np.empty(period, np.int32), np.empty(period, np.int32)
    counts = [0] * len(weights)
    waiting = [(release(dataset, 0), dataset) for dataset in range(len(weights))]
    heapq.heapify(waiting)
    released: list[tuple[int, int]] = []
    for n in range(1, period + 1):
        while waiting and waiting[0][0] <= n:
            _, dataset = heapq.heappop(waiting)
            heapq.heappush(released, (deadline(dataset, counts[dataset]), dataset))
        _, dataset = heapq.heappop(released)
        order[n - 1], counts_before[n - 1] = dataset, counts[dataset]
        counts[dataset] += 1
        heapq.heappush(waiting, (release(dataset, counts[dataset]), dataset))
    return order, counts_before
