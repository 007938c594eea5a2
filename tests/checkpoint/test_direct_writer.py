"""Files written past the page cache: the bytes are those that were given, and what the system refuses arrives."""

import errno
import fcntl
import os
import random

import pytest

from phase8.checkpoint import direct_writer
from phase8.checkpoint.direct_writer import ALIGNMENT_BYTES, DirectWriter

BUFFER = 4 * ALIGNMENT_BYTES


@pytest.fixture(autouse=True)
def _short_buffers(monkeypatch):
    monkeypatch.setattr(direct_writer, "BUFFER_BYTES", BUFFER)


def written(path, pieces):
    with DirectWriter(path) as file:
        for number, piece in enumerate(pieces):
            data = bytearray(piece)
            file.write(memoryview(data))
            data[:] = bytes(len(data))  # it may change afterwards
            assert file.size_bytes == sum(map(len, pieces[: number + 1]))
    assert path.read_bytes() == b"".join(pieces)


@pytest.mark.parametrize("size", [0, 1, ALIGNMENT_BYTES - 1, ALIGNMENT_BYTES, BUFFER - 1, BUFFER, BUFFER + 1, 2 * BUFFER, 3 * BUFFER + 1, 100_003])
def test_a_file_of_any_length(tmp_path, size):
    written(tmp_path / "whole", [random.Random(size).randbytes(size)])
    content, step = random.Random(size).randbytes(size), 1021
    written(tmp_path / "in pieces", [content[begin : begin + step] for begin in range(0, size, step)])


def is_direct(file):
    return bool(fcntl.fcntl(file._descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def test_it_goes_past_the_page_cache(tmp_path):
    with DirectWriter(tmp_path / "file") as file:
        if not is_direct(file):
            pytest.skip("this file system writes through the page cache only")
        file.write(bytes(3 * BUFFER + 5))
    assert (tmp_path / "file").stat().st_size == 3 * BUFFER + 5


def test_a_file_system_that_refuses_to_open_it_so(tmp_path, monkeypatch):
    real = os.open

    def refusing(path, flags, *mode):
        if flags & os.O_DIRECT:
            os.close(real(path, flags & ~os.O_DIRECT, *mode))  # as tmpfs did: made, then refused
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", refusing)
    written(tmp_path / "file", [bytes(range(256)) * 200])


def test_a_file_system_that_refuses_the_write(tmp_path, monkeypatch):
    real, refused = os.pwrite, []

    def refusing(descriptor, data, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, data[: ALIGNMENT_BYTES - 5], offset)  # and one that writes less than it was asked to

    monkeypatch.setattr(os, "pwrite", refusing)
    written(tmp_path / "file", [bytes(range(256)) * 200])
    assert len(refused) <= 1


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EINVAL, errno.EIO])
def test_a_write_that_fails_is_raised(tmp_path, monkeypatch, number, error):
    """Also the last one, which only the end of the context waits for, and a refusal that goes on without the cache being avoided."""
    real, count = os.pwrite, 0

    def failing(descriptor, data, offset):
        nonlocal count
        count += 1
        if count >= number:
            raise OSError(error, os.strerror(error))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError) as caught, DirectWriter(tmp_path / "file") as file:
        file.write(bytes(3 * BUFFER + 5))
    assert caught.value.errno == error and len(os.listdir("/proc/self/fd")) == descriptors


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        DirectWriter(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_the_error_that_ended_it_is_the_one_that_arrives(tmp_path):
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyError), DirectWriter(tmp_path / "file") as file:
        file.write(bytes(BUFFER + 1))
        raise KeyError
    assert len(os.listdir("/proc/self/fd")) == descriptors
