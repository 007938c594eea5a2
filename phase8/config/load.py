"""From a YAML file and `--set a.b=c` overrides to a RunConfig, every problem reported at once in one sentence each."""

from __future__ import annotations

import functools
import operator
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from phase8.config.describe import alternatives, describe_value, entry_section, iterate_keys, section_names, shortened, unknown_key
from phase8.config.schema import RunConfig
from phase8.config.sentences import problem_sentences
from phase8.config.shipped import config_file, shipped_names
from phase8.config.values import EXPAND_PATHS
from phase8.config.yaml_text import read_yaml
from phase8.errors import ConfigError

MAX_FILE_BYTES = 1 << 20


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Loads a config file and applies overrides.

    Args:
        path: YAML file with the sections of `schema.py`; or the name of a config that comes with phase8, if there is no such file.
        overrides: `section.key=value` strings; the value is read as the key's type. A text needs no quotes; some around it are taken as in YAML.

    Paths are expanded, see `phase8/paths.py`.

    Raises:
        ConfigError: All problems of the file and of the overrides, one sentence each.
    """
    path = config_file(Path(path))
    tree = _read_file(path)
    problems: list[str] = []
    overridden: dict[str, str] = {}
    for override in overrides:
        try:
            overridden[_apply_override(tree, override)] = f"--set {describe_value(override)}"
        except ConfigError as error:
            problems += error.problems
    try:
        config = RunConfig.model_validate(tree, context=EXPAND_PATHS)
    except ValidationError as error:
        raise ConfigError(problems + problem_sentences(error, tree, source=str(path), overridden=overridden)) from None
    if problems:
        raise ConfigError(problems)
    return config


def config_from_mapping(tree: Mapping[str, Any], *, source: str) -> RunConfig:
    """Parses a config stored as plain JSON, for example in a checkpoint."""
    try:
        return RunConfig.model_validate(dict(tree))
    except ValidationError as error:
        raise ConfigError(problem_sentences(error, tree, source=source, overridden={})) from None


def config_to_mapping(config: RunConfig) -> dict[str, Any]:
    """Converts a config to plain JSON values; `config_from_mapping` is its inverse."""
    return config.model_dump(mode="json")


def with_settings(config: RunConfig, settings: Mapping[str, Any], *, source: str = "settings") -> RunConfig:
    """A copy of a config with some keys changed.

    Args:
        config: Any config.
        settings: Plain JSON values of existing keys, by dotted name.
        source: Origin of the settings, for error messages.

    Raises:
        ConfigError: A key does not take its value.
    """
    tree = config_to_mapping(config)
    for name, value in settings.items():
        *sections, key = name.split(".")
        functools.reduce(operator.getitem, sections, tree)[key] = value
    return config_from_mapping(tree, source=source)


def _read_file(path: Path) -> dict[str, Any]:
    """Reads the sections of a config file."""
    text = _text_of(path)
    try:
        tree = read_yaml(text)
    except yaml.YAMLError as error:
        line, problem = _place_and_problem(error)
        where, remedy = (path, "correct it") if line is None else (f"{path}:{line}", "correct the line")
        raise ConfigError(f"{where}: not valid YAML ({problem}); {remedy}.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        kind = "a list" if isinstance(tree, list) else "a single value"
        raise ConfigError(f"Config file {path} holds {kind}, but a mapping of sections ({section_names()}) is needed.")
    # `section:` with nothing under it means the section's defaults.
    return {name: {} if value is None and name in RunConfig.model_fields else value for name, value in tree.items()}


def _text_of(path: Path) -> str:
    """Reads the text of a file. A pipe is refused: it may never end, and several ranks would each read a part of it."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"Config file {path} is a pipe, which only one process can read; write the YAML to a file and give that.")
            os.set_blocking(file.fileno(), True)
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(f"Config file {path} holds more than {MAX_FILE_BYTES} bytes, which no config does; give the YAML file of a config.")
        return data.decode()
    except FileNotFoundError:
        names = ", ".join(shipped_names())
        raise ConfigError(f"Config file {path} does not exist; give a YAML file with --config, or one that comes with phase8: {names}.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise ConfigError(f"Config file {path} cannot be read ({reason}); give a readable UTF-8 YAML file.") from None


def _place_and_problem(error: yaml.YAMLError) -> tuple[int | None, str]:
    """The line of a problem, if it is known, and its description."""
    if isinstance(error, yaml.MarkedYAMLError):
        return error.problem_mark.line + 1 if error.problem_mark else None, shortened(str(error.problem))
    return None, shortened(" ".join(str(error).split()))


def _apply_override(tree: dict[str, Any], override: str) -> str:
    """Sets the key that an override names, and returns its name."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set {describe_value(override)} is not of the form section.key=value, for example train.num_steps=200.")
    field = dict(iterate_keys()).get(name)
    if field is None:
        raise ConfigError(f"--set {describe_value(override)}: {unknown_key(name)}")
    try:
        value = _override_value(field, text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {describe_value(override)}: not valid YAML ({_place_and_problem(error)[1]}); correct the list.") from None
    *parents, leaf = name.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):  # a problem of the file, which validation reports
            return name
    node[leaf] = value
    return name


def _override_value(field: FieldInfo, text: str) -> Any:
    """Parses the value of an override: text for a key that takes text, without YAML's quotes around it; otherwise YAML, or text if it is no YAML."""
    if str in alternatives(field.annotation) and text not in ("null", "~"):
        is_list = entry_section(field) is not None and text.startswith(("[", "{"))  # a bare entry gets an error that asks for a list
        return read_yaml(text) if is_list else _unquoted(text)
    try:
        return read_yaml(text)
    except yaml.YAMLError:
        return text


def _unquoted(text: str) -> str:
    """A text as YAML reads it if it is in quotes as a whole, otherwise as it is: what looks like a number, a list or a comment is text."""
    try:
        value = read_yaml(text) if text.startswith(('"', "'")) else text
    except yaml.YAMLError:  # "Yes," she said: a text that begins with a quotation
        return text
    return value if isinstance(value, str) else text
