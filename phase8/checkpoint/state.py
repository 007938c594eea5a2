"""The flat names of all tensors in a checkpoint, and their restoration into model and optimizer.

| name | tensor |
|---|---|
| `model.<name>` | parameters and persistent buffers, once each (tied ones under their first name) |
| `optimizer.<parameter name>.<key>` | state that the optimizer declares for a parameter (`optim/state.py`): `exp_avg`, `exp_avg_sq`, `step`, ... |

Hyperparameters of the optimizer are not stored, because they come from the config and the schedule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from phase8.checkpoint.load import Checkpoint
from phase8.checkpoint.tensor_file import DTYPE_NAMES, DTYPES
from phase8.checkpoint.untrusted import shortened, shown
from phase8.distributed.placement import held_part, is_held_once, own_region, placed_like
from phase8.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError, first_few
from phase8.optim.state import ParameterState, StateTensor, declared_by

MODEL_PREFIX = "model."
OPTIMIZER_PREFIX = "optimizer."
# State shaped like a parameter may be stored in one of these and kept in another (`optim.state_dtype`).
_ONE_FOR_THE_OTHER = {"F32", "BF16"}


@dataclass(frozen=True)
class _Optimized:
    """A parameter that an optimizer updates.

    Args:
        whole: Parameter of the model, which may be divided over ranks.
        part: Part of it that this rank's optimizer updates.
        counter_device: Device on which the optimizer keeps scalars: the host, except for capturable and fused optimizers.
        state: State that the optimizer declares for the parameter.
    """

    whole: nn.Parameter
    part: nn.Parameter
    counter_device: torch.device
    state: ParameterState


def flat_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, parts: Mapping[str, nn.Parameter] | None = None
) -> dict[str, Tensor]:
    """The live tensors (not copies) of model and optimizer by flat name; tensors that are divided over ranks are DTensors.

    Args:
        model: Model, whose parameters may be divided.
        optimizer: Optimizer of the parameters or of this rank's parts of them.
        parts: Parts that the optimizer updates, by parameter name; None: the optimizer updates the parameters themselves.

    Raises:
        CheckpointError: Some state is not a tensor or is not declared, or a parameter of the optimizer is not in the model.
    """
    return _model_tensors(model) | _optimizer_tensors(optimizer, _optimized_parameters(model, optimizer, parts))


def restore_state(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    parts: Mapping[str, nn.Parameter] | None = None,
    *,
    is_part: bool = False,
    widen: bool = False,
) -> None:
    """Loads a checkpoint's tensors into a model and its optimizer; a checkpoint that does not fit changes nothing.

    Existing tensors are overwritten in place, one after the other, so at most one of them is in memory twice. Every byte is read once and
    checked on the way: a checkpoint that is found to be damaged may leave some of them overwritten, so nobody may train before another one is
    restored, which overwrites all. Optimizer state that does not exist yet is created on its parameter's device, scalars on the device where
    torch's optimizers keep them.

    Args:
        checkpoint: Checkpoint to read.
        model: Model built from the checkpoint's config.
        optimizer: Optimizer of parameters of `model`; None: only the model is restored.
        parts: Parts that the optimizer updates, as in `flat_state`.
        is_part: Whether the model is one of several pipeline stages, so that the checkpoint holds tensors of other stages too.
        widen: Whether weights may be stored in a narrower floating-point dtype, every number of which the model's dtype can represent.

    Raises:
        CheckpointMismatchError: Names, shapes or dtypes differ; the first few are listed.
        CheckpointCorruptError: Bytes of the checkpoint are damaged, or a part of a parameter's optimizer state is missing, which is found first.
    """
    in_place = _model_tensors(model)
    differences = list(_model_differences(checkpoint, in_place, is_part=is_part, widen=widen))
    optimized: dict[str, _Optimized] = {}
    stored: dict[str, tuple[str, str]] = {}
    if optimizer is not None:
        optimized, stored = _optimized_parameters(model, optimizer, parts), _stored_optimizer_state(checkpoint)
        stored = {name: owner for name, owner in stored.items() if not is_part or owner[0] in optimized}
        _check_complete(checkpoint, stored, optimized)
        existing = _optimizer_tensors(optimizer, optimized)
        differences += _optimizer_differences(checkpoint, stored, existing, optimized)
        in_place |= {name: tensor for name, tensor in existing.items() if name in stored}
    _require_none(differences, checkpoint)

    created = {}
    for name, (parameter_name, key) in stored.items():
        if name not in in_place:
            where = optimized[parameter_name]
            declared = _declared(where, key)
            value = _read_own(checkpoint, name, where.whole) if declared.shape is None else checkpoint.read(name)
            dtype = DTYPES.get(_dtype_of(declared, where) or "", value.dtype)
            created[name] = value.to(where.counter_device if declared.is_scalar else where.part.device, dtype)
    with torch.no_grad():
        for name, target in in_place.items():
            _overwrite(target, checkpoint, name)
    if optimizer is not None:
        _install_created(optimizer, optimized, stored, created)


def require_fit(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, widen: bool = False) -> None:
    """Refuses a checkpoint whose tensors are not exactly those of a model and its optimizer by name, shape and dtype; reads only the manifest.

    Args:
        checkpoint: Checkpoint.
        model: Whole model, which may be on the meta device.
        optimizer: Optimizer of its parameters, without state; None: the checkpoint's optimizer state is ignored.
        widen: Whether weights may be stored in a narrower dtype, as in `restore_state`.

    Raises:
        CheckpointMismatchError: Names, shapes or dtypes differ; the first few are listed.
        CheckpointCorruptError: A part of a parameter's optimizer state is missing.
    """
    differences = list(_model_differences(checkpoint, _model_tensors(model), is_part=False, widen=widen))
    if optimizer is not None:
        optimized, stored = _optimized_parameters(model, optimizer, None), _stored_optimizer_state(checkpoint)
        _check_complete(checkpoint, stored, optimized)
        differences += _optimizer_differences(checkpoint, stored, {}, optimized)
    _require_none(differences, checkpoint)


def _require_none(differences: list[str], checkpoint: Checkpoint) -> None:
    if differences:
        raise CheckpointMismatchError(f"{checkpoint.path} does not fit this model: {first_few(differences)}; use the config it was saved with")


def _overwrite(target: Tensor, checkpoint: Checkpoint, name: str) -> None:
    """Overwrites this rank's part of a tensor with stored bytes, which are read directly into its memory where that is possible."""
    part = held_part(target)
    if part.device.type == "cpu" and part.is_contiguous() and part.dtype == DTYPES[checkpoint.entry(name).dtype]:
        _read_own(checkpoint, name, target, into=part)
    else:
        part.copy_(_read_own(checkpoint, name, target))


def _read_own(checkpoint: Checkpoint, name: str, whole: Tensor, *, into: Tensor | None = None) -> Tensor:
    """Reads this rank's part of a stored tensor that is divided like `whole`; `into` as in `Checkpoint.read_region`."""
    return checkpoint.read_region(name, own_region(whole), into=into, for_the_last_time=is_held_once(whole))


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by flat name; a shared one comes once."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        _require_tensor(MODEL_PREFIX + name, value)
        if id(value) not in seen:
            seen.add(id(value))
            tensors[MODEL_PREFIX + name] = value
    return tensors


def _optimized_parameters(
    model: nn.Module, optimizer: torch.optim.Optimizer, parts: Mapping[str, nn.Parameter] | None
) -> dict[str, _Optimized]:
    """The parameters that the optimizer updates by their name in the model, in the model's order."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    declare = declared_by(optimizer)
    result = {}
    for name, parameter in model.named_parameters():
        part = parameter if parts is None else parts[name]
        if (group := groups.get(id(part))) is not None:
            counter_device = part.device if group.get("capturable") or group.get("fused") else torch.device("cpu")
            result[name] = _Optimized(parameter, part, counter_device, declare(name, parameter.shape))
    if len(result) != len(groups):
        raise CheckpointError(
            f"the optimizer has {len(groups) - len(result)} parameters that are not in the model; build it from model.named_parameters()"
        )
    return result


def _optimizer_tensors(optimizer: torch.optim.Optimizer, optimized: dict[str, _Optimized]) -> dict[str, Tensor]:
    """The existing state of the optimizer by flat name."""
    tensors = {
        (name, key): value for name, where in optimized.items() for key, value in optimizer.state.get(where.part, {}).items()
    }
    result = {}
    for (name, key), value in tensors.items():
        flat_name, where = f"{OPTIMIZER_PREFIX}{name}.{key}", optimized[name]
        _require_tensor(flat_name, value)
        result[flat_name] = placed_like(value, where.whole) if _declared(where, key).shape is None else value
    return result


def _declared(where: _Optimized, key: str) -> StateTensor:
    """The declaration of a tensor in the optimizer's state.

    Raises:
        CheckpointError: The optimizer does not declare the tensor.
    """
    declared = where.state.tensor(key)
    if declared is None:
        raise CheckpointError(f"the optimizer keeps {key}, which it does not declare; add it to what declare_state returns")
    return declared


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise CheckpointError(
            f"{name} is of type {type(value).__name__}; a checkpoint's state is made of tensors, everything else belongs into its metadata"
        )


def _stored_optimizer_state(checkpoint: Checkpoint) -> dict[str, tuple[str, str]]:
    """Flat name -> (parameter name, key) of the optimizer tensors in a checkpoint."""
    names = [name for name in checkpoint.tensor_names if name.startswith(OPTIMIZER_PREFIX)]
    parts = {name: name.removeprefix(OPTIMIZER_PREFIX).rpartition(".") for name in names}
    return {name: (parameter_name, key) for name, (parameter_name, _, key) in parts.items()}


def _check_complete(checkpoint: Checkpoint, stored: dict[str, tuple[str, str]], optimized: dict[str, _Optimized]) -> None:
    """Requires that a parameter has all of its optimizer's state or none; with a part, the next step would fail or start from zeros.

    State with a key that the optimizer does not declare is that of another optimizer; it is reported later as a mismatch.

    Raises:
        CheckpointCorruptError: A part of a parameter's state is missing.
    """
    keys: dict[str, set[str]] = {}
    for parameter_name, key in stored.values():
        keys.setdefault(parameter_name, set()).add(key)
    for parameter_name, found in keys.items():
        if parameter_name not in optimized:
            continue
        declared = [tensor.key for tensor in optimized[parameter_name].state.tensors]
        missing = [key for key in declared if key not in found]
        if missing and found <= set(declared):
            name = shortened(f"{OPTIMIZER_PREFIX}{parameter_name}.{missing[0]}")
            raise CheckpointCorruptError(f"{checkpoint.path} lacks {name}, which the optimizer keeps of this parameter; use another checkpoint")


def _model_differences(checkpoint: Checkpoint, targets: dict[str, Tensor], *, is_part: bool, widen: bool) -> Iterator[str]:
    stored = [name for name in checkpoint.tensor_names if name.startswith(MODEL_PREFIX)]
    present = set(stored)
    for name in (name for name in targets if name not in present):
        yield f"{shortened(name)} is not in the checkpoint"
    for name in stored:
        if name in targets:
            yield from _entry_differences(checkpoint, name, targets[name], widen=widen)
        elif not is_part:
            yield f"{shortened(name)} is not in the model"


def _optimizer_differences(
    checkpoint: Checkpoint, stored: dict[str, tuple[str, str]], existing: dict[str, Tensor], optimized: dict[str, _Optimized]
) -> Iterator[str]:
    for name, (parameter_name, key) in stored.items():
        where = optimized.get(parameter_name)
        declared = None if where is None else where.state.tensor(key)
        if where is None:
            yield f"{shortened(name)} is the state of no parameter here"
        elif declared is not None:
            yield from _declared_differences(checkpoint, name, declared, where)
    with_state = {parameter_name for parameter_name, _ in stored.values()}
    for name in existing:
        if name not in stored and name.removeprefix(OPTIMIZER_PREFIX).rpartition(".")[0] in with_state:
            yield f"{name} is not in the checkpoint"
    for name, (parameter_name, key) in stored.items():
        if parameter_name in optimized and optimized[parameter_name].state.tensor(key) is None:
            yield f"{shortened(name)} is nothing that the optimizer keeps of this parameter"
    for name in checkpoint.tensor_names:
        if not name.startswith((MODEL_PREFIX, OPTIMIZER_PREFIX)):
            yield f"{shortened(name)} is neither of the model nor of the optimizer"


def _declared_differences(checkpoint: Checkpoint, name: str, declared: StateTensor, where: _Optimized) -> Iterator[str]:
    """Differences between stored state and the declaration of state, which the optimizer may not have made yet."""
    entry = checkpoint.entry(name)
    shape = list(where.whole.shape if declared.shape is None else declared.shape)
    dtype = _dtype_of(declared, where)
    if entry.shape != shape:
        yield f"{name} has shape {shown(entry.shape)} in the checkpoint, but the optimizer keeps {shape} of this parameter"
    elif entry.dtype != dtype and (declared.is_scalar or not {entry.dtype, dtype} <= _ONE_FOR_THE_OTHER):
        yield f"{name} is {entry.dtype} in the checkpoint, but the optimizer keeps {dtype} of this parameter"


def _dtype_of(declared: StateTensor, where: _Optimized) -> str | None:
    """The dtype, as checkpoints name it, of state that the optimizer declares."""
    return DTYPE_NAMES.get(where.part.dtype) if declared.dtype is None else declared.dtype


def _entry_differences(checkpoint: Checkpoint, name: str, target: Tensor, *, widen: bool = False) -> Iterator[str]:
    entry = checkpoint.entry(name)
    if entry.shape != list(target.shape):
        yield f"{name} has shape {shown(entry.shape)} in the checkpoint and {list(target.shape)} here"
    elif entry.dtype != DTYPE_NAMES.get(target.dtype) and not (widen and _is_widened(DTYPES[entry.dtype], target.dtype)):
        yield f"{name} is {entry.dtype} in the checkpoint and {target.dtype} here"


def _is_widened(stored: torch.dtype, to: torch.dtype) -> bool:
    """Whether dtype `to` can represent every number of dtype `stored`; dtypes of eight bits never count, because they come with scales."""
    widths = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return stored in widths and to in widths and torch.promote_types(stored, to) == to


def _install_created(
    optimizer: torch.optim.Optimizer,
    optimized: dict[str, _Optimized],
    stored: dict[str, tuple[str, str]],
    created: dict[str, Tensor],
) -> None:
    """Adds the state that did not exist, and removes the state of parameters that had none when the checkpoint was saved."""
    for name, tensor in created.items():
        parameter_name, key = stored[name]
        optimizer.state[optimized[parameter_name].part][key] = tensor
    with_state = {parameter_name for parameter_name, _ in stored.values()}
    for name, where in optimized.items():
        if name not in with_state:
            optimizer.state.pop(where.part, None)
