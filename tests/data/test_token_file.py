"""Token files that change while they are read: an error in one sentence, where a memory map would end the process by a signal."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from phase8.config.schema import DataSection
from phase8.data import muse
from phase8.data.indexed import IndexedDataset, IndexedWriter
from phase8.data.loader import build_loader, open_dataset
from phase8.data.token_file import TokenFile
from phase8.errors import DataError

U2 = np.dtype("<u2")
SHORTER = "is shorter than when it was opened"


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "x.bin"
    path.write_bytes(np.arange(5000, dtype=U2).tobytes())
    return path


def test_tokens_are_read_by_position_and_cannot_be_written(path):
    file = TokenFile(path)
    assert file.num_bytes == 10_000
    assert file.read(4990, 10, U2).tolist() == list(range(4990, 5000))
    assert file.read(0, 0, U2).size == 0
    with pytest.raises(ValueError, match="read-only"):
        file.read(0, 1, U2)[0] = 1


def test_a_read_that_the_system_cuts_in_pieces_is_whole(path, monkeypatch):
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, count, offset: pread(descriptor, min(count, 7), offset))
    assert TokenFile(path).read(10, 1000, U2).tolist() == list(range(10, 1010))


def test_a_file_that_shrinks_is_named(path):
    file = TokenFile(path)
    os.truncate(path, 5001)
    assert file.read(0, 2500, U2).size == 2500
    with pytest.raises(DataError, match=rf"x.bin {SHORTER}: it held 10000 bytes and ends before byte 5002 now"):
        file.read(2000, 600, U2)


def test_what_the_disk_refuses_is_named(path, monkeypatch):
    file = TokenFile(path)

    def refuse(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", refuse)
    with pytest.raises(DataError, match=r"cannot read .*x.bin from byte 200 on: Input/output error"):
        file.read(100, 600, U2)


def test_a_file_replaced_under_its_name_is_read_on_as_it_was(path, tmp_path):
    file = TokenFile(path)
    (tmp_path / "new").write_bytes(b"\1\0")
    (tmp_path / "new").replace(path)
    assert file.read(4999, 1, U2).tolist() == [4999]


def test_threads_share_a_file(path):
    file, wrong = TokenFile(path), []

    def read(start: int) -> None:
        wrong.extend(i for i in range(300) if file.read(start + i, 50, U2)[0] != start + i)

    threads = [threading.Thread(target=read, args=(1000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_forgotten_file_is_closed(path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        TokenFile(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_pipes_in_the_place_of_files_are_refused_at_once(tmp_path):
    for ending, other in ((".bin", ".idx"), (".idx", ".bin")):
        prefix = tmp_path / ending.strip(".")
        with IndexedWriter(prefix, dtype=U2) as writer:
            writer.add_document(np.arange(9))
        Path(f"{prefix}{ending}").unlink()
        os.mkfifo(f"{prefix}{ending}")
        with pytest.raises(DataError, match=rf"{ending} is not a regular file"):
            IndexedDataset(prefix)
        assert Path(f"{prefix}{other}").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_names_the_file_that_shrank(tmp_path, num_workers):
    with IndexedWriter(tmp_path / "x", dtype=U2) as writer:
        writer.add_document(np.arange(4001))
    dataset = open_dataset(str(tmp_path / "x"), sequence_length=8, vocab_size=5000, seed=0)
    os.truncate(tmp_path / "x.bin", 50)
    kind = message = None
    try:
        list(build_loader(dataset, DataSection(pin_memory=False, num_workers=num_workers), sample_numbers=[[0, 1, 2, 3]]))
    except Exception as error:  # kept as text: pytest's record of an exception is a cycle that keeps the workers running
        kind, message = type(error), str(error)
    assert kind is DataError and f"x.bin {SHORTER}" in message


def test_a_pair_that_shrinks_while_it_is_imported_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "m.bin").write_bytes(np.arange(100, dtype="<u4").tobytes())
    (tmp_path / "m.idx").write_bytes(b"MUSE" + (1).to_bytes(4, "little") + np.array([0, 60, 60, 40], "<u8").tobytes())
    check = muse._check_documents

    def shrink(*arguments):
        check(*arguments)
        os.truncate(tmp_path / "m.bin", 300)

    monkeypatch.setattr(muse, "_check_documents", shrink)
    with pytest.raises(DataError, match=f"m.bin {SHORTER}"):
        muse.import_muse(tmp_path / "m", tmp_path / "out" / "x", vocab_size=1000, eod_id=None, tokenizer="t")
    assert os.listdir(tmp_path / "out") == []
