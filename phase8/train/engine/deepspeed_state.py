"""Weights and optimizer state of DeepSpeed under the names, shapes and divisions of our checkpoints.

DeepSpeed holds fp32 master weights and optimizer state as pieces of flat buffers, which are no rectangular parts of a parameter. For a checkpoint
each parameter is put together from its pieces, one after the other, and every rank keeps its rows of it in host memory. A single rank has all
pieces, and its buffers themselves are saved.

There is no public interface to a piece without a copy on the GPU: names with an underscore are those of DeepSpeed 0.19.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from phase8.checkpoint.load import Checkpoint
from phase8.checkpoint.state import MODEL_PREFIX, OPTIMIZER_PREFIX, require_fit
from phase8.distributed.collectives import add_up_over
from phase8.distributed.mesh import Mesh
from phase8.distributed.placement import own_region, placed, placed_like
from phase8.division import Region, part, whole_region
from phase8.errors import CheckpointMismatchError
from phase8.model.parameters import first_value
from phase8.tensor_parallel.parameters import ParameterSpec, own_part
from phase8.train.engine.protocol import WEIGHT, HeldTensor, Item, Replicas

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"


class _Piece(NamedTuple):
    """This rank's piece of a flattened parameter.

    Args:
        offset: Number of the first element.
        values: Live values, or those of the optimizer's state.
    """

    offset: int
    values: Tensor


class DeepSpeedState:
    """The tensors that a checkpoint of a run under DeepSpeed consists of.

    Args:
        zero: DeepSpeed's optimizer.
        model: Model whose parameters DeepSpeed has taken over.
        shapes: Shape of each parameter on this rank, by name.
        divided: Parameters that tensor-parallel ranks divide or hold whole, as DTensors, by name; without tensor parallelism none.
        mesh: Mesh of the ranks.
        device: Device on which the model computes.
    """

    def __init__(
        self, zero: Any, model: nn.Module, shapes: Mapping[str, torch.Size], divided: Mapping[str, DTensor], mesh: Mesh, *, device: torch.device
    ):
        self._zero, self._shapes, self._divided, self._mesh, self._device = zero, shapes, divided, mesh, device
        self._parameters, self._buffers = dict(model.named_parameters()), dict(model.named_buffers())
        self._rows_mesh = None if mesh.topology.world_size == 1 else _rows_mesh(mesh)
        self._copies: dict[str, Tensor] = {}

    @torch.no_grad()
    def initialise(self, specs: Mapping[str, tuple[torch.Size, ParameterSpec]], *, buffers: Mapping[str, Tensor], seed: int) -> None:
        """Gives weights and buffers their first values.

        Args:
            specs: Global shape and spec of each parameter, by name.
            buffers: First value of each buffer, by name.
            seed: Seed of the run.
        """
        for name, (shape, spec) in specs.items():
            value = own_part(first_value(name, shape, spec, seed=seed), spec, self._mesh.tp)
            self._write(name, WEIGHT, value)
        for name, value in buffers.items():
            self._buffers[name].copy_(value)
        self._compute_with_masters()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the checkpoint by name; a collective of all ranks."""
        found = {MODEL_PREFIX + name: self._own_rows(name, WEIGHT) for name in self._parameters}
        found |= {MODEL_PREFIX + name: buffer for name, buffer in self._buffers.items()}
        steps = self._steps
        for name in () if steps is None else self._parameters:
            found[f"{OPTIMIZER_PREFIX}{name}.{STEP}"] = torch.tensor(steps, dtype=torch.float32)
            found |= {f"{OPTIMIZER_PREFIX}{name}.{key}": self._own_rows(name, key) for key in MOMENTS}
        return found

    def sizes(self) -> list[int]:
        """The bytes of this rank's part of each tensor, in the order of `tensors`."""
        own = {name: 4 * self._region_of_rows(name).num_elements for name in self._parameters}
        moments = [size for name in self._parameters for size in (4, own[name], own[name])]
        return [*own.values(), *(buffer.nbytes for buffer in self._buffers.values()), *moments]

    def weights(self) -> dict[str, Tensor]:
        """The master weights and the buffers in host memory, those that tensor-parallel ranks divide as DTensors; a collective of all ranks."""
        found = {name: self._whole(name, WEIGHT).cpu() for name in self._parameters}
        return {name: placed_like(value, self._divided[name]) if self._divided else value for name, value in found.items()} | self._buffers

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that the next step will use, gathered on every rank; a collective of all ranks."""
        from deepspeed.utils import safe_get_full_grad  # installed, since the engine was built

        return {name: safe_get_full_grad(parameter) for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint, *, whole: nn.Module, weights_only: bool) -> None:
        """Loads a checkpoint's tensors; one that does not fit changes nothing, one that is damaged may leave some overwritten.

        Args:
            checkpoint: Checkpoint from which this rank reads what it holds.
            whole: The whole model on the meta device.
            weights_only: Whether only weights are loaded, which may then be stored in a narrower dtype.
        """
        optimizer = None if weights_only else torch.optim.AdamW(whole.parameters())
        require_fit(checkpoint, whole, optimizer, widen=weights_only)
        has_moments = not weights_only and any(name.startswith(OPTIMIZER_PREFIX) for name in checkpoint.tensor_names)
        keys = {WEIGHT: MODEL_PREFIX + "{}", **({key: OPTIMIZER_PREFIX + "{}." + key for key in MOMENTS} if has_moments else {})}
        steps = _common_step(checkpoint, self._parameters) if has_moments else 0.0
        regions = {name: self._region_of_part(name) for name in self._parameters}
        self._set_steps(steps)
        for name, region in regions.items():
            for key, pattern in keys.items():
                self._write(name, key, checkpoint.read_region(pattern.format(name), region))
        for name, buffer in self._buffers.items():
            buffer.copy_(checkpoint.read(MODEL_PREFIX + name))
        self._compute_with_masters()

    def replicas(self) -> Replicas:
        """The weights with which ranks compute, where several ranks hold them, and the buffers; in stage 3 data-parallel ranks divide the weights."""
        is_divided = self._is_stage_3
        whole_on_tensor_axis = {name for name, parameter in self._divided.items() if parameter.placements[-1].is_replicate()}
        axes = [(self._mesh.tp, whole_on_tensor_axis | set(self._buffers))] if self._mesh.tp.size > 1 else []
        if self._mesh.shard.size > 1:
            axes.append((self._mesh.shard, set(self._buffers) if is_divided else set(self._parameters) | set(self._buffers)))
        held = {name: parameter.ds_tensor if is_divided else parameter.data for name, parameter in self._parameters.items()} | self._buffers
        names = {name for _, names in axes for name in names}
        place = self._mesh.shard.index if is_divided else 0
        tensors = {Item(name, WEIGHT): HeldTensor(tensor, ([place], list(tensor.shape))) for name, tensor in held.items() if name in names}
        return Replicas(axes, tensors)

    @property
    def _flats(self) -> list[Tensor]:
        """The flat buffers of master weights, by which the optimizer knows its state."""
        zero = self._zero
        return zero.fp32_partitioned_groups_flat if self._is_stage_3 else zero.single_partition_of_fp32_groups

    @property
    def _is_stage_3(self) -> bool:
        return hasattr(self._zero, "fp32_partitioned_groups_flat")

    @property
    def _is_on_nvme(self) -> bool:
        return self._is_stage_3 and bool(self._zero.swap_optimizer)

    def _in_memory(self, name: str, *, changes: bool) -> AbstractContextManager[None]:
        """The context in which this rank's piece of a parameter, and of its moments, is in memory."""
        if not self._is_on_nvme:
            return nullcontext()
        number, *_ = self._zero.grad_position[self._zero.get_param_id(self._parameters[name])]
        return self._group_in_memory(number, changes=changes)

    @contextmanager
    def _group_in_memory(self, number: int, *, changes: bool) -> Iterator[None]:
        """The context in which a flat buffer and its moments are in memory; what changes is written back to NVMe."""
        if not (self._is_on_nvme and self._zero._swappable_optimizer_subgroup(number)):
            yield
            return
        self._zero._optimizer_states_and_gradient_swap_in(number)
        yield
        if changes:
            self._zero._optimizer_states_and_gradient_swap_out(number)
        else:
            self._zero._release_swap_buffers(number)

    @property
    def _steps(self) -> float | None:
        """Number of updates that the optimizer has made; None: it keeps no state yet."""
        state = self._zero.optimizer.state.get(self._flats[0])
        return float(state[STEP]) if state else None

    def _set_steps(self, steps: float) -> None:
        """Gives the optimizer its state, if it has none yet, with a number of updates; without updates the moments are zero."""
        for number, flat in enumerate(self._flats):
            with self._group_in_memory(number, changes=True):
                state = self._zero.optimizer.state[flat]
                state[STEP] = torch.tensor(steps, dtype=torch.float32, device=flat.device)
                for key in MOMENTS:
                    if key not in state:
                        state[key] = torch.zeros_like(flat)
                    elif not steps:
                        state[key].zero_()

    def _piece(self, name: str, key: str) -> _Piece:
        """This rank's piece of a parameter's master weights or moments."""
        parameter, moment = self._parameters[name], None if key == WEIGHT else key
        if self._is_stage_3:
            number, begin, length = self._zero.grad_position[self._zero.get_param_id(parameter)]
            flat = self._flats[number]
            values = flat if moment is None else self._zero.optimizer.state[flat][moment]
            offset = self._mesh.shard.index * length
            return _Piece(offset, values.detach()[begin : begin + min(length, max(self._shapes[name].numel() - offset, 0))])
        mapping = parameter._hp_mapping
        if mapping is None:
            return _Piece(0, self._flats[0].detach()[:0])
        flat, place = self._flats[mapping.param_group_index], mapping.hp_fragment_address
        values = flat if moment is None else self._zero.optimizer.state[flat][moment]
        return _Piece(mapping.lp_fragment_address.start, values.detach()[place.start : place.start + place.numel])

    def _write(self, name: str, key: str, value: Tensor) -> None:
        """Overwrites this rank's piece with what it has of the value of a whole parameter, or of its tensor-parallel part."""
        with self._in_memory(name, changes=True):
            offset, values = self._piece(name, key)
            values.copy_(value.flatten()[offset : offset + len(values)])

    def _whole(self, name: str, key: str) -> Tensor:
        """This rank's tensor-parallel part of a parameter, put together from the pieces of all data-parallel ranks."""
        shape = self._shapes[name]
        with self._in_memory(name, changes=False):
            offset, values = self._piece(name, key)
            if self._mesh.shard.size == 1:
                return values.clone().view(shape) if self._is_on_nvme else values.view(shape)
            together = torch.zeros(shape.numel(), dtype=torch.float32, device=self._device)
            together[offset : offset + len(values)] = values.to(self._device)
        add_up_over(together, self._mesh.shard)
        return together.view(shape)

    def _own_rows(self, name: str, key: str) -> Tensor:
        """The rows of a parameter that this rank saves; all of it, and no copy, on a single rank."""
        whole = self._whole(name, key)
        if self._rows_mesh is None:
            return whole
        rows = self._rows(whole)
        copy = self._copies.setdefault(f"{name}.{key}", torch.empty(rows.shape, dtype=torch.float32)).copy_(rows)
        placements: list[Placement] = [self._divided[name].placements[-1]] if self._divided else []
        if self._mesh.shard.size > 1:
            placements.append(Shard(0) if whole.ndim else Replicate())
        shape = self._divided[name].shape if self._divided else whole.shape
        return placed(copy, shape, self._rows_mesh, placements)

    def _rows(self, whole: Tensor) -> Tensor:
        if not whole.ndim:
            return whole
        own = part(whole.shape[0], self._mesh.shard.size, self._mesh.shard.index)
        return whole[own.start : own.stop]

    def _region_of_rows(self, name: str) -> Region:
        return whole_region(self._rows(torch.empty(self._shapes[name], device="meta")).shape)

    def _region_of_part(self, name: str) -> Region:
        """The region of a parameter that tensor parallelism gives this rank."""
        return own_region(self._divided[name]) if self._divided else whole_region(self._shapes[name])

    def _compute_with_masters(self) -> None:
        """Makes the weights with which this rank computes those of the master weights."""
        zero = self._zero
        if not self._is_stage_3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for number in range(len(self._flats)):
            with self._group_in_memory(number, changes=False):
                zero._reassign_or_swap_out_partitioned_parameters(number)


def _rows_mesh(mesh: Mesh) -> DeviceMesh:
    """The ranks as they divide what is saved: tensor parallelism first, then by rows."""
    assert mesh.device_mesh is not None  # there are several ranks
    if mesh.tp.size == 1 or mesh.shard.size == 1:
        return mesh.device_mesh["shard" if mesh.tp.size == 1 else "tp"]
    grid = mesh.device_mesh["shard", "tp"].mesh
    return DeviceMesh(mesh.device_mesh.device_type, grid.T.contiguous(), mesh_dim_names=("tp", "shard"))


def _common_step(checkpoint: Checkpoint, names: Iterable[str]) -> float:
    """The number of updates of all parameters.

    Raises:
        CheckpointMismatchError: Parameters were not updated equally often, which DeepSpeed cannot represent.
    """
    steps = {checkpoint.read(f"{OPTIMIZER_PREFIX}{name}.{STEP}").item() for name in names}
    if len(steps) > 1:
        raise CheckpointMismatchError(
            f"{checkpoint.path} has parameters that were updated {min(steps):.0f} and {max(steps):.0f} times, but DeepSpeed counts for all together; "
            "set zero.engine to fsdp."
        )
    return steps.pop()
