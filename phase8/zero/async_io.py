"""What DeepSpeed reads and writes on NVMe with: it compiles it once, at the first use, while other processes wait for it at a lock of torch."""

from __future__ import annotations

import glob
import importlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from phase8.errors import ConfigError
from phase8.kernels.toolchain import without_architectures
from phase8.terminal import warn
from phase8.zero.reserved_writes import reserve_room

# Another op, which it needs.
_LOADED_FIRST = "pin_memory"
# No compilation takes so long.
_COMPILATION_SECONDS = 900.0
# Others that only look for changes of the sources hold the lock for less.
_SECONDS_BEFORE_A_WORD = 5.0
_SECONDS_BETWEEN_LOOKS = 0.2


def require_async_io() -> None:
    """Refuses NVMe where it cannot be compiled.

    Raises:
        ConfigError: A compiler or libaio is missing.
    """
    if not importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            "zero.nvme_path is given, but what DeepSpeed reads and writes there with cannot be compiled here; install a C++ compiler, ninja and the "
            "headers of libaio (apt install g++ ninja-build libaio-dev; dnf install gcc-c++ ninja-build libaio-devel), or set zero.offload_optimizer "
            "and zero.offload_params to cpu and zero.nvme_path to null."
        )


def load_async_io(*, speaks: bool = True) -> None:
    """Loads it, and compiles it the first time, which takes one to two minutes. It then reserves the room of what it writes.

    Args:
        speaks: Whether this process says that it compiles, or waits for another one.

    Raises:
        ConfigError: An earlier compilation was killed.
    """
    from torch.utils.cpp_extension import _get_build_directory  # imports triton, which others import after settings of their own

    builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()
    libraries = [Path(_get_build_directory(name, verbose=False)) / f"{name}.so" for name in (_LOADED_FIRST, builder.name)]
    say = warn if speaks else lambda sentence: None
    for library in libraries:
        _wait_for_others(library.with_name("lock"), library.stem, say)
    is_new, begin = not libraries[-1].exists(), time.monotonic()
    if is_new:
        say(f"compiling DeepSpeed's {builder.name} once, for one to two minutes; later runs find it in {libraries[-1].parent}")
    with without_architectures():
        reserve_room(builder.load(verbose=False))
    if is_new:
        say(f"DeepSpeed's {builder.name} is compiled ({time.monotonic() - begin:.0f} s)")


def _wait_for_others(lock: Path, name: str, say: Callable[[str], None]) -> None:
    """Waits while another process compiles, as torch does, but neither silently nor for ever.

    Raises:
        ConfigError: The lock is too old.
    """
    begin, has_told = time.monotonic(), False
    while (made := _time_of(lock)) is not None:
        if time.time() - made > _COMPILATION_SECONDS:
            raise ConfigError(
                f"{lock} is older than any compilation takes, so the process that compiled DeepSpeed's {name} was killed, and others would wait "
                "for it for ever; delete the file."
            )
        if not has_told and time.monotonic() - begin >= _SECONDS_BEFORE_A_WORD:
            has_told = True
            say(_about(lock, name, made))
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _time_of(lock: Path) -> float | None:
    with suppress(FileNotFoundError):
        return lock.stat().st_mtime
    return None


def _about(lock: Path, name: str, made: float) -> str:
    """A sentence about a lock that is waited for."""
    since, holders = time.strftime("%H:%M:%S", time.localtime(made)), _processes_with(lock)
    if holders:
        return f"waiting for process {', '.join(holders)}, which has been compiling DeepSpeed's {name} since {since}"
    return (
        f"waiting for a compilation of DeepSpeed's {name} since {since}, but no process of this host is seen to hold its lock; if no other host or "
        f"container compiles it, its process was killed: delete {lock}"
    )


def _processes_with(path: Path) -> list[str]:
    """Ids of the processes of this host that have a file open, as far as this user may see them."""
    found, target = set(), os.path.realpath(path)
    for descriptor in glob.iglob("/proc/[0-9]*/fd/*"):
        with suppress(OSError):  # the process has ended, or is another user's
            if os.readlink(descriptor) == target:
                found.add(descriptor.split("/")[2])
    return sorted(found, key=int)
