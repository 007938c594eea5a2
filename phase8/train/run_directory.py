"""The run directory: where everything a run writes has its place."""

from __future__ import annotations

import fcntl
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import yaml

from phase8.config.load import config_to_mapping
from phase8.config.schema import RunConfig, RunSection
from phase8.durable import replace_file, storage_errors
from phase8.errors import StorageError


@dataclass(frozen=True)
class RunDirectory:
    """Paths below `<output_dir>/<name>`.

    Args:
        path: The directory itself.
    """

    path: Path

    @property
    def checkpoints(self) -> Path:
        """One directory per saved step."""
        return self.path / "checkpoints"

    @property
    def superseded(self) -> Path:
        """Checkpoints of a continuation that the user left by resuming from an earlier step."""
        return self.path / "superseded"

    def owns(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is one of this run."""
        return checkpoint.resolve().parent == self.checkpoints.resolve()

    def lock(self) -> IO[str]:
        """Claims the run for this process, until the returned file is closed or the process ends.

        Raises:
            StorageError: Another process trains in it, or its place cannot be written.
        """
        path = self.path.with_name(f".{self.path.name}.lock")  # beside the run, so that renaming the run does not move it
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w", encoding="utf-8")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StorageError(f"another process is training in {self.path}; wait until it has finished or choose another run.name.") from None
        return file

    def create(self) -> None:
        """Creates the directory and proves that it can be written, before any step is taken.

        Raises:
            StorageError: It cannot be written.
        """
        for directory in (self.path, self.checkpoints):
            with storage_errors(directory):
                directory.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=directory):
                    pass

    def keep_tokenizer(self, tokenizer: Path) -> Path:
        """A copy of the tokenizer that the run attaches to its checkpoints, whatever becomes of the original."""
        kept = self.path / f"tokenizer{tokenizer.suffix}"
        replace_file(kept, tokenizer.read_bytes())
        return kept

    def record(self, config: RunConfig) -> None:
        """Writes the config of the run to `config.yaml`."""
        text = yaml.safe_dump(config_to_mapping(config), sort_keys=False, allow_unicode=True)
        replace_file(self.path / "config.yaml", text.encode())

    def set_aside(self) -> Path | None:
        """Renames an earlier run of the same name to `<name>.1`, `.2`, ... so that a new one loses nothing; None if there is none."""
        with storage_errors(self.path):
            if not self.path.exists():
                return None
            number = 1
            while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
                number += 1
            self.path.rename(aside)
            return aside

    def set_aside_checkpoints(self, steps: list[Path]) -> None:
        """Moves checkpoints out of the way of `--resume auto` without deleting them."""
        for step in steps:
            number = 0
            while (aside := self.superseded / f"{step.name}.{number}").exists():
                number += 1
            with storage_errors(aside):
                self.superseded.mkdir(exist_ok=True)
                step.rename(aside)


def run_directory(section: RunSection) -> RunDirectory:
    """The directory of a run."""
    return RunDirectory(Path(section.output_dir) / section.name)
