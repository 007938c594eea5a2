"""The interface through which a run uses its engine: `fsdp.py` and `deepspeed.py` implement it, `train/build.py` chooses.

| method | users |
|---|---|
| `update`, `evaluate`, `close` | the train loop, trials of settings, the benchmark |
| `state`, `state_sizes`, `restore` | the saver, resuming, rollbacks, first weights from another model |
| `replicas` | the comparison of copies that several ranks hold |
| `whole_model` | the sample at the end of a run |
| `watch_gradients` | the benchmark |
| `end` | trials of settings, after which the run builds another engine |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from phase8.checkpoint.load import Checkpoint
from phase8.config.schema import RunConfig
from phase8.data.microbatch import Microbatch
from phase8.distributed.collectives import Axis
from phase8.distributed.mesh import Mesh
from phase8.model.model import LanguageModel


class LayerRouting(NamedTuple):
    """The routing of a layer with experts in a step, over the global batch.

    Args:
        load: Share of the choices that each expert got.
        dropped: Share of the choices that were dropped.
        entropy: Mean entropy of a token's scores, in nats.
        imbalance: What the balance loss weighs, 1 where experts are balanced.
    """

    load: tuple[float, ...]
    dropped: float
    entropy: float
    imbalance: float


@dataclass(frozen=True)
class StepResult:
    """The measurements of a step.

    Args:
        loss: Mean loss in nats per valid target, over all microbatches of all ranks.
        grad_norm: Global gradient norm before clipping.
        skipped: Whether the weights stayed as they were: loss or norm was not finite, the loss was too large, or data were unreadable.
        stop: Whether some rank was asked to stop.
        unreadable: Whether some rank could not read its data, in which case the weights stayed as they were.
        auxiliary_losses: Mean of each auxiliary loss per valid target, by name; `loss` does not contain them.
        routing: Routing of each layer with experts, by the number of the layer.
    """

    loss: float
    grad_norm: float
    skipped: bool
    stop: bool = False
    unreadable: bool = False
    auxiliary_losses: Mapping[str, float] = field(default_factory=dict)
    routing: Mapping[int, LayerRouting] = field(default_factory=dict)


class Item(NamedTuple):
    """The identity of a tensor that a rank holds.

    Args:
        parameter: Name of the parameter.
        key: Key in the optimizer's state, or `WEIGHT` or `HOST_COPY`.
    """

    parameter: str
    key: str

    def __str__(self) -> str:
        return self.parameter if self.key == WEIGHT else f"{self.key} of {self.parameter}"


WEIGHT, HOST_COPY = "weight", "the copy in host memory"


class HeldTensor(NamedTuple):
    """This rank's part of an item.

    Args:
        tensor: Live tensor.
        region: Offsets and shape of the part within the parameter; ranks with equal regions hold copies.
    """

    tensor: Tensor
    region: tuple[list[int], list[int]]


@dataclass(frozen=True)
class Replicas:
    """The tensors of which several ranks hold copies.

    Args:
        axes: Axes along which ranks hold copies, the same on every rank, each with the names of the parameters copied along it here.
        tensors: This rank's parts of these parameters and of their optimizer state.
    """

    axes: Sequence[tuple[Axis, set[str]]]
    tensors: Mapping[Item, HeldTensor]


class TrainingEngine(Protocol):
    """A rank's part of a model and its optimizer. Every method is a collective of all ranks, except `state_sizes` and `replicas`."""

    @property
    def mesh(self) -> Mesh:
        """The mesh of the ranks."""

    @property
    def device(self) -> torch.device:
        """The device on which the model computes."""

    @property
    def num_slow_updates(self) -> int:
        """The number of updates, at the beginning and after `close`, that are slow because they compile or record a step."""

    def update(
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
        """Updates the weights once, with the gradient of the mean loss over the valid targets of all microbatches of all ranks.

        Args:
            microbatches: Microbatches of this rank, of its slices where ranks share sequences, on the host or on the device.
            learning_rate: Learning rate of this step.
            gradient_clip_norm: Largest global norm; 0: no clipping.
            largest_loss: Largest loss that may change the weights; losses and norms that are not finite never do.
            stop: Whether this rank was asked to stop; all ranks learn it with the loss.
            unreadable: Whether this rank could not read its data and passes a stand-in; all ranks learn it with the loss and keep their
                weights.
            report: Function that is called with a text before every forward and backward.
        """

    def evaluate(self, microbatches: Iterable[Microbatch]) -> tuple[float, int]:
        """Returns mean loss in nats per valid target and number of targets over all ranks; every rank passes the same number of microbatches."""

    def state(self) -> dict[str, Tensor]:
        """The tensors of weights and optimizer under the names of `checkpoint/state.py`, valid until the next update; divided ones are DTensors."""

    def state_sizes(self) -> list[int]:
        """The bytes of this rank's part of each tensor of `state`, including tensors that the optimizer has not made yet."""

    def restore(self, checkpoint: Checkpoint, *, weights_only: bool = False) -> None:
        """Loads a checkpoint's tensors into weights and optimizer; one that does not fit changes nothing.

        Every byte is read once and checked on the way, so after a damaged checkpoint some tensors may be overwritten: the caller restores another
        one, which overwrites all, or ends the run.

        Args:
            checkpoint: Checkpoint from which this rank reads its parts.
            weights_only: Whether only weights are loaded, which may then be stored in a narrower dtype.

        Raises:
            CheckpointError: The checkpoint is damaged or belongs to another model.
        """

    def replicas(self) -> Replicas:
        """The tensors of which several ranks hold copies; no communication takes place."""

    def whole_model(self) -> Callable[[], LanguageModel] | None:
        """Gathers the tensors of the whole model on the first rank; returns what puts it together there, None on every other rank.

        It may fail without another rank noticing.
        """

    def watch_gradients(self, look: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Makes every later update call `look` with its gradients by parameter name, fully summed and not yet clipped.

        While a step is recorded `look` is called once, and what it computes is a part of the step; a replay calls nothing.
        """

    def close(self) -> None:
        """Frees memory that only updates need, such as a recorded step; weights and optimizer stay. A later update allocates it again."""

    def end(self) -> None:
        """Makes all memory of the engine go with the last reference to it; nothing of it may be used any more."""


class BuildEngine(Protocol):
    """A function that builds the engine of a config with its first weights."""

    def __call__(self, config: RunConfig, *, mesh: Mesh, device: torch.device) -> TrainingEngine:
        """Builds the engine; a collective of all ranks."""
