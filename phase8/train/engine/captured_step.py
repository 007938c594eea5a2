"""The whole optimizer step as one CUDA graph: forward, backward, clipping and optimizer in a single launch.

A small model is bound by the thousands of launches that Python makes in a step. They are recorded once and replayed by the device; the inputs
of each step are copied to the tensors from which the recording read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phase8 import accelerator
from phase8.data.microbatch import Microbatch
from phase8.train.engine.measured import StepNumbers, count_targets, step_result
from phase8.train.engine.protocol import StepResult
from phase8.train.engine.step import train_step, update
from phase8.train.engine.train_state import TrainState
from phase8.zero.fsdp import free_gathered

# Number of steps taken without a graph: compilation, the choice of kernels and the first state of the optimizer cannot be recorded.
EAGER_STEPS = 2


@dataclass(frozen=True)
class _Inputs:
    """The tensors on the device from which the graph reads the inputs of a step.

    Args:
        microbatches: Microbatches on the device.
        numbers: Numbers of the step as scalar tensors.
        learning_rate: Learning rate as a scalar tensor.
    """

    microbatches: tuple[Microbatch, ...]
    numbers: StepNumbers
    learning_rate: Tensor

    def fill(self, microbatches: Sequence[Microbatch], numbers: StepNumbers, learning_rate: float) -> None:
        """Copies the inputs of a step, asynchronously from page-locked memory; the end of the step waits for the copies.

        Raises:
            ValueError: The microbatches are not like those of the recorded step.
        """
        for to, batch in zip(self.microbatches, microbatches, strict=True):
            for static, new in ((to.tokens, batch.tokens), (to.targets, batch.targets), (to.starts, batch.starts)):
                if (static is None) != (new is None):
                    raise ValueError("A recorded step takes either packed documents or whole ones, as the step that was recorded.")
                if static is not None and new is not None:
                    if static.shape != new.shape:  # a copy would repeat a smaller one
                        raise ValueError(f"A recorded step takes microbatches of {list(static.shape)}, as recorded, not {list(new.shape)}.")
                    static.copy_(new, non_blocking=True)
        self.numbers.num_targets.fill_(numbers.num_targets)
        self.numbers.largest_loss.fill_(numbers.largest_loss)
        self.numbers.stop.fill_(numbers.stop)
        self.numbers.unreadable.fill_(numbers.unreadable)
        self.learning_rate.fill_(learning_rate)


class CapturedStep:
    """`train_step` as one CUDA graph, for batches that all have the same shape. Each rank records its own part, collectives included.

    Args:
        train_state: Model and optimizer; after the recording, only the graph may use the optimizer.
    """

    def __init__(self, train_state: TrainState):
        self._train_state, self._num_eager_steps = train_state, 0
        self._graph: accelerator.Graph | None = None

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
        """Takes a step; arguments as for `train_step`.

        Raises:
            ValueError: The step differs from the recorded one in what a recording keeps: `gradient_clip_norm`, or the form of the microbatches.
        """
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
            self._graph, self._clip_norm = self._record(microbatches, gradient_clip_norm=gradient_clip_norm), gradient_clip_norm
        if gradient_clip_norm != self._clip_norm:
            raise ValueError(f"A recorded step clips gradients at {self._clip_norm}, as recorded, not at {gradient_clip_norm}.")
        if report is not None:
            report("the recorded step")
        self._inputs.fill(microbatches, StepNumbers(count_targets(microbatches), largest_loss, stop, unreadable), learning_rate)
        self._graph.replay()
        return step_result(self._measured.tolist(), self._train_state.stage)

    def close(self) -> None:
        """Frees the graph; NCCL waits for this before it ends a communicator whose collectives are in the graph."""
        if self._graph is not None:
            self._graph.reset()
            self._graph = None

    def _record(self, microbatches: Sequence[Microbatch], *, gradient_clip_norm: float) -> accelerator.Graph:
        """Records a step for batches of this shape, without changing any weights."""
        device, graph = self._train_state.device, accelerator.Graph()
        static = tuple(batch.to(device) for batch in microbatches)
        numbers = StepNumbers(*(torch.zeros((), dtype=torch.float64, device=device) for _ in range(4)))
        self._inputs = _Inputs(static, numbers, learning_rate=torch.zeros((), device=device))
        for group in self._train_state.optimizer.param_groups:
            group.update(lr=self._inputs.learning_rate, capturable=True)
        free_gathered(self._train_state.stage.module)  # every replay has to gather the weights
        with accelerator.recording(graph):
            self._measured = update(self._train_state, static, numbers, gradient_clip_norm=gradient_clip_norm)
        return graph
