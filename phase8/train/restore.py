"""All ranks go to a checkpoint together: the first one chooses, each restores its parts, and all learn whether all could."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from phase8.checkpoint.load import Checkpoint, open_checkpoint
from phase8.distributed.collectives import broadcast_text, gather_texts
from phase8.errors import CheckpointCorruptError, CheckpointError

Restore = Callable[[Checkpoint], None]


def restore_together(
    choose: Callable[[Restore], Checkpoint | None],
    restore: Restore,
    *,
    is_first: bool,
    open_at: Callable[[Path], Checkpoint] = open_checkpoint,
) -> Checkpoint | None:
    """The checkpoint that all ranks have restored; None: there is none.

    Args:
        choose: Called on the first rank only: tries checkpoints with the function it is given, which restores one on all ranks and raises
            CheckpointError when some rank cannot, and returns the one that it settles for.
        restore: Loads this rank's parts of a checkpoint.
        is_first: This is the first rank.
        open_at: Opens on the other ranks what the first one has chosen.

    Raises:
        CheckpointError: As `choose` says.
    """
    if not is_first:
        return _follow(restore, open_at)
    checkpoint = choose(partial(_lead, restore))
    broadcast_text(None)
    return checkpoint


def _lead(restore: Restore, checkpoint: Checkpoint) -> None:
    """Restores a checkpoint on all ranks, of which each reads its own parts.

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
    """Restores on this rank what the first rank leads through; returns the last, which all could use."""
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
