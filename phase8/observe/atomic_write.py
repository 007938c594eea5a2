"""Files that are either the old ones or the new ones, and one sentence when the disk says no."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phase8.errors import StorageError


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """A block in which the operating system's refusals name the path and the remedy.

    Raises:
        StorageError: Instead of any `OSError`.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror if error.strerror is not None else str(error)
        raise StorageError(f"cannot write {path}: {reason}; free space there, allow writing, or set another run.output_dir") from error


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole: a crash leaves the old content or the new, never a mixture.

    Raises:
        StorageError: When the directory cannot be written; the old file is kept.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with storage_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
