"""Assigns layers to virtual stages so that the slowest stage, which sets the pace of the pipeline, is as fast as possible.

    costs        embedding 1 | layers 4 4 4 4 4 4 | head 9          3 virtual stages
    partition    [4 4] 1 + 8 = 9    [4 4 4] 12    [4] 4 + 9 = 13

The layers stay in order and every virtual stage gets at least one. Among all such partitions, in this order:

1. the largest cost of a virtual stage is the smallest possible;
2. the sum of the squares of the costs is smallest, so that the remaining virtual stages are even too;
3. the earlier virtual stages have fewer layers, because with 1f1b they hold the activations of more microbatches.

Both minima are exact (dynamic programming over suffixes, on integers), so that all ranks find the same partition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

from phase8.config.pipeline import too_few_layers
from phase8.errors import ConfigError


def partition_layers(
    layer_costs: Sequence[float], *, num_stages: int, num_chunks: int = 1, embedding_cost: float = 0, head_cost: float = 0
) -> tuple[range, ...]:
    """The layers of each virtual stage; chunk c of stage s is at position c * num_stages + s.

    Args:
        layer_costs: Cost of each layer, in any one unit.
        num_stages: parallel.pipeline_parallel_size.
        num_chunks: parallel.pipeline_chunks.
        embedding_cost: Additional cost of the first virtual stage.
        head_cost: Additional cost of the last virtual stage.

    Raises:
        ConfigError: There are fewer layers than virtual stages, or a cost is negative or not finite.
    """
    num_layers, num_parts = len(layer_costs), num_stages * num_chunks
    if problem := too_few_layers(num_layers, num_stages, num_chunks):
        raise ConfigError(problem)
    costs = _as_integers([embedding_cost, *layer_costs, head_cost])
    parts = _Parts(list(accumulate(costs[1:-1], initial=0)), costs[0], costs[-1], num_parts)
    ends = parts.best_ends(parts.smallest_maximum())
    return tuple(range(first, end) for first, end in zip([0, *ends], ends, strict=False))


class _Parts:
    """Contiguous parts of the layers.

    Args:
        before: Cumulative cost of the layers before each layer, and of all layers.
        embedding_cost: Additional cost of the first part.
        head_cost: Additional cost of the last part.
        num_parts: Number of virtual stages.
    """

    def __init__(self, before: list[int], embedding_cost: int, head_cost: int, num_parts: int):
        self.before, self.embedding_cost, self.head_cost, self.num_parts = before, embedding_cost, head_cost, num_parts
        self.num_layers = len(before) - 1

    def cost(self, part: int, first: int, end: int) -> int:
        """Cost of layers first to end - 1 as the given part."""
        extra = (self.embedding_cost if part == 0 else 0) + (self.head_cost if part == self.num_parts - 1 else 0)
        return self.before[end] - self.before[first] + extra

    def ends(self, part: int, first: int) -> range:
        """Possible ends of a part that leave a layer for every later part; the last part ends with the layers."""
        num_later = self.num_parts - 1 - part
        return range(first + 1, self.num_layers - num_later + 1) if num_later else range(self.num_layers, self.num_layers + 1)

    def smallest_maximum(self) -> int:
        """The largest cost of a part in the best partition."""
        best = {self.num_layers: 0}  # cost of the layers from here on, divided over the parts from `part` on
        for part in reversed(range(self.num_parts)):
            best = {first: min(max(self.cost(part, first, end), best[end]) for end in self.ends(part, first)) for first in self._firsts(part)}
        return best[0]

    def best_ends(self, limit: int) -> list[int]:
        """Ends of the parts with the smallest sum of squares under the limit; among equal sums, the earliest ends."""
        best: dict[int, tuple[int, list[int]]] = {self.num_layers: (0, [])}
        for part in reversed(range(self.num_parts)):
            found: dict[int, tuple[int, list[int]]] = {}
            for first in self._firsts(part):
                ends = [end for end in self.ends(part, first) if end in best and self.cost(part, first, end) <= limit]
                if ends:
                    found[first] = min((self.cost(part, first, end) ** 2 + best[end][0], [end, *best[end][1]]) for end in ends)
            best = found
        return best[0][1]

    def _firsts(self, part: int) -> range:
        """Possible begins of a part."""
        return range(part, self.num_layers - (self.num_parts - 1 - part)) if part else range(1)


def _as_integers(costs: Sequence[float]) -> list[int]:
    """The costs times their common denominator: equal costs stay equal in every sum."""
    for cost in costs:
        if not 0 <= cost < math.inf:
            raise ConfigError(f"a layer, the embedding or the head costs {cost}, but a cost must be finite and not negative; correct it.")
    fractions = [Fraction(cost) for cost in costs]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * scale) for fraction in fractions]
