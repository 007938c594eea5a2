"""A disk that is full while DeepSpeed offloads to it is one sentence, nothing is written that cannot be, and what has begun is waited for."""

import errno
import os
from types import SimpleNamespace

import pytest
import torch

from phase8.errors import StorageError, SwapError
from phase8.zero.reserved_writes import reserve_room


class Handle:
    """A stand-in for DeepSpeed's class, whose destructor aborts the process where something is pending."""

    pending, written, read = 0, [], []

    def __init__(self, block_size):
        self.block_size = block_size

    def async_pwrite(self, buffer, file, offset):
        Handle.written.append((file, offset, os.stat(file).st_size if isinstance(file, str) else None))
        Handle.pending += 1
        return 0

    def async_pread(self, buffer, file, offset):
        Handle.read.append((file, offset))
        Handle.pending += 1
        return 0

    def wait(self):
        assert Handle.pending > 0  # DeepSpeed aborts
        done, Handle.pending = Handle.pending, 0
        return done


@pytest.fixture
def handle():
    """A handle of the class as it is after two calls."""
    Handle.pending, Handle.written, Handle.read = 0, [], []
    operations = SimpleNamespace(aio_handle=Handle)
    reserve_room(operations)
    once = operations.aio_handle
    reserve_room(operations)
    assert operations.aio_handle is once
    yield (made := once(block_size=3))
    if Handle.pending:
        made.wait()


def test_files_have_their_room_before_they_are_written(handle, tmp_path):
    path = tmp_path / "0_param.tensor.swp"
    assert handle.async_pwrite(torch.zeros(1024), str(path), 0) == 0 and handle.block_size == 3
    assert Handle.written == [(str(path), 0, 4096)] and path.stat().st_blocks * 512 >= 4096
    path.write_bytes(b"x" * 8192)
    handle.async_pwrite(torch.zeros(1024), str(path), 0)  # a smaller tensor leaves the file as it is
    assert path.read_bytes() == b"x" * 8192
    handle.async_pwrite(torch.zeros(1024), str(path), 8192)
    assert path.stat().st_size == 12288
    handle.async_pread(torch.zeros(1024), str(path), 0)
    assert handle.wait() == 4 and Handle.read == [(str(path), 0)]


def test_a_full_disk_is_one_sentence(handle, tmp_path, monkeypatch):
    whole, path = tmp_path / "0_param.tensor.swp", tmp_path / "1_param.tensor.swp"
    handle.async_pwrite(torch.zeros(1024), str(whole), 0)

    def fail(descriptor, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(SwapError) as caught:
        handle.async_pwrite(torch.zeros(3 << 18), str(path), 0)
    assert str(caught.value) == (
        f"zero.nvme_path: 3.0 MiB cannot be written to {path} (No space left on device); make room there, or name a directory on a larger disk, and "
        "resume from the last checkpoint."
    )
    assert isinstance(caught.value, StorageError) and caught.value.exit_code == 5 and [name for name, *_ in Handle.written] == [str(whole)]
    handle.async_pwrite(torch.zeros(1024), str(whole), 0)  # has its room


@pytest.mark.parametrize("begin", ["async_pwrite", "async_pread", None])
def test_a_handle_waits_for_what_it_has_begun_before_it_goes(tmp_path, begin):
    Handle.pending = 0
    operations = SimpleNamespace(aio_handle=Handle)
    reserve_room(operations)
    short_lived = operations.aio_handle(block_size=3)
    if begin is not None:
        getattr(short_lived, begin)(torch.zeros(4), str(tmp_path / "file"), 0)
    del short_lived
    assert Handle.pending == 0
