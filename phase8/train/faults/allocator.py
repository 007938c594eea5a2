"""Steps in which the memory of an accelerator was so nearly full that torch's allocator had to give back what it keeps, and to ask anew.

Nothing fails then, but the device waits each time, and steps may take several times as long.
"""

from __future__ import annotations

import torch

from phase8 import accelerator
from phase8.observe.metrics import StepMetrics


class FullMemory:
    """Looks for such steps, and has something to say about the first.

    Args:
        device: Device of this rank.
        num_slow_steps: First steps of a process, in which memory still finds its place.
    """

    def __init__(self, device: torch.device, *, num_slow_steps: int):
        self._device, self._num_slow_steps = device, num_slow_steps
        self._num_before = accelerator.num_cache_flushes(device) or 0
        self._is_told = False

    def after_step(self, metrics: StepMetrics) -> str | None:
        """A sentence, the first time that the allocator has flushed its cache since the step before; None: there is nothing to say."""
        num_flushes = accelerator.num_cache_flushes(self._device) or 0
        num_new, self._num_before = num_flushes - self._num_before, num_flushes
        if self._num_slow_steps > 0:
            self._num_slow_steps -= 1
            return None
        if num_new <= 0 or self._is_told:
            return None
        self._is_told = True
        return (
            f"step {metrics.step}: the memory of the device is nearly full: {num_new:,} times since the step before torch gave back what it keeps "
            "for later tensors, and asked anew, while the device waited; lower train.micro_batch_size, let train.recompute keep less, or set "
            "PYTORCH_ALLOC_CONF=expandable_segments:True in the environment."
        )
