"""Writes a new file sequentially, bypassing the page cache where the file system supports it.

Copying into the page cache costs three times the processor time of copying and checksumming, and a checkpoint in the page cache evicts
what training reads. Direct writes need aligned memory and offsets, so bytes are collected in two buffers: one is filled while the other is written.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

BUFFER_BYTES = 32 * 2**20  # with 8 MiB the disk waits between writes
ALIGNMENT_BYTES = 4096  # size of the largest logical blocks
_DIRECT = os.O_DIRECT if hasattr(os, "O_DIRECT") else 0


class DirectWriter:
    """A context manager; when it ends without an exception, the file is on the disk.

    Args:
        path: The file; it must not exist.

    Raises:
        OSError: An error of the operating system, from any method.
    """

    def __init__(self, path: Path):
        self._descriptor = _open(path)
        self._writer = ThreadPoolExecutor(1)
        self._buffers = [np.frombuffer(mmap.mmap(-1, BUFFER_BYTES), dtype=np.uint8) for _ in range(2)]
        self._filled = 0
        self._offset = 0  # offset in the file of the buffer being filled
        self._writing: Future[None] | None = None

    @property
    def size_bytes(self) -> int:
        """Number of bytes written so far."""
        return self._offset + self._filled

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes, which may change afterwards."""
        source = np.asarray(memoryview(data))
        while len(source):
            fits = min(len(source), BUFFER_BYTES - self._filled)
            np.copyto(self._buffers[0][self._filled : self._filled + fits], source[:fits])
            source, self._filled = source[fits:], self._filled + fits
            if self._filled == BUFFER_BYTES:
                self._send(BUFFER_BYTES)

    def _send(self, num_bytes: int) -> None:
        """Starts writing the full buffer once the other one has been written, and swaps them."""
        self._wait()
        self._writing = self._writer.submit(self._write_at, memoryview(self._buffers[0])[:num_bytes], self._offset)
        self._buffers.reverse()
        self._offset, self._filled = self._offset + self._filled, 0

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _write_at(self, data: memoryview, offset: int) -> None:
        while data:
            try:
                written = os.pwrite(self._descriptor, data, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._stop_direct():
                    raise
            else:
                data, offset = data[written:], offset + written

    def _stop_direct(self) -> bool:
        """Continues through the page cache after a short write or a late refusal by the file system; False if it already does."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
        return bool(flags & _DIRECT)

    def __enter__(self) -> DirectWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                size = self.size_bytes
                self._send(-(-self._filled // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
                self._wait()
                os.ftruncate(self._descriptor, size)
                os.fsync(self._descriptor)
        finally:
            self._writer.shutdown()
            os.close(self._descriptor)


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL or not _DIRECT:
            raise
    # The file system does not support direct writes; some create the file before they report that.
    path.unlink(missing_ok=True)
    return os.open(path, flags, 0o666)
