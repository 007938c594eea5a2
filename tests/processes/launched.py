"""Commands of several processes, started as a user starts them."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRACEBACK = "Traceback (most recent call last):"  # of torchrun; those of ranks begin with their number
# torchrun asks the ranks that are left to stop, and one of them may say that it will before it ends.
ASKED_TO_STOP = "SIGTERM: all ranks stop after this step"
LOG_LINE = re.compile(r"(\[rank\d+\]:)?\[?[WE]\d{4} |frame #|Exception raised from |<omitting |\[Gloo\]")
LONG = 240.0  # a test that takes so long hangs, however busy the machine is
MARK = "PHASE8_TEST_RUN"
LAUNCHER_VARIABLES = re.compile(r"(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT)$|TORCHELASTIC|OMPI_|PMI|SLURM_")


def environment(**variables):
    """The environment of this process without what a launcher has put there."""
    clean = {name: value for name, value in os.environ.items() if not LAUNCHER_VARIABLES.match(name)}
    return {**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}


class Launched:
    """A command and all the processes it starts, which a mark in their environment tells from others.

    Args:
        command: Its words.
        variables: Of the environment, beside those of this process.
    """

    def __init__(self, command, **variables):
        self.command, self._mark = list(map(str, command)), uuid.uuid4().hex
        self.process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=environment(**{MARK: self._mark}, **variables),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C of a terminal is for a group of processes
        )

    def processes(self, **variables):
        """Ids of its processes, of those with these variables in their environment; torchrun gives each rank a session of its own."""
        wanted, found = {f"{name}={value}".encode() for name, value in {MARK: self._mark, **variables}.items()}, []
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if wanted <= set((directory / "environ").read_bytes().split(b"\0")):
                    found.append(int(directory.name))
        return found

    def wait_until(self, condition, *, timeout_seconds=LONG):
        """Waits for something that the command does."""
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{self.command} has not come that far\n{''.join(self.kill())}")
            time.sleep(0.02)

    def end(self, *, timeout_seconds=LONG):
        """Exit code, stdout and stderr; afterwards none of its processes is left."""
        try:
            output, errors = self.process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.command} has not ended within {timeout_seconds:g} s\n{''.join(self.kill())}")
        deadline = time.monotonic() + 3
        while (orphans := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for orphan in orphans:
            os.kill(orphan, signal.SIGKILL)
        assert not orphans, f"{len(orphans)} processes were left behind\n{errors}"
        return self.process.returncode, output, errors

    def kill(self):
        """Ends all its processes at once; what they wrote."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return self.process.communicate()


def run(command, *, timeout_seconds=LONG, **variables):
    """Exit code, stdout and stderr of a command; afterwards none of its processes is left."""
    return Launched(command, **variables).end(timeout_seconds=timeout_seconds)


def torchrun(*arguments, num_processes=3, options=(), **keywords):
    """The same of torchrun on this host."""
    return run(torchrun_command(*arguments, num_processes=num_processes, options=options), **keywords)


def torchrun_command(*arguments, num_processes, options=()):
    """The words of torchrun on this host."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}", *options, *arguments]


def code_of_first_failure(errors):
    """Rank and exit code that torchrun calls the root cause."""
    found = re.search(r"Root Cause.*?rank *: (\d+).*?exitcode *: (-?\d+)", errors, re.DOTALL)
    return tuple(map(int, found.groups()))


def own_lines(errors):
    """What the processes themselves have said, without the log lines of torch and torchrun's account at the end."""
    lines = errors.splitlines()
    end = lines.index(TRACEBACK) if TRACEBACK in lines else len(lines)
    return [line for line in lines[:end] if line and not LOG_LINE.match(line) and not line.startswith(ASKED_TO_STOP)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
