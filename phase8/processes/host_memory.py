"""The memory of this host, as Linux reports it, and as much of it as the control groups of this process may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MEMORY_OF_HOST = Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


class _Names(NamedTuple):
    """The files of a control group, and the key of the page cache that makes room in the last of them."""

    limit: str
    current: str
    statistics: str
    page_cache: str


_VERSION_1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file")
_VERSION_2 = _Names("memory.max", "memory.current", "memory.stat", "inactive_file")


def used_bytes() -> int | None:
    """Memory that is not available, page-locked memory included; None where the system does not report it."""
    found = _of_host()
    return None if found is None else found["MemTotal"] - found["MemAvailable"]


def available_bytes() -> int | None:
    """Memory that processes may still take, page cache that would make room included; None where the system does not report it."""
    found, left = _of_host(), _left_to_control_group()
    amounts = [amount for amount in (None if found is None else found["MemAvailable"], left) if amount is not None]
    return min(amounts, default=None)


def _of_host() -> dict[str, int] | None:
    if not MEMORY_OF_HOST.exists():
        return None
    rows = (line.partition(":") for line in MEMORY_OF_HOST.read_text().splitlines())
    return {name: 1024 * int(rest.split()[0]) for name, _, rest in rows}


def _left_to_control_group() -> int | None:
    """What the control groups leave in which this process is, each within the next, without their page cache; None: none has a limit."""
    amounts = [amount for directory, names in _control_groups() if (amount := _left_to(directory, names)) is not None]
    return min(amounts, default=None)


def _control_groups() -> Iterator[tuple[Path, _Names]]:
    """The directories of these groups. In a container, the group that appears as the outermost one may be its own, whatever the process is told."""
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else ["0::/"]
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "" or "memory" in controllers.split(","):
            top, names = (CONTROL_GROUP, _VERSION_2) if controllers == "" else (CONTROL_GROUP / "memory", _VERSION_1)
            own = top / path.lstrip("/")
            yield from ((directory, names) for directory in (own, *own.parents) if directory.is_relative_to(top) and ".." not in directory.parts)


def _left_to(directory: Path, names: _Names) -> int | None:
    """What a control group leaves; None: it has no limit."""
    limit, current, statistics = (directory / name for name in names[:3])
    if not limit.exists() or (largest := limit.read_text().strip()) == "max":
        return None
    cached = next((int(line.split()[1]) for line in statistics.read_text().splitlines() if line.startswith(f"{names.page_cache} ")), 0)
    return max(int(largest) - int(current.read_text()) + cached, 0)
