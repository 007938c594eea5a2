"""What the events in `metrics.jsonl` say about a run. They come from a file: a value of another form than a run writes counts as missing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from phase8.formatting import format_seconds

EVALUATIONS_CHANGED = "evaluations_changed"  # losses of evaluations from here on do not compare with those before
_MAX_CHARACTERS = 300
_WORTH_A_ROW = 1.1  # times the median rank
# Shown elsewhere, or summed up.
_NO_ROW = {"settings", "sample", "checkpoint", "stragglers"}


class EventRow(NamedTuple):
    """An event in words: the step after which it happened, its kind and what is known about it."""

    step: int
    kind: str
    text: str


@dataclass(frozen=True)
class RunEvents:
    """The events of a run.

    Args:
        starts: Fields of each start of a process group, the first one first.
        rows: Events in words, in order.
        steps: Steps of each kind of event.
        samples: Texts that the model wrote, by step.
        settings: Settings chosen automatically, with device and reason.
        epochs: Epochs of each source up to the last save.
    """

    starts: tuple[Mapping[str, Any], ...]
    rows: tuple[EventRow, ...]
    steps: Mapping[str, tuple[int, ...]]
    samples: Mapping[int, str]
    settings: Mapping[str, str]
    epochs: Mapping[str, float]

    @classmethod
    def from_records(cls, records: Sequence[Mapping[str, Any]]) -> RunEvents:
        """Sorts the events among the lines of a metrics file."""
        events = [record for record in records if "event" in record]
        steps: dict[str, tuple[int, ...]] = {}
        for record in events:
            steps[record["event"]] = (*steps.get(record["event"], ()), record["step"])
        saves, settings = _of_kind(events, "checkpoint"), _of_kind(events, "settings")
        return cls(
            starts=tuple(_of_kind(events, "start")),
            rows=tuple(_rows(events)),
            steps=steps,
            samples={record["step"]: record["text"] for record in _of_kind(events, "sample") if isinstance(record.get("text"), str)},
            settings={name: in_words(value) for name, value in settings[-1].items() if name not in ("step", "event")} if settings else {},
            epochs=numbers_by_name(saves[-1].get("epochs")) if saves else {},
        )

    @property
    def facts(self) -> dict[str, str]:
        """Facts about the run as it was started last, by name."""
        facts = self.starts[-1].get("facts") if self.starts else None
        return {name: value for name, value in facts.items() if isinstance(value, str)} if isinstance(facts, dict) else {}

    @property
    def reference_losses(self) -> dict[str, float]:
        """Losses to compare with, by name."""
        return numbers_by_name(self.starts[-1].get("reference_losses")) if self.starts else {}

    @property
    def planned_memory_bytes(self) -> float | None:
        """Planned memory of a GPU."""
        planned = self.starts[-1].get("planned_memory_bytes") if self.starts else None
        return float(planned) if _is_number(planned) else None

    @property
    def origin(self) -> str:
        """When, where and from which code the run was started; empty if it was not recorded."""
        if not self.starts:
            return ""
        first, last = self.starts[0], self.starts[-1]
        begun = f"started {_moment(first)}"
        again = f", {len(self.starts)} starts, the last {_moment(last)}" if len(self.starts) > 1 else ""
        return f"{begun}{again} on {in_words(last.get('host', '?'))}, {in_words(last.get('code', 'unknown code'))}"


def numbers_by_name(value: object) -> dict[str, float]:
    """The numbers of a mapping read from a file; empty if it is none."""
    return {name: float(number) for name, number in value.items() if _is_number(number)} if isinstance(value, dict) else {}


def in_words(value: object) -> str:
    """A value read from a file, as text of bounded length."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]} …"


def _rows(events: Sequence[Mapping[str, Any]]) -> Iterator[EventRow]:
    for record in events:
        kind, step = record["event"], record["step"]
        if kind not in _NO_ROW:
            yield EventRow(step, kind.replace("_", " "), _described(record))
    slow = [record for record in _of_kind(events, "stragglers") if _is_number(record.get("ratio")) and record["ratio"] > _WORTH_A_ROW]
    if slow:
        worst = max(slow, key=lambda record: record["ratio"])
        place = f"rank {in_words(worst.get('slowest_rank'))} on {in_words(worst.get('slowest_host'))}"
        yield EventRow(worst["step"], "straggler", f"{len(slow)} times a rank was slow; the worst was {place}, {worst['ratio']:.2f} times the median")
    if saves := _of_kind(events, "checkpoint"):
        stalls = [record["checkpoint_stall_seconds"] for record in saves if _is_number(record.get("checkpoint_stall_seconds"))]
        at = f", the last at {_moment(saves[-1])}" if "time" in saves[-1] else ""
        yield EventRow(saves[-1]["step"], "checkpoints", f"{len(saves)} saved{at}; training stood still for {format_seconds(sum(stalls))} in all")


def _described(record: Mapping[str, Any]) -> str:
    """The fields of an event; a message says it all."""
    kind = record["event"]
    if kind == "start":
        step = record["step"]
        what = f"resumed from step {step:,}" if step else "from the beginning"
        num_ranks = record.get("world_size")
        ranks = f" and {num_ranks - 1} more ranks" if isinstance(num_ranks, int) and num_ranks > 1 else ""
        return f"{what} at {_moment(record)} on {in_words(record.get('host', '?'))}{ranks}"
    if kind == "config_changed":
        return f"{in_words(record.get('key'))}: {in_words(record.get('old'))} → {in_words(record.get('new'))}"
    if "message" in record:
        return in_words(record["message"])
    return ", ".join(f"{name.replace('_', ' ')} {in_words(value)}" for name, value in record.items() if name not in ("step", "event"))


def _moment(record: Mapping[str, Any]) -> str:
    """The time of an event for people: `2026-11-29 14:05 UTC`."""
    return in_words(record.get("time", "an unknown time")).replace("T", " ").replace(":00+00:00", " UTC").replace("+00:00", " UTC")


def _of_kind(events: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    return [record for record in events if record["event"] == kind]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
