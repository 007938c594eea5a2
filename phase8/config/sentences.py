"""Translates pydantic's errors about a config into one sentence per problem."""

from __future__ import annotations

import difflib
import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from phase8.config.describe import describe_type, describe_value, entry_section, iterate_keys, shortened, unknown_key
from phase8.config.section import Section

MAX_PROBLEMS = 20


def problem_sentences(error: ValidationError, tree: Mapping[str, Any], *, source: str, overridden: Mapping[str, str]) -> list[str]:
    """The problems of a config in words; only the first of very many.

    Args:
        error: The error of pydantic.
        tree: The config that was validated.
        source: Origin of the config.
        overridden: Maps keys to the command-line option that set them.
    """
    fields = dict(iterate_keys())
    places: dict[str, list[ErrorDetails]] = {}
    dotted: list[list[str]] = []
    for problem in error.errors():
        parts = [str(part) for part in problem["loc"]]
        if problem["type"] == "extra_forbidden" and "." in parts[-1]:
            dotted.append(parts)
            continue
        name = next((key for n in range(len(parts), 0, -1) if (key := ".".join(parts[:n])) in fields), ".".join(parts))
        places.setdefault(name, []).append(problem)
    sentences = [f"{source}: {_about_dots(parts, fields)}" for parts in dotted[:MAX_PROBLEMS]]
    for name, problems in places.items():
        where = overridden.get(name, source)
        about = _about_key(name, fields[name], problems, tree) if name in fields else _about_place(name, problems[0])
        sentences += [f"{where}: {sentence}" for sentence in dict.fromkeys(about)]
        if len(sentences) > MAX_PROBLEMS:
            return [*sentences[:MAX_PROBLEMS], f"{source}: there are more problems than these {MAX_PROBLEMS}; correct them first."]
    return sentences


def _about_dots(parts: Sequence[str], fields: Mapping[str, FieldInfo]) -> str:
    """The sentence about a key that a file writes with dots, as command lines do."""
    name = ".".join(parts)
    if not any(key == name or key.startswith(f"{name}.") for key in fields):
        return unknown_key(name)
    *outer, last = name.split(".")
    nested = functools.reduce(lambda inner, section: f"{section}: {{{inner}}}", reversed(outer), f"{last}: ...")
    return f"{shortened(parts[-1])} is written with dots, as for --set; in a file a key stands inside its section: {nested}."


def _about_place(name: str, problem: ErrorDetails) -> Iterator[str]:
    """The sentence about a place that is no key: an unknown name, or a value where a section is needed."""
    if problem["type"] == "invalid_key":
        yield unknown_key(".".join([*map(str, problem["loc"][:-1]), describe_value(problem["input"])]))
    elif problem["type"] == "extra_forbidden":
        yield unknown_key(name)
    else:
        yield f"section {name} holds {describe_value(problem['input'])}, but a mapping of keys is needed."


def _about_key(name: str, field: FieldInfo, problems: Sequence[ErrorDetails], tree: Mapping[str, Any]) -> Iterator[str]:
    # The whole value is shown; pydantic points only to the wrong entry of a list.
    value = functools.reduce(operator.getitem, name.split("."), tree)
    section, in_entries = entry_section(field), [problem for problem in problems if _entry_number(problem) is not None]
    if section is not None and isinstance(value, list) and in_entries:
        yield from (f"{name}: entry {_about_entry(problem, section, value)}" for problem in in_entries)
    elif told := [_told(problem) for problem in problems if problem["type"] == "value_error"]:
        yield f"{name}: {told[0]}."
    else:
        yield f"{name} is {describe_value(value)}, but {describe_type(field)} is needed."


def _entry_number(problem: ErrorDetails) -> int | None:
    return next((position for position, part in enumerate(problem["loc"]) if isinstance(part, int)), None)


def _about_entry(problem: ErrorDetails, section: type[Section], entries: Sequence[Any]) -> str:
    """The sentence about one problem of one list entry; entries are counted from 1."""
    position = _entry_number(problem)
    assert position is not None
    number, rest = problem["loc"][position], [str(part) for part in problem["loc"][position + 1 :]]
    assert isinstance(number, int)
    keys = "{" + ", ".join(section.model_fields) + "}"
    entry = f"{number + 1} is {describe_value(entries[number])}"
    if not rest:
        return f"{entry}, but {keys} is needed."
    match problem["type"]:
        case "missing":
            return f"{entry}, which has no {rest[0]}; give every entry its {_required(section)}."
        case "extra_forbidden" | "invalid_key":
            near = difflib.get_close_matches(rest[0], section.model_fields, n=1)
            return f"{entry}, but has the unknown key {shortened(rest[0])}; " + (f"did you mean {near[0]}?" if near else f"the keys are {keys}.")
        case "value_error":
            return f"{number + 1}: {_told(problem)}."
    return f"{number + 1}: {rest[0]} is {describe_value(entries[number][rest[0]])}, but {describe_type(section.model_fields[rest[0]])} is needed."


def _required(section: type[Section]) -> str:
    return " and ".join(name for name, field in section.model_fields.items() if field.is_required())


def _told(problem: ErrorDetails) -> str:
    """The message of a rule in `values.py`."""
    return str(problem["ctx"]["error"])
