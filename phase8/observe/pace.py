"""The pace of a run: tokens per second over several steps, and the remaining time.

| figure | what counts |
|---|---|
| throughput | the tokens of the steps over their durations, which include waiting for data; what comes between steps does not count |
| remaining time | a truncated mean of the last steps' durations, and the mean of what came between steps so far, without the longest |

Evaluations, saves and checks come between steps. Compilation makes a few steps slow and the first evaluation long: such outliers do not
change the remaining time, but steps that are repeatedly slow do.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

_WINDOW_STEPS = 300
_MIN_STEPS = 3
_NUM_OUTLIERS = 3  # on each side; about as many first steps are slow because they compile


class Throughput:
    """Tokens per second over the steps since the last `clear`.

    Args:
        window_seconds: The newest steps count, as many as took this long together, at least one.
    """

    def __init__(self, *, window_seconds: float = math.inf):
        self._window_seconds = window_seconds
        self._steps: deque[tuple[float, float]] = deque()
        self._seconds = 0.0

    def add(self, *, seconds: float, tokens: float) -> None:
        """Counts a step."""
        self._steps.append((seconds, tokens))
        self._seconds += seconds
        while self._seconds > self._window_seconds and len(self._steps) > 1:
            self._seconds -= self._steps.popleft()[0]

    def clear(self) -> None:
        """Begins a new interval."""
        self._steps.clear()
        self._seconds = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens over seconds of the remembered steps, of which there must be one."""
        return math.fsum(tokens for _, tokens in self._steps) / math.fsum(seconds for seconds, _ in self._steps)


class RemainingTime:
    """The time until the last step of a run ends, estimated from the steps so far, without the last evaluation."""

    def __init__(self) -> None:
        self._step_seconds: deque[float] = deque(maxlen=_WINDOW_STEPS)
        self._num_steps = 0
        self._ended_at: float | None = None
        self._between_seconds = self._longest_between = 0.0

    def add(self, *, seconds: float, ended_at: float) -> None:
        """Counts a step.

        Args:
            seconds: Its duration.
            ended_at: Time of a steady clock at its end. The time since the end of the step before, less its duration, is counted as between steps.
        """
        if self._ended_at is not None:
            between = max(0.0, ended_at - self._ended_at - seconds)
            self._between_seconds += between
            self._longest_between = max(self._longest_between, between)
        self._ended_at = ended_at
        self._num_steps += 1
        self._step_seconds.append(seconds)

    def seconds(self, num_steps: int) -> float | None:
        """The estimate for this many further steps; None: too few steps are done."""
        if self._num_steps < _MIN_STEPS:
            return None
        num_steps_seen = len(self._step_seconds)
        num_outliers = min(_NUM_OUTLIERS, (num_steps_seen - 1) // 2)
        usual = sorted(self._step_seconds)[num_outliers : num_steps_seen - num_outliers]
        between = (self._between_seconds - self._longest_between) / self._num_steps
        return num_steps * (statistics.fmean(usual) + between)
