"""What an optimizer keeps of each parameter, declared before it exists: the checkpoint, the reshard tool, the saver and the planner ask here.

| optimizer | of each parameter |
|---|---|
| AdamW | `step`, a scalar; `exp_avg` and `exp_avg_sq`, shaped like the parameter |

An optimizer of the library's own declares its state by a method `declare_state` (`DeclaresState`); torch's AdamW is declared here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from phase8.config.schema import OptimSection
from phase8.errors import CheckpointError

_ELEMENT_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class StateTensor:
    """A tensor that an optimizer keeps of a parameter.

    Args:
        key: Its name among the tensors of that parameter.
        shape: Its shape, the same on every rank; None: that of the parameter, divided over the ranks as the parameter is.
        dtype: As checkpoints name it, `F32` for example; None: that of the parameter.
    """

    key: str
    shape: tuple[int, ...] | None = None
    dtype: str | None = None

    @property
    def is_scalar(self) -> bool:
        """It is a counter, not something that grows with the parameter."""
        return self.shape == ()

    def num_bytes(self, num_elements: int, *, parameter_bytes: int) -> int:
        """Bytes of it on a rank.

        Args:
            num_elements: Elements of the parameter that the rank keeps.
            parameter_bytes: Bytes of an element of the parameter.
        """
        count = num_elements if self.shape is None else math.prod(self.shape)
        return count * (parameter_bytes if self.dtype is None else _ELEMENT_BYTES[self.dtype])


@dataclass(frozen=True)
class ParameterState:
    """What an optimizer keeps of one parameter.

    Args:
        tensors: In the order in which the optimizer makes them.
        is_elementwise: An update of an element needs no other element, so ranks may divide the parameter in any way.
    """

    tensors: tuple[StateTensor, ...]
    is_elementwise: bool = True

    def tensor(self, key: str) -> StateTensor | None:
        """The tensor of a key; None: there is none."""
        return next((tensor for tensor in self.tensors if tensor.key == key), None)


# The state of a parameter by its name and its whole shape.
DeclareState = Callable[[str, Sequence[int]], ParameterState]


@runtime_checkable
class DeclaresState(Protocol):
    """An optimizer that says what it keeps."""

    def declare_state(self, name: str, shape: Sequence[int]) -> ParameterState:
        """What it keeps of the parameter of a name and a whole shape."""


def adamw_state(name: str, shape: Sequence[int]) -> ParameterState:
    """What torch's AdamW keeps of a parameter, whichever it is."""
    return ParameterState((StateTensor("step", (), "F32"), StateTensor("exp_avg"), StateTensor("exp_avg_sq")))


def declared_for(section: OptimSection) -> DeclareState:
    """The declaration of the optimizer that a config asks for, which need not exist."""
    return adamw_state  # `validate` refuses every other value of optim.name


def declared_by(optimizer: torch.optim.Optimizer) -> DeclareState:
    """The declaration of an optimizer.

    Raises:
        CheckpointError: It does not declare its state.
    """
    if isinstance(optimizer, DeclaresState):
        return optimizer.declare_state
    if isinstance(optimizer, torch.optim.AdamW):
        return adamw_state
    raise CheckpointError(f"{type(optimizer).__name__} does not declare what it keeps of each parameter; give it a method declare_state")
