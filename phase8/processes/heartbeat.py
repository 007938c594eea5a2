"""The ranks that this rank watches: the next rank, and the next one on its own host. Every rank is watched by at most two."""

from __future__ import annotations

import os
from collections.abc import Callable

from phase8.processes.bootstrap import World
from phase8.processes.failure import Beat, describe_loss


class Neighbour:
    """A rank that is watched by another one.

    Args:
        rank: Its number.
        has_same_launcher: torchrun started both on this host, so its process id is valid here.
    """

    def __init__(self, rank: int, *, has_same_launcher: bool):
        self.rank, self._has_same_launcher = rank, has_same_launcher
        self._beat, self._silent_ticks = Beat(), 0

    def find_loss(self, read_beat: Callable[[int], Beat], *, tick_seconds: float, heartbeat_seconds: float) -> str | None:
        """A sentence about the loss of the rank, or None; to be called every tick.

        Silence is counted in ticks, so that a pause of this process is not mistaken for one of the other.
        """
        # Read before the beat: a rank that has finished says so before its process ends.
        is_gone = self._has_same_launcher and self._beat.process != 0 and not _is_alive(self._beat.process)
        beat = read_beat(self.rank)
        self._silent_ticks = self._silent_ticks + 1 if beat.count == self._beat.count else 0
        self._beat = beat
        if beat.position.finished:
            return None
        if is_gone:
            return describe_loss(self.rank, beat, reason=f"its process {beat.process} has ended without a word")
        if self._silent_ticks * tick_seconds > heartbeat_seconds:
            return describe_loss(self.rank, beat, reason=f"nothing was heard from it for {heartbeat_seconds:g} s")
        return None


def neighbours_of(world: World) -> list[Neighbour]:
    """The ranks that this rank watches."""
    first_local = world.rank - world.local_rank
    has_same_launcher = world.launcher == "torchrun"  # it numbers the ranks of a host one after the other
    next_ranks = {(world.rank + 1) % world.world_size}
    local_ranks = range(first_local, first_local + world.local_world_size) if has_same_launcher else ()
    if has_same_launcher:
        next_ranks.add(first_local + (world.local_rank + 1) % world.local_world_size)
    return [Neighbour(rank, has_same_launcher=rank in local_ranks) for rank in sorted(next_ranks - {world.rank})]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
