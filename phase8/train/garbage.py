"""Collection of Python's garbage between steps, on all ranks after the same ones.

Left to itself, Python looks for garbage when a process has made enough objects: each rank in the middle of another step, and, once compilation has
made millions of objects, for most of a second. All other ranks wait for it in their next exchange.
"""

from __future__ import annotations

import gc
from types import TracebackType

# After this many steps what the last ones left is looked through, and after the larger number all that was made since the first steps.
STEPS_BETWEEN_COLLECTIONS = 100
STEPS_BETWEEN_WHOLE_COLLECTIONS = 1000
_YOUNG, _ALL = 1, 2


class GarbageBetweenSteps:
    """A context manager in which garbage is collected by `after_step` only.

    Args:
        num_slow_steps: Number of first steps, which compile. What exists after them stays, and is not looked through again.
    """

    def __init__(self, num_slow_steps: int):
        self._num_slow_steps, self._num_steps = num_slow_steps, 0

    def __enter__(self) -> GarbageBetweenSteps:
        self._was_enabled = gc.isenabled()
        gc.disable()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()

    def after_step(self) -> None:
        """Counts a step of this process, and collects where it is time."""
        self._num_steps += 1
        if self._num_steps == self._num_slow_steps:
            gc.collect()
            gc.freeze()
        elif self._num_steps % STEPS_BETWEEN_WHOLE_COLLECTIONS == 0:
            gc.collect(_ALL)
        elif self._num_steps % STEPS_BETWEEN_COLLECTIONS == 0:
            gc.collect(_YOUNG)
