"""Non-finite steps: skipped and counted; too many in a row stop the run."""

from __future__ import annotations

from collections.abc import Sequence

from phase8.errors import DivergenceError
from phase8.train.resume import Position
from phase8.train.step import StepResult


def count_skipped(position: Position, result: StepResult, *, max_consecutive: int, sample_numbers: Sequence[int]) -> None:
    """Takes note of whether the last step was skipped.

    Args:
        position: Its counters are updated.
        result: Of the step that `position.step` counts as done.
        max_consecutive: Skipped steps in a row at which the run stops.
        sample_numbers: Samples of the step.

    Raises:
        DivergenceError: The limit is reached; names step, loss, norm and the samples of the step.
    """
    if not result.skipped:
        position.consecutive_skipped = 0
        return
    position.consecutive_skipped += 1
    position.total_skipped += 1
    if position.consecutive_skipped >= max_consecutive:
        raise DivergenceError(
            f"step {position.step}: loss {result.loss} and gradient norm {result.grad_norm} were not finite "
            f"{position.consecutive_skipped} times in a row (train.max_consecutive_nonfinite_steps), last on samples "
            f"{sample_numbers[0]}..{sample_numbers[-1]}; lower optim.learning_rate or inspect those samples, "
            "then resume from the last checkpoint."
        )
