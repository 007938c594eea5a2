"""The state that an optimizer keeps for each parameter, declared without an optimizer for checkpoint, reshard tool, saver and planner.

| optimizer | state of each parameter |
|---|---|
| AdamW | `step`, a scalar; `exp_avg` and `exp_avg_sq`, shaped like the parameter |
| AdamW with `optim.state_dtype: bf16` | the same, the two moments of matrices in bf16 |
| AdamW with `optim.state_dtype: fp8` | the same, the two moments of matrices in codes of eight bits |
| Muon | of matrices `step` and `momentum`, shaped like the parameter; of the rest what AdamW keeps |

An optimizer of this library declares its state by a method `declare_state` (`DeclaresState`); torch's AdamW is declared here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from phase8.config.schema import OptimSection
from phase8.errors import CheckpointError

# The linear layers of blocks, of mixers and feed-forwards; not the scalars of heads, nor routers, whose rows have meanings of their own.
_ORTHOGONALISED = frozenset({"q", "k", "v", "out", "gate", "up", "down"})
_ELEMENT_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "U8": 1}


@dataclass(frozen=True)
class StateTensor:
    """A tensor that an optimizer keeps for a parameter.

    Args:
        key: Name of the tensor in the state of the parameter.
        shape: Shape, the same on every rank; None: the shape of the parameter, divided over the ranks as the parameter is.
        dtype: Dtype as checkpoints name it, `F32` for example; None: the dtype of the parameter.
    """

    key: str
    shape: tuple[int, ...] | None = None
    dtype: str | None = None

    @property
    def is_scalar(self) -> bool:
        """Whether it is a scalar, such as a counter, whose size does not depend on the parameter."""
        return self.shape == ()

    def num_bytes(self, num_elements: int, *, parameter_bytes: int) -> int:
        """Bytes of the tensor on a rank.

        Args:
            num_elements: Number of the parameter's elements that the rank keeps.
            parameter_bytes: Bytes per element of the parameter.
        """
        count = num_elements if self.shape is None else math.prod(self.shape)
        return count * (parameter_bytes if self.dtype is None else _ELEMENT_BYTES[self.dtype])


@dataclass(frozen=True)
class ParameterState:
    """The state that an optimizer keeps for one parameter.

    Args:
        tensors: Tensors of the state, in the order in which the optimizer makes them.
        is_divisible: Whether ranks may divide the parameter in any way: the update of an element needs no other element, or the optimizer gathers
            the parts.
    """

    tensors: tuple[StateTensor, ...]
    is_divisible: bool = True

    def tensor(self, key: str) -> StateTensor | None:
        """The tensor with a key; None if the state has none."""
        return next((tensor for tensor in self.tensors if tensor.key == key), None)


# Maps the name and the whole shape of a parameter to its state.
DeclareState = Callable[[str, Sequence[int]], ParameterState]


@runtime_checkable
class DeclaresState(Protocol):
    """An optimizer that declares its state."""

    def declare_state(self, name: str, shape: Sequence[int]) -> ParameterState:
        """The state that it keeps for a parameter, given the name and the whole shape of the parameter."""


def adamw_state(name: str, shape: Sequence[int]) -> ParameterState:
    """The state that torch's AdamW keeps, the same for every parameter."""
    return ParameterState((StateTensor("step", (), "F32"), StateTensor("exp_avg"), StateTensor("exp_avg_sq")))


def adamw_bf16_state(name: str, shape: Sequence[int]) -> ParameterState:
    """The state that AdamW keeps with moments of matrices in bf16."""
    if not has_short_moments(shape):
        return adamw_state(name, shape)
    return ParameterState((StateTensor("step", (), "F32"), StateTensor("exp_avg", dtype="BF16"), StateTensor("exp_avg_sq", dtype="BF16")))


def adamw_fp8_state(name: str, shape: Sequence[int]) -> ParameterState:
    """The state that AdamW keeps with moments of matrices in eight bits."""
    if not has_short_moments(shape):
        return adamw_state(name, shape)
    return ParameterState((StateTensor("step", (), "F32"), StateTensor("exp_avg", dtype="U8"), StateTensor("exp_avg_sq", dtype="U8")))


def has_short_moments(shape: Sequence[int]) -> bool:
    """Whether the moments of a parameter have fewer bits where `optim.state_dtype` says so: those of matrices, which are nearly all numbers."""
    return len(shape) >= 2


def muon_state(name: str, shape: Sequence[int]) -> ParameterState:
    """The state that Muon keeps, which gathers the matrices that ranks divide."""
    if not is_orthogonalised(name, shape):
        return adamw_state(name, shape)
    return ParameterState((StateTensor("step", (), "F32"), StateTensor("momentum")))


def is_orthogonalised(name: str, shape: Sequence[int]) -> bool:
    """Whether Muon orthogonalises the updates of a parameter: a matrix of a linear layer in a block, or several; AdamW updates all others."""
    layer = name.removesuffix(".weight").rpartition(".")[2]  # those of experts are parameters of one module
    return name.startswith("blocks.") and layer in _ORTHOGONALISED and len(shape) >= 2


def declared_for(section: OptimSection) -> DeclareState:
    """The declaration of the optimizer that a config asks for; no optimizer has to be built for it."""
    if section.state_dtype != "fp32":
        return {"bf16": adamw_bf16_state, "fp8": adamw_fp8_state}[section.state_dtype]
    return {"adamw": adamw_state, "muon": muon_state}[section.name]


def declared_by(optimizer: torch.optim.Optimizer) -> DeclareState:
    """The declaration of an optimizer.

    Raises:
        CheckpointError: The optimizer does not declare its state.
    """
    if isinstance(optimizer, DeclaresState):
        return optimizer.declare_state
    if isinstance(optimizer, torch.optim.AdamW):
        return adamw_state
    raise CheckpointError(f"{type(optimizer).__name__} does not declare what it keeps of each parameter; give it a method declare_state")
