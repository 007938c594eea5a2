"""The losses that a checkpoint names, for whoever reads about its model: the mean over the latest steps, and the latest evaluation."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

NUM_STEPS = 100


@dataclass
class RecentLosses:
    """What a process has measured since it began.

    Args:
        training: Losses of the latest steps that counted, in nats per token.
        validation: Step and loss of the latest evaluation; None: there was none.
    """

    training: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_STEPS))
    validation: tuple[int, float] | None = None

    @property
    def record(self) -> dict[str, Any] | None:
        """The losses as plain JSON; None: no step has counted yet."""
        if not self.training:
            return None
        found: dict[str, Any] = {"training": math.fsum(self.training) / len(self.training), "num_steps": len(self.training)}
        if self.validation is not None and math.isfinite(self.validation[1]):
            found |= {"validation_step": self.validation[0], "validation": self.validation[1]}
        return found
