"""The run directory, under which a run writes all its files."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from phase8.config.load import config_to_mapping
from phase8.config.schema import RunConfig, RunSection
from phase8.durable import open_lock_file, replace_file, storage_errors
from phase8.errors import CheckpointError, StorageError
from phase8.paths import real_path


@dataclass(frozen=True)
class RunDirectory:
    """The directory `<output_dir>/<name>` and the paths in it.

    Args:
        path: Path of the directory.
    """

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Directory with one subdirectory per saved step."""
        return self.path / "checkpoints"

    @property
    def superseded(self) -> Path:
        """Directory for checkpoints of a continuation that the user left by resuming from an earlier step."""
        return self.path / "superseded"

    @property
    def metrics(self) -> Path:
        """Path of the metrics file."""
        return self.path / "metrics.jsonl"

    @property
    def profiles(self) -> Path:
        """Directory of profiles of steps, a table and a trace for each rank."""
        return self.path / "profile"

    def profile(self, *, step: int, rank: int) -> Path:
        """The table of a step that a rank recorded."""
        return self.profiles / f"step_{step}_rank_{rank}.txt"

    def owns(self, checkpoint: Path) -> bool:
        """Whether a checkpoint belongs to this run."""
        return real_path(checkpoint).parent == real_path(self.checkpoints)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """A context manager that claims the run for this process, under any name of its directory; the claim leaves nothing behind.

        The lock file lies next to the directory, so that renaming the run does not move it.

        Raises:
            StorageError: Another process trains in the directory, a file has its name or that of a parent, or the lock file cannot be written.
        """
        if (file := next((each for each in (self.path, *self.path.parents) if os.path.exists(each) and not os.path.isdir(each)), None)) is not None:
            raise StorageError(
                f"run.output_dir is {self.path.parent} and run.name is {self.path.name}, but {file} is a file, and the run needs a directory there; "
                "choose other names, or move the file."
            )
        place = real_path(self.path)
        path = place.with_name(f".{place.name}.lock")
        missing = [directory for directory in path.parents if not directory.exists()]
        descriptor = self._claim(path)
        try:
            yield
        finally:
            with suppress(OSError):  # a lock file that stays does no harm
                path.unlink()
            os.close(descriptor)
            with suppress(OSError):  # a directory that contains a run is not empty, and stays
                for directory in missing:
                    directory.rmdir()

    def _claim(self, path: Path) -> int:
        """Opens and locks the lock file; closing the descriptor releases the lock.

        The lock belongs to the process (`lockf`): loader workers, which inherit the descriptor, do not keep it when the process is killed.
        """
        while True:
            with storage_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = open_lock_file(path)
                try:
                    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.path.samestat(os.fstat(descriptor), path.stat()):
                        return descriptor
                except FileNotFoundError:
                    pass
                except BlockingIOError:
                    os.close(descriptor)
                    raise StorageError(
                        f"another process is training in {self.path}; wait until it has finished or choose another run.name."
                    ) from None
                os.close(descriptor)  # the last owner removed the file after it was opened here

    @contextmanager
    def tell_interrupts(self) -> Iterator[None]:
        """A context manager that gives a `KeyboardInterrupt` a sentence: whether there is a checkpoint to go on from."""
        try:
            yield
        except KeyboardInterrupt:
            from phase8.checkpoint.load import list_checkpoints  # it imports torch, which commands that only plan do without

            saved = False
            with suppress(CheckpointError):
                saved = bool(list_checkpoints(self.checkpoints))
            since = " since the last checkpoint" if saved else ", and there is no checkpoint yet"
            raise KeyboardInterrupt(f"interrupted: nothing was saved{since}") from None

    def exists(self) -> bool:
        """Whether a run of this name has written anything."""
        return self.path.exists()

    def create(self) -> None:
        """Creates the directory.

        Raises:
            StorageError: It cannot be written.
        """
        for directory in (self.path, self.checkpoints):
            with storage_errors(directory):
                real_path(directory).mkdir(parents=True, exist_ok=True)

    def keep(self, name: str, content: bytes) -> None:
        """Writes a copy of a file that checkpoints carry, for people and tools that look for it in the run directory."""
        replace_file(self.path / name, content)

    def record(self, config: RunConfig) -> None:
        """Writes the config of the run to `config.yaml`."""
        text = yaml.safe_dump(config_to_mapping(config), sort_keys=False, allow_unicode=True)
        replace_file(self.path / "config.yaml", text.encode())

    def set_aside(self) -> Path | None:
        """Renames an earlier run of the same name to `<name>.1`, `.2`, ... so that nothing is lost; returns None if there is none."""
        place = real_path(self.path) if self.path.is_symlink() else self.path  # the user's link is kept
        with storage_errors(place):
            if not place.exists():
                return None
            number = 1
            while os.path.lexists(aside := place.with_name(f"{place.name}.{number}")):
                number += 1
            place.rename(aside)
            return aside

    def set_aside_checkpoints(self, steps: Iterable[Path]) -> None:
        """Moves checkpoints to another directory, where `--resume auto` does not find them, without deleting them."""
        for step in steps:
            number = 0
            while os.path.lexists(aside := self.superseded / f"{step.name}.{number}"):
                number += 1
            with storage_errors(aside):
                self.superseded.mkdir(exist_ok=True)
                step.rename(aside)


def run_directory(section: RunSection) -> RunDirectory:
    """The directory of a run."""
    return RunDirectory(Path(section.output_dir) / section.name)


def check_writable(*directories: Path) -> None:
    """Checks that directories can be written (for a missing one, its nearest existing parent); leaves no files.

    Raises:
        StorageError: A directory cannot be written.
    """
    for directory in directories:
        with storage_errors(directory), tempfile.TemporaryFile(dir=nearest_existing(directory)):
            pass


def nearest_existing(directory: Path) -> Path:
    """A directory itself, or the nearest of its parents that exists."""
    nearest = real_path(directory)
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    return nearest
