"""Text that a tokenizer cannot keep, counted while documents are tokenised.

| loss | unit | found by |
|---|---|---|
| text without a token of its own | unknown tokens (one may stand for a whole word) | looking at the ids |
| characters that leave no trace in the ids | characters | encoding each distinct character once |

A tokenizer that rewrites characters (case, accents, width) or runs of white space loses them on purpose; that is not counted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np

from phase8.data.tokenizer import Tokenizer
from phase8.errors import DataError

_SHOWN_CHARACTERS = 40
_UNSEEN, _KEPT, _DROPPED = range(3)


@dataclass(frozen=True, kw_only=True)
class LostText:
    """Counts and first examples of lost text.

    Attributes:
        num_unknown: Unknown tokens.
        num_documents_with_unknown: Documents that hold one.
        first_unknown: What the first of them stands for, and where.
        num_dropped: Characters that leave no trace in the ids.
        num_documents_with_dropped: Documents that hold one.
        first_dropped: The first of them, and where.
    """

    num_unknown: int = 0
    num_documents_with_unknown: int = 0
    first_unknown: str | None = None
    num_dropped: int = 0
    num_documents_with_dropped: int = 0
    first_dropped: str | None = None

    def __add__(self, later: LostText) -> LostText:
        return LostText(
            num_unknown=self.num_unknown + later.num_unknown,
            num_documents_with_unknown=self.num_documents_with_unknown + later.num_documents_with_unknown,
            first_unknown=self.first_unknown or later.first_unknown,
            num_dropped=self.num_dropped + later.num_dropped,
            num_documents_with_dropped=self.num_documents_with_dropped + later.num_documents_with_dropped,
            first_dropped=self.first_dropped or later.first_dropped,
        )


def stored_lost_text(values: object) -> LostText | None:
    """Parses the counts in a record; None if they are malformed."""
    if not isinstance(values, dict) or values.keys() != {field.name for field in fields(LostText)}:
        return None
    is_whole = all(
        (value is None or isinstance(value, str)) if name.startswith("first_") else (type(value) is int and value >= 0)
        for name, value in values.items()
    )
    return LostText(**values) if is_whole else None


class LostTextCounter:
    """Counts lost text over documents.

    Args:
        tokenizer: The tokenizer of the documents.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._fates = np.full(sys.maxunicode + 1, _UNSEEN, np.uint8)
        self.total = LostText()

    def add(self, pieces: Iterable[str], tokens: np.ndarray) -> None:
        """Counts a document.

        Args:
            pieces: Its text, as it was encoded.
            tokens: Its ids.
        """
        num_unknown = 0 if self._tokenizer.unknown_id is None else int(np.count_nonzero(tokens == self._tokenizer.unknown_id))
        num_dropped, first_dropped, first_unknown, place = 0, None, None, ""
        for piece in pieces:
            place = place or f"in a document that begins with {piece[:_SHOWN_CHARACTERS]!r}"
            dropped = self._dropped(piece)
            num_dropped += dropped.size
            if dropped.size and first_dropped is None:
                first_dropped = f"U+{dropped[0]:04X} {place}"
            if num_unknown and first_unknown is None and self.total.first_unknown is None:
                found = self._tokenizer.first_unknown(piece)
                first_unknown = None if found is None else f"{found[:_SHOWN_CHARACTERS]!r} {place}"
        self.total += LostText(
            num_unknown=num_unknown,
            num_documents_with_unknown=int(num_unknown > 0),
            first_unknown=first_unknown,
            num_dropped=num_dropped,
            num_documents_with_dropped=int(num_dropped > 0),
            first_dropped=first_dropped,
        )

    def _dropped(self, text: str) -> np.ndarray:
        """Code points of the characters of `text` that the tokenizer drops, in order."""
        code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        fates = self._fates[code_points]
        if (fates == _UNSEEN).any():
            new = np.unique(code_points[fates == _UNSEEN])
            self._fates[new] = _KEPT
            self._fates[[ord(character) for character in dropped_characters(self._tokenizer, "".join(map(chr, new)))]] = _DROPPED
            fates = self._fates[code_points]
        return code_points[fates == _DROPPED]


def dropped_characters(tokenizer: Tokenizer, characters: str) -> list[str]:
    """Those of some characters that leave no trace in the ids."""
    try:
        kept = set(tokenizer.decode(tokenizer.encode(characters)))
        return [character for character in characters if character not in kept and tokenizer.drops(character)]
    except DataError:  # a tokenizer that refuses what it does not know drops nothing
        return []
