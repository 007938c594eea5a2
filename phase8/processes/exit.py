"""How one process of several ends: what it says about an error, with which code, and without waiting for anything."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from phase8.errors import Phase8Error, describe_error
from phase8.processes.bootstrap import World
from phase8.terminal import tell

# What asks a process to end: schedulers and launchers, a terminal that closes, and Slurm ahead of the time limit (`--signal=USR1`).
END_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
FLUSH_SECONDS = 1.0
STILL_SECONDS = 20.0  # ranks that read Python's files from a busy file system come seconds apart
_BACKEND_ERROR = re.compile(r"gloo|nccl|pair closure", re.IGNORECASE)  # gloo raises plain RuntimeErrors


@contextmanager
def one_voice(world: World, *, still_seconds: float = STILL_SECONDS) -> Iterator[None]:
    """An error that every rank finds is told by the first rank of each host.

    For what is done before `watch.running`, when the ranks cannot talk to each other yet. The other ranks of a host keep still until
    the launcher, which has seen the first one fail, ends them. If it does not, the error is theirs alone, and they tell it.

    Args:
        world: The place of this rank.
        still_seconds: How long they keep still.
    """
    completed = False
    try:
        yield
        completed = True
    finally:
        if not completed and world.local_rank != 0:
            error = sys.exception()
            time.sleep(still_seconds)
            tell(own_message(error, rank=world.rank))
            raise SystemExit(exit_code_of(error)) from None


def heeded_end_signals() -> tuple[signal.Signals, ...]:
    """Those of `END_SIGNALS` that count: what whoever started this process has it ignore, as nohup does with SIGHUP, stays ignored."""
    return tuple(number for number in END_SIGNALS if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN)


def exit_code_of(error: BaseException) -> int:
    """The exit code of a process that this error ends."""
    if isinstance(error, Phase8Error):
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def is_echo(error: BaseException) -> bool:
    """Whether an error may be what the failure of another rank looks like from here."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _BACKEND_ERROR.search(str(error)) is not None)


def own_message(error: BaseException, *, rank: int) -> str:
    """What a rank says about its own error: the sentence if it was raised on purpose, else the traceback."""
    if isinstance(error, Phase8Error):
        return "".join(f"rank {rank}: {line}\n" for line in describe_error(error).splitlines())
    if isinstance(error, KeyboardInterrupt):
        return "interrupted: nothing was saved since the last checkpoint\n"
    if isinstance(error, SystemExit):
        return f"rank {rank}: {summary(error)}\n"
    return f"rank {rank}: {''.join(traceback.format_exception(error))}"


def summary(error: BaseException) -> str:
    """One line about an error."""
    if isinstance(error, Phase8Error):
        return first_line(error)
    if isinstance(error, SystemExit):
        return f"ended with exit code {exit_code_of(error)}"
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def first_line(error: BaseException) -> str:
    """The first line of a message, or the name of an error that has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def leave_word(error_file: str | None, message: str) -> None:
    """Writes what torchrun shows at the end of its account, below the exit codes of all ranks; None: there is no torchrun."""
    if error_file is None:
        return
    word = {"message": {"message": message, "extraInfo": {"py_callstack": message.rstrip(), "timestamp": str(int(time.time()))}}}
    with contextlib.suppress(OSError):  # a full disk must not hide what was told already
        Path(error_file).write_text(json.dumps(word), encoding="utf-8")


def leave(exit_code: int) -> NoReturn:
    """Ends the process whatever its other threads wait for."""
    within(FLUSH_SECONDS, _flush)
    os._exit(exit_code)


def within(seconds: float, work: Callable[[], None]) -> None:
    """Does something that may never end, and goes on without it then."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)


def _flush() -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
