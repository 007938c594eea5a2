"""Reads YAML for configs: numbers are decimal, only true and false are booleans, and depth and size are bounded.

YAML 1.1, which PyYAML implements, has surprising spellings: 010 is eight, 1:00 is sixty, 0x10 and 1_0 are numbers, `on` is true and
2024-01-31 is a date. Here 010 is ten, and the rest of these are text, which a key that needs a number refuses.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from phase8.config.values import SpelledFloat, SpelledInt

MAX_DEPTH = 50
MAX_VALUES = 50_000

_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def read_yaml(text: str) -> Any:
    """Parses a YAML document. Finite numbers are returned as `SpelledInt` and `SpelledFloat`.

    Raises:
        yaml.YAMLError: It is not YAML, or deeper or larger than any config; an alias counts each time it is used.
    """
    return yaml.load(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):
    """A loader that refuses repeated keys, and bounds depth and size while reading."""

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = 0
        self._num_values = 0
        self._num_values_of: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        is_alias, before = self.check_event(yaml.AliasEvent), self._num_values
        if self._depth == MAX_DEPTH and parent is not None:
            raise _refusal(parent, f"values are nested more than {MAX_DEPTH} deep")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        assert node is not None
        if not is_alias:
            self._num_values += 1
            self._num_values_of[node] = self._num_values - before
        elif node in self._num_values_of:
            self._num_values += self._num_values_of[node]
        else:
            raise _refusal(node, "a value contains itself")
        if self._num_values > MAX_VALUES:
            raise _refusal(parent or node, f"there are more than {MAX_VALUES} values, those of aliases counted where they are used")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node in (key_node for key_node, _ in node.value if isinstance(key_node, yaml.ScalarNode)):
            if key_node.value in seen:
                raise _refusal(key_node, f"key {key_node.value!r} is given twice")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_bool(self, node: yaml.ScalarNode) -> bool:
        text = self.construct_scalar(node).lower()
        if text not in ("true", "false"):
            raise _refusal(node, f"{text!r} is neither true nor false")
        return text == "true"

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        if not _INT.fullmatch(text):
            raise _refusal(node, f"{text!r} is no decimal whole number")
        try:
            return SpelledInt(text)
        except ValueError:  # too many digits for Python's int
            raise _refusal(node, f"a number has {len(text)} digits") from None

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        text = self.construct_scalar(node)
        if _NOT_FINITE.fullmatch(text):
            return float(text.lower().replace(".", ""))
        if not _FLOAT.fullmatch(text) and not _INT.fullmatch(text):
            raise _refusal(node, f"{text!r} is no decimal number")
        return SpelledFloat(text)


def _refusal(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_PREFIX = "tag:yaml.org,2002:"
# Unknown tags are refused: no config needs them, and PyYAML fails on some.
_Loader.yaml_constructors = {
    None: yaml.SafeLoader.construct_undefined,
    **{f"{_PREFIX}{kind}": yaml.SafeLoader.yaml_constructors[f"{_PREFIX}{kind}"] for kind in ("null", "str", "seq", "map")},
    f"{_PREFIX}bool": _Loader.construct_yaml_bool,
    f"{_PREFIX}int": _Loader.construct_yaml_int,
    f"{_PREFIX}float": _Loader.construct_yaml_float,
}
_Loader.yaml_implicit_resolvers = {}
for _kind, _pattern, _first in (
    ("null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(rf"({_INT.pattern})$"), list("-+0123456789")),
    ("float", re.compile(rf"({_FLOAT.pattern}|{_NOT_FINITE.pattern})$"), list("-+0123456789.")),
    ("merge", re.compile(r"<<$"), ["<"]),
):
    _Loader.add_implicit_resolver(f"{_PREFIX}{_kind}", _pattern, _first)
