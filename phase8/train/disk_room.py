"""Room on the disk for the checkpoints of a run, looked at before its first step: a run that could save none is refused."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from phase8.checkpoint.load import list_checkpoints
from phase8.checkpoint.step_directories import leftover_directories, step_of
from phase8.config.schema import CheckpointSection, RunConfig
from phase8.errors import StorageError
from phase8.formatting import format_bytes
from phase8.paths import real_path
from phase8.plan.whole_config import checkpoint_bytes
from phase8.train.run_directory import RunDirectory, nearest_existing
from phase8.train.start import Choice

_MOST_SAVES = 100_000  # that are looked at


class Kept(NamedTuple):
    """A checkpoint on the disk.

    Args:
        step: Its step.
        num_bytes: Its size.
    """

    step: int
    num_bytes: int


def require_room(config: RunConfig, directory: RunDirectory, choice: Choice, *, step: int, stop_step: int) -> list[tuple[str, str]]:
    """Refuses a run that has no room on the disk for a checkpoint; returns a fact for the banner if a later one has none.

    All ranks write to one directory, so the first one asks, for all of a checkpoint. What cannot be told, as quotas and some network file systems,
    refuses nothing.

    Args:
        config: Config without `auto` settings.
        directory: Directory of the run.
        choice: What is moved for the run; earlier runs that are renamed stay on the disk.
        step: Step from which the run goes on.
        stop_step: Step at which it ends, with a save.

    Raises:
        StorageError: There is no room.
    """
    place = real_path(directory.path).parent if choice.sets_run_aside else real_path(directory.checkpoints)
    free, size, there = _free_bytes(place), checkpoint_bytes(config), list[Kept]()
    if free is None:
        return []
    if not choice.sets_run_aside:
        paths = [path for path in reversed(list_checkpoints(directory.checkpoints)) if path not in choice.later]
        there = [Kept(step_of(path.name) or 0, _bytes_below(path)) for path in paths]
        free += sum(map(_bytes_below, leftover_directories(place)))  # they are removed before the first step
    without = save_without_room(config.checkpoint, there, free_bytes=free, num_bytes=size, saves=_saves(config.checkpoint, step, stop_step))
    if without is None:
        return []
    room = f"the disk of {directory.checkpoints} has {format_bytes(free)} free"
    if free < size:
        raise StorageError(
            f"a checkpoint of this run takes {format_bytes(size)}, but {room}, so that none could be saved; make room there, or choose another "
            "run.output_dir."
        )
    every = config.checkpoint.keep_every_n_steps
    keys = f"checkpoint.keep_last {config.checkpoint.keep_last}" + ("" if every is None else f" and checkpoint.keep_every_n_steps {every}")
    sentence = (
        f"{room}, too little to save step {without:,} beside the checkpoints that {keys} keep until then, {format_bytes(size)} each; make room, or "
        "keep fewer: from that step on none could be saved"
    )
    return [("disk", sentence)]


def save_without_room(
    section: CheckpointSection, there: Iterable[Kept], *, free_bytes: int, num_bytes: int, saves: Iterable[int]
) -> int | None:
    """The first step whose checkpoint does not fit on the disk; None: all do. An old one is removed when a new one is complete.

    Args:
        section: What is kept.
        there: Checkpoints that are there, the oldest first.
        free_bytes: Room on the disk.
        num_bytes: Size of a new checkpoint.
        saves: Steps that are saved; of very many, the first are looked at.
    """
    newest = deque(there)
    for step in islice(saves, _MOST_SAVES):
        if free_bytes < num_bytes:
            return step
        free_bytes -= num_bytes
        newest.append(Kept(step, num_bytes))
        while len(newest) > section.keep_last:
            oldest = newest.popleft()
            if section.keep_every_n_steps is None or oldest.step % section.keep_every_n_steps:
                free_bytes += oldest.num_bytes
    return None


def _saves(section: CheckpointSection, step: int, stop_step: int) -> Iterator[int]:
    """The steps at which a run saves: those that are due, and the last one."""
    if section.every_n_steps:
        yield from range(step + section.every_n_steps - step % section.every_n_steps, stop_step, section.every_n_steps)
    yield stop_step


def _free_bytes(place: Path) -> int | None:
    """Room that this process may fill on the disk of a directory that may not exist yet; None: the file system does not tell."""
    try:
        disk = os.statvfs(nearest_existing(place))
    except OSError:
        return None
    blocks = disk.f_bfree if os.geteuid() == 0 else disk.f_bavail  # some are kept for the administrator
    return blocks * disk.f_frsize if disk.f_blocks else None


def _bytes_below(directory: Path) -> int:
    """Sizes of the files of a checkpoint; of one that cannot be read, those that can."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:  # it may go in this moment
                continue
    return total
