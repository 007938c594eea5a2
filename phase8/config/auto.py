"""Settings that are `auto` are chosen for the machine when a run starts, and are explicit from then on. An explicit value is always obeyed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phase8.config.dotted import replaced, value_of
from phase8.config.schema import RunConfig

AUTO = "auto"
# Value of each setting when nothing is chosen: the least memory, and no assumption about the machine.
OFF: dict[str, Any] = {
    "train.micro_batch_size": None,
    "train.recompute": "none",
    "train.compile.enabled": False,
    "train.cuda_graphs": False,
    "data.num_workers": 0,
    "data.pin_memory": False,
    "checkpoint.asynchronous": False,
}
# Keys that `train.recompute: auto` sets as well.
WITH_RECOMPUTE = ("train.activation_memory_budget", "train.recompute_every_n_layers")


def automatic_keys(config: RunConfig) -> tuple[str, ...]:
    """The keys of a config that are `auto`."""
    return tuple(name for name in OFF if value_of(config, name) == AUTO)


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """A config whose `auto` keys have values; values for keys that are already explicit are ignored.

    Args:
        config: Any config.
        values: Values by dotted name; keys that belong to `train.recompute` are set only with it.
    """
    automatic = automatic_keys(config)
    chosen = {name: value for name, value in values.items() if name in automatic or (name in WITH_RECOMPUTE and "train.recompute" in automatic)}
    return replaced(config, chosen)


def without_auto(config: RunConfig) -> RunConfig:
    """A config in which every `auto` key has its fixed value, as with `train.tuning: off`."""
    return with_values(config, OFF | {"train.compile.enabled": config.train.recompute == "budget"})
