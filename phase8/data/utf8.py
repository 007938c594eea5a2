"""UTF-8 of long texts in bounded pieces, since a second form of a whole document may not fit into memory."""

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
    """Length of the UTF-8 of a text in bytes."""
    return sum(map(len, encoded_pieces(text)))


def lone_surrogate(text: str) -> tuple[int, str] | None:
    """Position and description of the first lone surrogate of a text; None if UTF-8 can hold the text."""
    for start in range(0, len(text), _PIECE_CHARACTERS):
        try:
            text[start : start + _PIECE_CHARACTERS].encode()
        except UnicodeEncodeError as error:
            position = start + error.start
            return position, f"the lone surrogate {text[position]!a}, which is not Unicode text; remove it"
    return None
