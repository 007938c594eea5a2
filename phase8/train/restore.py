"""Restoring a checkpoint on all ranks: the first rank selects it, each rank restores its parts, and all report whether they could."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from phase8.checkpoint.load import Checkpoint, newest_good_checkpoint, open_checkpoint
from phase8.distributed.collectives import broadcast_text, gather_texts
from phase8.errors import CheckpointCorruptError, CheckpointError

Restore = Callable[[Checkpoint], None]


def restore_together(
    path: Path | None, restore: Restore, *, is_first: bool, open_at: Callable[[Path], Checkpoint] = open_checkpoint
) -> Checkpoint | None:
    """Restores one checkpoint on all ranks; None: there is none.

    Args:
        path: Path of the checkpoint on the first rank, which decides for all ranks; None: there is none.
        restore: Function that loads this rank's parts of a checkpoint.
        is_first: Whether this is the first rank.
        open_at: Function that opens a checkpoint.

    Raises:
        CheckpointError: Some rank cannot use it; raised on the first rank.
    """
    if not is_first:
        return _follow(restore, open_at)
    checkpoint = None
    if path is not None:
        checkpoint = open_at(path)
        _lead(restore, checkpoint)
    broadcast_text(None)
    return checkpoint


def restore_newest_together(
    root: Path, restore: Restore, *, is_first: bool, on_damaged: Callable[[Path, CheckpointError], None]
) -> Checkpoint | None:
    """Restores the newest checkpoint that all ranks can use; None: there is none at all.

    Args:
        root: Directory `checkpoints` of a run.
        restore: Function that loads this rank's parts of a checkpoint.
        is_first: Whether this is the first rank.
        on_damaged: Function that is called on the first rank with every newer checkpoint that was skipped, and the reason.

    Raises:
        CheckpointError: The cases of `newest_good_checkpoint`; raised on the first rank.
    """
    if not is_first:
        return _follow(restore, open_checkpoint)
    checkpoint = newest_good_checkpoint(root, on_damaged=on_damaged, check=partial(_lead, restore))
    broadcast_text(None)
    return checkpoint


def _lead(restore: Restore, checkpoint: Checkpoint) -> None:
    """Restores a checkpoint on all ranks, as the first rank; each rank reads its own parts.

    Raises:
        CheckpointError: Some rank cannot use it.
    """
    broadcast_text(str(checkpoint.path))
    failure: CheckpointError | None = None
    try:
        restore(checkpoint)
    except CheckpointError as error:
        failure = error
    others = gather_texts(None if failure is None else str(failure))[1:]
    if failure is not None:
        raise failure
    for rank, problem in enumerate(others, start=1):
        if problem is not None:
            raise CheckpointCorruptError(f"{problem} (seen by rank {rank})")


def _follow(restore: Restore, open_at: Callable[[Path], Checkpoint]) -> Checkpoint | None:
    """Restores on this rank each checkpoint that the first rank selects; returns the last one, which all ranks could use."""
    checkpoint = None
    while (path := broadcast_text(None)) is not None:
        problem = None
        try:
            checkpoint = open_at(Path(path))
            restore(checkpoint)
        except CheckpointError as error:
            problem = str(error)
        gather_texts(problem)
    return checkpoint
