"""How a run of several ranks ends: all ranks together, within seconds, with one message.

Every rank runs two small threads beside its work. One writes a beat into the store (a sign of life with the current action) every
second and reads those of other ranks. The other ends the process if the first is stuck because the store is gone.

| what happens | what the ranks do |
|---|---|
| all ranks find the same error before they meet | the first rank of each host reports it (`exit.one_voice`) |
| a rank raises | it prints its message and exits with its code; the rest, in collectives that it never joins, follow; rank 0 prints the reason |
| a rank is killed | the rank of its host that watches it sees that its process is gone; all exit with 7 |
| a host is lost | the ranks of the host before it see that the beats of all its ranks have stopped for `heartbeat_seconds`; all exit with 7 |
| a rank is silent, but its process lives | it is no loss (`heartbeat.py` says why); after the time-out the rank that watches it reports a stall |
| a collective breaks | gloo raises where a peer is gone; the rank treats this as an echo and waits for the record of the actual failure |
| no rank moves for the time-out | rank 0 reads all positions and names the rank that is behind; every rank writes a hang record; all exit with 7 |
| rank 0 is silent or lost | the rank that found the failure prints the reason instead |
| the store is gone | the host of rank 0 is lost: one rank of each host says so; all exit with 7 |
| torchrun is killed | the kernel kills its ranks, also one that holds the interpreter's lock; ranks of other hosts have lost a host |
| SIGTERM, SIGHUP, SIGUSR1 | a failure after which the launcher signals gets time to be reported; then the rank exits with 128 + number |

The training loop has its own handlers of these signals, which finish the step and save. A rank that ends because of another one uses
`os._exit`, because its main thread may be in a collective forever. torchrun itself exits with 1 whatever its ranks did; its summary
ends with the code and the message of the first rank that failed, so that rank must exit first.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

import torch.distributed as dist

from phase8.errors import CommunicationError
from phase8.processes.bootstrap import World
from phase8.processes.exit import (
    end_with_launcher,
    exit_code_of,
    first_line,
    heeded_end_signals,
    is_echo,
    leave,
    leave_word,
    own_message,
    summary,
    within,
)
from phase8.processes.failure import Beat, Failure, Position, find_stall
from phase8.processes.hang_record import write_hang_record
from phase8.processes.heartbeat import neighbours_of
from phase8.processes.rendezvous import connect, process_group
from phase8.terminal import tell

FAILURE, RANK_0_TELLS, ACKNOWLEDGED, LEFT = "failure", "rank_0_tells", "acknowledged", "left"
FINISHED, EVERYONE_FINISHED = "finished", "everyone_finished"
# torchrun polls its processes ten times a second; the first failed rank must be gone for this long before the rest follow.
FOLLOW_SECONDS = 1.0
PATIENCE_SECONDS = 5.0  # time for ranks that do not answer while the run ends
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Limits:
    """Time-outs of a run.

    Args:
        timeout_seconds: How long the ranks may take to meet, how long all of them may stay at one position, and how long a rank may be silent
            whose process lives.
        heartbeat_seconds: How long all ranks of another host may be silent, and how long the store may take to answer. A rank is silent while
            its main thread waits for its device with the interpreter's lock held. Other ranks keep a device waiting as long as they compile
            at the first step, which may take more than half a minute.
        tick_seconds: Time between two beats.
    """

    timeout_seconds: float = 600.0
    heartbeat_seconds: float = 120.0
    tick_seconds: float = 1.0


@contextmanager
def running(world: World, *, device_type: str = "cpu", limits: Limits | None = None, hang_directory: Path | None = None) -> Iterator[Watch]:
    """A context manager for the process group and the watch over it.

    If one of several ranks fails inside, the process ends inside as well. With one rank, errors are raised as usual.

    Args:
        world: From `world_from_environment`.
        device_type: Type of the device.
        limits: The time-outs.
        hang_directory: Directory for hang records; None: none are written.

    Raises:
        CommunicationError: The ranks do not meet in time.
        ConfigError: There are more processes than GPUs.
    """
    limits = Limits() if limits is None else limits
    with process_group(world, device_type=device_type, timeout_seconds=limits.timeout_seconds) as attempt:
        if world.world_size == 1:
            yield Watch(world, limits=limits)
            return
        store = dist.PrefixStore(f"{attempt}/watch", connect(world, timeout_seconds=limits.timeout_seconds))
        with Watch(world, store, limits=limits, device_type=device_type, hang_directory=hang_directory) as watch:
            yield watch


class Watch:
    """The position of this rank, and the watch over the other ranks.

    Args:
        world: The place of this rank.
        store: A separate connection, with the keys of this attempt; None: there is one rank.
        limits: The time-outs.
        device_type: Device whose collectives a hang record shows.
        hang_directory: Directory for hang records.
    """

    def __init__(
        self,
        world: World,
        store: dist.Store | None = None,
        *,
        limits: Limits,
        device_type: str = "cpu",
        hang_directory: Path | None = None,
    ):
        self.world, self.limits = world, limits
        self._store, self._device_type, self._hang_directory = store, device_type, hang_directory
        self._position, self._moved_at = Position(), time.monotonic()  # written by the main thread only
        self._count, self._beating = 0, threading.Lock()
        self._neighbours = neighbours_of(world)
        self._done, self._is_ending = threading.Event(), False
        self._threads = [threading.Thread(target=work, name=f"phase8{work.__name__}", daemon=True) for work in (self._watch, self._guard)]
        self._handlers: dict[signal.Signals, object] = {}  # handlers to be restored

    def report(self, *, step: int, doing: str) -> None:
        """Sets the current position of this rank; cheap, since the thread writes it to the store.

        Args:
            step: The optimizer step, from 1.
            doing: Current action for the message about a hang, such as `forward of microbatch 3`.
        """
        self._move_to(Position(step, doing, ordinal=self._position.ordinal + 1 if step == self._position.step else 1))

    def __enter__(self) -> Watch:
        if self.world.launcher == "torchrun":
            end_with_launcher()
        self._send_beat()
        for thread in self._threads:
            thread.start()
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._on_terminate) for number in heeded_end_signals()}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._fail(error)
        self._finish()
        self._done.set()
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _move_to(self, position: Position) -> None:
        self._position, self._moved_at = position, time.monotonic()

    # ---- the main thread: how this rank exits

    def _finish(self) -> None:
        """Waits until all ranks have finished; until then, the failure of any of them still stops all."""
        self._move_to(replace(self._position, finished=True))
        self._send_beat()
        if self._store.add(FINISHED, 1) == self.world.world_size:
            self._store.set(EVERYONE_FINISHED, "")
        while not self._store.check([EVERYONE_FINISHED]):
            time.sleep(POLL_SECONDS)

    def _fail(self, error: BaseException) -> NoReturn:
        """Records the failure of this rank unless another was recorded first, and ends the process."""
        if self._handlers:
            for number in (*self._handlers, signal.SIGINT):  # it is ending already
                signal.signal(number, signal.SIG_IGN)
        if is_echo(error):
            # The watch ends this process once it knows the reason. A tick takes longer than `tick_seconds`, by the answers of the store.
            time.sleep(1.25 * self.limits.heartbeat_seconds + 3 * self.limits.tick_seconds)
            error = CommunicationError(
                f"a collective failed at {self._position}, but no rank is known to have failed ({first_line(error)}); "
                "look at the network between the hosts."
            )
        failure = Failure(self.world.rank, exit_code_of(error), summary(error), "error")
        try:
            is_first = self._claim(failure)
        except dist.DistError:
            is_first = True  # no other rank can report it
        if not is_first:
            time.sleep(PATIENCE_SECONDS)  # the watch ends this process with the exit code of the first failure
            leave(failure.exit_code)
        message = own_message(error, rank=self.world.rank)
        tell(message)
        leave_word(self.world.error_file, message)
        with contextlib.suppress(dist.DistError):
            self._wait_until(lambda: self._store.add(ACKNOWLEDGED, 0) >= self.world.world_size - 1)
            self._store.set(LEFT, "")
        leave(failure.exit_code)

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        self._done.wait(FOLLOW_SECONDS + 3 * self.limits.tick_seconds)
        raise SystemExit(128 + number)

    # ---- the threads: how this rank learns about the other ranks

    def _watch(self) -> None:
        try:
            while not self._done.wait(self.limits.tick_seconds):
                self._send_beat()
                self._look()
        except dist.DistError as error:
            if not self._done.is_set():
                self._end_without_store(first_line(error))

    def _guard(self) -> None:
        """Ends the process when the watch itself is stuck: a host that has lost power never answers."""
        count, silent_ticks = self._count, 0
        while not self._done.wait(self.limits.tick_seconds):
            silent_ticks = silent_ticks + 1 if count == self._count else 0
            count = self._count
            # Who ends sends no beats, but has the reason to tell, and may wait for others before.
            patience = self.limits.heartbeat_seconds + (3 * PATIENCE_SECONDS if self._is_ending else 0.0)
            if silent_ticks * self.limits.tick_seconds > patience:
                self._end_without_store(f"no answer for {patience:g} s")

    def _send_beat(self) -> None:
        with self._beating:  # a beat must not overtake a more recent one
            age_seconds = time.monotonic() - self._moved_at
            beat = Beat(self._count, os.getpid(), self._position, age_seconds)
            self._store.set(f"beat/{self.world.rank}", beat.to_json())
            self._count += 1

    def _look(self) -> None:
        """Ends this process if a failure is recorded; otherwise looks for one to record."""
        if self._store.check([FAILURE]):
            failure = Failure.from_json(self._store.get(FAILURE))
            if failure.kind != "error" or failure.rank != self.world.rank:
                self._end(failure)
            return
        found = self._find_loss() or self._find_stall()
        if found is not None and self._claim(found):
            self._end(found, found_here=True)

    def _claim(self, failure: Failure) -> bool:
        """Records a failure; False if another was recorded before."""
        text = failure.to_json()
        return self._store.compare_set(FAILURE, "", text).decode() == text

    def _find_loss(self) -> Failure | None:
        for neighbour in self._neighbours:
            sentence = neighbour.find_loss(self._beat_of, tick_seconds=self.limits.tick_seconds, heartbeat_seconds=self.limits.heartbeat_seconds)
            if sentence is not None:
                return Failure(neighbour.rank, CommunicationError.exit_code, sentence, "loss")
        return None

    def _find_stall(self) -> Failure | None:
        """Every rank looks for the silence of those that it watches; rank 0 for a stall of any rank, once it does not move itself."""
        tick_seconds, timeout_seconds = self.limits.tick_seconds, self.limits.timeout_seconds
        for neighbour in self._neighbours:
            sentence = neighbour.find_silence(self._beats, tick_seconds=tick_seconds, timeout_seconds=timeout_seconds)
            if sentence is not None:
                return Failure(neighbour.rank, CommunicationError.exit_code, sentence, "stall")
        if self.world.rank != 0 or time.monotonic() - self._moved_at < timeout_seconds:
            return None
        stall = find_stall(self._beats(), timeout_seconds=timeout_seconds)
        return None if stall is None else Failure(stall[0], CommunicationError.exit_code, stall[1], "stall")

    def _beats(self) -> list[Beat]:
        return [self._beat_of(rank) for rank in range(self.world.world_size)]

    def _beat_of(self, rank: int) -> Beat:
        key = f"beat/{rank}"
        return Beat.from_json(self._store.get(key)) if self._store.check([key]) else Beat()

    def _end(self, failure: Failure, *, found_here: bool = False) -> NoReturn:
        """Ends this process because of another rank, or because no rank moves.

        Rank 0 tells the reason. The rank that found the failure does if rank 0 is the failed one, or does not answer.
        """
        self._is_ending = True
        tells = self.world.rank == 0 or (found_here and failure.rank == 0)
        if self.world.rank == 0:
            with contextlib.suppress(dist.DistError):
                self._store.set(RANK_0_TELLS, "")
        directory = self._hang_directory
        if failure.kind == "stall" and directory is not None:
            within(PATIENCE_SECONDS, lambda: write_hang_record(directory, rank=self.world.rank, device_type=self._device_type))
        if found_here and not tells:
            with contextlib.suppress(dist.DistError):
                tells = not self._wait_until(lambda: self._store.check([RANK_0_TELLS]))
        if tells:
            time.sleep(POLL_SECONDS)  # the failed rank prints its own message first
            tell(f"error: {f'stopped because rank {failure.rank} failed: ' if failure.kind == 'error' else ''}{failure.sentence}\n")
        with contextlib.suppress(dist.DistError):
            self._store.add(ACKNOWLEDGED, 1)
            if failure.kind == "error":
                self._wait_until(lambda: self._store.check([LEFT]))
        if failure.kind != "stall":
            time.sleep(FOLLOW_SECONDS)  # torchrun, which looks from time to time, sees the failed rank end before this one
        leave(failure.exit_code)

    def _end_without_store(self, reason: str) -> NoReturn:
        if self.world.local_rank == 0:
            host, port = self.world.address
            tell(
                f"rank {self.world.rank}: error: the store at {host}:{port} is gone ({reason}): "
                "the host or launcher of rank 0 has ended; look at its output for the reason.\n"
            )
        leave(CommunicationError.exit_code)

    def _wait_until(self, condition: Callable[[], bool]) -> bool:
        """Whether the condition holds within `PATIENCE_SECONDS`."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (holds := condition()) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return holds
