"""The memory of this host, as Linux reports it, and as much of it as the control group of this process may use."""

from __future__ import annotations

from pathlib import Path

MEMORY_OF_HOST = Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")


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
    """The limit of version 2 less what the group holds, without its page cache; None: there is no limit."""
    limit, current, statistics = (CONTROL_GROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if not limit.exists() or (largest := limit.read_text().strip()) == "max":
        return None
    cached = next((int(line.split()[1]) for line in statistics.read_text().splitlines() if line.startswith("inactive_file ")), 0)
    return max(int(largest) - int(current.read_text()) + cached, 0)
