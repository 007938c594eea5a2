"""Anomalous steps: loss or gradient is not finite, or the loss is far above the previous losses. Their update is skipped on the device.

`train.anomaly.policy` decides what follows: `skip` continues with the next samples, `stop` ends the run, `rollback` restores the newest
checkpoint and continues with the samples after the anomalous step, so that those that led to it are not trained on again.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from phase8.config.schema import AnomalySection
from phase8.errors import DivergenceError
from phase8.train.engine.protocol import StepResult
from phase8.train.resume import Position

SPIKE_WINDOW, MIN_SPIKE_HISTORY = 64, 16
# Ratio of median absolute deviation to standard deviation for a normal distribution.
MAD_OF_NORMAL = 0.6745
# A loss that exceeds the median by less than this share is never a spike, however steady the losses were.
MIN_RELATIVE_DEVIATION = 1e-3


@dataclass(frozen=True)
class Anomaly:
    """A step whose update was skipped.

    Args:
        step: Its number.
        loss: Its loss.
        grad_norm: Its gradient norm.
        largest_loss: Largest loss that was allowed.
        samples: Global numbers of its samples.
    """

    step: int
    loss: float
    grad_norm: float
    largest_loss: float
    samples: range

    def __str__(self) -> str:
        """Description of the anomaly and its samples."""
        if math.isfinite(self.loss) and math.isfinite(self.grad_norm):
            what = f"loss {self.loss:.4f} is above {self.largest_loss:.4f}, where spikes begin (train.anomaly.spike_deviations)"
        else:
            what = f"loss {self.loss} and gradient norm {self.grad_norm} are not both finite"
        return f"step {self.step}: {what}, on samples {self.samples[0]}..{self.samples[-1]}"


class RollbackAsked(Exception):
    """Raised to return from an anomaly to the last checkpoint; the training loop catches it.

    Args:
        anomaly: The reason.
    """

    def __init__(self, anomaly: Anomaly):
        super().__init__(str(anomaly))
        self.anomaly = anomaly


def largest_loss(recent_losses: Sequence[float], section: AnomalySection) -> float:
    """Loss above which the next step is a spike: the median of the last losses plus a number of robustly estimated standard deviations."""
    if section.spike_deviations is None or len(recent_losses) < MIN_SPIKE_HISTORY:
        return math.inf
    median = statistics.median(recent_losses)
    deviation = statistics.median(abs(loss - median) for loss in recent_losses) / MAD_OF_NORMAL
    return median + section.spike_deviations * max(deviation, MIN_RELATIVE_DEVIATION * median)


def take_note(position: Position, result: StepResult, section: AnomalySection, *, largest_loss: float, samples: range) -> Anomaly | None:
    """Counts the last step; if it is an anomaly, applies the policy and returns the anomaly.

    Args:
        position: Its counters and its history of losses are updated.
        result: Result of the step that `position.step` counts as done.
        section: Section with the policy.
        largest_loss: The limit for this step.
        samples: Global numbers of its samples.

    Raises:
        DivergenceError: The policy is to stop, or there were too many anomalies in a row; the trainer adds how to go on.
        RollbackAsked: The policy is to roll back.
    """
    if not result.skipped:
        position.consecutive_skipped = 0
        # Where no spikes are looked for, no loss is remembered: it would be an old one when somebody looks again.
        position.recent_losses = [] if section.spike_deviations is None else [*position.recent_losses, result.loss][-SPIKE_WINDOW:]
        return None
    position.consecutive_skipped += 1
    position.total_skipped += 1
    anomaly = Anomaly(position.step, result.loss, result.grad_norm, largest_loss, samples)
    advice = "lower optim.learning_rate or inspect those samples"
    if section.policy == "stop":
        raise DivergenceError(f"{anomaly}, and train.anomaly.policy is stop; {advice}")
    if position.consecutive_skipped >= section.max_consecutive:
        raise DivergenceError(f"{anomaly}, the last of {position.consecutive_skipped} in a row (train.anomaly.max_consecutive); {advice}")
    if section.policy == "rollback":
        raise RollbackAsked(anomaly)
    return anomaly
