"""What every parameter starts from and whether weight decay applies to it, declared by the module that owns it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterSpec:
    """Initial value of a parameter and its decay group.

    Args:
        std: Standard deviation of normal random values; 0: no random values.
        value: What the random values are added to; a number or a tensor of the parameter's shape.
        decay: Weight decay applies. True for the matrices of linear layers.
    """

    std: float = 0.0
    value: float | Tensor = 0.0
    decay: bool = False


@runtime_checkable
class OwnsParameters(Protocol):
    """A module that registers parameters directly, and says what they are."""

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        """The spec of every parameter registered on this module itself, by its local name."""


def iterate_specs(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, ParameterSpec]]:
    """Every parameter with its global name and spec; a shared parameter comes once, under its first name."""
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


@torch.no_grad()
def initialise(model: nn.Module, *, seed: int) -> None:
    """Fills every parameter from a seed derived from its global name, so that every topology starts from the same weights."""
    for name, parameter, spec in iterate_specs(model):
        value = torch.as_tensor(spec.value, dtype=torch.float32).expand(parameter.shape)
        if spec.std:
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            value = value + spec.std * torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        parameter.copy_(value)


def decayed_parameter_names(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay applies to."""
    return {name for name, _, spec in iterate_specs(model) if spec.decay}


def inverse_softplus(x: float) -> float:
    """The y with softplus(y) = x."""
    return math.log(math.expm1(x))
