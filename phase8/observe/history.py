"""The metrics of a run as arrays, and figures that summarise them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phase8.observe.routing import RoutingHistory, routing_history

Series = NDArray[np.float64]

_SMOOTHING_SHARE = 0.015


@dataclass(frozen=True)
class Places:
    """Where the values of a curve stand, on each axis that a chart may have.

    Args:
        steps: Step numbers.
        tokens: Training tokens seen by then.
        seconds: Time spent in steps by then; evaluations, saves and pauses between processes are not in it.
    """

    steps: Series
    tokens: Series
    seconds: Series

    def at(self, steps: Series) -> Places:
        """The places of other steps, between these; before the first step nothing was seen."""
        known = np.append(0.0, self.steps)
        return Places(steps, *(np.interp(steps, known, np.append(0.0, values)) for values in (self.tokens, self.seconds)))


@dataclass(frozen=True)
class History:
    """Everything `metrics.jsonl` says about a run; a missing figure is NaN.

    Args:
        steps: Step numbers, one per training step as are the following.
        tokens: Tokens seen after each step.
        loss: Training loss in nats per token, NaN where the step was skipped.
        learning_rate: Learning rate.
        grad_norm: Global gradient norm before clipping.
        tokens_per_second: Throughput.
        step_seconds: Duration.
        data_wait_seconds: Part of the duration spent waiting for data.
        mfu: Model FLOPs utilisation as a ratio.
        peak_memory_bytes: Peak memory so far.
        skipped_steps: Steps that were skipped because of an anomaly.
        auxiliary_losses: What was minimised beside the loss, by name, NaN where it was not recorded.
        validation_steps: Steps after which the model was evaluated.
        validation_loss: Loss of each evaluation.
        validation_sources: Loss of each source of a blend in each evaluation, by name.
        validation_sequences: Number of sequences of each source of a blend in the last evaluation.
        routing: Routing of experts; None: there is none.
    """

    steps: Series
    tokens: Series
    loss: Series
    learning_rate: Series
    grad_norm: Series
    tokens_per_second: Series
    step_seconds: Series
    data_wait_seconds: Series
    mfu: Series
    peak_memory_bytes: Series
    skipped_steps: tuple[int, ...]
    auxiliary_losses: Mapping[str, Series]
    validation_steps: Series
    validation_loss: Series
    validation_sources: Mapping[str, Series]
    validation_sequences: Mapping[str, float]
    routing: RoutingHistory | None

    @classmethod
    def from_records(cls, records: Sequence[Mapping[str, Any]]) -> History:
        """Sort the lines of a metrics file into arrays."""
        figures = [record for record in records if "event" not in record]
        training = [record for record in figures if "loss" in record]
        evaluations = [record for record in figures if "validation_loss" in record]
        return cls(
            steps=_column(training, "step"),
            tokens=_column(training, "tokens"),
            loss=_column(training, "loss"),
            learning_rate=_column(training, "learning_rate"),
            grad_norm=_column(training, "grad_norm"),
            tokens_per_second=_column(training, "tokens_per_second"),
            step_seconds=_column(training, "step_seconds"),
            data_wait_seconds=_column(training, "data_wait_seconds"),
            mfu=_column(training, "mfu"),
            peak_memory_bytes=_column(training, "peak_memory_bytes"),
            skipped_steps=tuple(record["step"] for record in training if record["skipped"]),
            auxiliary_losses=_columns(training, "auxiliary_losses", lambda loss: loss),
            validation_steps=_column(evaluations, "step"),
            validation_loss=_column(evaluations, "validation_loss"),
            validation_sources=_columns(evaluations, "validation_sources", lambda source: source["loss"]),
            validation_sequences={name: source["sequences"] for name, source in (evaluations or [{}])[-1].get("validation_sources", {}).items()},
            routing=routing_history(training),
        )

    @property
    def places(self) -> Places:
        """The places of the training steps."""
        return Places(self.steps, self.tokens, np.cumsum(self.step_seconds))


def smooth(values: Series) -> Series:
    """A noisy series averaged with triangular weights over about three per cent of its length; NaN is ignored.

    Two passes of a moving average, so that a single spike leaves a small hill and not a plateau.
    """
    half_window = round(_SMOOTHING_SHARE * len(values))
    return moving_average(moving_average(values, half_window=half_window), half_window=half_window)


def moving_average(values: Series, *, half_window: int) -> Series:
    """Mean over a window around each value, without NaN; NaN where the whole window is.

    The window is centred and narrows towards the start, so that the steep beginning of a loss curve is neither lagged nor
    lifted; at the end it keeps its left half, so that the last value is not a single noisy step.

    Args:
        values: The series.
        half_window: Values taken in on each side.
    """
    index = np.arange(len(values))
    left = np.minimum(half_window, index // 4)
    right = np.minimum(left, len(values) - 1 - index)
    finite = np.isfinite(values)
    sums = np.append(0.0, np.cumsum(np.where(finite, values, 0.0)))
    counts = np.append(0, np.cumsum(finite))
    window_sums = sums[index + right + 1] - sums[index - left]
    window_counts = counts[index + right + 1] - counts[index - left]
    return np.where(window_counts > 0, window_sums / np.maximum(window_counts, 1), np.nan)


def last_finite(values: Series) -> float | None:
    """The last value that is not NaN."""
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if finite.size else None


def median(values: Series) -> float | None:
    """The median of the values that are not NaN."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else None


def loss_limits(loss: Series, validation_loss: Series, reference_losses: Mapping[str, float]) -> tuple[float, float]:
    """Limits of a loss axis: they cut off the initial drop from the untrained loss, which would flatten the rest.

    The references and the validation losses of the second half are always inside.
    """
    smoothed = smooth(loss)[np.isfinite(loss)]
    validation = validation_loss[np.isfinite(validation_loss)]
    inside = [*reference_losses.values(), *validation[len(validation) // 2 :]]
    if smoothed.size:
        inside += [float(np.nanquantile(loss, 0.001)), float(np.quantile(smoothed, 0.98))]
    if not inside:
        return 0.0, 1.0
    low, high = min(inside), max(inside)
    margin = max(0.06 * (high - low), 0.1)
    return max(0.0, low - margin), high + margin


def thin_out(x: Series, y: Series, *, most: int) -> tuple[Series, Series]:
    """A curve with no more points than a picture can show; minimum and maximum of each stretch are kept, and with them spikes."""
    if len(x) <= most:
        return x, y
    keep: list[int] = []
    for stretch in np.array_split(np.arange(len(x)), most // 2):
        finite = stretch[np.isfinite(y[stretch])]
        extremes = {int(finite[np.argmin(y[finite])]), int(finite[np.argmax(y[finite])])} if finite.size else {int(stretch[0])}
        keep.extend(sorted(extremes))
    return x[keep], y[keep]


def _column(records: Sequence[Mapping[str, Any]], key: str) -> Series:
    return np.array([np.nan if record[key] is None else record[key] for record in records], dtype=np.float64)


def _columns(records: Sequence[Mapping[str, Any]], key: str, value_of: Callable[[Any], float | None]) -> dict[str, Series]:
    """The series of each name under a key that holds a mapping; NaN where a record lacks the name."""
    names = dict.fromkeys(name for record in records for name in record.get(key, {}))

    def value(record: Mapping[str, Any], name: str) -> float:
        found = value_of(record[key][name]) if name in record.get(key, {}) else None
        return np.nan if found is None else found

    return {name: np.array([value(record, name) for record in records], dtype=np.float64) for name in names}
