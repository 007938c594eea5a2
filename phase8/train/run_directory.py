"""The run directory: where everything a run writes has its place."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from phase8.config.load import config_to_mapping
from phase8.config.schema import RunConfig, RunSection
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

    def create(self) -> None:
        """Creates the directory and proves that it can be written, before any work is done.

        Raises:
            StorageError: It cannot be written.
        """
        with self._storage_errors():
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass

    def record(self, config: RunConfig) -> None:
        """Writes the config of the run to `config.yaml`."""
        text = yaml.safe_dump(config_to_mapping(config), sort_keys=False, allow_unicode=True)
        with self._storage_errors():
            (self.path / "config.yaml").write_text(text, encoding="utf-8")

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"run directory {self.path} cannot be written ({error.strerror}); set run.output_dir to a place that can."
            ) from error

    def set_aside(self) -> Path | None:
        """Renames an earlier run of the same name to `<name>.1`, `.2`, ... so that a new one loses nothing; None if there is none."""
        if not self.path.exists():
            return None
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        try:
            self.path.rename(aside)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be renamed to {aside} ({error.strerror}); choose another run.name.") from error
        return aside

    def set_aside_checkpoints(self, steps: list[Path]) -> None:
        """Moves checkpoints out of the way of `--resume auto` without deleting them."""
        for step in steps:
            number = 0
            while (aside := self.superseded / f"{step.name}.{number}").exists():
                number += 1
            try:
                self.superseded.mkdir(exist_ok=True)
                step.rename(aside)
            except OSError as error:
                raise StorageError(f"{step} cannot be moved to {aside} ({error.strerror}); make {self.path} writable.") from error


def run_directory(section: RunSection) -> RunDirectory:
    """The directory of a run."""
    return RunDirectory(Path(section.output_dir) / section.name)
