"""Messages between ranks about their position and the reason for stopping: plain values and sentences, no torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Position:
    """The current position of a rank in its work.

    Args:
        step: The optimizer step, from 1; 0: before the first step.
        doing: The current action.
        ordinal: Number of actions begun in this step.
        finished: It has finished its work and waits for the other ranks.
    """

    step: int = 0
    doing: str = "starting"
    ordinal: int = 0
    finished: bool = False

    @property
    def order(self) -> tuple[bool, int, int]:
        """Sort key; smaller for a rank that is behind."""
        return (self.finished, self.step, self.ordinal)

    def __str__(self) -> str:
        return "finished" if self.finished else f"step {self.step}, {self.doing}"


@dataclass(frozen=True)
class Beat:
    """A sign of life of a rank.

    Args:
        count: Increases with every beat.
        process: Process id on its host; 0: not known yet.
        position: Current position of the rank.
        age_seconds: Time since the position changed.
    """

    count: int = -1
    process: int = 0
    position: Position = Position()
    age_seconds: float = 0.0

    def to_json(self) -> str:
        """The JSON text for the store."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: bytes) -> Beat:
        """Parses the JSON text from the store."""
        values = json.loads(text)
        return Beat(**{**values, "position": Position(**values["position"])})


@dataclass(frozen=True)
class Failure:
    """The reason why all ranks stop.

    Args:
        rank: The rank that failed, is lost or is behind.
        exit_code: Exit code of every rank.
        sentence: Description of the failure.
        kind: `error`: the rank raised and reports it itself; `loss`: its process is gone; `stall`: no rank moves, or a living rank is silent.
    """

    rank: int
    exit_code: int
    sentence: str
    kind: str

    def to_json(self) -> str:
        """The JSON text for the store."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: bytes) -> Failure:
        """Parses the JSON text from the store."""
        return Failure(**json.loads(text))


def describe_loss(rank: int, beat: Beat, *, reason: str) -> str:
    """The sentence about a rank whose process is gone."""
    return (
        f"rank {rank} is lost: {reason}; it was last at {beat.position}; "
        "look for its own message, for an out-of-memory kill in the system log of its host, and at the host itself."
    )


def describe_silence(rank: int, beats: Sequence[Beat], *, silent: Collection[int], timeout_seconds: float) -> str:
    """The sentence about a silent rank whose process lives.

    Args:
        rank: The rank.
        beats: The last beats of all ranks.
        silent: All silent ranks.
        timeout_seconds: How long the rank has been silent.
    """
    return (
        f"rank {rank} has been silent for {timeout_seconds:g} s: its process lives, but is stopped, or waits for its device while it holds the "
        f"interpreter's lock ({_places(beats, silent=silent)}); raise the time-out if this may take longer."
    )


def find_stall(beats: Sequence[Beat], *, timeout_seconds: float) -> tuple[int, str] | None:
    """The rank that is furthest behind and a sentence about it, if no rank has moved for the time-out; otherwise None.

    The last beat of a silent rank says how long the rank had not moved by then. If that is less than the time-out, this finds no stall; the
    rank that watches the silent one does (`heartbeat.Neighbour.find_silence`).
    """
    if min(beat.age_seconds for beat in beats) < timeout_seconds:
        return None
    slowest = min(beat.position.order for beat in beats)
    behind = [rank for rank, beat in enumerate(beats) if beat.position.order == slowest]
    who = "all are at the same place" if len(behind) == len(beats) else f"{describe_ranks(behind)} {'is' if len(behind) == 1 else 'are'} behind"
    return behind[0], f"no rank has moved for {timeout_seconds:g} s and {who} ({_places(beats)}); raise the time-out if this may take longer."


def _places(beats: Sequence[Beat], *, silent: Collection[int] = ()) -> str:
    """The positions of all ranks, those that are behind first."""
    places: dict[str, list[int]] = {}
    for rank in sorted(range(len(beats)), key=lambda rank: beats[rank].position.order):
        places.setdefault(f"{'silent, last at ' if rank in silent else ''}{beats[rank].position}", []).append(rank)
    return "; ".join(f"{describe_ranks(ranks)}: {place}" for place, ranks in places.items())


def describe_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    spans = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(spans)}"
