"""What a writer leaves beside its pair: true, believed only beside the very same tokens, and never written through a link."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from phase8.data import content
from phase8.data.content import content_digest
from phase8.data.indexed import IndexedDataset, IndexedWriter
from phase8.data.pair_record import MadeWith, record_path
from phase8.data.staging import sweep_partial
from phase8.errors import StorageError

U2 = np.dtype("<u2")


def write(prefix: Path, *documents: list[int], dtype: np.dtype = U2) -> Path:
    with IndexedWriter(prefix, dtype=dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, np.int64))
    return prefix


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<i4", "<i8"])
def test_the_record_says_what_was_written(tmp_path, dtype):
    write(tmp_path / "a", [5, 9, 7], [], [3], dtype=np.dtype(dtype))
    record, tokens = IndexedDataset(tmp_path / "a").record, (tmp_path / "a.bin").read_bytes()
    assert (record.bin_bytes, record.bin_sha256) == (len(tokens), hashlib.sha256(tokens).hexdigest())
    assert record.content == content_digest(tmp_path / "a.bin")
    assert (record.smallest_id, record.largest_id) == (3, 9)


@pytest.mark.parametrize("made_with", [None, MadeWith(tokenizer_sha256="12", eod_id=2, eod_token="</s>")])
def test_the_record_tells_the_tokenizer_where_the_writer_knew_it(tmp_path, made_with):
    with IndexedWriter(tmp_path / "a", dtype=U2, made_with=made_with) as writer:
        writer.add_document(np.array([1, 2]))
    assert IndexedDataset(tmp_path / "a").record.made_with == made_with
    assert ("made_with" in json.loads(record_path(tmp_path / "a").read_text())) == (made_with is not None)


def test_appended_pairs_are_counted_in(tmp_path):
    write(tmp_path / "a", [50, 9]), write(tmp_path / "b", [2])
    with IndexedWriter(tmp_path / "both", dtype=U2) as writer:
        writer.append_indexed(tmp_path / "a")
        writer.append_indexed(tmp_path / "b")
    assert IndexedDataset(tmp_path / "both").record == IndexedDataset(write(tmp_path / "whole", [50, 9, 2])).record


def test_a_pair_without_tokens_has_no_range(tmp_path):
    record = IndexedDataset(write(tmp_path / "a")).record
    assert (record.bin_bytes, record.smallest_id, record.largest_id) == (0, None, None)


def test_a_record_of_other_tokens_is_not_believed(tmp_path):
    write(tmp_path / "a", [1, 2, 3])
    assert IndexedDataset(tmp_path / "a").record is not None
    (tmp_path / "a.bin").write_bytes(np.array([7, 8, 9], U2).tobytes())
    assert IndexedDataset(tmp_path / "a").record is None


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"bin_bytes": "6"}, {"largest_id": True}, {"largest_id": None}, {"bin_sha256": 3}, {"more": 1}, {"content": None}]
    + [{"made_with": made} for made in (None, 3, {}, {"tokenizer_sha256": "1", "eod_id": "2", "eod_token": None})],
)
def test_a_record_of_another_form_is_not_believed(tmp_path, change):
    path = record_path(write(tmp_path / "a", [1, 2, 3]))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert IndexedDataset(tmp_path / "a").record is None


@pytest.mark.parametrize("text", ["", "3", "[]", '{"version": 1}', "[" * 100_000, "\0\xff"])
def test_what_is_no_record_is_no_record(tmp_path, text):
    record_path(write(tmp_path / "a", [1, 2, 3])).write_text(text)
    assert IndexedDataset(tmp_path / "a").record is None


def test_a_writer_that_fails_halfway_leaves_no_record_of_other_tokens(tmp_path, monkeypatch):
    write(tmp_path / "a", [1, 2, 3])
    replace = Path.replace

    def full(source: Path, target: Path) -> Path:
        if target.name == "a.meta.json":
            raise OSError(28, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageError):
        write(tmp_path / "a", [4, 5, 6])
    assert sorted(os.listdir(tmp_path)) == ["a.bin"]


def test_files_are_hashed_once_per_process(tmp_path, monkeypatch):
    write(tmp_path / "a", [1, 2, 3])
    read = []
    monkeypatch.setattr("phase8.data.indexed.content_digest", lambda path: read.append(path) or content.content_digest(path))
    pair = IndexedDataset(tmp_path / "a")
    assert pair.fingerprint() == pair.fingerprint() and pair.record is not None
    assert read == [tmp_path / "a.bin"]


def test_partial_files_are_new_files_of_names_that_nobody_knows_in_advance(tmp_path, monkeypatch):
    seen = []
    for _ in range(2):
        with IndexedWriter(tmp_path / "a", dtype=U2) as writer:
            writer.add_document(np.array([1]))
            seen += [path.name for path in tmp_path.glob("*.partial")]
    assert len(set(seen)) == 2 and str(os.getpid()) not in seen[0].split(".")
    monkeypatch.setattr("phase8.data.indexed.partial_name", lambda path: path.with_name(f"{path.name}.known.partial"))
    (tmp_path / "target").write_text("precious")
    (tmp_path / "a.bin.known.partial").symlink_to(tmp_path / "target")
    with pytest.raises(StorageError, match="File exists"):
        write(tmp_path / "a", [1])
    assert (tmp_path / "target").read_text() == "precious"


def test_what_a_killed_writer_leaves_is_swept(tmp_path):
    writer = IndexedWriter(tmp_path / "a", dtype=U2)
    writer.__enter__()
    assert len(os.listdir(tmp_path)) == 1
    sweep_partial(tmp_path, "a.")
    assert os.listdir(tmp_path) == []
