"""Crash-safe writing: a file under its final name is complete, and errors of the disk become one sentence.

Everything is written under a temporary name beside its destination, fsynced, and renamed. A killed process leaves only names that
match `*.partial`.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from phase8.errors import StorageError


class _InTheWayError(OSError):
    """Another file has the name that is to be written; the message gives the remedy."""


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """A context manager that turns the operating system's write errors into sentences with path and remedy.

    Raises:
        StorageError: In place of any `OSError`.
    """
    try:
        yield
    except _InTheWayError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
    except OSError as error:
        if (file := _file_in_the_way(error)) is not None:
            raise StorageError(f"cannot write {path}: {file} is a file, but a directory is needed there; move it, or choose another place") from error
        reason = error.strerror or str(error)
        raise StorageError(f"cannot write {path}: {reason}; free space there, allow writing, or choose another place") from error


def _file_in_the_way(error: OSError) -> Path | None:
    """The file that has the name of a directory, if that is what an error is about, and not a partial file that had to be a new one."""
    if not isinstance(error, FileExistsError | NotADirectoryError) or not isinstance(error.filename, str | os.PathLike):
        return None
    place = Path(error.filename)
    on_the_way = (each for each in (place, *place.parents) if each.suffix != ".partial")
    return next((each for each in on_the_way if os.path.exists(each) and not os.path.isdir(each)), None)


@contextmanager
def staged_file(destination: Path) -> Iterator[Path]:
    """Yields a temporary path that replaces `destination` when the block ends without an exception.

    Raises:
        StorageError: The file cannot be written, or the disk is full; an old file is kept.
    """
    partial = partial_name(destination)
    with storage_errors(destination):
        if not is_regular_or_free(destination):
            raise _InTheWayError(errno.EINVAL, "it is a device, a pipe or a socket, whose place a file would take; choose another place")
        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            fsync_path(partial)
            partial.replace(destination)
            fsync_path(destination.parent)
        finally:
            with suppress(OSError):  # whatever prevents writing it may prevent removing it
                partial.unlink(missing_ok=True)


def is_regular_or_free(path: Path) -> bool:
    """Whether a file may take the place of what has this name, directly or through a link: not of a device such as /dev/null, nor of a pipe."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return True  # nothing is there, or the writer finds the reason
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


@contextmanager
def staged_directory(destination: Path) -> Iterator[Path]:
    """Yields a temporary directory that replaces `destination` when the block ends without an exception.

    Files written inside must be fsynced by their writers, as those of `staged_file` are.

    Raises:
        StorageError: The directory cannot be written, or the disk is full.
    """
    partial = partial_name(destination)
    with storage_errors(destination):
        partial.mkdir(parents=True)
        try:
            yield partial
            fsync_path(partial)
            if destination.exists():
                shutil.rmtree(destination)
            partial.rename(destination)
            fsync_path(destination.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def replace_file(destination: Path, content: bytes) -> None:
    """Writes a whole file: after a crash it has the old content or the new, never a mixture.

    Raises:
        StorageError: As `staged_file`.
    """
    with staged_file(destination) as partial:
        partial.write_bytes(content)


def append_whole(file: FileIO, record: bytes) -> None:
    """Appends a record to an unbuffered file; if the disk is full in the middle of it, nothing is appended.

    Raises:
        OSError: The system refuses to write.
    """
    start = file.tell()
    written = 0
    try:
        while written < len(record):
            written += file.write(record[written:])
    except OSError:
        file.truncate(file.seek(start))
        raise


def open_lock_file(path: Path) -> int:
    """Opens a lock file, creating it if it is missing; its content is never changed.

    Raises:
        OSError: It cannot be opened, or is no regular file.
    """
    return _open_known_name(path, os.O_RDWR)


def open_for_appending(path: Path) -> int:
    """Opens a file that grows line by line, creating it if it is missing.

    Raises:
        OSError: As `open_lock_file`.
    """
    return _open_known_name(path, os.O_WRONLY | os.O_APPEND)


def _open_known_name(path: Path, access: int) -> int:
    """Opens a file with a predictable name, where another user of a shared directory may have placed a link or a pipe.

    A link is not followed, and a pipe is not waited for.
    """
    try:
        descriptor = os.open(path, access | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise _InTheWayError(error.errno, "it is a symbolic link, which is not followed; remove the link", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _InTheWayError(errno.EINVAL, "it is in the way and not a regular file; remove it", str(path))
    return descriptor


def partial_name(destination: Path) -> Path:
    """A fresh temporary name beside `destination`."""
    return destination.with_name(f"{destination.name}.{secrets.token_hex(6)}.partial")


def fsync_path(path: Path) -> None:
    """Makes a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
