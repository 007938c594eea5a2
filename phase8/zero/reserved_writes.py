"""Room on the disk for what DeepSpeed writes there, reserved before it writes.

DeepSpeed does not look at the result of a write. Where the disk is full, what was not written is missed at the next read, which aborts the process,
or it is read as zeros where later parts of the file were written.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

from phase8.errors import SwapError


def reserve_room(operations: ModuleType) -> None:
    """Makes DeepSpeed reserve the room of every file that it writes.

    Args:
        operations: DeepSpeed's module with `aio_handle`, the class of what reads and writes.
    """
    if not issubclass(operations.aio_handle, _Reserving):
        operations.aio_handle = type("ReservingHandle", (_Reserving, operations.aio_handle), {})


class _Reserving:
    """What comes before DeepSpeed's class; a handle that goes while it reads or writes, as after an error, would abort the process."""

    _num_pending = 0

    def async_pwrite(self, buffer: Any, file: str | int, offset: int = 0) -> int:
        """Begins to write a tensor to a file.

        Raises:
            SwapError: There is no room for it.
        """
        if isinstance(file, str):
            _reserve(file, offset + buffer.nbytes)
        self._num_pending += 1
        return super().async_pwrite(buffer, file, offset)  # type: ignore[misc, no-any-return]

    def async_pread(self, buffer: Any, file: str | int, offset: int = 0) -> int:
        """Begins to read a tensor from a file."""
        self._num_pending += 1
        return super().async_pread(buffer, file, offset)  # type: ignore[misc, no-any-return]

    def wait(self) -> int:
        """Waits for all that has begun, and returns its number."""
        self._num_pending = 0
        return super().wait()  # type: ignore[misc, no-any-return]

    def __del__(self) -> None:
        if self._num_pending:
            self.wait()


def _reserve(path: str, num_bytes: int) -> None:
    """Makes a file at least so large, all of it on the disk; one that is large enough has its room."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(descriptor).st_size < num_bytes:
                os.posix_fallocate(descriptor, 0, num_bytes)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise SwapError(
            f"zero.nvme_path: {num_bytes / 2**20:.1f} MiB cannot be written to {path} ({error.strerror}); make room there, or name a directory on a "
            "larger disk, and resume from the last checkpoint."
        ) from error
