"""Ids outside the vocabulary are found before the first step: from the writer's record, else by reading all tokens, once."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from phase8.data import token_ids
from phase8.data.indexed import IndexedDataset, IndexedWriter
from phase8.data.pair_record import record_path
from phase8.data.token_ids import check_token_ids
from phase8.errors import DataError


@pytest.fixture
def scans(monkeypatch) -> list[Path]:
    """The pairs that were read in full."""
    scanned, scan = [], token_ids._scanned_range
    monkeypatch.setattr(token_ids, "_scanned_range", lambda pair, told: scanned.append(pair.bin_path) or scan(pair, told))
    return scanned


def write(prefix: Path, tokens: list[int], dtype: str = "<u2", *, foreign: bool = True) -> Path:
    with IndexedWriter(prefix, dtype=np.dtype(dtype)) as writer:
        writer.add_document(np.array(tokens))
    if foreign:
        record_path(prefix).unlink()
    return prefix


def check(prefix: Path, vocab_size: int, told: list | None = None) -> None:
    found = [] if told is None else told
    check_token_ids(
        IndexedDataset(prefix), vocab_size=vocab_size, cache_dir=prefix.parent / "cache", on_progress=lambda *said: found.append(said)
    )


@pytest.mark.parametrize("foreign", [False, True])
def test_the_first_id_outside_the_vocabulary_is_named(tmp_path, foreign):
    write(tmp_path / "a", [3, 4, 61, 70, 5], foreign=foreign)
    check(tmp_path / "a", 71)
    with pytest.raises(DataError, match=r"a.bin holds token id 70 at position 3, but model.vocab_size is 70; set it above the largest id"):
        check(tmp_path / "a", 70)
    with pytest.raises(DataError, match=r"holds token id 61 at position 2, but model.vocab_size is 61"):
        check(tmp_path / "a", 61)


@pytest.mark.parametrize("foreign", [False, True])
def test_a_pair_without_tokens_has_no_id_outside(tmp_path, scans, foreign):
    """A pattern of a run's data may match one; it ended the run in a traceback."""
    check(write(tmp_path / "a", [], foreign=foreign), 5)
    assert scans == []


def test_what_our_writer_recorded_is_not_read_again(tmp_path, scans):
    check(write(tmp_path / "a", [3, 4], foreign=False), 5)
    assert scans == [] and not (tmp_path / "cache").exists()


def test_pairs_of_others_are_read_once_and_left_as_they_are(tmp_path, scans):
    write(tmp_path / "a", [3, 4])
    for vocab_size in (5, 6):
        check(tmp_path / "a", vocab_size)
    assert scans == [tmp_path / "a.bin"]
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx", "cache"]
    write(tmp_path / "a", [3, 9])  # the same size under the same name
    with pytest.raises(DataError, match="holds token id 9 at position 1"):
        check(tmp_path / "a", 6)


def test_the_same_bytes_in_another_type_are_read_again(tmp_path, scans):
    check(write(tmp_path / "a", [1, 1, 1, 1], "u1"), 2)
    with pytest.raises(DataError, match="holds token id 257 at position 0"):
        check(write(tmp_path / "b", [257, 257]), 2)
    assert len(scans) == 2


def test_negative_ids_are_found(tmp_path):
    write(tmp_path / "a", [1, 2, 3], "<i2")
    (tmp_path / "a.bin").write_bytes(np.array([1, -1, 3], "<i2").tobytes())
    with pytest.raises(DataError, match="holds token id -1 at position 1"):
        check(tmp_path / "a", 10)


def test_a_cache_that_cannot_be_used_does_not_stop_anybody(tmp_path, scans):
    (tmp_path / "cache").write_text("a file")
    for _ in range(2):
        check(write(tmp_path / "a", [3, 4]), 5)
    assert len(scans) == 2


def test_long_readings_go_in_chunks_and_say_how_far_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(token_ids, "_CHUNK_TOKENS", 10)
    write(tmp_path / "a", [*range(90), 7, 95, 3, 97])
    told: list = []
    check(tmp_path / "a", 98, told)
    assert told == []  # a moment
    (tmp_path / "cache").rename(tmp_path / "other")
    monkeypatch.setattr(token_ids, "_LONG_SCAN_BYTES", 1)
    check(tmp_path / "a", 98, told)
    assert [(done, total) for _, done, total in told] == [(start, 94) for start in range(0, 94, 10)]
    assert "a.bin for its largest token id" in told[0][0]
    with pytest.raises(DataError, match="holds token id 97 at position 93"):
        check(tmp_path / "a", 96 + 1)
