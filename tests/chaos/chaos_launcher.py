"""A stand-in for the agent of torchrun that starts ranks in a fraction of a second: they are forked from a process that has imported torch.

Like the agent it keeps one store over all attempts, gives every rank its place by the environment, and ends the others when one fails.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from tests.forked import forking_context

ROOT = Path(__file__).parents[2]
GRACE_SECONDS = 30.0  # as torchrun
LONG = 240.0  # what takes so long hangs, however busy the machine is


def run_script(script: str, arguments: Sequence[str], environment: dict[str, str], log: str) -> None:
    """What a process does: the script, as if it had been started by its name."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


class Group:
    """Processes that work together.

    Args:
        processes: In the order of their ranks.
        log: What they write.
    """

    def __init__(self, processes: Sequence[multiprocessing.Process], log: Path):
        self._processes, self._log = processes, log

    @property
    def output(self) -> str:
        """What they have written so far."""
        return self._log.read_text(encoding="utf-8") if self._log.exists() else ""

    @property
    def is_running(self) -> bool:
        """None has ended."""
        return all(process.is_alive() for process in self._processes)

    def kill(self, ranks: Sequence[int]) -> None:
        """Kills some of them; they have no chance to say anything."""
        for process in [self._processes[rank] for rank in ranks]:
            with contextlib.suppress(ProcessLookupError):
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)

    def end(self) -> list[int]:
        """Waits until all have ended, as torchrun does: when one fails, the others are asked to end and after a while killed.

        Returns:
            Exit codes in the order of the ranks; -9: killed.
        """
        deadline, asked = time.monotonic() + LONG, False
        while running := [process for process in self._processes if process.is_alive()]:
            multiprocessing.connection.wait([process.sentinel for process in running], max(0.0, deadline - time.monotonic()))
            if not asked and any(process.exitcode for process in self._processes):
                for process in running:
                    process.terminate()
                asked, deadline = True, time.monotonic() + GRACE_SECONDS
            elif time.monotonic() > deadline:
                self.kill(range(len(self._processes)))
                assert asked, f"ranks hang:\n{self.output}"
        return [process.exitcode for process in self._processes]


class Launcher:
    """Starts groups.

    Args:
        directory: For what they write to their terminal.
    """

    def __init__(self, directory: Path):
        self._directory, self._count = directory, 0
        self._directory.mkdir(parents=True, exist_ok=True)
        self._context = forking_context()
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def start(self, script: str, arguments: Sequence[str], *, num_ranks: int | None = None) -> Group:
        """Starts ranks, or with None a plain process."""
        self._count += 1
        log = self._directory / f"{self._count}.log"
        environments = [self._place(rank, num_ranks) for rank in range(num_ranks)] if num_ranks else [{}]
        processes = [
            self._context.Process(target=run_script, args=(str(ROOT / script), list(map(str, arguments)), environment, str(log)), daemon=True)
            for environment in environments
        ]
        for process in processes:
            process.start()
        return Group(processes, log)

    def _place(self, rank: int, num_ranks: int) -> dict[str, str]:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_PORT": self._store.port}
        agent = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "chaos", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        return {name: str(value) for name, value in places.items()} | agent
