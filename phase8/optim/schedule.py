"""The learning rate of every step, as a pure function of the step."""

from __future__ import annotations

import math

from phase8.config.schema import OptimSection


def learning_rate(step: int, section: OptimSection, *, num_steps: int) -> float:
    """The learning rate that optimizer step `step` uses.

    Args:
        step: Number of the step, from 1 to num_steps.
        section: Optimizer section with peak, schedule, warmup and decay.
        num_steps: Length of the schedule; a run may stop earlier.
    """
    peak = section.learning_rate
    if step <= section.warmup_steps:
        return peak * step / section.warmup_steps
    floor = section.min_learning_rate_ratio
    if section.schedule == "constant":
        return peak
    if section.schedule == "wsd":
        remaining = min((num_steps - step) / section.final_decay_steps(num_steps), 1.0)
        return peak * (floor + (1 - floor) * remaining)
    progress = (step - section.warmup_steps) / (num_steps - section.warmup_steps)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
