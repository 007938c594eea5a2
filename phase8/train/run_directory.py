"""The run directory: where everything a run writes has its place."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from phase8.config.load import config_to_mapping
from phase8.config.schema import RunConfig, RunSection
from phase8.durable import replace_file, storage_errors


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
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass

    def record(self, config: RunConfig) -> None:
        """Writes the config of the run to `config.yaml`."""
        text = yaml.safe_dump(config_to_mapping(config), sort_keys=False, allow_unicode=True)
        replace_file(self.path / "config.yaml", text.encode())

    def set_aside(self) -> Path | None:
        """Renames an earlier run of the same name to `<name>.1`, `.2`, ... so that a new one loses nothing; None if there is none."""
        if not self.path.exists():
            return None
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        with storage_errors(aside):
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
