"""A source of training data as one stream of tokens: a pair, a range of its documents, or several pairs one after the other.

Windows cross the borders of pairs as they cross those of documents, so each token of a stream is trained on as often as
any other, and each window comes once per epoch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import numpy as np

from phase8.data.indexed import IndexedDataset
from phase8.errors import DataError


class _Part:
    """Consecutive documents of a pair."""

    def __init__(self, pair: IndexedDataset, documents: tuple[int, int]):
        self.pair, self.documents = pair, documents
        self.first_token, self.end_token = pair.token_range(*documents)

    def fingerprint(self) -> dict[str, object]:
        is_whole = self.documents == (0, self.pair.num_documents)
        return self.pair.fingerprint() | ({} if is_whole else {"documents": list(self.documents)})


class TokenStream:
    """The tokens of some documents of one or more pairs, in order.

    Args:
        prefix: Name in the config: the prefix of the pair, or a pattern.
        pairs: The pairs, opened.
        share: The documents of each pair that belong to the stream: begin and end, as shares of their number.
    """

    def __init__(self, prefix: str, pairs: Sequence[IndexedDataset], share: tuple[Fraction, Fraction] = (Fraction(0), Fraction(1))):
        self.prefix = prefix
        self.pairs = tuple(pairs)
        ranges = [(round(share[0] * pair.num_documents), round(share[1] * pair.num_documents)) for pair in pairs]  # rounded as Megatron does
        self._parts = [_Part(pair, documents) for pair, documents in zip(pairs, ranges, strict=True)]
        self._starts = [0, *accumulate(part.end_token - part.first_token for part in self._parts)]
        self.num_tokens = self._starts[-1]
        self.num_documents = sum(end - first for first, end in ranges)

    def part(self, share: tuple[Fraction, Fraction]) -> TokenStream:
        """The stream of a share of the documents of each pair of this one."""
        return TokenStream(self.prefix, self.pairs, share)

    def tokens(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from `start` on, read-only.

        Raises:
            DataError: A file has become shorter, or cannot be read.
        """
        pieces = [part.pair.tokens(first, number) for part, first, number in self._pieces(start, count)]
        return pieces[0] if len(pieces) == 1 else np.concatenate([piece.astype(np.int64) for piece in pieces])

    def document_starts(self, start: int, count: int) -> np.ndarray:
        """Bool [count]: True where a token begins a document."""
        return np.concatenate([part.pair.document_starts(first, number) for part, first, number in self._pieces(start, count)])

    def place(self, position: int) -> tuple[Path, int]:
        """The `.bin` that holds a token of the stream, and its position there."""
        ((part, first, _),) = self._pieces(position, 1)
        return part.pair.bin_path, first

    def fingerprint(self) -> dict[str, object]:
        """What determines the tokens of the stream; a stream of several pairs has this for each pair under `files`."""
        if len(self._parts) == 1:
            return self._parts[0].fingerprint()
        with ThreadPoolExecutor() as threads:  # hashing releases the interpreter lock, and there may be a thousand files
            found = list(threads.map(_Part.fingerprint, self._parts))
        return {"files": [{"name": Path(part.pair.prefix).name, **each} for part, each in zip(self._parts, found, strict=True)]}

    def _pieces(self, start: int, count: int) -> Iterator[tuple[_Part, int, int]]:
        """The parts that tokens of the stream lie in, with the first token and the number of tokens in the pair."""
        if start < 0 or count < 1 or start + count > self.num_tokens:
            raise DataError(f"{self.prefix}: tokens {start} to {start + count} were asked for; there are {self.num_tokens}")
        number = bisect_right(self._starts, start) - 1
        while count:
            part, offset = self._parts[number], start - self._starts[number]
            taken = min(count, self._starts[number + 1] - start)
            if taken:
                yield part, part.first_token + offset, taken
            start, count, number = start + taken, count - taken, number + 1
