"""The ranks that this rank watches: the next rank of its own host, and a rank of the next host. Every rank is watched by at most two.

A rank may be silent and well: while its main thread waits for its device inside a call that holds the interpreter's lock, for instance to
launch a kernel behind a full queue, its other threads stand still. Therefore silence is not yet a loss where more is known:

| the watched rank | is lost when |
|---|---|
| is of this host, and its process id is known | its process has ended |
| is of another host | all ranks of that host have been silent together for a time; a rank that beats there watches the processes of the others |
| was not started by torchrun, or is of this host and has never said anything | it has been silent for a time |
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from phase8.processes.bootstrap import World
from phase8.processes.failure import Beat, describe_loss, describe_ranks, describe_silence


class Neighbour:
    """A rank that is watched by another one.

    Args:
        rank: Its number.
        has_same_launcher: torchrun started both on this host, so its process id is valid here.
        host: The ranks of its host, if they watch each other's processes: it is lost when all of them are silent. Without them, its own
            silence is enough.
    """

    def __init__(self, rank: int, *, has_same_launcher: bool = False, host: Sequence[int] = ()):
        self.rank, self._has_same_launcher = rank, has_same_launcher
        self._others = [other for other in host if other != rank]
        self._beat, self._counts = Beat(), [Beat().count] * len(self._others)
        self._silent_ticks, self._silent_ticks_of_host = 0, 0
        self._lives = False  # its process was there at the last look
        self._earlier_beats: list[Beat] | None = None  # of all ranks, when this one had been silent for half the time-out

    def find_loss(self, read_beat: Callable[[int], Beat], *, tick_seconds: float, heartbeat_seconds: float) -> str | None:
        """A sentence about the loss of the rank, or None; to be called every tick.

        Silence is counted in ticks, so that a pause of this process is not mistaken for one of the other.
        """
        # Read before the beat: a rank that has finished says so before its process ends.
        is_gone = self._has_same_launcher and self._beat.process != 0 and not _is_alive(self._beat.process)
        self._listen(read_beat)
        self._lives = self._has_same_launcher and self._beat.process != 0 and not is_gone
        if self._beat.position.finished or self._lives:
            return None
        if is_gone:
            return describe_loss(self.rank, self._beat, reason=f"its process {self._beat.process} has ended without a word")
        if self._silent_ticks_of_host * tick_seconds > heartbeat_seconds:
            who = f"any rank of its host ({describe_ranks([self.rank, *self._others])})" if self._others else "it"
            return describe_loss(self.rank, self._beat, reason=f"nothing was heard from {who} for {heartbeat_seconds:g} s")
        return None

    def find_silence(self, read_beats: Callable[[], list[Beat]], *, tick_seconds: float, timeout_seconds: float) -> str | None:
        """A sentence about a silent rank of this host whose process lives, or None; to be called every tick after `find_loss`.

        Ranks that have been silent for the second half of the time-out are said to be silent, too.

        Args:
            read_beats: Reads the beats of all ranks.
            tick_seconds: Time between two calls.
            timeout_seconds: How long the rank may be silent.
        """
        silent_seconds = self._silent_ticks * tick_seconds
        if not self._lives or silent_seconds < timeout_seconds / 2:
            self._earlier_beats = None
            return None
        if self._earlier_beats is None:
            self._earlier_beats = read_beats()
        if silent_seconds < timeout_seconds:
            return None
        beats = read_beats()
        silent = [rank for rank, (earlier, beat) in enumerate(zip(self._earlier_beats, beats, strict=True)) if earlier.count == beat.count]
        return describe_silence(self.rank, beats, silent=silent, timeout_seconds=timeout_seconds)

    def _listen(self, read_beat: Callable[[int], Beat]) -> None:
        """Counts the ticks since the last beat of the rank, and since the last one of any rank of its host.

        The other ranks are read only while this one is silent; a beat of theirs from before counts then, which delays a loss by one tick.
        """
        beat = read_beat(self.rank)
        is_silent = is_host_silent = beat.count == self._beat.count
        if is_silent and self._others:
            counts = [read_beat(other).count for other in self._others]
            is_host_silent, self._counts = counts == self._counts, counts
        self._beat = beat
        self._silent_ticks = self._silent_ticks + 1 if is_silent else 0
        self._silent_ticks_of_host = self._silent_ticks_of_host + 1 if is_host_silent else 0


def neighbours_of(world: World) -> list[Neighbour]:
    """The ranks that this rank watches.

    torchrun numbers the ranks of a host one after the other, and hosts are taken to have equally many. A rank watches the rank at its own
    place on the next host, so that each rank of a host watches the next host: those that are silent themselves find nothing.
    """
    if world.launcher != "torchrun":  # nothing tells which ranks share a host
        return [Neighbour((world.rank + 1) % world.world_size)] if world.world_size > 1 else []
    first_local = world.rank - world.local_rank
    next_local = first_local + (world.local_rank + 1) % world.local_world_size
    first_of_host = (first_local + world.local_world_size) % world.world_size
    host = range(first_of_host, min(first_of_host + world.local_world_size, world.world_size))
    next_remote = min(first_of_host + world.local_rank, world.world_size - 1)
    neighbours = [Neighbour(next_local, has_same_launcher=True), Neighbour(next_remote, host=host)]
    return [neighbour for neighbour in neighbours if neighbour.rank != world.rank]


def _is_alive(process: int) -> bool:
    """Whether a process of this host has not ended; one that has, and that its launcher has not collected yet, is a zombie."""
    try:
        os.kill(process, 0)
        with contextlib.suppress(FileNotFoundError):  # not Linux
            return Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")[2][0] not in "ZX"
    except ProcessLookupError:
        return False
    return True
