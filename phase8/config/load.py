"""From a YAML file and `--set a.b=c` overrides to a RunConfig, every problem reported at once in one sentence each."""

from __future__ import annotations

import copy
import functools
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from phase8.config.describe import describe_type, describe_value, iterate_keys, section_names, unknown_key
from phase8.config.schema import RunConfig
from phase8.errors import CheckpointError, CheckpointMismatchError, ConfigError


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.1 without three of its traps: `1e-3` is a number, a date is a text, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node in (key_node for key_node, _ in node.value if isinstance(key_node, yaml.ScalarNode)):
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key_node.value!r} is given twice", key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+|\d[\d_]*\.[\d_]*|\.\d[\d_]*([eE][-+]?\d+)?)$"),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a file with overrides applied.

    Args:
        path: YAML file with the sections of `schema.py`.
        overrides: `section.key=value` strings; the value is read as the key's type.

    Raises:
        ConfigError: All problems of the file and of the overrides, one sentence each.
    """
    tree = _read_yaml(Path(path))
    problems: list[str] = []
    overridden: dict[str, str] = {}
    for override in overrides:
        try:
            overridden[_apply_override(tree, override)] = f"--set {override!r}"
        except ConfigError as error:
            problems += error.problems
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(problems + _sentences(error, tree, source=str(path), overridden=overridden)) from None
    if problems:
        raise ConfigError(problems)
    return config


def config_from_mapping(tree: Mapping[str, Any], *, source: str) -> RunConfig:
    """The config stored as plain JSON, in a checkpoint for example."""
    try:
        return RunConfig.model_validate(dict(tree))
    except ValidationError as error:
        raise ConfigError(_sentences(error, tree, source=source, overridden={})) from None


def stored_config(metadata: Mapping[str, Any], *, source: Path) -> RunConfig:
    """The config that a checkpoint holds in its metadata. Keys of other revisions are left out, but for those that say what the model is.

    Raises:
        CheckpointError: It holds none.
        CheckpointMismatchError: It holds one that no run of this revision can have.
    """
    saved = metadata.get("config")
    if not isinstance(saved, dict):
        raise CheckpointError(f"{source} holds no config; give a checkpoint written by launch/pretrain.py.")
    try:
        return config_from_mapping(_without_foreign_keys(saved), source=str(source))
    except ConfigError as error:
        raise CheckpointMismatchError(" ".join(error.problems)) from None


def _without_foreign_keys(tree: dict[str, Any]) -> dict[str, Any]:
    try:
        RunConfig.model_validate(tree)
    except ValidationError as error:
        tree = copy.deepcopy(tree)
        for problem in error.errors():
            if problem["type"] == "extra_forbidden" and problem["loc"][0] != "model":
                *parents, leaf = problem["loc"]
                holder: Any = tree
                for parent in parents:
                    holder = holder.get(parent) if isinstance(holder, dict) else None
                if isinstance(holder, dict):
                    holder.pop(leaf, None)
    return tree


def config_to_mapping(config: RunConfig) -> dict[str, Any]:
    """The config as plain JSON values; `config_from_mapping` is its inverse."""
    return config.model_dump(mode="json")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"Config file {path} does not exist; give a YAML file with --config, for example configs/quickstart.yaml.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Config file {path} cannot be read ({error}); give a readable UTF-8 YAML file.") from None
    try:
        tree = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        where = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else str(path)
        raise ConfigError(f"{where}: not valid YAML ({error.problem}); correct the line.") from None
    except (yaml.YAMLError, ValueError) as error:  # a character or a number that YAML cannot read
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())}); correct it.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        kind = "a list" if isinstance(tree, list) else "a single value"
        raise ConfigError(f"Config file {path} holds {kind}, but a mapping of sections ({section_names()}) is needed.")
    # `section:` with nothing under it means the section's defaults.
    return {name: {} if value is None and name in RunConfig.model_fields else value for name, value in tree.items()}


def _apply_override(tree: dict[str, Any], override: str) -> str:
    """Sets the key that an override names, and returns its name."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set {override!r} is not of the form section.key=value, for example train.num_steps=200.")
    field = dict(iterate_keys()).get(name)
    if field is None:
        raise ConfigError(f"--set {override!r}: {unknown_key(name)}")
    value: Any = text
    if not _takes_string(field) or text in ("null", "~"):
        try:
            value = yaml.load(text, Loader=_StrictLoader)
        except (yaml.YAMLError, ValueError):
            value = text
    *parents, leaf = name.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):  # the file's problem, which validation reports
            return name
    node[leaf] = value
    return name


def _takes_string(field: FieldInfo) -> bool:
    return str in (field.annotation, *get_args(field.annotation))


def _sentences(error: ValidationError, tree: Mapping[str, Any], *, source: str, overridden: Mapping[str, str]) -> list[str]:
    fields = dict(iterate_keys())
    sentences = []
    for problem in error.errors():
        parts = [str(part) for part in problem["loc"]]
        name = next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in fields), ".".join(parts))
        if name in fields:
            # The whole value: of a list, pydantic names the one entry that is wrong.
            value = functools.reduce(operator.getitem, name.split("."), tree)
            sentence = f"{name} is {describe_value(value)}, but {describe_type(fields[name])} is needed."
            sentences.append(f"{overridden.get(name, source)}: {sentence}")
        elif problem["type"] in ("extra_forbidden", "invalid_key"):
            sentences.append(f"{source}: {unknown_key(name)}")
        else:
            sentences.append(f"{source}: section {name} holds {describe_value(problem['input'])}, but a mapping of keys is needed.")
    return list(dict.fromkeys(sentences))
