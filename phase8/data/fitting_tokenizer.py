"""The tokenizer of a run's data, whose ids the model must have."""

from __future__ import annotations

from pathlib import Path

from phase8.data.tokenizer import Tokenizer, load_tokenizer
from phase8.errors import DataError


def load_fitting_tokenizer(path: str | Path, *, eod_token: str | None, vocab_size: int) -> Tokenizer:
    """Reads a tokenizer of which every id is an id of the model.

    Args:
        path: The file.
        eod_token: The piece between documents; None: the one that the tokenizer itself names.
        vocab_size: Number of token ids of the model.

    Raises:
        DataError: The tokenizer cannot be used, or has more ids than the model.
    """
    tokenizer = load_tokenizer(path, eod_token=eod_token)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"tokenizer {path} has {tokenizer.vocab_size} ids, but model.vocab_size is {vocab_size}; "
            f"set model.vocab_size to {tokenizer.vocab_size} or more."
        )
    return tokenizer
