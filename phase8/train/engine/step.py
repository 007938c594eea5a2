"""One optimizer step: accumulate gradients over microbatches, clip, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phase8.data.microbatch import Microbatch
from phase8.distributed.collectives import sum_over
from phase8.optim.clip import step_clipped
from phase8.topology import EVERYBODY, LOSS, TOKENS
from phase8.train.engine.protocol import LayerRouting, StepResult
from phase8.train.engine.stage import Stage
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


@dataclass(frozen=True)
class StepNumbers:
    """The numbers of a step. They are scalars on the device for a recorded step, which reads them at every replay.

    Args:
        num_targets: Number of targets on this rank, from `count_targets`.
        largest_loss: Largest loss that may change the weights.
        stop: Whether this rank was asked to stop.
        unreadable: Whether this rank could not read its data.
    """

    num_targets: int | Tensor
    largest_loss: float | Tensor
    stop: bool | Tensor
    unreadable: bool | Tensor


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
        Numbers for `step_result`: loss, gradient norm, number of ranks that were asked to stop, number of ranks that could not read their
        data, 1 if the weights were changed or else 0, the auxiliary losses, and the routing of each layer with experts.
    """
    optimizer, shards, mesh, device = train_state.optimizer, train_state.shards, train_state.mesh, train_state.device
    total, auxiliary, routing = train_state.stage.train(microbatches, _over_all_ranks(numbers.num_targets, train_state), report=report)
    shards.take_gradients()
    norm = shards.gradient_norm()
    total = sum_over(total, *mesh.axes(LOSS))
    told = torch.stack([flag.to(total) if isinstance(flag, Tensor) else torch.full_like(total, flag) for flag in (numbers.stop, numbers.unreadable)])
    told = sum_over(told, *mesh.axes(EVERYBODY))
    counts = total.isfinite() & norm.isfinite().to(device) & (total <= numbers.largest_loss) & (told[1] == 0)
    step_clipped(optimizer, norm, max_norm=gradient_clip_norm, counts=counts)
    shards.write_back()
    shards.drop_gradients()
    # Tensor-parallel ranks have the same main loss, but each has the auxiliary losses of its own tokens.
    found = () if auxiliary is None else sum_over(auxiliary, *mesh.axes(EVERYBODY))
    measured = torch.stack((total, norm.to(total), *told, counts.to(total), *found))
    if routing is None:
        return measured
    routing = sum_over(routing, *mesh.axes(EVERYBODY))
    train_state.stage.learn_from_routing(routing, counts)
    return torch.cat((measured, routing.flatten().to(measured)))


def step_result(measured: Sequence[float], stage: Stage) -> StepResult:
    """Makes a StepResult from the numbers that `update` returns."""
    loss, norm, num_stopped, num_unreadable, counts, *more = measured
    names, section = stage.auxiliary_losses, stage.chunks[0].section
    auxiliary, routing = more[: len(names)], more[len(names) :]
    per_layer = section.numbers_of_routing
    return StepResult(
        loss,
        norm,
        skipped=counts == 0,
        stop=num_stopped > 0,
        unreadable=num_unreadable > 0,
        auxiliary_losses=dict(zip(names, auxiliary, strict=True)),
        routing={
            layer: _layer_routing(routing[place * per_layer : (place + 1) * per_layer], section.top_k)
            for place, layer in enumerate(stage.routed_layers)
        },
    )


def _layer_routing(measured: Sequence[float], top_k: int) -> LayerRouting:
    *choices, dropped, entropy = measured
    total = max(sum(choices), 1.0)
    return LayerRouting(tuple(count / total for count in choices), dropped / total, entropy * top_k / total)


@torch.no_grad()
def evaluate(train_state: TrainState, microbatches: Iterable[Microbatch]) -> tuple[float, int]:
    """Returns mean loss in nats per valid target and number of targets over all ranks; every rank passes the same number of microbatches."""
    batches = list(microbatches)
    loss_sum = sum_over(train_state.stage.loss_sum(batches), train_state.mesh.pp)
    sums = torch.stack((loss_sum, loss_sum.new_tensor(sum(batch.num_valid for batch in batches))))
    loss, num_valid = sum_over(sums, *train_state.mesh.axes(TOKENS)).tolist()
    return loss / max(num_valid, 1), int(num_valid)


def count_targets(microbatches: Sequence[Microbatch]) -> int:
    """The number of valid targets of a step on this rank."""
    return sum(microbatch.num_valid for microbatch in microbatches)


def _over_all_ranks(num_targets: int | Tensor, train_state: TrainState) -> int | Tensor:
    """The sum over the ranks that read different tokens, but at least 1; with several ranks, and on a GPU, a scalar on the device.

    A GPU multiplies by the reciprocal of a Python number, but divides by a tensor: the loss of a recorded step would differ in its last bit.
    """
    axes = train_state.mesh.axes(TOKENS)
    if isinstance(num_targets, int):
        if train_state.device.type == "cpu" and all(axis.size == 1 for axis in axes):
            return max(num_targets, 1)
        num_targets = torch.full((), num_targets, dtype=torch.float64, device=train_state.device)
    return sum_over(num_targets, *axes).clamp(min=1)
