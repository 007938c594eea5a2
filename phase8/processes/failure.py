"""What the ranks tell each other about where they are and why they stop: plain values and sentences, no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Position:
    """Where a rank is in its work.

    Args:
        step: The optimizer step, from 1; 0: before the first.
        doing: What it does there.
        ordinal: How many things it has begun in this step.
        finished: It has ended its work and waits for the others.
    """

    step: int = 0
    doing: str = "starting"
    ordinal: int = 0
    finished: bool = False

    @property
    def order(self) -> tuple[bool, int, int]:
        """Smaller for a rank that is behind."""
        return (self.finished, self.step, self.ordinal)

    def __str__(self) -> str:
        return "finished" if self.finished else f"step {self.step}, {self.doing}"


@dataclass(frozen=True)
class Beat:
    """The sign of life of a rank.

    Args:
        count: Grows with every beat.
        process: Id of the process on its host; 0: not known yet.
        position: Where it is.
        age_seconds: For how long it has been there.
    """

    count: int = -1
    process: int = 0
    position: Position = Position()
    age_seconds: float = 0.0

    def to_json(self) -> str:
        """For the store."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: bytes) -> Beat:
        """From the store."""
        values = json.loads(text)
        return Beat(**{**values, "position": Position(**values["position"])})


@dataclass(frozen=True)
class Failure:
    """Why the world stops.

    Args:
        rank: Who failed, is lost or is behind.
        exit_code: Of every rank.
        sentence: What happened.
        kind: `error`: the rank raised and tells it itself; `lost`: it is gone; `stall`: nobody moves.
    """

    rank: int
    exit_code: int
    sentence: str
    kind: str

    def to_json(self) -> str:
        """For the store."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: bytes) -> Failure:
        """From the store."""
        return Failure(**json.loads(text))


def describe_loss(rank: int, beat: Beat, *, reason: str) -> str:
    """The sentence about a rank that is gone."""
    return (
        f"rank {rank} is lost: {reason}; it was last at {beat.position}; "
        "look for its own message, for an out-of-memory kill in the system log of its host, and at the host itself."
    )


def find_stall(beats: Sequence[Beat], *, timeout_seconds: float) -> tuple[int, str] | None:
    """The rank that is behind and the sentence about it, if no rank has moved for the time-out."""
    if min(beat.age_seconds for beat in beats) < timeout_seconds:
        return None
    positions = [beat.position for beat in beats]
    slowest = min(position.order for position in positions)
    behind = [rank for rank, position in enumerate(positions) if position.order == slowest]
    places: dict[str, list[int]] = {}
    for rank in sorted(range(len(positions)), key=lambda rank: positions[rank].order):
        places.setdefault(str(positions[rank]), []).append(rank)
    where = "; ".join(f"{describe_ranks(ranks)}: {place}" for place, ranks in places.items())
    who = "all are at the same place" if len(behind) == len(beats) else f"{describe_ranks(behind)} {'is' if len(behind) == 1 else 'are'} behind"
    return behind[0], f"no rank has moved for {timeout_seconds:g} s and {who} ({where}); raise the time-out if this may take longer."


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
