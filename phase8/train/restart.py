"""`--resume` after a restart by torchrun: the run continues from what it has saved itself, whatever the first start resumed.

A torchrun agent keeps its name over all its restarts, and a group that restarts shares at least one agent with the group before.
So a run records the agents that have trained it beside its checkpoints; a later launch or an earlier run has other agents.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from phase8.checkpoint.load import list_checkpoints
from phase8.durable import replace_file, storage_errors
from phase8.errors import StorageError
from phase8.train.run_directory import RunDirectory


def resume_after_restart(asked: str, directory: RunDirectory, *, agents: Collection[str]) -> str:
    """The value of `--resume` for `resume_run`.

    Args:
        asked: The given `--resume`: `auto`, `none`, or a checkpoint directory.
        directory: Directory of the run.
        agents: Names of the agents that started this group.

    Raises:
        StorageError: The record of agents cannot be read.
    """
    if asked == "auto" or set(agents).isdisjoint(recorded_agents(directory)):
        return asked
    return resume_own_run(asked, directory)


def resume_own_run(asked: str, directory: RunDirectory) -> str:
    """The value of `--resume` for a run that began as `asked` and owns its directory; before its first save, it begins as `asked` again."""
    return "auto" if asked == "none" or list_checkpoints(directory.checkpoints) else asked


def record_agents(directory: RunDirectory, *, agents: Collection[str]) -> None:
    """Adds to the names of the agents that have trained this run.

    Args:
        directory: Directory of the run, which exists.
        agents: As for `resume_after_restart`.

    Raises:
        StorageError: The record cannot be read or written.
    """
    known = recorded_agents(directory) if agents else set()
    if not known.issuperset(agents):
        replace_file(_record(directory), json.dumps(sorted(known.union(agents))).encode())


def recorded_agents(directory: RunDirectory) -> set[str]:
    """The names of the agents that have trained a run.

    Raises:
        StorageError: The record cannot be read.
    """
    path = _record(directory)
    with storage_errors(path):
        try:
            names = json.loads(path.read_bytes())
        except FileNotFoundError:
            return set()
        except ValueError:
            names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise StorageError(f"{path} is not the list of names that a run records; delete it, and start the run again with --resume auto.")
    return set(names)


def _record(directory: RunDirectory) -> Path:
    return directory.path / "launchers.json"
