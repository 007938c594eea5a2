"""The engine that divides the model over data-parallel ranks by FSDP2, with tensor-parallel layers and pipeline stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from phase8.accelerator import records_steps
from phase8.checkpoint.load import Checkpoint
from phase8.checkpoint.state import MODEL_PREFIX, flat_state, restore_state
from phase8.config.schema import RunConfig
from phase8.data.microbatch import Microbatch
from phase8.distributed.collectives import Axis
from phase8.distributed.mesh import Mesh
from phase8.distributed.placement import held_part, is_of_divided_experts, own_region
from phase8.division import whole_region
from phase8.model.model import LanguageModel
from phase8.optim.state import declared_by
from phase8.precision.policy import compute_dtype
from phase8.topology import COPIES, STAGE, AxisName
from phase8.train.engine.captured_step import EAGER_STEPS, CapturedStep
from phase8.train.engine.compilation import compile_modules
from phase8.train.engine.measured import evaluate
from phase8.train.engine.protocol import HOST_COPY, WEIGHT, HeldTensor, Item, Replicas, StepResult
from phase8.train.engine.stage import EMBEDDING
from phase8.train.engine.step import train_step
from phase8.train.engine.train_state import TrainState, build_train_state, whole_model
from phase8.zero.fsdp import free_gathered


class FsdpEngine:
    """An engine over FSDP2; `TrainingEngine` documents its methods.

    Args:
        train_state: Model and optimizer.
        config: Config of the run.
    """

    def __init__(self, train_state: TrainState, config: RunConfig):
        self.train_state, self._config = train_state, config
        self._captured: CapturedStep | None = None

    @property
    def mesh(self) -> Mesh:
        """The mesh of the ranks."""
        return self.train_state.mesh

    @property
    def device(self) -> torch.device:
        """The device on which the model computes."""
        return self.train_state.device

    @property
    def captures_steps(self) -> bool:
        """Whether steps are replayed as one CUDA graph."""
        return self._config.train.cuda_graphs and records_steps(self.device.type)

    @property
    def num_slow_updates(self) -> int:
        """The number of first updates that compile, choose kernels or record."""
        return EAGER_STEPS + 1

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
        """Updates the weights once."""
        numbers = {"learning_rate": learning_rate, "gradient_clip_norm": gradient_clip_norm, "largest_loss": largest_loss}
        if not self.captures_steps:
            return train_step(self.train_state, microbatches, **numbers, stop=stop, unreadable=unreadable, report=report)
        if self._captured is None:
            self._captured = CapturedStep(self.train_state)
        return self._captured(microbatches, **numbers, stop=stop, unreadable=unreadable, report=report)

    def evaluate(self, microbatches: Iterable[Microbatch]) -> tuple[float, int]:
        """Returns the mean loss and the number of targets."""
        try:
            return evaluate(self.train_state.stage, microbatches)
        finally:
            # Else they stay gathered until a backward, which a recorded step does not run in Python: the next evaluation would find old weights.
            free_gathered(self.train_state.stage.module)

    def state(self) -> dict[str, Tensor]:
        """The live tensors of model and optimizer."""
        return flat_state(self.train_state.stage.module, self.train_state.optimizer, self.train_state.shards.parts)

    def state_sizes(self) -> list[int]:
        """The bytes of this rank's part of each tensor of `state`."""
        shards, declare = self.train_state.shards, declared_by(self.train_state.optimizer)
        weights = [held_part(tensor).nbytes for name, tensor in self.state().items() if name.startswith(MODEL_PREFIX)]
        states = (
            tensor.num_bytes(part.numel(), parameter_bytes=part.element_size())
            for name, part in shards.parts.items()
            for tensor in declare(name, shards.whole[name].shape).tensors
        )
        return [*weights, *states]

    def restore(self, checkpoint: Checkpoint, *, weights_only: bool = False) -> None:
        """Puts a checkpoint's tensors into model and optimizer."""
        self.close()  # a checkpoint without the optimizer's state frees tensors that a recorded step writes
        state = self.train_state
        is_part = self.mesh.pp.size > 1
        if weights_only:
            restore_state(checkpoint, state.stage.module, None, is_part=is_part, widen=True)
        else:
            restore_state(checkpoint, state.stage.module, state.optimizer, state.shards.parts, is_part=is_part)
        state.shards.read_again()

    def replicas(self) -> Replicas:
        """The parameters of which data-parallel ranks, tensor-parallel ranks, or the first and the last stage hold copies; and all buffers."""
        axes, buffers = self._axes_of_replicas(), self._buffers
        if not axes:
            return Replicas(axes, {})
        held = dict(self._held({name for _, names in axes for name in names}))
        return Replicas(axes, held | {Item(name, WEIGHT): HeldTensor(buffer, whole_region(buffer.shape)) for name, buffer in buffers.items()})

    def whole_model(self) -> Callable[[], LanguageModel] | None:
        """Gathers the whole model on the first rank."""
        return whole_model(self.train_state, self._config)

    def watch_gradients(self, look: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Calls `look` with the gradients between backward and optimizer step."""

        def show(*_: object) -> None:
            parts = self.train_state.shards.parts
            look({name: part.grad for name, part in parts.items() if part.grad is not None})

        self.train_state.optimizer.register_step_pre_hook(show)

    def close(self) -> None:
        """Frees the recorded step."""
        if self._captured is not None:
            captured, self._captured = self._captured, None
            captured.close()

    def end(self) -> None:
        """Frees the recorded step; all else goes with the last reference."""
        self.close()

    @property
    def _buffers(self) -> dict[str, Tensor]:
        """The buffers of this stage, of which every rank of the stage has a copy."""
        return dict(self.train_state.stage.module.named_buffers())

    def _axes_of_replicas(self) -> list[tuple[Axis, set[str]]]:
        mesh, whole = self.mesh, self.train_state.shards.whole
        of_experts = {name for name, parameter in whole.items() if is_of_divided_experts(parameter)}

        def replicated(axis_name: AxisName) -> set[str]:
            return {name for name, parameter in whole.items() if _is_replicated(parameter, axis_name)}

        copies = dict(zip(COPIES, mesh.axes(COPIES), strict=True))
        axes = [
            (axis, replicated(axis_name) - (of_experts if axis_name is AxisName.REPLICATE else set()))
            for axis_name, axis in copies.items()
            if axis.size > 1
        ]
        if mesh.expert_replicate.size > 1:
            axes.append((mesh.expert_replicate, replicated(AxisName.REPLICATE) & of_experts))
        if self._buffers:
            axes += [(axis, set(self._buffers)) for axis in mesh.axes(STAGE) if axis.size > 1]
        if mesh.pp.size > 1 and self._config.model.tie_embeddings:
            axes.append((mesh.pp, {EMBEDDING} if mesh.pp.index in (0, mesh.pp.size - 1) else set()))
        return axes

    def _held(self, names: set[str]) -> Iterator[tuple[Item, HeldTensor]]:
        """Yields this rank's part of each named parameter, its copy in host memory where the optimizer is offloaded, and its optimizer state."""
        shards, optimizer = self.train_state.shards, self.train_state.optimizer
        for name, parameter in shards.whole.items():
            if name not in names:
                continue
            region = own_region(parameter)
            yield Item(name, WEIGHT), HeldTensor(held_part(parameter), region)
            if shards.offload:
                yield Item(name, HOST_COPY), HeldTensor(shards.parts[name], region)
            for key, value in optimizer.state.get(shards.parts[name], {}).items():
                yield Item(name, key), HeldTensor(value, region)


def build_fsdp_engine(config: RunConfig, *, mesh: Mesh, device: torch.device) -> FsdpEngine:
    """Builds the engine of a config with its first weights, compiled as the config says.

    Args:
        config: Config without `auto` settings.
        mesh: Mesh of the ranks, which all build their engines at the same time.
        device: Device on which the model computes.
    """
    train_state = build_train_state(config, mesh=mesh, device=device, dtype=compute_dtype(config.precision))
    compile_modules(train_state.stage.chunks, config)
    return FsdpEngine(train_state, config)


def _is_replicated(parameter: Tensor, axis: AxisName) -> bool:
    """Whether the ranks along an axis hold the same part of a parameter."""
    if not isinstance(parameter, DTensor):
        return False
    names = parameter.device_mesh.mesh_dim_names
    assert names is not None  # `build_mesh` names all dims
    return axis in names and parameter.placements[names.index(axis)].is_replicate()
