"""Output that is there already: what a preparation or an import may replace without being asked to, and how the earlier data differ."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from phase8.data.prepare_options import Layout, PrepareOptions
from phase8.data.staging import read_json
from phase8.errors import ConfigError, first_few

_REMEDY = "give another --output-prefix, or replace it with --overwrite"


def refuse_earlier_output(options: PrepareOptions, layout: Layout, made_from: Mapping[str, object]) -> None:
    """Refuses to replace data that were made from something else; damaged or unfinished data of the same inputs and options are made again.

    Args:
        options: Options of the preparation.
        layout: Its paths.
        made_from: Everything on which its output depends.

    Raises:
        ConfigError: Data of other inputs or options are there, and `options.overwrite` is not set.
    """
    record = read_json(layout.record)
    before = record.get("made_from") if isinstance(record, dict) else read_json(layout.publishing)
    if options.overwrite or before == made_from:
        return
    is_described = isinstance(before, dict)
    there = next(filter(_exists, layout.everything() if is_described else layout.replaced()), None)
    if there is None:
        return
    if not is_described:
        raise ConfigError(f"--output-prefix is {options.output_prefix}, but {there} exists, and no record says what it was made from; {_REMEDY}.")
    differences = first_few(list(_differences(before, made_from)) or ["the record is of another form"], separator=", ")
    raise ConfigError(
        f"--output-prefix is {options.output_prefix}, but {there} exists, prepared with other inputs or options: {differences}; {_REMEDY}."
    )


def refuse_pair(prefix: str) -> None:
    """Refuses to replace a `.bin/.idx` pair by an import; a file without the other is what an interrupted import leaves.

    Raises:
        ConfigError: Both files are there.
    """
    if _exists(Path(f"{prefix}.bin")) and _exists(Path(f"{prefix}.idx")):
        raise ConfigError(f"--output-prefix leads to {prefix}.bin, which exists; {_REMEDY}.")


def _exists(path: Path) -> bool:
    return os.path.lexists(path)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs, a clause each; the earlier record is not trusted to have any form."""
    if before.get("format_version") != now["format_version"]:
        yield "another release of phase8 made it"
    yield from _source_differences(before.get("sources"), now["sources"])
    rules, tokenizer = before.get("rules"), before.get("tokenizer")
    if isinstance(rules, dict):
        yield from _option_differences(rules, now["rules"])
    if isinstance(tokenizer, dict) and tokenizer != now["tokenizer"]:
        if tokenizer.keys() != now["tokenizer"].keys() or "sha256" in tokenizer:
            yield "the tokenizer was another one"
        else:
            names = {"sample_bytes": "tokenizer_sample_bytes"}
            old, new = ({names.get(name, name): value for name, value in each.items()} for each in (tokenizer, now["tokenizer"]))
            yield from _option_differences(old, new)


def _option_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name, value in now.items():
        if name in before and before[name] != value:
            yield f"--{name.replace('_', '-')} was {json.dumps(before[name])} and is {json.dumps(value)}"


def _source_differences(before: object, now: list[dict[str, Any]]) -> Iterator[str]:
    if not isinstance(before, list) or before == now:
        return
    old = {str(source.get("path")): source for source in before if isinstance(source, dict)}
    new = {str(source["path"]): source for source in now}
    clauses = [f"{path} was changed" for path, source in new.items() if path in old and source != old[path]]
    clauses += [f"{path} is new" for path in new if path not in old]
    clauses += [f"{path} is missing" for path in old if path not in new]
    yield from clauses or ["the inputs come in another order"]
