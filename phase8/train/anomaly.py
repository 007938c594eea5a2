"""Non-finite steps: skipped and counted; too many in a row stop the run."""

from __future__ import annotations

from collections.abc import Sequence

from phase8.errors import DivergenceError
from phase8.train.step import StepResult


class NonFiniteGuard:
    """Counts skipped steps.

    Args:
        max_consecutive: Skipped steps in a row at which the run stops.
        consecutive: Count so far in a row, from a checkpoint.
        total: Count so far, from a checkpoint.
    """

    def __init__(self, *, max_consecutive: int, consecutive: int = 0, total: int = 0):
        self.max_consecutive = max_consecutive
        self.consecutive = consecutive
        self.total = total

    def observe(self, result: StepResult, *, step: int, sample_numbers: Sequence[int]) -> None:
        """Takes note of a step.

        Raises:
            DivergenceError: The limit is reached; names step, loss, norm and the samples of the step.
        """
        if not result.skipped:
            self.consecutive = 0
            return
        self.consecutive += 1
        self.total += 1
        if self.consecutive >= self.max_consecutive:
            raise DivergenceError(
                f"step {step}: loss {result.loss} and gradient norm {result.grad_norm} were not finite {self.consecutive} times in a row "
                f"(train.max_consecutive_nonfinite_steps), last on samples {sample_numbers[0]}..{sample_numbers[-1]}; "
                "lower optim.learning_rate or inspect those samples, then resume from the last checkpoint."
            )
