"""How tokens were spread over experts, step by step: its record in `metrics.jsonl`, and as arrays.

A step's record maps the number of each layer with experts to `load`, the share of the choices that each expert got, `dropped`, the share of choices
that was dropped, `entropy`, the mean entropy of a token's scores in nats, and `imbalance`, what the balance loss weighs: 1 where experts are
balanced. Records of earlier releases have no `imbalance`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

_DIGITS = 4
_NUMBERS = ("dropped", "entropy", "imbalance")  # of a layer, beside its load
_MAX_NUMBERS = 1 << 20


class Routing(Protocol):
    """What a step measured of a layer with experts."""

    @property
    def load(self) -> tuple[float, ...]:
        """Share of the choices that each expert got."""

    @property
    def dropped(self) -> float:
        """Share of the choices that were dropped."""

    @property
    def entropy(self) -> float:
        """Mean entropy of a token's scores, in nats."""

    @property
    def imbalance(self) -> float:
        """What the balance loss weighs, 1 where experts are balanced."""


@dataclass(frozen=True)
class RoutingHistory:
    """The routing of the steps that recorded it.

    Args:
        steps: Step numbers [S].
        layers: Numbers of the layers with experts [L].
        load: Share of the choices that each expert got [S, L, E].
        dropped: Share of the choices that was dropped [S, L].
        entropy: Mean entropy of a token's scores in nats [S, L].
        imbalance: What the balance loss weighs [S, L].
    """

    steps: NDArray[np.float64]
    layers: tuple[int, ...]
    load: NDArray[np.float64]
    dropped: NDArray[np.float64]
    entropy: NDArray[np.float64]
    imbalance: NDArray[np.float64]


def routing_record(routing: Mapping[int, Routing]) -> dict[str, dict[str, Any]]:
    """The record of a step, rounded to what a picture shows; a number that is not finite is null."""
    return {
        str(layer): {"load": [_rounded(share) for share in each.load]} | {name: _rounded(getattr(each, name)) for name in _NUMBERS}
        for layer, each in routing.items()
    }


def routing_scalars(record: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The numbers of a record that TensorBoard shows, by tag, and the load of the busiest expert."""
    scalars = {}
    for layer, each in record.items():
        busiest = max((share for share in each["load"] if share is not None), default=None)
        for name, value in (*((name, each.get(name)) for name in _NUMBERS), ("largest_load", busiest)):
            if value is not None:
                scalars[f"routing/layer_{layer}/{name}"] = value
    return scalars


def is_routing(value: object) -> bool:
    """Whether a value read from a file has the form of a record."""
    if not isinstance(value, dict) or not all(isinstance(layer, str) and layer.isdecimal() and _is_layer(each) for layer, each in value.items()):
        return False
    return len({len(each["load"]) for each in value.values()}) <= 1


def routing_history(records: Sequence[Mapping[str, Any]]) -> RoutingHistory | None:
    """The routing in the records of steps; None where no step has any. Records of other layers or experts than the last one has are left out."""
    routed = [record for record in records if record.get("routing")]
    if not routed:
        return None
    form = _form(routed[-1]["routing"])
    routed = [record for record in routed if _form(record["routing"]) == form]
    layers = sorted(routed[-1]["routing"], key=int)

    def column(key: str) -> NDArray[np.float64]:
        return np.array([[record["routing"][layer].get(key) for layer in layers] for record in routed], dtype=np.float64)

    steps = np.array([record["step"] for record in routed], dtype=np.float64)
    return RoutingHistory(steps, tuple(map(int, layers)), column("load"), *map(column, _NUMBERS))


def _form(record: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    return {layer: len(each["load"]) for layer, each in record.items()}


def _is_layer(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(load := value.get("load"), list) or not 0 < len(load) < _MAX_NUMBERS:
        return False
    numbers = (*load, value.get("dropped", ""), value.get("entropy", ""), value.get("imbalance"))
    return all(each is None or (isinstance(each, int | float) and abs(each) < _MAX_NUMBERS) for each in numbers)


def _rounded(number: float) -> float | None:
    return round(number, _DIGITS) if math.isfinite(number) else None
