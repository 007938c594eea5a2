"""The partition of the layers against all there are."""

import random
from fractions import Fraction
from itertools import combinations, pairwise

import pytest

from phase8.errors import ConfigError
from phase8.pipeline_parallel.partition import partition_layers


def best_of_all(costs, num_parts, embedding_cost, head_cost):
    """Sizes of the parts, by trying every partition."""

    def key(sizes):
        ends = [sum(sizes[: part + 1]) for part in range(num_parts)]
        parts = [sum(map(Fraction, costs[end - size : end])) for size, end in zip(sizes, ends, strict=True)]
        parts[0] += Fraction(embedding_cost)
        parts[-1] += Fraction(head_cost)
        return max(parts), sum(part**2 for part in parts), sizes

    cuts = combinations(range(1, len(costs)), num_parts - 1)
    return min(([b - a for a, b in pairwise((0, *cut, len(costs)))] for cut in cuts), key=key)


@pytest.mark.parametrize("seed", [*range(20), *(pytest.param(seed, marks=pytest.mark.full) for seed in range(20, 150))])
def test_no_partition_is_better(seed):
    choose = random.Random(seed)
    num_layers = choose.randint(1, 10)
    num_stages = choose.randint(1, min(4, num_layers))
    num_chunks = choose.randint(1, num_layers // num_stages)
    values = choose.choice([[1], [0.1], [0, 1, 2], [1, 1, 1, 1.37], [choose.random() * 10 for _ in range(4)]])
    costs = [choose.choice(values) for _ in range(num_layers)]
    embedding_cost, head_cost = choose.choice([0, 0.5, 1]), choose.choice([0, 1, 2.5, 7])
    found = partition_layers(costs, num_stages=num_stages, num_chunks=num_chunks, embedding_cost=embedding_cost, head_cost=head_cost)
    assert [layer for part in found for layer in part] == list(range(num_layers))
    assert [len(part) for part in found] == best_of_all(costs, num_stages * num_chunks, embedding_cost, head_cost)


@pytest.mark.parametrize(
    ("costs", "options", "sizes"),
    [
        ([4] * 6, {"num_stages": 3, "embedding_cost": 1, "head_cost": 9}, [2, 3, 1]),  # the example at the head of the file
        ([0.1] * 5, {"num_stages": 2}, [2, 3]),  # the first stage holds more activations and gets fewer layers
        ([0.1] * 10, {"num_stages": 2, "num_chunks": 2}, [2, 2, 3, 3]),
        ([1] * 4, {"num_stages": 2, "head_cost": 100}, [3, 1]),
        ([1] * 32, {"num_stages": 4, "num_chunks": 2, "head_cost": 1.5}, [4, 4, 4, 4, 4, 4, 5, 3]),
        ([1, 1, 1, 1, 1, 1, 9], {"num_stages": 3}, [3, 3, 1]),  # even where the largest cost does not ask for it
        ([2] * 7, {"num_stages": 1}, [7]),
        ([0, 0, 0], {"num_stages": 3}, [1, 1, 1]),
    ],
)
def test_layers_are_divided_by_cost(costs, options, sizes):
    assert [len(part) for part in partition_layers(costs, **options)] == sizes


def test_too_few_layers_are_one_sentence():
    with pytest.raises(ConfigError) as raised:
        partition_layers([1, 1, 1], num_stages=2, num_chunks=2)
    assert str(raised.value) == (
        "model.num_layers 3 is below parallel.pipeline_parallel_size 2 x parallel.pipeline_chunks 2 = 4; every chunk needs a layer: use at "
        "least 4 layers, or fewer stages or chunks."
    )


@pytest.mark.parametrize("options", [{"head_cost": -1}, {"embedding_cost": float("nan")}, {"head_cost": float("inf")}])
def test_costs_that_are_none_are_refused(options):
    with pytest.raises(ConfigError, match=r"costs (-1|nan|inf), but a cost must be finite and not negative"):
        partition_layers([1, 1], num_stages=2, **options)
