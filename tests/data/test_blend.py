"""Blends: the file, and never a whole sample from the target ratio."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from phase8.data.blend import BlendTable, read_blend
from phase8.errors import DataError

CONFIGS = Path(__file__).parents[2] / "configs"


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


def test_blend_file_gives_paths_beside_itself(tmp_path):
    file = tmp_path / "mix" / "blend.yaml"
    file.parent.mkdir()
    file.write_text("sources:\n  - {path: a/web, weight: 3}\n  - {path: /data/books, weight: 1, dialect: deepspeed}\n")
    web, books = read_blend(file)
    assert (web.path, web.weight, web.dialect) == (str(tmp_path / "mix" / "a" / "web"), 3, None)
    assert (books.path, books.weight, books.dialect) == ("/data/books", 1, "deepspeed")


def test_shipped_example_is_a_blend():
    sources = read_blend(CONFIGS / "data_mixing.yaml")
    assert [source.weight for source in sources] == [70, 20, 10]
    assert BlendTable([source.weight for source in sources]).period == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: [{path: a, weight: 0.7}]", "sources.0.weight is 0.7"),
        ("sources: [{path: a, weight: '7'}]", "sources.0.weight is '7'"),
        ("sources: [{path: a, weight: true}]", "sources.0.weight is True"),
        ("sources: [{path: a, weight: 0}]", "sources.0.weight is 0"),
        ("sources: [{path: a}]", "sources.0.weight (Field required)"),
        ("sources: [{path: '', weight: 1}]", "sources.0.path is ''"),
        ("sources: [{path: a, weight: 1, wieght: 2}]", "sources.0.wieght is 2"),
        ("sources: [{path: a, weight: 1, dialect: fairseq}]", "sources.0.dialect is 'fairseq'"),
        ("sources: []", "sources (List should have at least 1 item"),
        ("sorces: [{path: a, weight: 1}]", "sorces"),
        ("- a\n- b", "the file"),
        ("", "the file"),
        ("sources: [", "is not YAML"),
        ("sources: [{path: a, weight: 1}, {path: b, weight: 1}, {path: a, weight: 2}]", "lists a more than once"),
    ],
)
def test_anything_else_is_refused_in_one_line(tmp_path, text, message):
    file = tmp_path / "blend.yaml"
    file.write_text(text)
    with pytest.raises(DataError) as caught:
        read_blend(file)
    assert message in str(caught.value) and "blend.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_all_problems_come_at_once(tmp_path):
    (tmp_path / "b.yaml").write_text("sources: [{path: a, weight: 0.7}, {weight: -1}]")
    with pytest.raises(DataError) as caught:
        read_blend(tmp_path / "b.yaml")
    assert all(part in str(caught.value) for part in ("sources.0.weight", "sources.1.path", "sources.1.weight"))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read the blend .*absent.yaml: No such file"):
        read_blend(tmp_path / "absent.yaml")
