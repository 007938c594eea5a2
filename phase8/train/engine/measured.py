"""The measurements of a step: each rank's shares are summed over the ranks, on the device, and read once at the end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from phase8.data.microbatch import Microbatch
from phase8.distributed.collectives import sum_over
from phase8.topology import EVERYBODY, LOSS, TOKENS
from phase8.train.engine.protocol import LayerRouting, StepResult
from phase8.train.engine.stage import Stage, StageShares


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


class StepSums(NamedTuple):
    """The sums over all ranks of what a step measures.

    Args:
        loss: Mean loss without auxiliary losses.
        told: Number of ranks that were asked to stop, and number of ranks that could not read their data [2].
        auxiliary: Auxiliary losses [n]; None: the model has none.
        routing: What layers with experts measure [layers, E + 3]; None: there are none.
    """

    loss: Tensor
    told: Tensor
    auxiliary: Tensor | None
    routing: Tensor | None

    def may_count(self, numbers: StepNumbers) -> Tensor:
        """A scalar on the device: whether the weights may change as far as loss and data are concerned."""
        return self.loss.isfinite() & (self.loss <= numbers.largest_loss) & (self.told[1] == 0)

    def measured(self, norm: Tensor, counts: Tensor) -> Tensor:
        """The numbers for `step_result`.

        Args:
            norm: Gradient norm.
            counts: Whether the weights were changed.
        """
        auxiliary = () if self.auxiliary is None else self.auxiliary
        measured = torch.stack((self.loss, norm.to(self.loss), *self.told, counts.to(self.loss), *auxiliary))
        return measured if self.routing is None else torch.cat((measured, self.routing.flatten().to(measured)))


def sum_shares(shares: StageShares, numbers: StepNumbers, stage: Stage) -> StepSums:
    """Sums what each rank's stage has measured; a collective of all ranks."""
    mesh = stage.mesh
    loss = sum_over(shares.loss, *mesh.axes(LOSS))
    flags = (numbers.stop, numbers.unreadable)
    told = torch.stack([flag.to(loss) if isinstance(flag, Tensor) else torch.full_like(loss, flag) for flag in flags])
    told = sum_over(told, *mesh.axes(EVERYBODY))
    # Tensor-parallel ranks have the same main loss, but each has the auxiliary losses of its own tokens.
    auxiliary = None if shares.auxiliary is None else sum_over(shares.auxiliary, *mesh.axes(EVERYBODY))
    routing = None if shares.routing is None else sum_over(shares.routing, *mesh.axes(EVERYBODY))
    return StepSums(loss, told, auxiliary, routing)


def step_result(measured: Sequence[float], stage: Stage) -> StepResult:
    """Makes a StepResult from the numbers that `StepSums.measured` returns."""
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
    *choices, dropped, entropy, imbalance = measured
    total = max(sum(choices), 1.0)
    return LayerRouting(tuple(count / total for count in choices), dropped / total, entropy * top_k / total, imbalance * top_k / total)


@torch.no_grad()
def evaluate(stage: Stage, microbatches: Iterable[Microbatch]) -> tuple[float, int]:
    """Returns mean loss in nats per valid target and number of targets over all ranks; every rank passes the same number of microbatches."""
    batches = list(microbatches)
    loss_sum = sum_over(stage.loss_sum(batches), stage.mesh.pp)
    sums = torch.stack((loss_sum, loss_sum.new_tensor(sum(batch.num_valid for batch in batches))))
    loss, num_valid = sum_over(sums, *stage.mesh.axes(TOKENS)).tolist()
    return loss / max(num_valid, 1), int(num_valid)


def count_targets(microbatches: Sequence[Microbatch]) -> int:
    """The number of valid targets of a step on this rank."""
    return sum(microbatch.num_valid for microbatch in microbatches)


def targets_of_all(num_targets: int | Tensor, stage: Stage) -> int | Tensor:
    """The sum over the ranks that read different tokens, but at least 1; with several ranks, and on a GPU, a scalar on the device.

    A GPU multiplies by the reciprocal of a Python number, but divides by a tensor: the loss of a recorded step would differ in its last bit.
    """
    axes = stage.mesh.axes(TOKENS)
    if isinstance(num_targets, int):
        if stage.device.type == "cpu" and all(axis.size == 1 for axis in axes):
            return max(num_targets, 1)
        num_targets = torch.full((), num_targets, dtype=torch.float64, device=stage.device)
    return sum_over(num_targets, *axes).clamp(min=1)
