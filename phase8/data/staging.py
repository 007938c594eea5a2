"""Records and locks of work that is done once: JSON files that are complete or absent, and exclusive ownership of a path.

A killed process leaves only names that match `*.partial`, which the next owner of the lock removes.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from phase8.durable import open_lock_file, staged_file, storage_errors
from phase8.errors import DataError


def write_json(path: Path, value: object) -> None:
    """Writes `value` as indented JSON with sorted keys, complete or not at all.

    Raises:
        StorageError: The place cannot be written, or the disk is full.
    """
    with staged_file(path) as partial:
        partial.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> object:
    """The value of a JSON file; None if it is missing or damaged (its owner then does the work again)."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; make it readable or remove it") from error


@contextmanager
def exclusive_lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Owns the lock file `path` exclusively among processes; the system releases it when a process is killed.

    Args:
        path: The lock file; it exists only while a process owns it (or after a kill, which does no harm).
        wait: Wait for the owner to finish; otherwise refuse.

    Raises:
        DataError: Another process owns it and `wait` is false.
        StorageError: The place cannot be written.
    """
    descriptor = _owned_lock_file(path, wait=wait)
    try:
        yield
    finally:
        with suppress(OSError):  # the work under the lock is already done
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _owned_lock_file(path: Path, *, wait: bool) -> int:
    while True:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = open_lock_file(path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
            except FileNotFoundError:
                pass
            except BlockingIOError as error:
                os.close(descriptor)
                raise DataError(f"another process holds {path}; wait until it has finished or choose another place") from error
            os.close(descriptor)  # the last owner removed this file while this process waited: another process may own a new one


def sweep_partial(directory: Path, name: str) -> None:
    """Removes partial files of `name` in `directory` that killed processes left; requires the lock of the directory."""
    for leftover in directory.glob(f"{glob.escape(name)}*.partial"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
