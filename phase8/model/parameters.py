"""Initial value, weight decay and division of every parameter, as the module that owns it declares them."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from phase8.distributed.collectives import ALONE, Axis
from phase8.distributed.placement import held_part
from phase8.division import DividedShape
from phase8.tensor_parallel.parameters import ParameterSpec, divided, own_part


@runtime_checkable
class OwnsParameters(Protocol):
    """A module that registers parameters directly and declares their specs."""

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        """The spec of every parameter registered on this module itself, by its local name."""


@runtime_checkable
class OwnsBuffers(Protocol):
    """A module that registers buffers, which are saved but not trained, and declares their first values."""

    def first_buffers(self) -> dict[str, float]:
        """The value of every element of each buffer registered on this module itself, by its local name."""


def iterate_specs(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, ParameterSpec]]:
    """Yields every parameter with its global name and spec; a shared parameter comes once, under its first name."""
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        specs = module.parameter_specs() if isinstance(module, OwnsParameters) else {}
        if own.keys() != specs.keys():
            raise TypeError(f"{type(module).__name__} holds parameters {sorted(own)} but declares {sorted(specs)}")
        for name, parameter in own.items():
            if parameter not in seen:
                seen.add(parameter)
                yield f"{prefix}.{name}" if prefix else name, parameter, specs[name]


def divided_shapes(model: nn.Module) -> dict[str, DividedShape]:
    """The global shape and the division of every parameter by name; the model is one without parallelism, for example on the meta device."""
    return {
        name: DividedShape(tuple(parameter.shape), spec.divided, is_rounded=spec.is_rounded) for name, parameter, spec in iterate_specs(model)
    }


def buffer_shapes(model: nn.Module) -> dict[str, DividedShape]:
    """The shape of every buffer by name; every rank has buffers whole."""
    return {name: DividedShape(tuple(buffer.shape), is_whole=True) for name, buffer in model.named_buffers()}


def materialise(model: nn.Module, *, device: torch.device, axis: Axis, expert: Axis = ALONE) -> None:
    """Gives every parameter on the meta device uninitialised memory for this rank's part of it, and every buffer its memory.

    Args:
        model: Model, of which some parameters may have their memory already; its shared parameters stay shared.
        device: Device of the memory.
        axis: Axis of tensor parallelism.
        expert: Axis of the ranks that share experts.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        specs = module.parameter_specs() if isinstance(module, OwnsParameters) else {}
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            if parameter not in made:
                made[parameter] = divided(parameter, specs[name], axis, device=device, expert=expert)
            setattr(module, name, made[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device=device))


def initialise(model: nn.Module, *, seed: int, axis: Axis = ALONE, expert: Axis = ALONE) -> None:
    """Fills every parameter from a seed derived from its global name and shape, so that every topology starts from the same weights.

    Buffers get their first values.
    """
    specs = list(iterate_specs(model))
    values = _own_values([(name, parameter.shape, spec) for name, parameter, spec in specs], seed, axis, expert)
    _fill([parameter for _, parameter, _ in specs], values)
    _fill_buffers(model)


def initialised_parts(
    model: nn.Module, parts: Sequence[nn.Module], *, device: torch.device, seed: int, axis: Axis, expert: Axis = ALONE
) -> Iterator[nn.Module]:
    """Gives memory and first values, those of `initialise`, to one part of a model after the other, and yields each.

    A part that ZeRO divides, or moves to the host, before the next one is asked for leaves no more of itself on the device than its share.

    Args:
        model: Model on the meta device.
        parts: Modules of it that have nothing in common, and the model itself last.
        device: Device of the memory; on device `meta` parameters have their local shapes only.
        seed: Seed of the run.
        axis: Axis of tensor parallelism.
        expert: Axis of the ranks that share experts.
    """
    if device.type == "meta":
        materialise(model, device=device, axis=axis, expert=expert)
        yield from parts
        return
    inside = {parameter: part for part in parts[:-1] for parameter in part.parameters()}
    wanted: dict[nn.Module, list[tuple[str, torch.Size, ParameterSpec]]] = {part: [] for part in parts}
    for name, parameter, spec in iterate_specs(model):
        wanted[inside.get(parameter, model)].append((name, parameter.shape, spec))
    values = _own_values(chain.from_iterable(wanted.values()), seed, axis, expert)
    for part in parts:
        materialise(part, device=device, axis=axis, expert=expert)
        names = {name for name, _, _ in wanted[part]}
        _fill([parameter for name, parameter, _ in iterate_specs(part) if part is not model or name in names], values)
        if part is model:
            _fill_buffers(model)
        yield part


@torch.no_grad()
def _fill(parameters: Iterable[nn.Parameter], values: Iterator[torch.Tensor]) -> None:
    for parameter in parameters:
        held_part(parameter).copy_(next(values))


def _fill_buffers(model: nn.Module) -> None:
    for name, value in first_buffers(model).items():
        model.get_buffer(name).copy_(value)


def _own_values(parameters: Iterable[tuple[str, torch.Size, ParameterSpec]], seed: int, axis: Axis, expert: Axis) -> Iterator[torch.Tensor]:
    """Yields this rank's part of the first value of each parameter, given by global name and shape.

    A generator makes its random numbers one by one, so several values are made at once, ahead, in as many threads as torch computes with.
    """

    def own_value(name: str, shape: torch.Size, spec: ParameterSpec) -> torch.Tensor:
        return own_part(first_value(name, shape, spec, seed=seed), spec, axis, expert)

    num_threads, ahead = torch.get_num_threads(), deque[Future[torch.Tensor]]()
    with ThreadPoolExecutor(max_workers=num_threads) as threads:
        for parameter in parameters:
            ahead.append(threads.submit(own_value, *parameter))
            if len(ahead) > num_threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def first_value(name: str, shape: torch.Size, spec: ParameterSpec, *, seed: int) -> torch.Tensor:
    """The whole value of a parameter before the first step, fp32.

    Args:
        name: Global name of the parameter.
        shape: Global shape of the parameter.
        spec: Spec of the parameter.
        seed: Seed of the run.
    """
    value = torch.as_tensor(spec.value, dtype=torch.float32).expand(shape)
    if spec.std:
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        value = value + torch.randn(shape, generator=generator, dtype=torch.float32).mul_(spec.std)
    return value


def first_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The value of every buffer before the first step, by name; the model may be on the meta device."""
    return {
        f"{prefix}.{name}": torch.full(module.get_buffer(name).shape, value)
        for prefix, module in model.named_modules()
        if isinstance(module, OwnsBuffers)
        for name, value in module.first_buffers().items()
    }


def shard_dims(model: nn.Module) -> dict[nn.Parameter, int]:
    """The dim of each parameter that ZeRO divides."""
    return {parameter: spec.divided.get("shard", 0) for _, parameter, spec in iterate_specs(model)}


def rounded_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that layers round to the dtype of the residual stream before anything else."""
    return {parameter for _, parameter, spec in iterate_specs(model) if spec.is_rounded}


def decayed_parameter_names(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay applies to."""
    return {name for name, _, spec in iterate_specs(model) if spec.decay}

