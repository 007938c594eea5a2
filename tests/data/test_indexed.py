"""The `.bin/.idx` reader and writer: bytes, round trips, every check, damage of any kind."""

from __future__ import annotations

import os
import pickle
import resource
import struct
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phase8.data.indexed import IndexedDataset, IndexedWriter, best_dtype
from phase8.errors import DataError, IndexedFormatError, StorageError

EXAMPLE = [[[1, 2, 3], [4, 5]], [[6]]]
EXAMPLE_IDX = bytes.fromhex(
    "4d4d49444944580000 0100000000000000 08 0300000000000000 0300000000000000"
    "03000000 02000000 01000000"
    "0000000000000000 0600000000000000 0a00000000000000"
    "0000000000000000 0200000000000000 0300000000000000"
)
EXAMPLE_BIN = bytes.fromhex("0100 0200 0300 0400 0500 0600")
CODES = {np.dtype(name): code for name, code in {"u1": 1, "i1": 2, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 8}.items()}

documents_strategy = st.lists(st.lists(st.lists(st.integers(0, 127), max_size=6), min_size=1, max_size=3), max_size=5)


def write(prefix: Path, documents: list, dtype: str = "<u2") -> Path:
    with IndexedWriter(prefix, dtype=np.dtype(dtype)) as writer:
        for document in documents:
            writer.add_document(*[np.array(sequence, dtype=np.int64) for sequence in document])
    return prefix


def write_bytes(prefix: Path, idx: bytes, tokens: bytes = EXAMPLE_BIN) -> Path:
    Path(f"{prefix}.idx").write_bytes(idx)
    Path(f"{prefix}.bin").write_bytes(tokens)
    return prefix


def read(prefix: Path, **options) -> list:
    dataset = IndexedDataset(prefix, **options)
    return [[sequence.tolist() for sequence in dataset.document(k)] for k in range(dataset.num_documents)]


def expected_idx(documents: list, dtype: np.dtype) -> bytes:
    """An `.idx` by the book, independent of the writer."""
    lengths = [len(sequence) for document in documents for sequence in document]
    offsets = [sum(lengths[:i]) * dtype.itemsize for i in range(len(lengths))]
    index = [sum(len(document) for document in documents[:k]) for k in range(len(documents) + 1)]
    header = b"MMIDIDX\0\0" + struct.pack("<Q", 1) + struct.pack("<B", CODES[dtype]) + struct.pack("<QQ", len(lengths), len(index))
    return header + struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(offsets)}q{len(index)}q", *offsets, *index)


def idx(**changes) -> bytes:
    """The worked example with some fields changed; `code`, `lengths`, `offsets`, `index`, `tail`, `version`, `magic`, `n`, `d`."""
    fields = {
        "magic": b"MMIDIDX\0\0", "version": 1, "code": 8, "lengths": [3, 2, 1], "offsets": [0, 6, 10], "index": [0, 2, 3], "tail": b""
    } | changes
    lengths, offsets, index = fields["lengths"], fields["offsets"], fields["index"]
    header = fields["magic"] + struct.pack("<QBQQ", fields["version"], fields["code"], fields.get("n", len(lengths)), fields.get("d", len(index)))
    arrays = struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(offsets)}q", *offsets) + struct.pack(f"<{len(index)}q", *index)
    return header + arrays + fields["tail"]


def test_writer_makes_the_worked_example_byte_for_byte(tmp_path):
    write(tmp_path / "example", EXAMPLE)
    assert len(EXAMPLE_IDX) == 94
    assert (tmp_path / "example.idx").read_bytes() == EXAMPLE_IDX
    assert (tmp_path / "example.bin").read_bytes() == EXAMPLE_BIN
    assert sorted(os.listdir(tmp_path)) == ["example.bin", "example.idx", "example.meta.json"]


def test_reader_understands_the_worked_example(tmp_path):
    dataset = IndexedDataset(write_bytes(tmp_path / "example", EXAMPLE_IDX))
    assert (dataset.num_sequences, dataset.num_documents, dataset.num_tokens) == (3, 2, 6)
    assert dataset.dtype == np.dtype("<u2")
    assert dataset.sequence_lengths.tolist() == [3, 2, 1] and dataset.sequence_lengths.dtype == np.int32
    assert dataset.document_index.tolist() == [0, 2, 3] and dataset.document_index.dtype == np.int64
    assert [[sequence.tolist() for sequence in dataset.document(k)] for k in range(2)] == EXAMPLE
    assert dataset.sequence(2).tolist() == [6]
    assert dataset.tokens(1, 4).tolist() == [2, 3, 4, 5]
    assert dataset.document_starts(0, 6).tolist() == [True, False, False, False, False, True]
    assert dataset.document_starts(5, 1).tolist() == [True]
    assert dataset.document_starts(1, 4).tolist() == [False] * 4


@pytest.mark.parametrize("dtype", list(CODES))
@settings(derandomize=True, max_examples=25, deadline=None)
@given(documents=documents_strategy)
def test_round_trip_in_every_type(dtype, documents):
    with tempfile.TemporaryDirectory() as directory:
        prefix = write(Path(directory) / "a.b", documents, dtype)
        assert Path(f"{prefix}.idx").read_bytes() == expected_idx(documents, dtype)
        assert read(prefix) == documents
        flat = [token for document in documents for sequence in document for token in sequence]
        dataset = IndexedDataset(prefix)
        assert dataset.tokens(0, dataset.num_tokens).tolist() == flat
        starts = [i == 0 for document in documents for i in range(sum(map(len, document)))]
        assert dataset.document_starts(0, dataset.num_tokens).tolist() == starts


@settings(derandomize=True, max_examples=25, deadline=None)
@given(shards=st.lists(documents_strategy, min_size=1, max_size=4))
def test_appending_shards_equals_writing_their_documents(shards):
    with tempfile.TemporaryDirectory() as directory:
        prefixes = [write(Path(directory) / f"shard{i}", documents) for i, documents in enumerate(shards)]
        merged = Path(directory) / "merged"
        with IndexedWriter(merged, dtype=np.dtype("<u2")) as writer:
            for prefix in prefixes:
                writer.append_indexed(prefix)
        whole = write(Path(directory) / "whole", [document for documents in shards for document in documents])
        for suffix in (".idx", ".bin"):
            assert Path(f"{merged}{suffix}").read_bytes() == Path(f"{whole}{suffix}").read_bytes()


def test_appending_another_type_or_modes_is_refused(tmp_path):
    write(tmp_path / "wide", EXAMPLE, "<i4")
    write_bytes(tmp_path / "modes", idx(tail=b"\0\1\0"))
    with IndexedWriter(tmp_path / "out", dtype=np.dtype("<u2")) as writer:
        with pytest.raises(DataError, match="int32 tokens and cannot be appended"):
            writer.append_indexed(tmp_path / "wide")
        with pytest.raises(DataError, match="mode per sequence"):
            writer.append_indexed(tmp_path / "modes")


def test_best_dtype_follows_megatron():
    assert [best_dtype(size).name for size in (256, 65499, 65500, 65536, 200000)] == ["uint16", "uint16", "int32", "int32", "int32"]


def test_mode_bytes_are_found_by_the_length_of_the_file(tmp_path):
    dataset = IndexedDataset(write_bytes(tmp_path / "modes", idx(tail=b"\0\1\2")))
    assert dataset.sequence_modes.tolist() == [0, 1, 2]
    assert read(tmp_path / "modes") == EXAMPLE
    assert IndexedDataset(write_bytes(tmp_path / "plain", idx())).sequence_modes is None


def test_empty_pair_is_a_valid_pair(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "empty", []))
    assert (dataset.num_documents, dataset.num_tokens, dataset.tokens(0, 0).tolist()) == (0, 0, [])
    assert (tmp_path / "empty.idx").stat().st_size == 34 + 8


def test_pickle_keeps_the_path_not_the_tokens(tmp_path):
    prefix = write(tmp_path / "long", [[list(range(50000))]])
    data = pickle.dumps(IndexedDataset(prefix))
    assert len(data) < 1000
    assert pickle.loads(data).tokens(49999, 1).tolist() == [49999]


def test_a_pair_that_was_replaced_is_not_read_by_a_process_that_opens_it_anew(tmp_path):
    """A spawned loader worker read tokens of the new pair in the windows of the old one, and nobody noticed."""
    dataset = IndexedDataset(write(tmp_path / "a", [[[1, 2]], [[3]]]))
    data = pickle.dumps(dataset)
    write(tmp_path / "a", [[[4, 5]], [[6]]])
    assert dataset.tokens(0, 3).tolist() == [1, 2, 3]
    with pytest.raises(DataError, match=r"a\.bin was replaced by another file while a run reads it; put the old one back, or begin again with the"):
        pickle.loads(data).tokens(0, 3)


def test_fingerprint_changes_with_either_file(tmp_path):
    first = IndexedDataset(write(tmp_path / "a", [[[1, 2]], [[3]]])).fingerprint()
    assert first == IndexedDataset(write(tmp_path / "b", [[[1, 2]], [[3]]])).fingerprint()
    assert first["num_tokens"] == 3 and first["bin_bytes"] == 6
    assert IndexedDataset(write(tmp_path / "c", [[[1]], [[2, 3]]])).fingerprint()["idx_sha256"] != first["idx_sha256"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds 0 bytes, less than the 34"),
        (EXAMPLE_IDX[:20], "holds 20 bytes, less than the 34"),
        (EXAMPLE_IDX[:-1], "take 94 bytes, but it holds 93"),
        (EXAMPLE_IDX + b"\0", "take 94 bytes, but it holds 95"),
        (b"TNTIDX\0\0" + bytes(60), "older fairseq"),
        (b"MUSE" + struct.pack("<IQQ", 1, 0, 6), "MUSE index"),
        (b"PK\3\4 something else entirely, a zip file", "not such an index"),
        (idx(version=2), "version 2; only version 1"),
        (idx(code=0), "dtype code is 0"),
        (idx(code=9), "dtype code is 9"),
        (idx(d=0, index=[]), "document index is empty"),
        (idx(lengths=[3, 4, -1]), "sequence 2 has -1 tokens"),
        (idx(lengths=[3, 2, 2]), "promises 7 tokens of uint16, 14 bytes, but its .bin holds 12"),
        (idx(lengths=[2, 3, 1]), "byte offset of sequence 1 is not"),
        (idx(offsets=[0, 6, 12]), "byte offset of sequence 2 is not"),
        (idx(index=[1, 2, 3]), "runs from 1 to 3, not 0 to 3"),
        (idx(index=[0, 2, 4]), "runs from 0 to 4, not 0 to 3"),
        (idx(index=[0, 3, 2, 3]), "goes backwards"),
        (idx(index=[0, -5, 3]), "goes backwards"),
    ],
)
def test_each_damage_is_named(tmp_path, content, message):
    prefix = write_bytes(tmp_path / "x", content)
    with pytest.raises(IndexedFormatError) as caught:
        IndexedDataset(prefix)
    assert message in str(caught.value) and "x.idx" in str(caught.value)


def test_bin_of_another_length_is_refused(tmp_path):
    for tokens in (EXAMPLE_BIN[:-2], EXAMPLE_BIN + b"\0\0", b""):
        with pytest.raises(IndexedFormatError, match=f"its .bin holds {len(tokens)}"):
            IndexedDataset(write_bytes(tmp_path / "x", EXAMPLE_IDX, tokens))


@pytest.mark.parametrize("counts", [{"n": 2**40}, {"d": 2**40}, {"n": 2**63}, {"d": 2**64 - 1}, {"n": 2**64 - 1, "d": 2**64 - 1}, {"n": 2**62 + 3}])
def test_absurd_counts_allocate_nothing(tmp_path, counts):
    prefix = write_bytes(tmp_path / "x", idx(**counts))
    tracemalloc.start()
    try:
        with pytest.raises(IndexedFormatError, match="but it holds 94"):
            IndexedDataset(prefix)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("code", "itemsize", "writers"),
    [
        (6, 8, ["megatron (float64)", "nanotron (float64)"]),
        (6, 4, ["gpt-neox (float32)"]),
        (6, 2, ["deepspeed (uint16)"]),
        (7, 4, ["megatron (float32)", "deepspeed (uint32)"]),
        (7, 8, ["gpt-neox (float64)", "nanotron (float64)"]),
        (8, 8, ["deepspeed (uint64)"]),
    ],
)
def test_ambiguous_and_foreign_type_codes_name_their_writers(tmp_path, code, itemsize, writers):
    content = idx(code=code, offsets=[0, 3 * itemsize, 5 * itemsize])
    with pytest.raises(IndexedFormatError) as caught:
        IndexedDataset(write_bytes(tmp_path / "x", content, bytes(6 * itemsize)))
    for writer in ("megatron", "gpt-neox", "nanotron", "deepspeed"):
        named = [candidate for candidate in writers if candidate.startswith(f"{writer} ")]
        assert all(candidate in str(caught.value) for candidate in named)
        assert bool(named) == (f"{writer} (" in str(caught.value))


@pytest.mark.parametrize(("code", "dtype"), [(6, "<u2"), (7, "<u4"), (8, "<u8"), (4, "<i4")])
def test_stated_deepspeed_dialect_is_read(tmp_path, code, dtype):
    tokens = np.array([1, 2, 3, 4, 5, 6], dtype)
    content = idx(code=code, offsets=[0, 3 * tokens.itemsize, 5 * tokens.itemsize])
    prefix = write_bytes(tmp_path / "x", content, tokens.tobytes())
    assert read(prefix, dialect="deepspeed") == EXAMPLE
    assert pickle.loads(pickle.dumps(IndexedDataset(prefix, dialect="deepspeed"))).dtype == np.dtype(dtype)


def test_stated_dialect_is_still_checked(tmp_path):
    with pytest.raises(IndexedFormatError, match="float32 in megatron, but tokens are integers"):
        IndexedDataset(write_bytes(tmp_path / "x", idx(code=7, offsets=[0, 12, 20]), bytes(24)), dialect="megatron")
    with pytest.raises(IndexedFormatError, match=r"6 tokens of uint64, 48 bytes, but its .bin holds 12"):
        IndexedDataset(write_bytes(tmp_path / "y", idx()), dialect="deepspeed")
    with pytest.raises(DataError, match="dialect 'fairseq' is unknown; use one of megatron"):
        IndexedDataset(write_bytes(tmp_path / "z", idx()), dialect="fairseq")


@settings(derandomize=True, max_examples=250, deadline=None)
@given(
    documents=documents_strategy,
    tail=st.binary(max_size=4),
    edits=st.lists(st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=8)), max_size=3),
    keep=st.one_of(st.none(), st.integers(0, 200)),
    dtype=st.sampled_from(["<u2", "<i4", "u1"]),
)
def test_fuzzed_idx_is_refused_or_consistent(documents, tail, edits, keep, dtype):
    with tempfile.TemporaryDirectory() as directory:
        content = bytearray(expected_idx(documents, np.dtype(dtype)) + tail)
        for position, patch in edits:
            position %= len(content)
            content[position : position + len(patch)] = patch[: len(content) - position]
        content = bytes(content[:keep])
        tokens = b"".join(np.array(sequence, dtype).tobytes() for document in documents for sequence in document)
        prefix = write_bytes(Path(directory) / "x", content, tokens)
        try:
            dataset = IndexedDataset(prefix)
        except IndexedFormatError:
            return
        accepted = [dataset.document(k) for k in range(dataset.num_documents)]
        modes = b"" if dataset.sequence_modes is None else dataset.sequence_modes.tobytes()
        assert expected_idx(accepted, dataset.dtype) + modes == content
        assert b"".join(sequence.tobytes() for document in accepted for sequence in document) == tokens


def test_missing_files_are_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"nothing.bin: No such file"):
        IndexedDataset(tmp_path / "nothing")
    (tmp_path / "half.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"half.idx: No such file"):
        IndexedDataset(tmp_path / "half")


def test_reading_outside_is_refused(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "x", EXAMPLE))
    for request in (
        lambda: dataset.tokens(4, 3), lambda: dataset.tokens(-1, 2), lambda: dataset.document_starts(6, 1),
        lambda: dataset.sequence(3), lambda: dataset.sequence(-1), lambda: dataset.document(2), lambda: dataset.document(-1),
    ):
        with pytest.raises(DataError, match="asked for"):
            request()


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "has no sequence"),
        ([np.array([1, 65536])], "uint16 allows 0 to 65535"),
        ([np.array([1, -1])], "ids from -1 to 1"),
        ([np.array([1.0])], "give one dimension of integers"),
        ([np.array([[1]])], "give one dimension of integers"),
        ([np.array([7]), np.broadcast_to(np.uint16(0), 2**31)], "2147483648 tokens; the format allows 2147483647"),
    ],
)
def test_refused_document_leaves_the_file_as_it_was(tmp_path, sequences, message):
    with IndexedWriter(tmp_path / "x", dtype=np.dtype("<u2")) as writer:
        writer.add_document(np.array([5]))
        with pytest.raises(DataError, match=message):
            writer.add_document(*sequences)
    assert read(tmp_path / "x") == [[[5]]]


@pytest.mark.parametrize("dtype", ["f4", "u4", "u8", "?"])
def test_types_without_a_code_are_refused(tmp_path, dtype):
    with pytest.raises(DataError, match=r"have no code in .idx"):
        IndexedWriter(tmp_path / "x", dtype=np.dtype(dtype))


def test_big_endian_input_is_written_little_endian(tmp_path):
    with IndexedWriter(tmp_path / "x", dtype=np.dtype(">i4")) as writer:
        writer.add_document(np.array([1, 2], ">i4"))
    assert (tmp_path / "x.bin").read_bytes() == bytes.fromhex("01000000 02000000")


def test_exception_leaves_no_file_and_keeps_an_older_pair(tmp_path):
    write(tmp_path / "old", EXAMPLE)
    for name in ("new", "old"):
        with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / name, dtype=np.dtype("<u2")) as writer:
            writer.add_document(np.arange(100))
            raise KeyboardInterrupt
    assert sorted(os.listdir(tmp_path)) == ["old.bin", "old.idx", "old.meta.json"]
    assert read(tmp_path / "old") == EXAMPLE


@pytest.mark.parametrize("num_tokens", [100_000, 3_000_000])
def test_full_disk_is_a_storage_error_and_leaves_nothing(tmp_path, num_tokens):
    """The limit on file size makes real writes fail, once while flushing at the end and once in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*x.bin: File too large; free space there"):
            with IndexedWriter(tmp_path / "x", dtype=np.dtype("<u2")) as writer:
                writer.add_document(np.zeros(num_tokens, np.uint16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_failing_fsync_publishes_nothing(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"), IndexedWriter(tmp_path / "x", dtype=np.dtype("<u2")) as writer:
        writer.add_document(np.array([1]))
    assert os.listdir(tmp_path) == []


def test_bin_is_renamed_before_idx_and_never_beside_an_older_idx(tmp_path, monkeypatch):
    write(tmp_path / "x", EXAMPLE)
    seen = []
    replace = Path.replace

    def watched(source: Path, target: Path) -> Path:
        seen.append((target.name, (tmp_path / "x.idx").exists()))
        assert not (tmp_path / "x.meta.json").exists() or target.name == "x.idx"
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", watched)
    write(tmp_path / "x", [[[9]]])
    assert seen == [("x.bin", False), ("x.meta.json", False), ("x.idx", False)]
    assert read(tmp_path / "x") == [[[9]]]


def test_place_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file is a file, but a directory is"), IndexedWriter(tmp_path / "file" / "x", dtype=np.dtype("u1")):
        pass


def test_missing_directories_are_made(tmp_path):
    write(tmp_path / "a" / "b" / "x", EXAMPLE)
    assert read(tmp_path / "a" / "b" / "x") == EXAMPLE
