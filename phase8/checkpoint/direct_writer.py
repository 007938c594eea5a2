"""A new file, written in order and past the page cache where its file system can do that.

The kernel's copy into the page cache costs three times the processor time of copying and checksumming, and a checkpoint there drives out
what training reads. Past it, memory and offsets must be aligned, so bytes are collected in two buffers: one is filled, the other written.
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
ALIGNMENT_BYTES = 4096  # of the largest logical blocks
_DIRECT = os.O_DIRECT if hasattr(os, "O_DIRECT") else 0


class DirectWriter:
    """A context, at whose end the file is on the disk, unless an exception ended it.

    Args:
        path: Must not exist.

    Raises:
        OSError: As the operating system says; from any method.
    """

    def __init__(self, path: Path):
        self._descriptor = _open(path)
        self._writer = ThreadPoolExecutor(1)
        self._buffers = [np.frombuffer(mmap.mmap(-1, BUFFER_BYTES), dtype=np.uint8) for _ in range(2)]
        self._filled = 0
        self._offset = 0  # of the buffer that is being filled
        self._writing: Future[None] | None = None

    @property
    def size_bytes(self) -> int:
        """What was written so far."""
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
        """Begins to write the first buffer, once the other has been written, and makes that the first."""
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
        """Goes on through the page cache, after a write that was cut short or on a file system that refuses only now; False: it did already."""
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
    # The file system has no such writes; some have made the file before they said so.
    path.unlink(missing_ok=True)
    return os.open(path, flags, 0o666)
