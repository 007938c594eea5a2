"""What differs from the checkpoint from which a run continues, config keys and what no key tells alone: each is shown and recorded in one line."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phase8.checkpoint.untrusted import shortened
from phase8.config.describe import describe_value, iterate_keys
from phase8.config.load import config_to_mapping
from phase8.config.schema import RunConfig
from phase8.config.without_effect import unread_keys

# Keys for where a run is kept, what it shows, when it saves and stops, and how data are fetched: the steps are the same, and nothing is removed.
_OF_NO_CONCERN = (
    "run.", "observe.", "checkpoint.every_n_steps", "checkpoint.asynchronous", "data.cache_dir", "data.num_workers", "data.prefetch_factor",
    "data.persistent_workers", "data.pin_memory", "data.allow_fingerprint_change", "parallel.timeout_seconds", "train.stop_at_step",
)  # fmt: skip
# A user who changes one of these expects other weights.
_FIRST_WEIGHTS = "checkpoint.initialise_from"


@dataclass(frozen=True)
class ChangedKey:
    """A key with its two values as JSON.

    Args:
        name: Its dotted name.
        old: Its value in the checkpoint.
        new: Its value now.
        unread_because: Why nothing reads it; None: it has an effect.
    """

    name: str
    old: Any
    new: Any
    unread_because: str | None = None

    def __str__(self) -> str:
        effect = "" if self.unread_because is None else f", without effect: {self.unread_because}"
        return f"{self.name}: {_in_words(self.old)} -> {_in_words(self.new)}{effect}"

    @property
    def event(self) -> str:
        """Kind of the event in the metrics of the run."""
        return "config_changed"

    @property
    def record(self) -> dict[str, str | int | float | None]:
        """Fields of that event."""
        return {"key": self.name, "old": _scalar(self.old), "new": _scalar(self.new)}


@dataclass(frozen=True)
class Consequence:
    """What changes mean.

    Args:
        event: Kind of the event in the metrics of the run.
        sentence: What is shown.
    """

    event: str
    sentence: str

    def __str__(self) -> str:
        return self.sentence

    @property
    def record(self) -> dict[str, str | int | float | None]:
        """Fields of the event."""
        return {"message": self.sentence}


def changed_keys(saved: RunConfig, config: RunConfig) -> list[ChangedKey]:
    """The keys that have changed since a config was saved, in the order of the schema.

    Args:
        saved: The config of a checkpoint.
        config: The config of the run.
    """
    before, now = config_to_mapping(saved), config_to_mapping(config)
    pairs = ((name, _value(before, name), _value(now, name)) for name, _ in iterate_keys())
    unread = unread_keys(config) | {_FIRST_WEIGHTS: "the run goes on from a checkpoint"}
    return [ChangedKey(name, old, new, unread.get(name)) for name, old, new in pairs if old != new and not name.startswith(_OF_NO_CONCERN)]


def _value(tree: Mapping[str, Any], name: str) -> Any:
    return functools.reduce(operator.getitem, name.split("."), tree)


def _in_words(value: Any) -> str:
    return shortened(describe_value(value))


def _scalar(value: Any) -> str | int | float | None:
    return value if value is None or isinstance(value, str | int | float) else _in_words(value)
