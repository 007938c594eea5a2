"""How one process of several exits: its message and exit code, without waiting for anything."""

from __future__ import annotations

import contextlib
import ctypes
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

# Signals that ask a process to end, sent by schedulers, launchers, a closing terminal, or Slurm before the time limit (`--signal=USR1`).
END_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
FLUSH_SECONDS = 1.0
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
STILL_SECONDS = 20.0  # on a busy file system, ranks finish importing Python modules seconds apart
_BACKEND_ERROR = re.compile(r"gloo|nccl|pair closure", re.IGNORECASE)  # gloo raises plain RuntimeErrors


@contextmanager
def one_voice(world: World, *, still_seconds: float = STILL_SECONDS) -> Iterator[None]:
    """A context manager for errors that every rank finds: only the first rank of each host reports them.

    It is for work before `watch.running`, when ranks cannot communicate yet. The other ranks of a host stay silent until
    the launcher, which sees the first rank fail, ends them. If it does not, the error is their own, and they report it.

    Args:
        world: The place of this rank.
        still_seconds: How long other ranks stay silent.
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
    """The signals of `END_SIGNALS` that are not ignored; those that the parent process had ignored (nohup ignores SIGHUP) stay ignored."""
    return tuple(number for number in END_SIGNALS if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN)


def exit_code_of(error: BaseException) -> int:
    """The exit code for a process that ends with this error."""
    if isinstance(error, Phase8Error):
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def is_echo(error: BaseException) -> bool:
    """Whether an error may be a consequence of the failure of another rank."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _BACKEND_ERROR.search(str(error)) is not None)


def own_message(error: BaseException, *, rank: int) -> str:
    """The message of a rank about its own error: the sentence of a deliberate error, otherwise the traceback."""
    if isinstance(error, Phase8Error):
        return "".join(f"rank {rank}: {line}\n" for line in describe_error(error).splitlines())
    if isinstance(error, KeyboardInterrupt):
        return f"{str(error) or 'interrupted'}\n"
    if isinstance(error, SystemExit):
        return f"rank {rank}: {summary(error)}\n"
    return f"rank {rank}: {''.join(traceback.format_exception(error))}"


def summary(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, Phase8Error):
        return first_line(error)
    if isinstance(error, SystemExit):
        return f"ended with exit code {exit_code_of(error)}"
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of the error if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def leave_word(error_file: str | None, message: str) -> None:
    """Writes the message that torchrun shows in its summary after the exit codes; None: torchrun did not start this process."""
    if error_file is None:
        return
    word = {"message": {"message": message, "extraInfo": {"py_callstack": message.rstrip(), "timestamp": str(int(time.time()))}}}
    with contextlib.suppress(OSError):  # a full disk must not hide a message that was already printed
        Path(error_file).write_text(json.dumps(word), encoding="utf-8")


def leave(exit_code: int) -> NoReturn:
    """Ends the process without waiting for its other threads."""
    within(FLUSH_SECONDS, _flush)
    os._exit(exit_code)


def end_with_launcher() -> None:
    """Has the kernel kill this process when the launcher that started it ends; on other systems than Linux nothing does.

    The watch ends a rank whose launcher is gone, but it is a thread: a rank that holds the interpreter's lock while it waits for its device would
    wait forever for ranks that have ended, and keep its memory there.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def within(seconds: float, work: Callable[[], None]) -> None:
    """Runs something that may never return, and continues without it after a time-out."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)


def _flush() -> None:
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed
        sys.stdout.flush()
        sys.stderr.flush()
