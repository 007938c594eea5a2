"""The whole optimizer step as one CUDA graph: forward, backward, clipping and optimizer in a single launch.

A small model is bound by the thousands of launches of a step from Python. Recorded once, they are replayed by the device, from inputs that
are copied to where the recording has read them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phase8.data.microbatch import Microbatch
from phase8.train.engine.protocol import StepResult
from phase8.train.engine.step import StepNumbers, count_targets, step_result, train_step, update
from phase8.train.engine.train_state import TrainState

# Steps taken without a graph: compilation, the choice of kernels and the first state of the optimizer cannot be recorded.
EAGER_STEPS = 2


@dataclass(frozen=True)
class _Inputs:
    """Where the graph reads what is new in a step, on the device.

    Args:
        microbatches: Their tensors.
        numbers: Scalars.
        learning_rate: A scalar.
    """

    microbatches: tuple[Microbatch, ...]
    numbers: StepNumbers
    learning_rate: Tensor

    def fill(self, microbatches: Sequence[Microbatch], numbers: StepNumbers, learning_rate: float) -> None:
        """Copies the inputs of a step; its end waits for the copies, which read page-locked memory."""
        for to, batch in zip(self.microbatches, microbatches, strict=True):
            for static, new in ((to.tokens, batch.tokens), (to.targets, batch.targets), (to.starts, batch.starts)):
                if static is not None and new is not None:
                    static.copy_(new, non_blocking=True)
        self.numbers.num_targets.fill_(numbers.num_targets)
        self.numbers.largest_loss.fill_(numbers.largest_loss)
        self.numbers.stop.fill_(numbers.stop)
        self.numbers.unreadable.fill_(numbers.unreadable)
        self.learning_rate.fill_(learning_rate)


class CapturedStep:
    """`train_step` on a GPU, whose batches all have the same shape. Of several ranks, every one records its part, collectives included.

    Args:
        train_state: Its optimizer belongs to the graph once there is one.
    """

    def __init__(self, train_state: TrainState):
        self._train_state, self._num_eager_steps = train_state, 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(
        self,
        microbatches: Sequence[Microbatch],
        *,
        learning_rate: float,
        gradient_clip_norm: float,
        largest_loss: float = math.inf,
        stop: bool = False,
        unreadable: bool = False,
        report: Callable[[str], None] | None = None,
    ) -> StepResult:
        """Takes a step; arguments as for `train_step`, those that are no numbers of the batch as in the recorded step."""
        if self._num_eager_steps < EAGER_STEPS:
            self._num_eager_steps += 1
            return train_step(
                self._train_state,
                microbatches,
                learning_rate=learning_rate,
                gradient_clip_norm=gradient_clip_norm,
                largest_loss=largest_loss,
                stop=stop,
                unreadable=unreadable,
                report=report,
            )
        if self._graph is None:
            self._graph = self._record(microbatches, gradient_clip_norm=gradient_clip_norm)
        if report is not None:
            report("the recorded step")
        self._inputs.fill(microbatches, StepNumbers(count_targets(microbatches), largest_loss, stop, unreadable), learning_rate)
        self._graph.replay()
        return step_result(self._measured.tolist(), self._train_state.stage.auxiliary_losses)

    def close(self) -> None:
        """Frees the graph. NCCL waits for that when a communicator ends whose collectives are in it."""
        if self._graph is not None:
            self._graph.reset()
            self._graph = None

    def _record(self, microbatches: Sequence[Microbatch], *, gradient_clip_norm: float) -> torch.cuda.CUDAGraph:
        """Records a step of this shape, without taking it."""
        device, graph = self._train_state.device, torch.cuda.CUDAGraph()
        static = tuple(batch.to(device) for batch in microbatches)
        numbers = StepNumbers(*(torch.zeros((), dtype=torch.float64, device=device) for _ in range(4)))
        self._inputs = _Inputs(static, numbers, learning_rate=torch.zeros((), device=device))
        for group in self._train_state.optimizer.param_groups:
            group.update(lr=self._inputs.learning_rate, capturable=True)
        # Threads that page-lock the next batches may go on meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._measured = update(self._train_state, static, numbers, gradient_clip_norm=gradient_clip_norm)
        return graph
