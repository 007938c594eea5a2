"""Reads the wire format of protocol buffers, in which sentencepiece stores its models, without the package of that name.

Source: protobuf.dev, "Encoding".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_VARINT, _FIXED64, LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5


def fields(message: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Yields number and value of each field: whole numbers, floats of 32 and 64 bits, and bytes (which text and messages are).

    Raises:
        ValueError: A kind of field that no current writer makes.
        IndexError: The message ends inside a field.
    """
    position = 0
    while position < len(message):
        tag, position = varint(message, position)
        kind = tag & 7
        if kind in (_VARINT, LENGTH_DELIMITED):
            value, position = varint(message, position)
            if kind == _VARINT:
                yield tag >> 3, value
                continue
            yield tag >> 3, message[position : position + value]
            position += value
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
            yield tag >> 3, struct.unpack("<f" if size == 4 else "<d", message[position : position + size])[0]
            position += size
        else:
            raise ValueError(f"field {tag >> 3} is of kind {kind}, which no current writer makes")


def varint(data: bytes, position: int) -> tuple[int, int]:
    """Reads a whole number; returns it and the position of what follows."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
