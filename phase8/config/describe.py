"""The schema in words: every key with its type, default and meaning, for `--help` and for error sentences."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from phase8.config.schema import RunConfig, Section


def iterate_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the schema with its dotted name, in the order of the schema."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from iterate_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def describe_type(field: FieldInfo) -> str:
    """What values a key takes, in words."""
    return _describe(field.annotation, field.metadata)


def describe_schema() -> str:
    """The whole surface as text: a line for each section, two for each key."""
    lines = []
    for section_name, section in RunConfig.model_fields.items():
        assert isinstance(section.annotation, type)
        lines.append(f"\n{section_name}: {section.annotation.__doc__}")
        for name, field in iterate_keys(section.annotation, f"{section_name}."):
            default = field.default if isinstance(field.default, str) else describe_value(field.default)
            lines.append(f"  {name} = {default}    [{describe_type(field)}]")
            lines.append(f"      {field.description}")
    return "\n".join(lines)


def describe_value(value: Any) -> str:
    """A value as YAML spells it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def section_names() -> str:
    """The names of the sections, for a sentence."""
    return ", ".join(RunConfig.model_fields)


def unknown_key(name: str) -> str:
    """The sentence about a name that is no key, with the nearest one that is."""
    keys = [key for key, _ in iterate_keys()]
    inside = [key for key in keys if key.startswith(f"{name}.")]
    if inside:
        return f"{name} is a section; give one of its keys, {inside[0]} for example."
    known = [*keys, *dict.fromkeys(key.rsplit(".", 1)[0] for key in keys)]
    # The same last word in another section is the likeliest intention, then the nearest spelling.
    near = [key for key in known if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    near += difflib.get_close_matches(name, [key for key in known if not name.startswith(f"{key}.")], n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"the sections are {section_names()}."
    return f"unknown key {name}; {hint}"


def _describe(annotation: Any, metadata: Sequence[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (types.UnionType, Union):
        return " or ".join("null" if part is types.NoneType else _describe(part, metadata) for part in arguments)
    if origin is Annotated:
        return _describe(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        return "one of " + ", ".join(str(value) for value in arguments)
    if origin is tuple and arguments[1:] == (...,):
        (kind, _) = arguments
        is_section = isinstance(kind, type) and issubclass(kind, Section)
        return "a list of " + ("{" + ", ".join(kind.model_fields) + "}" if is_section else f"values, each {_describe(kind, [])}")
    if origin is tuple:
        return f"a list of {len(arguments)} values, each {_describe(arguments[0], [])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return " ".join([words[annotation], " and ".join(_bounds(metadata))]).strip()


def _bounds(metadata: Sequence[Any]) -> Iterator[str]:
    for item in metadata:
        match item:
            case FieldInfo():
                yield from _bounds(item.metadata)
            case annotated_types.Ge(ge=bound):
                yield f"at least {bound}"
            case annotated_types.Gt(gt=bound):
                yield f"above {bound}"
            case annotated_types.Le(le=bound):
                yield f"at most {bound}"
            case _ if "pattern" in vars(item):
                yield "of letters, digits, '.', '_' and '-' that begins with a letter or a digit"
            case _ if "allow_inf_nan" in vars(item):
                yield "finite"
