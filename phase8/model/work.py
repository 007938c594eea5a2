"""Counts of a model's work: keys that a token attends to, and the cost of a backward in forwards. Plain arithmetic, no torch."""

from __future__ import annotations

from phase8.config.model_section import ModelSection

BACKWARD_OVER_FORWARD = 2


def mean_visible_keys(model: ModelSection, window: int) -> float:
    """Keys that attention reads in a layer of this window (0: none), averaged over the positions of a sequence."""
    length = model.sequence_length
    if model.block == "transformer":
        return (length + 1) / 2
    if window == 0:
        return 0.0
    far = model.global_tokens
    beyond, within = max(length - window, 0), min(length, window)
    near_keys = within * (within + 1) // 2 + beyond * window
    # Position i >= W sees the global tokens that have left its window: min(i + 1 - W, G) of them.
    ramp = min(beyond, far)
    far_keys = ramp * (ramp + 1) // 2 + (beyond - ramp) * far
    return (near_keys + far_keys) / length
