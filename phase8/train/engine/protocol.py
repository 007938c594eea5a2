"""What a training run knows of the engine that takes its steps: a few verbs. The fsdp engine is one; it is chosen in `train/build.py`.

| verb | who asks for it |
|---|---|
| `update`, `evaluate`, `close` | the train loop, trials of settings, the benchmark |
| `state`, `state_sizes`, `restore` | the saver, resuming, rollbacks, first weights from another model |
| `replicas` | the comparison of what several ranks hold alike |
| `whole_model` | the sample at the end of a run |
| `watch_gradients` | the benchmark |
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


@dataclass(frozen=True)
class StepResult:
    """What a step measured.

    Args:
        loss: Mean loss in nats per valid target, over all microbatches of all ranks.
        grad_norm: Global gradient norm before clipping.
        skipped: Loss or norm was not finite, or the loss too large, and the weights were left alone.
        stop: Some rank was asked to stop.
        unreadable: Some rank could not read its data, and the weights were left alone.
        auxiliary_losses: Mean of each auxiliary loss per valid target, by name; `loss` does not contain them.
    """

    loss: float
    grad_norm: float
    skipped: bool
    stop: bool = False
    unreadable: bool = False
    auxiliary_losses: Mapping[str, float] = field(default_factory=dict)


class Item(NamedTuple):
    """A tensor that a rank holds.

    Args:
        parameter: Name.
        key: The key of the optimizer's state, `WEIGHT` or `HOST_COPY`.
    """

    parameter: str
    key: str

    def __str__(self) -> str:
        return self.parameter if self.key == WEIGHT else f"{self.key} of {self.parameter}"


WEIGHT, HOST_COPY = "weight", "the copy in host memory"


class HeldTensor(NamedTuple):
    """What this rank holds of an item.

    Args:
        tensor: The live tensor.
        region: Offsets and shape of this part of the parameter; ranks with equal regions hold copies.
    """

    tensor: Tensor
    region: tuple[list[int], list[int]]


@dataclass(frozen=True)
class Replicas:
    """What several ranks hold alike.

    Args:
        axes: Axes along which ranks hold copies, the same on every rank, and the names of the parameters that this rank has copies of.
        tensors: Those parameters on this rank, and the optimizer's state of them.
    """

    axes: Sequence[tuple[Axis, set[str]]]
    tensors: Mapping[Item, HeldTensor]


class TrainingEngine(Protocol):
    """A model with its optimizer, as one rank holds them. Every verb is a collective of all ranks, but for `state` and what cites it."""

    @property
    def mesh(self) -> Mesh:
        """The ranks."""

    @property
    def device(self) -> torch.device:
        """Where the model computes."""

    @property
    def num_slow_updates(self) -> int:
        """Updates at the beginning, and after `close`, that take longer than later ones: compilation, the recording of a step."""

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
        """Updates the weights once, by the mean loss over the valid targets of all microbatches of all ranks.

        Args:
            microbatches: Of this rank, on the host or on the device.
            learning_rate: For this step.
            gradient_clip_norm: Largest global norm; 0: no clipping.
            largest_loss: The largest loss that may change the weights; losses and norms that are not finite never do.
            stop: This rank was asked to stop; all ranks learn it with the loss.
            unreadable: This rank could not read its data and brings a stand-in; all ranks learn it with the loss and keep their weights.
            report: Told of every forward and backward.
        """

    def evaluate(self, microbatches: Iterable[Microbatch]) -> tuple[float, int]:
        """Mean loss in nats per valid target, and the number of those targets, over all ranks. Every rank brings as many microbatches."""

    def state(self) -> dict[str, Tensor]:
        """The live tensors (not copies) of weights and optimizer under the names of `checkpoint/state.py`; divided ones are DTensors."""

    def state_sizes(self) -> list[int]:
        """Bytes of this rank's parts of `state`, in its order, those included that the optimizer has not made yet."""

    def restore(self, checkpoint: Checkpoint, *, weights_only: bool = False) -> None:
        """Puts a checkpoint's tensors into weights and optimizer; changes nothing when it fails.

        Args:
            checkpoint: To read this rank's parts from.
            weights_only: Leave the optimizer alone, and take weights of narrower dtypes, too.

        Raises:
            CheckpointError: It is damaged, or of another model.
        """

    def replicas(self) -> Replicas:
        """What several ranks hold alike; called on all ranks, but without communication."""

    def whole_model(self) -> LanguageModel | None:
        """The model in one piece, on the first rank; None on the others, which help to gather it."""

    def watch_gradients(self, look: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Has every later update show its gradients by the name of their parameter, fully summed and not yet clipped."""

    def close(self) -> None:
        """Frees what only updates need, a recorded step for instance. Weights and optimizer stay, and a later update makes it anew."""


class BuildEngine(Protocol):
    """Makes the engine of a config with its first weights."""

    def __call__(self, config: RunConfig, *, mesh: Mesh, device: torch.device) -> TrainingEngine:
        """Builds it on all ranks at once."""
