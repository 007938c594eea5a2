"""The keys of a config by their dotted names."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any

from phase8.config.schema import RunConfig


def value_of(config: RunConfig, name: str) -> Any:
    """The value under a dotted name."""
    return operator.attrgetter(name)(config)


def values_of(config: RunConfig, names: tuple[str, ...]) -> dict[str, Any]:
    """The values under some dotted names."""
    return {name: value_of(config, name) for name in names}


def replaced(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """A config with other values under some dotted names; the values are not validated."""
    return functools.reduce(lambda changed, name: _with_value(changed, name.split("."), values[name]), values, config)


def _with_value(section: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    return section.model_copy(update={name: _with_value(getattr(section, name), rest, value) if rest else value})
