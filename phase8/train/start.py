"""The start of a run: all decisions and checks come first, and the disk changes only after nothing can refuse the start any more."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from phase8.checkpoint.deepspeed_source import is_deepspeed
from phase8.checkpoint.load import Checkpoint, find_checkpoint, is_saved_run, list_checkpoints, open_checkpoint
from phase8.checkpoint.model_source import open_model
from phase8.checkpoint.quantization import require_as_trained
from phase8.checkpoint.run_metadata import run_metadata
from phase8.checkpoint.step_directories import MANIFEST_NAME, clear_leftovers, holds_weights_only, step_of
from phase8.config.schema import RunConfig
from phase8.distributed.collectives import broadcast_text
from phase8.durable import staged_directory, storage_errors
from phase8.errors import CheckpointError, ConfigError, StorageError
from phase8.observe.metrics import read_metrics
from phase8.paths import real_path
from phase8.train.restart import record_agents, recorded_agents
from phase8.train.restore import Restore, restore_newest_together, restore_together
from phase8.train.run_directory import RunDirectory, check_writable


@dataclass(frozen=True)
class Choice:
    """The checkpoint from which a run continues, and what has to be moved for it.

    Args:
        checkpoint: Checkpoint that was restored; None: the run starts from the beginning.
        sets_run_aside: Whether an earlier run of the same name is renamed.
        lacks_checkpoint: Whether that is because it has taken steps and left no checkpoint, though the run was to go on.
        later: Checkpoints of this run that are moved because it continues from an earlier one.
    """

    checkpoint: Checkpoint | None = None
    sets_run_aside: bool = False
    lacks_checkpoint: bool = False
    later: tuple[Path, ...] = ()

    @property
    def moves(self) -> bool:
        """Whether something has to be moved."""
        return self.sets_run_aside or bool(self.later)


def restore_asked(
    asked: str, directory: RunDirectory, restore: Restore, *, is_first: bool, on_message: Callable[[str], None]
) -> Checkpoint | None:
    """Restores the checkpoint that `--resume` selects on all ranks; nothing is moved yet. Returns None if there is none.

    Args:
        asked: `auto`, `none`, or a checkpoint directory.
        directory: Directory of the run.
        restore: Function that checks that a checkpoint belongs to this run and loads this rank's parts of it.
        is_first: Whether this is the first rank.
        on_message: Function that is called with messages about damaged checkpoints.

    Raises:
        CheckpointError: The selected checkpoint, or with `auto` every one there is, cannot be used.
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
    """Decides what has to be moved for a run that continues from the checkpoint of `restore_asked` (None: from the beginning)."""
    if asked == "none":
        return Choice(sets_run_aside=directory.exists())
    if checkpoint is None:
        lost = _has_taken_steps(directory)
        return Choice(sets_run_aside=lost, lacks_checkpoint=lost)
    if asked == "auto":
        return Choice(checkpoint)
    if not directory.owns(checkpoint.path):
        return Choice(checkpoint, sets_run_aside=directory.exists())
    later = [
        path
        for path in list_checkpoints(directory.checkpoints)
        if (step_of(path.name) or 0) >= checkpoint.step and real_path(path) != real_path(checkpoint.path)
    ]
    return Choice(checkpoint, later=tuple(later))


def claimed(directory: RunDirectory) -> AbstractContextManager[None]:
    """The lock of a run directory in which a run may be.

    Raises:
        ConfigError: No run can begin there.
        StorageError: As for `RunDirectory.lock`.
    """
    with storage_errors(directory.path):  # a directory that may not be entered
        _require_no_model(directory)
    return directory.lock()


def _require_no_model(directory: RunDirectory) -> None:
    """Refuses a run directory that itself is a checkpoint or an exported model, unless a run has left checkpoints in it all the same.

    Raises:
        ConfigError: It is one; the sentence has the ways to use it that work.
    """
    path = directory.path
    if is_saved_run(path):
        return
    has_weights = any(path.glob("*.safetensors"))
    if has_weights and os.path.lexists(path / MANIFEST_NAME):
        kind = "a checkpoint"
    elif has_weights and holds_weights_only(path):
        kind = "an exported model"
    elif is_deepspeed(path):
        kind = "a checkpoint of DeepSpeed"
    else:
        return
    raise ConfigError(f"run.name is {path.name}, but {path} itself is {kind}, where no run can begin; give another run.name{_uses(path)}.")


def _uses(path: Path) -> str:
    """What a run of another name can do with a model; nothing with one that is damaged, or has weights of few bits."""
    try:
        model = open_model(path)
        require_as_trained(model)
        run_metadata(model)
    except CheckpointError:
        return ""
    is_trained = model.step > 0  # one of step 0 has no position in data: weights alone, or made of such
    resume = "" if not is_trained else f", with --resume {path} to go on from it"
    return f"{resume}{' or' if resume else ', with'} checkpoint.initialise_from={path} to begin with its weights"


def _has_taken_steps(directory: RunDirectory) -> bool:
    """Whether the directory holds metrics of steps, or a file of metrics that cannot be read."""
    if not directory.metrics.exists():
        return False
    try:
        return any(record["step"] > 0 for record in read_metrics(directory.metrics))
    except StorageError:
        return True


def recorded_settings(asked: str, directory: RunDirectory, *, is_first: bool) -> object:
    """Settings recorded in the checkpoint from which the run will continue, as the first rank reads it; None: there are none.

    All ranks must call it together. The result comes from a file and is not trusted.
    """
    found: object = None
    if is_first and asked != "none":
        with suppress(CheckpointError):  # `restore_asked` reports it
            paths = list_checkpoints(directory.checkpoints) if asked == "auto" else [find_checkpoint(Path(asked))]
            found = next(_settings_in(paths), None)
    return json.loads(broadcast_text(json.dumps(found)) or "null")


def _settings_in(paths: Iterable[Path]) -> Iterator[object]:
    """The settings that checkpoints record, of those that can be opened: the run goes on from the first of these."""
    for path in paths:
        with suppress(CheckpointError):
            yield open_checkpoint(path).metadata.get("settings")


def check_place(choice: Choice, directory: RunDirectory, *, agents: Collection[str]) -> None:
    """Refuses a run directory in which the run could not write.

    Raises:
        StorageError: It cannot be written, or a file to which the run would append is damaged.
    """
    if choice.sets_run_aside:
        return  # the lock file was written next to the directory, so the directory can be renamed
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
    """Prepares the run directory and moves the files of an earlier run that are in its place.

    Steps that can fail come first: when a file cannot be written, nothing has been moved yet.

    Args:
        choice: The result of `choice_of`.
        directory: Directory of the run, checked by `check_place`.
        config: Config of the run.
        attachments: Content of files that are kept in the directory.
        agents: Agents of torchrun that train the run.
        on_message: Function that is called with messages about what was moved.

    Raises:
        StorageError: A file cannot be written after all.
    """
    if directory.checkpoints.is_dir():  # what a killed save left may be all that fills the disk
        with suppress(OSError):  # what cannot be removed is told by the first save, which tries again
            clear_leftovers(directory.checkpoints)
    with ExitStack() as stack:
        new = RunDirectory(stack.enter_context(staged_directory(real_path(directory.path)))) if choice.sets_run_aside else directory
        new.create()
        new.record(config)
        for name, content in attachments.items():
            new.keep(name, content)
        record_agents(new, agents=agents)
        if choice.sets_run_aside:
            why = "the earlier run of this name has no checkpoint to go on from; it" if choice.lacks_checkpoint else "the earlier run of this name"
            on_message(f"{why} is now {directory.set_aside()}")
    if choice.later:
        directory.set_aside_checkpoints(choice.later)
        on_message(f"{len(choice.later)} later checkpoints were moved to {directory.superseded}")
