"""One optimizer step: accumulate gradients over microbatches, clip, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from phase8.data.microbatch import Microbatch
from phase8.optim.clip import step_clipped
from phase8.train.engine.measured import StepNumbers, count_targets, step_result, sum_shares, targets_of_all
from phase8.train.engine.protocol import StepResult
from phase8.train.engine.train_state import TrainState


def train_step(
    train_state: TrainState,
    microbatches: Sequence[Microbatch],
    *,
    learning_rate: float,
    gradient_clip_norm: float,
    largest_loss: float = math.inf,
    stop: bool = False,
    unreadable: bool = False,
    report: Callable[[str], None] | None = None,
) -> StepResult:
    """Updates the weights once.

    The loss is a mean over the valid targets of all microbatches of all ranks, so it does not depend on how the batch is cut.

    Args:
        train_state: Model and optimizer. The model must have no gradients, and has none after the step. Weights and optimizer state do
            not change when loss or gradient norm is not finite, the loss is too large, or data are unreadable.
        microbatches: Microbatches of this rank, on the host or on the device.
        learning_rate: Learning rate of this step.
        gradient_clip_norm: Largest global norm; 0: no clipping.
        largest_loss: Largest loss that may change the weights.
        stop: Whether this rank was asked to stop; all ranks learn it with the loss.
        unreadable: Whether this rank could not read its data and passes a stand-in; all ranks learn it with the loss and keep their weights.
        report: Function that is called with a text before every forward and backward.
    """
    for group in train_state.optimizer.param_groups:
        group["lr"] = learning_rate
    numbers = StepNumbers(count_targets(microbatches), largest_loss, stop, unreadable)
    measured = update(train_state, microbatches, numbers, gradient_clip_norm=gradient_clip_norm, report=report)
    return step_result(measured.tolist(), train_state.stage)  # the only synchronisation of the step


def update(
    train_state: TrainState,
    microbatches: Sequence[Microbatch],
    numbers: StepNumbers,
    *,
    gradient_clip_norm: float,
    report: Callable[[str], None] | None = None,
) -> Tensor:
    """Enqueues a step's work on the device without waiting; arguments as for `train_step`. The optimizer has its learning rate already.

    Returns:
        Numbers for `step_result`.
    """
    stage, shards = train_state.stage, train_state.shards
    shares = stage.train(microbatches, targets_of_all(numbers.num_targets, stage), report=report)
    shards.take_gradients()
    norm = shards.gradient_norm()
    sums = sum_shares(shares, numbers, stage)
    counts = sums.may_count(numbers) & norm.isfinite().to(stage.device)
    step_clipped(train_state.optimizer, norm, max_norm=gradient_clip_norm, counts=counts)
    shards.write_back()
    shards.drop_gradients()
    if sums.routing is not None:
        stage.learn_from_routing(sums.routing, counts)
    return sums.measured(norm, counts)
