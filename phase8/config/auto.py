"""Settings that are `auto`: chosen for the machine when a run starts, and explicit from then on. A value that is given is always obeyed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phase8.config.dotted import replaced, value_of
from phase8.config.schema import RunConfig

AUTO = "auto"
# What each setting is when nobody chooses: the least memory and the fewest assumptions that need no look at the machine.
OFF: dict[str, Any] = {
    "train.micro_batch_size": None,
    "train.recompute": "none",
    "train.compile.enabled": False,
    "train.cuda_graphs": False,
    "data.num_workers": 0,
    "data.pin_memory": False,
    "checkpoint.asynchronous": False,
}
# Keys that `train.recompute: auto` sets besides.
WITH_RECOMPUTE = ("train.activation_memory_budget", "train.recompute_every_n_layers")


def automatic_keys(config: RunConfig) -> tuple[str, ...]:
    """The keys of a config that are `auto`."""
    return tuple(name for name in OFF if value_of(config, name) == AUTO)


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """A config whose `auto` keys have values; those of keys that are explicit are left out.

    Args:
        config: Any config.
        values: By dotted name; those beside `train.recompute` follow it.
    """
    automatic = automatic_keys(config)
    chosen = {name: value for name, value in values.items() if name in automatic or (name in WITH_RECOMPUTE and "train.recompute" in automatic)}
    return replaced(config, chosen)


def without_auto(config: RunConfig) -> RunConfig:
    """A config in which nothing is left to choose, as with `train.tuning: off`."""
    return with_values(config, OFF | {"train.compile.enabled": config.train.recompute == "budget"})
