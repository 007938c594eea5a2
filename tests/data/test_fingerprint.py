"""Fingerprints: other tokens are other data, whatever their size; the same tokens are the same data, whatever their name and age."""

from __future__ import annotations

import copy
import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phase8.config.schema import DataSource
from phase8.data import content
from phase8.data.fingerprint import data_fingerprint
from phase8.data.fingerprint_difference import content_of, describe_fingerprint_difference
from phase8.data.indexed import IndexedWriter
from phase8.data.loader import open_dataset
from phase8.data.pair_record import record_path

SHARE = (Fraction(0), Fraction(1, 2))


def write(prefix: Path, seed: int, num_documents: int = 4) -> Path:
    """Documents of one shape, whatever the seed."""
    generator = np.random.default_rng(seed)
    with IndexedWriter(prefix, dtype=np.dtype("<u2")) as writer:
        for _ in range(num_documents):
            writer.add_document(generator.integers(0, 500, 20))
    return prefix


def fingerprint(*paths: object, weights: tuple[int, ...] = (3, 1), share: tuple[Fraction, Fraction] | None = None) -> dict[str, Any]:
    """As a checkpoint records it, for one path or a blend of several."""
    data = str(paths[0]) if len(paths) == 1 else [DataSource(path=str(path), weight=weight) for path, weight in zip(paths, weights, strict=True)]
    dataset = open_dataset(data, sequence_length=8, vocab_size=500, seed=0)
    return json.loads(json.dumps(data_fingerprint(dataset if share is None else dataset.part(share, name="training"))))


def as_older_releases_wrote(recorded: dict[str, Any]) -> dict[str, Any]:
    older = copy.deepcopy(recorded)
    for source in older["sources"]:
        del source["content"]
        source.pop("bin_sha256", None)
    return older


def test_other_tokens_of_the_same_shape_are_other_data(tmp_path):
    old, new = fingerprint(write(tmp_path / "a", 1)), fingerprint(write(tmp_path / "b", 2))
    assert old["sources"][0]["idx_sha256"] == new["sources"][0]["idx_sha256"]
    (sentence,) = describe_fingerprint_difference(old, new)
    assert sentence.startswith("source 0 (a, now b): the hash of .bin was ") and sentence.endswith(f" and is {new['sources'][0]['bin_sha256'][:12]}")
    for path in ("a", "b"):
        record_path(tmp_path / path).unlink()
    (sentence,) = describe_fingerprint_difference(old, fingerprint(tmp_path / "b"))
    assert "the hash of .bin was sha256:" in sentence


def test_a_copy_without_its_record_is_the_same_data(tmp_path):
    write(tmp_path / "a", 1)
    for ending in (".bin", ".idx"):
        shutil.copy(tmp_path / f"a{ending}", tmp_path / f"copy{ending}")
    old, new = fingerprint(tmp_path / "a"), fingerprint(tmp_path / "copy")
    assert "bin_sha256" in old["sources"][0] and "bin_sha256" not in new["sources"][0]
    assert describe_fingerprint_difference(old, new) == describe_fingerprint_difference(new, old) == []
    assert content_of(old["sources"][0]) == content_of(new["sources"][0])


def test_what_sampling_misses_the_hash_of_the_writer_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "WHOLE_BYTES", 8)
    monkeypatch.setattr(content, "NUM_BLOCKS", 2)
    monkeypatch.setattr(content, "BLOCK_BYTES", 4)
    found = []
    for middle in (1, 2):
        with IndexedWriter(tmp_path / "a", dtype=np.dtype("<u2")) as writer:
            writer.add_document(np.array([7] * 10 + [middle] + [7] * 10))
        found.append(fingerprint(tmp_path / "a"))
    assert found[0]["sources"][0]["content"] == found[1]["sources"][0]["content"]
    assert "the hash of .bin was" in describe_fingerprint_difference(*found)[0]


def test_older_fingerprints_are_compared_by_what_they_hold(tmp_path):
    new = fingerprint(write(tmp_path / "a", 1))
    assert describe_fingerprint_difference(as_older_releases_wrote(new), new) == []
    other = fingerprint(write(tmp_path / "b", 1, num_documents=5))
    assert len(describe_fingerprint_difference(as_older_releases_wrote(other), new)) == 2


@pytest.mark.parametrize("num_documents", [4, 5], ids=["one shape", "two shapes"])
def test_another_order_of_the_sources_is_called_so(tmp_path, num_documents):
    write(tmp_path / "a", 1), write(tmp_path / "b", 2, num_documents), write(tmp_path / "c", 3)
    old = fingerprint(tmp_path / "a", tmp_path / "b", tmp_path / "c", weights=(3, 1, 1))
    moved = fingerprint(tmp_path / "b", tmp_path / "c", tmp_path / "a", weights=(1, 1, 3))
    assert describe_fingerprint_difference(old, moved) == ["the sources of the blend come in another order: it was a, b, c and is b, c, a"]
    exchanged = fingerprint(tmp_path / "b", tmp_path / "a", tmp_path / "c", weights=(3, 1, 1))
    assert describe_fingerprint_difference(old, exchanged) == [
        "the sources of the blend come in another order: it was a, b, c and is b, a, c",
        "source 0 (a, now a): the blend weight was 3 and is 1",
        "source 1 (b, now b): the blend weight was 1 and is 3",
    ]


def test_a_replaced_source_is_no_other_order(tmp_path):
    write(tmp_path / "a", 1), write(tmp_path / "b", 2), write(tmp_path / "c", 3)
    (sentence,) = describe_fingerprint_difference(fingerprint(tmp_path / "a", tmp_path / "b"), fingerprint(tmp_path / "a", tmp_path / "c"))
    assert sentence.startswith("source 1 (b, now c): the hash of .bin was")


def test_a_pattern_is_compared_pair_by_pair(tmp_path):
    for i in range(3):
        write(tmp_path / f"s{i}", i)
    old = fingerprint(f"{tmp_path}/s*")
    assert describe_fingerprint_difference(old, fingerprint(f"{tmp_path}/s?")) == []
    write(tmp_path / "s1", 9)
    (sentence,) = describe_fingerprint_difference(old, fingerprint(f"{tmp_path}/s*"))
    assert sentence.startswith("source 0 (s*, now s*): s1, now s1: the hash of .bin was")
    write(tmp_path / "s1", 1)
    for ending in (".bin", ".idx"):  # the names decide about the order
        (tmp_path / f"s0{ending}").rename(tmp_path / f"s4{ending}")
    assert describe_fingerprint_difference(old, fingerprint(f"{tmp_path}/s*")) == [
        "source 0 (s*, now s*): its pairs come in another order: it was s0, s1, s2 and is s1, s2, s4"
    ]
    write(tmp_path / "s5", 5)
    assert describe_fingerprint_difference(old, fingerprint(f"{tmp_path}/s*")) == [
        "source 0 (s*, now s*): the number of its pairs was 3 and is 4"
    ]


def test_a_pattern_of_one_pair_is_that_pair(tmp_path):
    write(tmp_path / "s0", 1)
    assert describe_fingerprint_difference(fingerprint(tmp_path / "s0"), fingerprint(f"{tmp_path}/s*")) == []


def test_a_split_is_part_of_it(tmp_path):
    write(tmp_path / "a", 1)
    whole, half = fingerprint(tmp_path / "a"), fingerprint(tmp_path / "a", share=SHARE)
    for old in (whole, as_older_releases_wrote(whole)):
        assert describe_fingerprint_difference(old, half) == ["source 0 (a, now a): the documents of data.split were all and are 0 to 2"]
    assert describe_fingerprint_difference(half, half) == []
    assert describe_fingerprint_difference(whole, fingerprint(tmp_path / "a", share=(Fraction(0), Fraction(1)))) == []
