"""How a run starts: everything is decided and checked first; what is on the disk changes when nothing can refuse the start any more."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from phase8.checkpoint.load import Checkpoint, find_checkpoint, list_checkpoints, open_checkpoint
from phase8.checkpoint.step_directories import step_of
from phase8.config.schema import RunConfig
from phase8.distributed.collectives import broadcast_text
from phase8.durable import staged_directory
from phase8.errors import CheckpointError
from phase8.observe.metrics import read_metrics
from phase8.paths import real_path
from phase8.train.restart import record_agents, recorded_agents
from phase8.train.restore import Restore, restore_newest_together, restore_together
from phase8.train.run_directory import RunDirectory, check_writable


@dataclass(frozen=True)
class Choice:
    """The checkpoint that a run goes on from, and what has to make way for it.

    Args:
        checkpoint: None: the run starts from the beginning.
        sets_run_aside: An earlier run of the same name gets another one.
        later: Checkpoints of this run that it leaves by going on from an earlier one.
    """

    checkpoint: Checkpoint | None = None
    sets_run_aside: bool = False
    later: tuple[Path, ...] = ()

    @property
    def moves(self) -> bool:
        """Something has to make way."""
        return self.sets_run_aside or bool(self.later)


def restore_asked(
    asked: str, directory: RunDirectory, restore: Restore, *, is_first: bool, on_message: Callable[[str], None]
) -> Checkpoint | None:
    """Restores the checkpoint that `--resume` asks for on all ranks; nothing is moved yet. None: there is none.

    Args:
        asked: `auto`, `none`, or a checkpoint directory.
        directory: Of the run.
        restore: Checks that a checkpoint belongs to this run and loads this rank's parts of it.
        is_first: This is the first rank.
        on_message: Told of damaged checkpoints.

    Raises:
        CheckpointError: The named one, or every one there is, cannot be used.
    """
    if asked != "auto":
        path = find_checkpoint(Path(asked)) if is_first and asked != "none" else None
        return restore_together(path, restore, is_first=is_first)
    return restore_newest_together(
        directory.checkpoints,
        restore,
        is_first=is_first,
        on_damaged=lambda path, error: on_message(f"checkpoint {path.name} is damaged and passed over: {error}"),
    )


def choice_of(asked: str, directory: RunDirectory, checkpoint: Checkpoint | None) -> Choice:
    """What has to make way for a run that goes on from a checkpoint that `restore_asked` has restored, or from the beginning."""
    if asked == "none":
        return Choice(sets_run_aside=directory.exists())
    if checkpoint is None or asked == "auto":
        return Choice(checkpoint)
    if not directory.owns(checkpoint.path):
        return Choice(checkpoint, sets_run_aside=directory.exists())
    later = [
        path
        for path in list_checkpoints(directory.checkpoints)
        if (step_of(path.name) or 0) >= checkpoint.step and real_path(path) != real_path(checkpoint.path)
    ]
    return Choice(checkpoint, later=tuple(later))


def recorded_settings(asked: str, directory: RunDirectory, *, is_first: bool) -> object:
    """What the checkpoint that the run is going to go on from says of its settings, as the first rank reads it; None: nothing.

    All ranks call it together. Anybody may have written what it returns.
    """
    found: object = None
    if is_first and asked != "none":
        try:
            paths = list_checkpoints(directory.checkpoints)[:1] if asked == "auto" else [find_checkpoint(Path(asked))]
            found = open_checkpoint(paths[0]).metadata.get("settings") if paths else None
        except CheckpointError:  # is told by whoever restores it
            found = None
    return json.loads(broadcast_text(json.dumps(found)) or "null")


def check_place(choice: Choice, directory: RunDirectory, *, agents: Collection[str]) -> None:
    """Refuses a run directory that cannot take what the run is going to write.

    Raises:
        StorageError: It cannot be written, or what the run would add to is damaged.
    """
    if choice.sets_run_aside:
        return  # what lies beside the lock can be renamed
    check_writable(directory.path, directory.checkpoints, *([directory.superseded] if choice.later else []))
    if agents:
        recorded_agents(directory)
    if choice.checkpoint is not None and directory.metrics.exists():
        read_metrics(directory.metrics)


def make_way(
    choice: Choice,
    directory: RunDirectory,
    config: RunConfig,
    *,
    attachments: dict[str, bytes],
    agents: Collection[str],
    on_message: Callable[[str], None],
) -> None:
    """Makes the run directory what the run needs, and moves out of its way what an earlier one has left.

    What can fail comes first: nothing has been moved when a file cannot be written.

    Args:
        choice: From `choice_of`.
        directory: Of the run, which `check_place` has seen.
        config: Of the run.
        attachments: Content of files that are kept in it.
        agents: Those of torchrun that train it.
        on_message: Told of what was moved.

    Raises:
        StorageError: Something cannot be written after all.
    """
    with ExitStack() as stack:
        new = RunDirectory(stack.enter_context(staged_directory(real_path(directory.path)))) if choice.sets_run_aside else directory
        new.create()
        new.record(config)
        for name, content in attachments.items():
            new.keep(name, content)
        record_agents(new, agents=agents)
        if choice.sets_run_aside:
            on_message(f"the earlier run of this name is now {directory.set_aside()}")
    if choice.later:
        directory.set_aside_checkpoints(choice.later)
        on_message(f"{len(choice.later)} later checkpoints were moved to {directory.superseded}")
