"""Steps that must not count: loss or gradient is not finite, or the loss is far above those before. Their update is left out on the device.

What follows is `train.anomaly.policy`: `skip` goes on with the next samples, `stop` ends the run, `rollback` goes back to the newest
checkpoint and on from there with the samples after the step, so that whatever led to it is not trained on.
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
# The median absolute deviation of a normal distribution is this share of its standard deviation.
MAD_OF_NORMAL = 0.6745
# However steady the losses were: what differs by less than this share of them is no spike.
MIN_RELATIVE_DEVIATION = 1e-3


@dataclass(frozen=True)
class Anomaly:
    """A step whose update was left out.

    Args:
        step: Its number.
        loss: Its loss.
        grad_norm: Its gradient norm.
        largest_loss: The loss that was still allowed.
        samples: Numbers of its samples.
    """

    step: int
    loss: float
    grad_norm: float
    largest_loss: float
    samples: range

    def __str__(self) -> str:
        """What was wrong, and with which samples."""
        if math.isfinite(self.loss) and math.isfinite(self.grad_norm):
            what = f"loss {self.loss:.4f} is above {self.largest_loss:.4f}, where spikes begin (train.anomaly.spike_deviations)"
        else:
            what = f"loss {self.loss} and gradient norm {self.grad_norm} are not both finite"
        return f"step {self.step}: {what}, on samples {self.samples[0]}..{self.samples[-1]}"


class RollbackAsked(Exception):
    """Leads from an anomaly to the checkpoint before it; the training loop catches it.

    Args:
        anomaly: Why.
    """

    def __init__(self, anomaly: Anomaly):
        super().__init__(str(anomaly))
        self.anomaly = anomaly


def largest_loss(recent_losses: Sequence[float], section: AnomalySection) -> float:
    """The loss above which the next one is a spike: so many standard deviations, estimated robustly, above the median of the last ones."""
    if section.spike_deviations is None or len(recent_losses) < MIN_SPIKE_HISTORY:
        return math.inf
    median = statistics.median(recent_losses)
    deviation = statistics.median(abs(loss - median) for loss in recent_losses) / MAD_OF_NORMAL
    return median + section.spike_deviations * max(deviation, MIN_RELATIVE_DEVIATION * median)


def take_note(position: Position, result: StepResult, section: AnomalySection, *, largest_loss: float, samples: range) -> Anomaly | None:
    """Counts the last step and does what the policy says if it is an anomaly, which is returned.

    Args:
        position: Its counters and its memory of losses are updated.
        result: Of the step that `position.step` counts as done.
        section: The policy.
        largest_loss: As it was for this step.
        samples: Numbers of its samples.

    Raises:
        DivergenceError: The policy is to stop, or there were too many in a row.
        RollbackAsked: The policy is to go back.
    """
    if not result.skipped:
        position.consecutive_skipped = 0
        if section.spike_deviations is not None:
            position.recent_losses = [*position.recent_losses, result.loss][-SPIKE_WINDOW:]
        return None
    position.consecutive_skipped += 1
    position.total_skipped += 1
    anomaly = Anomaly(position.step, result.loss, result.grad_norm, largest_loss, samples)
    advice = "lower optim.learning_rate or inspect those samples, then resume from the last checkpoint."
    if section.policy == "stop":
        raise DivergenceError(f"{anomaly}, and train.anomaly.policy is stop; {advice}")
    if position.consecutive_skipped >= section.max_consecutive:
        raise DivergenceError(f"{anomaly}, the last of {position.consecutive_skipped} in a row (train.anomaly.max_consecutive); {advice}")
    if section.policy == "rollback":
        raise RollbackAsked(anomaly)
    return anomaly
