"""Prompts from a file: one on each line, or JSON lines with the key `prompt`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

from phase8.data.input_files import JSON_LINES_SUFFIXES
from phase8.data.utf8 import BYTE_ORDER_MARK
from phase8.errors import DataError

_LINE_END = re.compile(r"\r\n|\r|\n")  # str.splitlines also ends lines within texts, at U+2028 for example
# Options that a line of JSON could be thought to set; other keys, such as an id, or the seed in an object of --json, are the reader's own.
_OPTIONS = frozenset({"max_tokens", "stop", "num_samples", "temperature", "top_k", "top_p", "eod_token"})


class Prompt(NamedTuple):
    """A text to continue, and the number of its line in a file, from 1; None: it comes from no file."""

    text: str
    line: int | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, or of standard input where the path is `-`; blank lines are left out.

    The file has JSON lines if its name says so (`.jsonl`), or if its first line is a JSON object.

    Raises:
        DataError: It cannot be read, holds no prompt, or a line of JSON has none, or an option of the command.
    """
    name = "standard input" if path == Path("-") else str(path)
    try:
        content = sys.stdin.buffer.read() if path == Path("-") else path.read_bytes()
        text = content.removeprefix(BYTE_ORDER_MARK).decode()
    except OSError as error:
        raise DataError(f"--batch-file: cannot read {name}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--batch-file: {name} is not UTF-8 (byte {error.start}); convert it, with iconv for example.") from error
    lines = [(number, line) for number, line in enumerate(_LINE_END.split(text), start=1) if line.strip()]
    if not lines:
        raise DataError(f"--batch-file: {name} holds no prompt; it needs one on each line.")
    is_named_so = path.suffix.lower() in JSON_LINES_SUFFIXES
    if not is_named_so and not isinstance(_parsed(lines[0][1]), dict):
        return [Prompt(line, number) for number, line in lines]
    model = f"the lines of a {path.suffix} file are" if is_named_so else "the first one is"
    return [Prompt(_prompt_of(line, f"--batch-file: line {number} of {name}", model), number) for number, line in lines]


def _prompt_of(line: str, place: str, model: str) -> str:
    record = _parsed(line)
    if not isinstance(record, dict):
        raise DataError(f"{place} is not a JSON object, as {model}.")
    if not isinstance(record.get("prompt"), str):
        raise DataError(f'{place} has no text under the key "prompt".')
    if options := sorted(_OPTIONS.intersection(record)):
        raise DataError(f'{place} has the key "{options[0]}", but --{options[0].replace("_", "-")} applies to all prompts; give the option instead.')
    return record["prompt"]


def _parsed(line: str) -> object:
    """The value of a line of JSON; None: it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
