"""What is read of the sources: windows of everything, whole documents, or a number of windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from phase8.errors import ConfigError, DataError
from phase8.evaluate.pieces import Piece, carried, evenly_spread_pieces, windows
from phase8.evaluate.sources import Source


def select_pieces(
    sources: Sequence[Source], *, length: int, stride: int | None = None, carry_state: bool = False, num_sequences: int | None = None
) -> tuple[list[Source], list[Piece]]:
    """Chooses the pieces that are read.

    Args:
        sources: The sources.
        length: T, tokens of a window.
        stride: Predictions that a window adds; None: T.
        carry_state: Read every document from its beginning to its end, whatever its length.
        num_sequences: Windows in all, evenly spread over each source; None: all of them.

    Returns:
        The sources as they are read, and the pieces.

    Raises:
        ConfigError: The stride is longer than a window.
        DataError: A source holds less than one window, and their number is given; or no source holds a prediction.
    """
    if stride is not None and stride > length:
        raise ConfigError(f"--stride is {stride}, but a window has {length} tokens, so some tokens would be left out; give at most {length}")
    if num_sequences is not None:
        for source in sources:
            if source.num_tokens <= length:
                raise DataError(
                    f"{source.name} holds {source.num_tokens} tokens, fewer than the {length + 1} of one sequence; shorten it with --length, "
                    "or leave --sequences out"
                )
        num_tokens, weights = zip(*((source.num_tokens, source.weight) for source in sources), strict=True)
        return list(sources), evenly_spread_pieces(num_tokens, weights=weights, num_pieces=num_sequences, length=length)
    if carry_state:
        sources = [replace(source, starts=None) for source in sources]  # a document has no boundary inside
        pieces = [carried(i, document) for i, source in enumerate(sources) for document in source.documents()]
    else:
        pieces = [
            piece
            for i, source in enumerate(sources)
            for tokens in source.ranges()
            for piece in windows(i, tokens, length=length, stride=stride or length)
        ]
    if not pieces:
        raise DataError("every document holds a single token, so nothing is predicted; leave --carry-state out, or give longer documents")
    return list(sources), pieces
