"""Documents of JSON lines: a line is an object that holds a text under a key."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, BinaryIO

from phase8.data.input_files import Document, OnInvalid, Span, describe_keys
from phase8.data.utf8 import BYTE_ORDER_MARK, lone_surrogate
from phase8.errors import DataError

_SKIPPED_BYTES = 1 << 20

Report = Callable[[str], None]


class _ObjectWithRepeats(dict[str, Any]):
    """A JSON object in which keys occur more than once."""

    repeated: set[str]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    with_repeats = _ObjectWithRepeats(found)
    with_repeats.repeated = {key for key, number in Counter(key for key, _ in pairs).items() if number > 1}
    return with_repeats


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def read_json_lines(file: BinaryIO, stored: BinaryIO, span: Span, *, json_key: str, on_invalid: OnInvalid) -> Iterator[Document]:
    """Yields the texts of the lines that begin in a span, exactly as stored. Intermediate forms of a long line are freed as soon as possible.

    Args:
        file: The (decompressed) content.
        stored: The stored file, the same as `file` if it is not compressed.
        span: The part to read.
        json_key: Key of the text in each object.
        on_invalid: Called with an error naming file and line for every line that is not a document; it raises to stop reading.
    """
    if span.start:
        file.seek(span.start - 1)
        _skip_line(file, span.end)
    first = position = stored.tell()
    num_lines = 0

    @cache
    def num_lines_before() -> int:
        return _num_lines(span.source.path, first)

    def report(problem: str) -> None:
        on_invalid(DataError(f"{span.source.path}, line {num_lines_before() + num_lines}: {problem}"))

    while (position < span.end or span.source.is_compressed) and (line := file.readline()):
        num_lines += 1
        begin, position = position, stored.tell()
        if line.isspace():
            continue
        record = _decoded(line, report)
        del line
        text = None if record is None else _text_of_record(record, json_key, report)
        del record
        if text is not None:
            yield Document(text, position - begin)
            del text


def _skip_line(file: BinaryIO, end: int) -> None:
    """Reads to the end of the line, or past `end`, since a line may be longer than many spans."""
    while (part := file.readline(_SKIPPED_BYTES)) and not part.endswith(b"\n") and file.tell() < end:
        pass


def _decoded(line: bytes, report: Report) -> str | None:
    try:
        return line.removeprefix(BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        return report(f"byte {error.start} is 0x{error.object[error.start]:02x}, which is not UTF-8; convert the file")


def _text_of_record(record: str, json_key: str, report: Report) -> str | None:
    """The document of a line; None after `report` was called with the problem."""
    try:
        found = _DECODER.decode(record)
    except (ValueError, RecursionError) as error:
        return report(f"not JSON ({error}); every line must be one object with the text under {json_key!r}")
    if not isinstance(found, dict):
        return report(f"found {_in_words(found)}, where an object with the text under {json_key!r} is needed; correct or remove the line")
    if json_key not in found:
        return report(f"found an object with the keys {describe_keys(found)}, without the key {json_key!r}; name the key of the text with --json-key")
    if isinstance(found, _ObjectWithRepeats) and json_key in found.repeated:
        return report(f"the key {json_key!r} occurs more than once, so which of its values is the document is not known; keep one of them")
    text = found[json_key]
    if not isinstance(text, str):
        remedy = "put the text there or remove the line" if text is None else "name the key of the text with --json-key"
        return report(f"{json_key!r} is {_in_words(text)}, where a text is needed; {remedy}")
    if surrogate := lone_surrogate(text):
        return report(f"{json_key!r} holds {surrogate[1]}")
    return text


def _in_words(value: object) -> str:
    """JSON's name for the type of a value."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {dict: "an object", list: "a list", str: "a string"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), "a number")


def _num_lines(path: str, end: int) -> int:
    """Number of lines that end in the first `end` bytes of a file."""
    total, remaining = 0, end
    with open(path, "rb") as file:
        while chunk := file.read(min(remaining, 1 << 20)):
            total += chunk.count(b"\n")
            remaining -= len(chunk)
    return total
