"""Which tokens the model reads together, so that every token is predicted exactly once; no torch.

A range is a run of tokens that belong together: a document, or all tokens of a source, one after the other as in training. Position i of a range
predicts the token after it. A piece is what the model reads from an empty state.

| | pieces of a range |
|---|---|
| windows of T tokens | the first T, then S (the stride) more each time, after T - S tokens of context; the last one reaches back until it is full |
| carried state | the whole range, read T tokens at a time |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from phase8.data.blend import BlendTable
from phase8.data.sampler import count_windows, evenly_spread_windows

SHAPE_STEP = 64  # lengths are padded to a multiple: kernels are compiled and tuned for shapes, and texts of every length would each bring one


class Range(NamedTuple):
    """Tokens that belong together.

    Attributes:
        first: Position in the source of the first token that is read.
        num_predictions: Number of tokens after it.
    """

    first: int
    num_predictions: int


class Piece(NamedTuple):
    """What the model reads from an empty state.

    Attributes:
        source: Number of the source.
        first: Position in the source of the first token that is read.
        length: Tokens that are read, each of which predicts the next one.
        num_context: The first of them, whose predictions do not count: another piece makes them.
    """

    source: int
    first: int
    length: int
    num_context: int = 0


def windows(source: int, tokens: Range, *, length: int, stride: int) -> Iterator[Piece]:
    """Windows of at most `length` tokens that together predict every token of a range once.

    Args:
        source: Number of the source.
        tokens: The range.
        length: T, tokens of a window.
        stride: S, predictions that a window adds to those of the windows before it.
    """
    begin = 0
    while begin < tokens.num_predictions:
        end = min(begin + (stride if begin else length), tokens.num_predictions)
        start = max(end - length, 0)
        yield Piece(source, tokens.first + start, end - start, begin - start)
        begin = end


def carried(source: int, tokens: Range) -> Piece:
    """A range as one piece."""
    return Piece(source, tokens.first, tokens.num_predictions)


def evenly_spread_pieces(num_tokens: Sequence[int], *, weights: Sequence[int], num_pieces: int, length: int) -> list[Piece]:
    """The windows that an evaluation during training takes.

    Args:
        num_tokens: Tokens of each source.
        weights: Weight of each source in the blend.
        num_pieces: Windows in all, evenly spread over each source.
        length: T, tokens of a window.
    """
    num_windows = [count_windows(number, length) for number in num_tokens]
    spread = evenly_spread_windows(num_pieces, num_windows=num_windows, blend=BlendTable(weights))
    return [Piece(source, window * length, length) for source, window in spread]


def batches(pieces: Iterable[Piece], batch_size: int, *, tokens_at_once: int = 0) -> list[list[Piece]]:
    """Pieces side by side, the longest first, none less than half as long as the longest; they depend on the pieces alone, not on the ranks.

    Args:
        pieces: The pieces.
        batch_size: Pieces of a batch.
        tokens_at_once: More of them, if they are so short that all together have no more tokens than this.
    """
    found: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda piece: (-piece.length, piece)):
        longest = max(found[-1][0].length, SHAPE_STEP) if found else 0
        if not found or len(found[-1]) == max(batch_size, tokens_at_once // longest) or 2 * max(piece.length, SHAPE_STEP) < longest:
            found.append([])
        found[-1].append(piece)
    return found
