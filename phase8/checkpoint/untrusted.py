"""Text from files of untrusted origin: parsed strictly, and shown in messages shortened and without control characters."""

from __future__ import annotations

import json
import reprlib
from typing import Any

_MAX_SHOWN = 200


def strict_json(data: bytes, *, encoding: str) -> Any:
    """Parses JSON in this encoding; an object with a repeated key is refused.

    Raises:
        ValueError: It is not such JSON, or a number or the nesting exceeds Python's limits.
    """
    try:
        return json.loads(data.decode(encoding), object_pairs_hook=_object_without_duplicates)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has the same key twice")
    return result


def shown(value: Any) -> str:
    """A value in a few characters, for messages."""
    return reprlib.repr(value).encode("ascii", "backslashreplace").decode()


def shown_name(name: str) -> str:
    """A name in quotes; the middle of a very long one is left out."""
    return ascii(shortened(name))


def shortened(text: str) -> str:
    """A text; of a very long one its beginning and end."""
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN // 2]}...{text[-_MAX_SHOWN // 2 :]}"


def printable(text: str) -> str:
    """A text with its control characters escaped."""
    return text if text.isprintable() else ascii(text)
