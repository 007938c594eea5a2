"""When, where and from which code a run was started: the event `start` in its metrics, from which its report is drawn."""

from __future__ import annotations

import socket
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from phase8.train.build import Run

_ROOT = Path(__file__).parents[2]
_GIT_SECONDS = 5


def start_record(run: Run) -> dict[str, Any]:
    """Fields of the event, as plain JSON."""
    return {
        "time": now(),
        "host": socket.gethostname(),
        "code": code_version(),
        "world_size": run.engine.mesh.topology.world_size,
        "planned_memory_bytes": run.planned_memory_bytes,
        "reference_losses": run.data.reference_losses,
        "facts": dict(run.facts),
    }


def now() -> str:
    """The time in UTC to a second, as ISO 8601 writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def code_version(root: Path = _ROOT) -> str:
    """The commit of a working tree, with `-dirty` where files were changed; elsewhere the version of the package."""
    if (root / ".git").exists():  # a tree further up is another project's
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True)
            return f"commit {done.stdout.strip()}"
        except (OSError, subprocess.SubprocessError):  # there is no git, or the tree belongs to another user
            pass
    try:
        return f"phase8 {version('phase8')}"
    except PackageNotFoundError:
        return "unknown"
