"""Selects the checkpoints that are kept, and removes the rest safely."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phase8.checkpoint.load import list_checkpoints, newest_good_checkpoint
from phase8.checkpoint.step_directories import clear_leftovers, rename_for_removal, step_of
from phase8.durable import fsync_path
from phase8.errors import CheckpointError, StorageError


def apply_retention(root: Path, *, keep_last: int, keep_every_n_steps: int | None, known_good: Path | None = None) -> list[Path]:
    """Removes checkpoints that are no longer kept, and leftovers of dead writers and interrupted removals; returns the removed paths.

    The `keep_last` newest are kept, `known_good` with as many before it, those of every n-th step, and in any case one that is intact:
    `known_good`, or the newest that passes a full verification. A directory is renamed before anything in it is deleted.

    Args:
        root: The `checkpoints` directory of a run.
        keep_last: Newest checkpoints kept, at least 1.
        keep_every_n_steps: Also keep steps that are multiples of this.
        known_good: A checkpoint that the caller has just saved or read, so that none needs to be verified.

    Raises:
        StorageError: A file or directory cannot be removed.
    """
    with _removal_errors(root):
        directories = list_checkpoints(root)
        kept = set(directories[:keep_last])
        if known_good in directories:  # newer ones are those that the run has passed over as damaged
            kept |= set(directories[directories.index(known_good) :][:keep_last])
        if keep_every_n_steps is not None:
            kept |= {directory for directory in directories if step_of(directory.name) % keep_every_n_steps == 0}
        removed = [directory for directory in directories if directory not in kept]
        if removed and known_good not in directories:
            removed = _spare_newest_good(root, removed)
        for directory in removed:
            shutil.rmtree(rename_for_removal(directory))
        if root.is_dir():
            clear_leftovers(root)
            fsync_path(root)
    return removed


def _spare_newest_good(root: Path, candidates: list[Path]) -> list[Path]:
    try:
        good = newest_good_checkpoint(root, on_damaged=lambda path, error: None)  # damage is reported by the next resume
    except CheckpointError:  # none is, or that cannot be told
        return []
    return [directory for directory in candidates if good is not None and directory != good.path]


@contextmanager
def _removal_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = root if error.filename is None else error.filename
        raise StorageError(
            f"old checkpoints under {root} cannot be removed ({error.strerror}: {place}); make it writable or remove them by hand"
        ) from error
