"""Tokens read from a file by position, a piece at a time.

Files are not memory-mapped: when a mapped file shrinks (truncated or overwritten), its reader is killed by a signal, with nothing saved.
With plain reads this is an ordinary error.
"""

from __future__ import annotations

import os
import stat
import weakref
from pathlib import Path

import numpy as np

from phase8.errors import DataError


class TokenFile:
    """An open file of tokens; if another file replaces it under its name, the old content is still read.

    Threads and forked processes may read it at the same time, because every read gives its position.

    Args:
        path: The file.
        identity: What another process has opened under the name: every read of another file is refused. None: any file is read.

    Attributes:
        num_bytes: Size when it was opened.
        identity: Device and inode, which tell it from a file that replaces it while a process has it open.

    Raises:
        DataError: It is no regular file.
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path, *, identity: tuple[int, int] | None = None):
        self.path = path
        self._descriptor = open_regular_file(path)
        weakref.finalize(self, os.close, self._descriptor).atexit = False  # threads may still read while Python ends
        found = os.fstat(self._descriptor)
        self.num_bytes, self.identity = found.st_size, (found.st_dev, found.st_ino)
        self._is_other = identity not in (None, self.identity)

    def read(self, start: int, count: int, dtype: np.dtype) -> np.ndarray:
        """`count` tokens of a type from token `start` on, read-only.

        Raises:
            DataError: The file has become shorter, cannot be read, or is not the one that it has to be.
        """
        if self._is_other:
            raise DataError(f"{self.path} was replaced by another file while a run reads it; put the old one back, or begin again with the new one")
        offset, remaining, pieces = int(start) * dtype.itemsize, int(count) * dtype.itemsize, []
        while remaining:
            try:
                piece = os.pread(self._descriptor, remaining, offset)
            except OSError as error:
                raise DataError(f"cannot read {self.path} from byte {offset} on: {error.strerror}; copy the data again") from error
            if not piece:
                raise DataError(
                    f"{self.path} is shorter than when it was opened: it held {self.num_bytes} bytes and ends before byte {offset + 1} now; "
                    "write or copy the data again"
                )
            pieces.append(piece)
            offset, remaining = offset + len(piece), remaining - len(piece)
        return np.frombuffer(pieces[0] if len(pieces) == 1 else b"".join(pieces), dtype=dtype)


def open_regular_file(path: Path) -> int:
    """A descriptor for reading. A pipe is refused, because opening it would wait for a writer.

    Raises:
        DataError: It is no regular file.
        OSError: It cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{path} is not a regular file; give the path of the pair without .bin / .idx")
    return descriptor
