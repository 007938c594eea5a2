"""Checkpoints that DeepSpeed itself wrote, turned into consolidated weights: those with and without ZeRO, and universal ones.

They are pickles, which can run any code when they are read, so nothing here is called unless somebody says that their origin is trusted. The state
of the optimizer is not read.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from phase8.accelerator import memory_that_ran_out
from phase8.checkpoint.step_directories import WEIGHTS_CONFIG_NAME, WEIGHTS_NAME
from phase8.checkpoint.untrusted import printable, shortened
from phase8.durable import replace_file, staged_file
from phase8.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError, OutOfMemoryError

_LATEST = "latest"
_LONGEST_NAME = 4096  # of a path, in bytes
_STATES = "*_model_states.pt"
_UNIVERSAL = "zero/*/fp32.pt"
# What DeepSpeed looks for in its files, by their names.
_CONTENT = {_STATES: {"buffer_names", "module", "param_shapes", "shared_params"}, "*_optim_states.pt": {"optimizer_state_dict"}}
# Wrappers of a model put these before its names.
_WRAPPERS = ("module.", "model.")


def is_deepspeed(directory: Path) -> bool:
    """Whether a directory is a checkpoint of DeepSpeed: one step of it, or the directory of several with the file `latest`."""
    return _step(directory) is not None


def consolidate_deepspeed(directory: Path, destination: Path, config: Mapping[str, Any]) -> None:
    """Writes the fp32 weights as consolidated weights, all of which are in host memory meanwhile. Runs whatever code the files contain.

    Args:
        directory: A checkpoint of DeepSpeed.
        destination: An existing directory for the weights.
        config: Config of the run.

    Raises:
        CheckpointCorruptError: A file is truncated or damaged.
        CheckpointError: DeepSpeed is not installed, or cannot read its checkpoint.
    """
    step = _step(directory)
    assert step is not None  # `is_deepspeed` says so
    weights = _universal(step) if list(step.glob(_UNIVERSAL)) else _without_zero(step) or _of_zero(step)
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in weights):
            weights = {name.removeprefix(wrapper): value for name, value in weights.items()}
    with staged_file(destination / WEIGHTS_NAME) as partial:
        save_file({name: value.float().contiguous() for name, value in weights.items()}, partial)
    replace_file(destination / WEIGHTS_CONFIG_NAME, json.dumps(dict(config)).encode())


def _step(directory: Path) -> Path | None:
    """The directory with the files of a step."""
    latest, step = directory / _LATEST, directory
    try:
        if latest.is_file():
            with latest.open("rb") as file:
                step = directory / file.read(_LONGEST_NAME).decode(errors="replace").strip()
        return step if list(step.glob(_STATES)) or list(step.glob(_UNIVERSAL)) else None
    except OSError:  # `latest` cannot be read, or what it names is no name of a directory
        return None


def _without_zero(step: Path) -> dict[str, Tensor] | None:
    """The weights of a checkpoint without ZeRO, as the model had them; None: it is another."""
    files = list(step.glob("*_states.pt"))
    states = _read(files[0]) if [path.name for path in files] == ["mp_rank_00_model_states.pt"] else None
    if not isinstance(states, dict) or "param_shapes" not in states or states["param_shapes"] is not None:
        return None
    if not isinstance(weights := states.get("module"), dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise CheckpointCorruptError(f"{files[0]} holds no weights, so it is damaged or of another kind; use another checkpoint.")
    return dict(weights)


def _of_zero(step: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint with the pieces of each data-parallel rank, put together by DeepSpeed."""
    if len(set(path.name[: len("mp_rank_00")] for path in step.glob("mp_rank_*_model_states.pt"))) > 1:
        raise CheckpointMismatchError(
            f"{step} is of several tensor-parallel ranks, whose parts DeepSpeed does not put together; convert it with python -m "
            "deepspeed.checkpoint.ds_to_universal first."
        )
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise CheckpointError(f"{step} is a checkpoint of DeepSpeed, which is needed to read it; pip install 'phase8[deepspeed]'.") from error
    with contextlib.redirect_stdout(sys.stderr):  # it reports each file
        try:
            return get_fp32_state_dict_from_zero_checkpoint(str(step.parent), step.name)
        except Exception as error:  # a pickle that is cut off or altered can raise any
            _refuse_damaged_files(step)
            raise CheckpointError(f"DeepSpeed cannot read {step} ({_reason(error)}); use another checkpoint.") from error


def _refuse_damaged_files(step: Path) -> None:
    """Names the first file that is the reason for DeepSpeed's error, which names none.

    Raises:
        CheckpointCorruptError: There is such a file.
    """
    for pattern, expected in _CONTENT.items():
        for path in sorted(step.glob(pattern)):
            found = _read(path)
            missing = sorted(expected - found.keys() if isinstance(found, dict) else expected)
            if missing:
                raise CheckpointCorruptError(f"{path} lacks {', '.join(missing)}, so it is damaged or of another kind; use another checkpoint.")


def _universal(step: Path) -> dict[str, Tensor]:
    """The weights of a universal checkpoint, which has a directory for each parameter."""
    found: dict[str, Tensor] = {}
    for path in sorted(step.glob(_UNIVERSAL)):
        content = _read(path)
        weight = content.get("param") if isinstance(content, dict) else content
        if not isinstance(weight, Tensor):
            raise CheckpointCorruptError(f"{path} holds no weight, so it is damaged or of another kind; use another checkpoint.")
        found[path.parent.name] = weight
    return found


def _read(path: Path) -> Any:
    """What was pickled into a file.

    Raises:
        CheckpointCorruptError: It cannot be read.
        OutOfMemoryError: The host has too little memory for it.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # a pickle that is cut off or altered can raise any
        if memory_that_ran_out(error) is not None:
            raise OutOfMemoryError(f"the host has too little memory for {path}; read it on a host with more.") from error
        raise CheckpointCorruptError(f"{path} cannot be read ({_reason(error)}), so it is truncated or damaged; use another checkpoint.") from error


def _reason(error: Exception) -> str:
    """An error in a few words on one line."""
    return printable(shortened(f"{type(error).__name__}: {error}".partition("\n")[0].removesuffix(".")))
