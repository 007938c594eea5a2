"""Blends that change during a run: data sets that stay go on where they were, and those that are new begin.

A sample is found from its number alone, so a checkpoint has to record only at which sample the blend began, and what each data set had delivered by
then. One that is no longer read is remembered, and goes on if it comes back. Data sets are recognised by their content, not by their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from phase8.data.blend import BlendTable
from phase8.data.fingerprint_difference import is_same_source
from phase8.data.sampler import Draws


@dataclass(frozen=True)
class Left:
    """A data set that is no longer read.

    Args:
        source: Its entry in a fingerprint.
        draws: What it had delivered.
    """

    source: dict[str, Any]
    draws: Draws


@dataclass(frozen=True)
class OrderHistory:
    """What came before the present blend.

    Args:
        begin: Number of the first sample of the blend.
        draws: What each data set of the blend had delivered before; empty: nothing, the run began with the blend.
        left: Data sets that are no longer read.
    """

    begin: int = 0
    draws: tuple[Draws, ...] = ()
    left: tuple[Left, ...] = ()

    @property
    def record(self) -> dict[str, Any] | None:
        """The history as plain JSON; None: there is none."""
        if not self.begin and not self.left:
            return None
        left = [{"source": each.source, "draws": each.draws._asdict()} for each in self.left]
        return {"begin": self.begin, "draws": [each._asdict() for each in self.draws], "left": left}


def history_of(record: dict[str, Any] | None) -> OrderHistory:
    """The inverse of `OrderHistory.record`, for a record that was checked."""
    if record is None:
        return OrderHistory()
    left = tuple(Left(each["source"], Draws(**each["draws"])) for each in record["left"])
    return OrderHistory(record["begin"], tuple(Draws(**each) for each in record["draws"]), left)


def changed(history: OrderHistory, before: dict[str, Any], now: dict[str, Any], *, num_samples: int) -> OrderHistory:
    """The history of a run whose blend changes after a number of samples.

    Args:
        history: The history of the blend until then.
        before: Fingerprint of the data until then.
        now: Fingerprint of the data from then on, with the same sequence length.
        num_samples: Number of samples that the run has read.
    """
    if num_samples == 0:
        return OrderHistory()  # the run begins with the blend, and a record tells nothing else
    known = list(_delivered(history, before["sources"], num_samples))
    key, draws = 1 + max((each.draws.key for each in known), default=-1), []
    for source in now["sources"]:
        same = next((each for each in known if is_same_source(each.source, source)), None)
        if same is None:
            draws.append(Draws(key, 0))
            key += 1
        else:
            draws.append(same.draws)
            known.remove(same)
    return OrderHistory(num_samples, tuple(draws), tuple(each for each in known if each.draws.drawn))


def _delivered(history: OrderHistory, sources: Sequence[dict[str, Any]], num_samples: int) -> Iterator[Left]:
    """All data sets that a run has read, as if they were left now."""
    if sources:
        counts = BlendTable([source["weight"] for source in sources]).counts(num_samples - history.begin)
        earlier = history.draws or [Draws(key, 0) for key in range(len(sources))]
        for source, draws, count in zip(sources, earlier, counts, strict=True):
            yield Left(source, Draws(draws.key, draws.drawn + count))
    yield from history.left
