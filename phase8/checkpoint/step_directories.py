"""Names inside a `checkpoints/` directory, and the renames that make every change of it atomic.

| name | what it is |
|---|---|
| `step-0000000100` | a committed checkpoint |
| `step-0000000100.resaved` | a committed checkpoint of a step that already existed; renamed to the above at once, or after an interruption later |
| `.saving-step-0000000100-<8 hex>` | a checkpoint being written; its writer holds a lock on it while it lives |
| `.removing-step-0000000100-<8 hex>` | a former checkpoint being deleted |

Any other name belongs to somebody else and is never touched.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phase8.durable import fsync_path

MANIFEST_NAME = "manifest.json"
RUN_CHECKPOINTS_NAME = "checkpoints"  # directory of a run's checkpoints in its own
WEIGHTS_CONFIG_NAME = "config.json"  # config of weights without a manifest: consolidated, or in Hugging Face's format
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"  # of weights in several files
SAVING_PREFIX = ".saving-"
REMOVING_PREFIX = ".removing-"
RESAVED_SUFFIX = ".resaved"
_COMMITTED = re.compile(r"step-(?P<digits>[0-9]{10,18})(?P<resaved>\.resaved)?")


def step_directory_name(step: int) -> str:
    """Directory name of the checkpoint of a step; names sort as steps do."""
    return f"step-{step:010d}"


def step_of(directory_name: str) -> int | None:
    """Step of a committed checkpoint's directory name; None for any other name."""
    match = _COMMITTED.fullmatch(directory_name)
    if match is None or step_directory_name(int(match["digits"])) != f"step-{match['digits']}":
        return None
    return int(match["digits"])


def holds_weights_only(directory: Path) -> bool:
    """Whether a directory describes its weights by a config instead of a manifest."""
    return not os.path.lexists(directory / MANIFEST_NAME) and os.path.lexists(directory / WEIGHTS_CONFIG_NAME)


def committed_directories(root: Path) -> list[Path]:
    """Committed checkpoints, newest first; of two with the same step, the one saved later first."""
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if step_of(entry.name) is not None and entry.is_dir(follow_symlinks=False)]
    return [root / name for name in sorted(names, key=lambda name: (step_of(name), name.endswith(RESAVED_SUFFIX)), reverse=True)]


@contextmanager
def saving_directory(root: Path, step: int) -> Iterator[Path]:
    """Yields a locked temporary directory beside the checkpoints; it is removed at the end unless it was committed.

    The kernel releases the lock (`flock` on the directory itself) when the process ends, however it ends. So
    `clear_leftovers` recognises dead writers from any process of this machine, without clocks or process ids.
    """
    directory, lock = _create_locked(root, step)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)  # after a commit nothing has this name; what cannot be removed becomes a leftover
        os.close(lock)


def _create_locked(root: Path, step: int) -> tuple[Path, int]:
    while True:
        directory = root / f"{SAVING_PREFIX}{step_directory_name(step)}-{secrets.token_hex(4)}"
        directory.mkdir()
        try:
            lock = _lock(directory, wait=True)
        except FileNotFoundError:
            continue  # another process removed it as a leftover between the two lines above
        if directory.exists():
            return directory, lock
        os.close(lock)


def _lock(directory: Path, *, wait: bool) -> int:
    """Opens and locks the directory where the file system supports locks; BlockingIOError if another process holds the lock."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        if not wait:
            os.close(descriptor)
            raise
        # The file system has no locks, so no other process can take this directory for a leftover either.
    return descriptor


def commit(directory: Path, root: Path, step: int) -> Path:
    """Gives a completely written directory its final name; at no instant is the step without a committed checkpoint.

    A step that already exists (saved again after going back to an older one) is never touched before its replacement is
    committed under the `.resaved` name.
    """
    final = root / step_directory_name(step)
    finish_replacement(root, step)
    if not os.path.lexists(final):
        os.rename(directory, final)
        fsync_path(root)
        return final
    if final.is_symlink() or not final.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "in the way of the checkpoint and not a directory", str(final))
    os.rename(directory, final.with_name(final.name + RESAVED_SUFFIX))
    fsync_path(root)
    finish_replacement(root, step)
    return final


def finish_replacement(root: Path, step: int) -> None:
    """Moves a `.resaved` checkpoint to its step's plain name, in place of the older one."""
    final = root / step_directory_name(step)
    resaved = final.with_name(final.name + RESAVED_SUFFIX)
    if not os.path.lexists(resaved):
        return
    if os.path.lexists(final):
        removed = rename_for_removal(final)
        os.rename(resaved, final)
        fsync_path(root)
        shutil.rmtree(removed, ignore_errors=True)  # what cannot be removed of the old checkpoint is removed with the leftovers
    else:
        os.rename(resaved, final)
        fsync_path(root)


def rename_for_removal(directory: Path) -> Path:
    """Renames a checkpoint before its removal, so that an interruption leaves no partial checkpoint under a valid name."""
    removed = directory.with_name(f"{REMOVING_PREFIX}{directory.name}-{secrets.token_hex(4)}")
    os.rename(directory, removed)
    return removed


def clear_leftovers(root: Path) -> list[Path]:
    """Removes leftovers of interrupted removals and dead writers; returns what was removed.

    A `.saving-` directory belongs to a dead writer exactly when its lock can be taken. Where the file system has no locks it is
    not touched.
    """
    removed = []
    for directory in _possible_leftovers(root):
        with _unless_its_writer_lives(directory) as is_left:
            if is_left:
                shutil.rmtree(directory)
                removed.append(directory)
    return removed


def leftover_directories(root: Path) -> list[Path]:
    """What `clear_leftovers` would remove; nothing where the directory is missing or cannot be listed."""
    found = []
    try:
        for directory in _possible_leftovers(root):
            with _unless_its_writer_lives(directory) as is_left:
                found += [directory] * is_left
    except OSError:
        return []
    return found


def _possible_leftovers(root: Path) -> list[Path]:
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    return [root / name for name in sorted(names) if name.startswith((REMOVING_PREFIX, SAVING_PREFIX))]


@contextmanager
def _unless_its_writer_lives(directory: Path) -> Iterator[bool]:
    """A context manager for a possible leftover: whether it is one. A directory that is being saved is locked meanwhile."""
    if directory.name.startswith(REMOVING_PREFIX):
        yield True
        return
    try:
        lock = _lock(directory, wait=False)
    except OSError:
        yield False  # its writer holds it, it has disappeared, or the file system has no locks
        return
    try:
        yield True
    finally:
        os.close(lock)
