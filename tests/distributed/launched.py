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
LOG_LINE = re.compile(r"[WE]\d{4} |\[(rank\d+\]:\[)?[WE]\d{4} |frame #|Exception raised from |<omitting |\[Gloo\]")
MARK = "PHASE8_TEST_RUN"
LAUNCHER_VARIABLES = re.compile(r"(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT)$|TORCHELASTIC|OMPI_|PMI")


def environment(**variables):
    """The environment of this process without what a launcher has put there."""
    clean = {name: value for name, value in os.environ.items() if not LAUNCHER_VARIABLES.match(name)}
    return {**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}


def run(command, *, timeout_seconds=60.0, **variables):
    """Exit code, stdout and stderr of a command; afterwards none of its processes is left."""
    mark = f"{MARK}={uuid.uuid4().hex}"
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(**{MARK: mark.partition("=")[2]}, **variables), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        output, errors = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        for left in marked_processes(mark):
            os.kill(left, signal.SIGKILL)
        output, errors = process.communicate()
        pytest.fail(f"{command} has not ended within {timeout_seconds:g} s\n{output}\n{errors}")
    deadline = time.monotonic() + 3
    while (orphans := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for orphan in orphans:
        os.kill(orphan, signal.SIGKILL)
    assert not orphans, f"{len(orphans)} processes were left behind"
    return process.returncode, output, errors


def marked_processes(mark):
    """Ids of the processes, launcher and ranks, that have a mark in their environment; torchrun gives each rank a session of its own."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if mark.encode() in (directory / "environ").read_bytes().split(b"\0"):
                found.append(int(directory.name))
    return found


def torchrun(*arguments, num_processes=3, options=(), **keywords):
    """The same of torchrun on this host."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}", *options, *map(str, arguments)]
    return run(command, **keywords)


def code_of_first_failure(errors):
    """Rank and exit code that torchrun calls the root cause."""
    found = re.search(r"Root Cause.*?rank *: (\d+).*?exitcode *: (-?\d+)", errors, re.DOTALL)
    return tuple(map(int, found.groups()))


def own_lines(errors):
    """What the processes themselves have said, without the log lines of torch and torchrun's account at the end."""
    lines = errors.splitlines()
    end = lines.index(TRACEBACK) if TRACEBACK in lines else len(lines)
    return [line for line in lines[:end] if line and not LOG_LINE.match(line)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
