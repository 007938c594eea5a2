"""The MUSE importer: both layouts, every report field, every refusal."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from phase8.data.indexed import IndexedDataset
from phase8.data.muse import import_muse
from phase8.errors import DataError, IndexedFormatError

TOKENS = [10, 11, 2, 20, 2, 30, 31, 32]


def muse(prefix: Path, pairs: list, tokens: list = TOKENS, *, counted: bool = False, version: int = 1) -> Path:
    numbers = ([len(pairs)] if counted else []) + [number for pair in pairs for number in pair]
    Path(f"{prefix}.idx").write_bytes(b"MUSE" + struct.pack(f"<I{len(numbers)}Q", version, *numbers))
    Path(f"{prefix}.bin").write_bytes(np.array(tokens, "<u4").tobytes())
    return prefix


def imported(prefix: Path, **changes):
    options = {"vocab_size": 1000, "eod_id": 2, "tokenizer": "gpt2"} | changes
    return import_muse(prefix, prefix.parent / "out" / "train", **options)


def documents(tmp_path: Path) -> list:
    dataset = IndexedDataset(tmp_path / "out" / "train")
    assert dataset.num_sequences == dataset.num_documents
    return [dataset.document(k)[0].tolist() for k in range(dataset.num_documents)]


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("pairs", [[(0, 3), (3, 2), (5, 3)], [(0, 8)]])
def test_documents_keep_their_order_and_tokens(tmp_path, counted, pairs):
    report = imported(muse(tmp_path / "train", pairs, counted=counted))
    assert documents(tmp_path) == [TOKENS[offset : offset + length] for offset, length in pairs]
    assert report.layout == ("counted" if counted else "pairs")
    assert (report.num_documents, report.num_tokens) == (len(pairs), 8)
    assert report.num_overlapping_ranges == report.num_uncovered_ranges == report.num_zero_length_documents == 0


def test_chat_layout_is_the_32_bytes_that_the_original_reader_refuses(tmp_path):
    muse(tmp_path / "train", [(0, 8)], counted=True)
    assert (tmp_path / "train.idx").stat().st_size == 32
    imported(tmp_path / "train")
    assert documents(tmp_path) == [TOKENS]


def test_a_pair_never_replaces_its_own_source(tmp_path):
    prefix = muse(tmp_path / "train", [(0, 8)])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match=r"the pair \S+/train would replace its own source \S+/train.bin; give another --output-prefix"):
        import_muse(prefix, prefix, vocab_size=1000, eod_id=2, tokenizer="gpt2")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_order_of_the_index_wins_over_order_in_bin(tmp_path):
    imported(muse(tmp_path / "train", [(5, 3), (0, 3), (3, 2)]))
    assert documents(tmp_path) == [[30, 31, 32], [10, 11, 2], [20, 2]]


def test_report_counts_zero_length_overlapping_and_uncovered_ranges(tmp_path):
    report = imported(muse(tmp_path / "train", [(4, 0), (3, 3), (1, 3), (8, 0), (2, 1)]))
    assert documents(tmp_path) == [TOKENS[3:6], TOKENS[1:4], TOKENS[2:3]]
    assert report.num_zero_length_documents == 2
    assert report.overlapping_ranges == [(2, 3), (3, 4)]
    assert (report.num_overlapping_ranges, report.num_overlapping_tokens) == (2, 2)
    assert report.uncovered_ranges == [(0, 1), (6, 8)]
    assert (report.num_uncovered_ranges, report.num_uncovered_tokens) == (2, 3)
    assert (report.num_documents, report.num_tokens) == (3, 7)


def test_document_inside_another_is_an_overlap_and_not_a_gap(tmp_path):
    report = imported(muse(tmp_path / "train", [(0, 8), (2, 2), (6, 2)]))
    assert report.overlapping_ranges == [(2, 4), (6, 8)]
    assert report.uncovered_ranges == []


def test_ends_of_documents_are_counted_and_never_added(tmp_path):
    prefix = muse(tmp_path / "train", [(0, 3), (3, 2), (5, 3)])
    assert imported(prefix).num_documents_ending_in_eod == 2
    assert imported(prefix, eod_id=None).num_documents_ending_in_eod is None
    assert documents(tmp_path)[2] == [30, 31, 32]


def test_log_beside_the_destination_holds_the_report(tmp_path):
    report = imported(muse(tmp_path / "train", [(0, 3), (1, 3)]), tokenizer="rinna/japanese", eod_id=3)
    log = json.loads((tmp_path / "out" / "train.import.json").read_text())
    assert (log["tokenizer"], log["eod_id"], log["vocab_size"], log["dtype"]) == ("rinna/japanese", 3, 1000, "uint16")
    assert log["overlapping_ranges"] == [[1, 3]] and log["num_tokens"] == report.num_tokens == 6
    assert sorted(os.listdir(tmp_path / "out")) == ["train.bin", "train.idx", "train.import.json", "train.meta.json"]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, "uint16"), (65500, "int32"), (2**32, "int32")])
def test_type_follows_the_vocabulary(tmp_path, vocab_size, dtype):
    imported(muse(tmp_path / "train", [(0, 8)]), vocab_size=vocab_size)
    assert IndexedDataset(tmp_path / "out" / "train").dtype.name == dtype


@pytest.mark.parametrize(("token", "vocab_size", "largest"), [(32, 32, 31), (2**31, 2**32, 2**31 - 1), (70000, 40000, 39999)])
def test_token_outside_the_vocabulary_is_refused_and_nothing_is_left(tmp_path, token, vocab_size, largest):
    prefix = muse(tmp_path / "train", [(0, 3), (3, 1)], [1, 2, 3, token])
    with pytest.raises(DataError, match=f"at token 3 holds id {token}, .* at most {largest} is allowed"):
        imported(prefix, vocab_size=vocab_size)
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("pair", [(0, 9), (9, 0), (8, 1), (2**64 - 1, 2), (2, 2**64 - 1), (2**63, 2**63)])
def test_document_outside_the_tokens_is_refused(tmp_path, pair):
    with pytest.raises(IndexedFormatError, match=r"document 1 is .* but .bin holds 8 tokens"):
        imported(muse(tmp_path / "train", [(0, 3), pair]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a MUSE index"),
        (b"MUSE\1\0", "not a MUSE index"),
        (b"MMIDIDX\0\0" + bytes(30), "Megatron's format already"),
        (b"TNTIDX\0\0" + bytes(30), "not a MUSE index"),
        (b"MUSE\2\0\0\0" + struct.pack("<QQ", 0, 8), "MUSE version 2"),
        (b"MUSE\1\0\0\0" + struct.pack("<QQ", 0, 8)[:-1], "no whole number of u64"),
        (b"MUSE\1\0\0\0" + struct.pack("<QQQ", 2, 0, 8), "neither pairs nor a count"),
    ],
)
def test_damaged_index_is_named(tmp_path, content, message):
    prefix = muse(tmp_path / "train", [(0, 8)])
    (tmp_path / "train.idx").write_bytes(content)
    with pytest.raises(IndexedFormatError, match=message):
        imported(prefix)


def test_other_refusals(tmp_path):
    prefix = muse(tmp_path / "train", [(0, 8)])
    with pytest.raises(DataError, match=r"end-of-document id 1000 is outside the vocabulary of 1000; .* --tokenizer"):
        imported(prefix, eod_id=1000)
    with pytest.raises(DataError, match=r"absent.idx: No such file"):
        imported(tmp_path / "absent")
    (tmp_path / "train.bin").write_bytes(bytes(31))
    with pytest.raises(IndexedFormatError, match="no whole number of u32"):
        imported(prefix)


def test_empty_muse_pair_becomes_an_empty_pair(tmp_path):
    report = imported(muse(tmp_path / "train", [], []))
    assert (report.num_documents, report.num_uncovered_ranges, documents(tmp_path)) == (0, 0, [])


def test_document_too_long_for_megatron_is_refused(tmp_path):
    prefix = muse(tmp_path / "train", [(0, 2**31)])
    os.truncate(tmp_path / "train.bin", 4 * 2**31)  # sparse: takes no space
    with pytest.raises(DataError, match="document 0 holds 2147483648 tokens"):
        imported(prefix)
