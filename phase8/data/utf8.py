"""Texts and their UTF-8, a bounded part at a time: a second form of a whole document can be more than memory holds."""

from __future__ import annotations

from collections.abc import Iterator

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_PIECE_CHARACTERS = 1 << 20


def encoded_pieces(text: str) -> Iterator[bytes]:
    """The UTF-8 of a text, in pieces.

    Raises:
        UnicodeEncodeError: The text holds a lone surrogate.
    """
    for start in range(0, len(text), _PIECE_CHARACTERS):
        yield text[start : start + _PIECE_CHARACTERS].encode()


def num_encoded_bytes(text: str) -> int:
    """Bytes of the UTF-8 of a text."""
    return sum(map(len, encoded_pieces(text)))
