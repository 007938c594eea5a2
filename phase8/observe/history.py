"""The metrics of a run as arrays, and figures that summarise them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phase8.observe.routing import RoutingHistory, routing_history

Series = NDArray[np.float64]

_SMOOTHING_SHARE = 0.015


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
        num_skipped: Steps skipped because loss or gradient was not finite.
        validation_steps: Steps after which the model was evaluated.
        validation_tokens_seen: Training tokens seen by then.
        validation_loss: Loss of each evaluation.
        routing: Routing of experts; None: there is none.
        last_validation_sources: Loss (NaN where it is not finite) and number of sequences of each source of a blend in the last evaluation.
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
    num_skipped: int
    validation_steps: Series
    validation_tokens_seen: Series
    validation_loss: Series
    routing: RoutingHistory | None
    last_validation_sources: Mapping[str, tuple[float, int]]

    @classmethod
    def from_records(cls, records: Sequence[Mapping[str, Any]]) -> History:
        """Sort the lines of a metrics file into arrays."""
        figures = [record for record in records if "event" not in record]
        training = [record for record in figures if "loss" in record]
        evaluations = [record for record in figures if "validation_loss" in record]
        steps, tokens = _column(training, "step"), _column(training, "tokens")
        validation_steps = _column(evaluations, "step")
        return cls(
            steps=steps,
            tokens=tokens,
            loss=_column(training, "loss"),
            learning_rate=_column(training, "learning_rate"),
            grad_norm=_column(training, "grad_norm"),
            tokens_per_second=_column(training, "tokens_per_second"),
            step_seconds=_column(training, "step_seconds"),
            data_wait_seconds=_column(training, "data_wait_seconds"),
            mfu=_column(training, "mfu"),
            peak_memory_bytes=_column(training, "peak_memory_bytes"),
            num_skipped=sum(record["skipped"] for record in training),
            validation_steps=validation_steps,
            # An evaluation records only its step; before the first step no token was seen.
            validation_tokens_seen=np.interp(validation_steps, np.append(0.0, steps), np.append(0.0, tokens)),
            validation_loss=_column(evaluations, "validation_loss"),
            routing=routing_history(training),
            last_validation_sources={
                name: (np.nan if source["loss"] is None else source["loss"], source["sequences"])
                for name, source in (evaluations[-1].get("validation_sources", {}) if evaluations else {}).items()
            },
        )


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


def _column(records: Sequence[Mapping[str, Any]], key: str) -> Series:
    return np.array([np.nan if record[key] is None else record[key] for record in records], dtype=np.float64)
