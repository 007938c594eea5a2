"""Checks that data and tokenizer belong together: the record of a pair names the tokenizer of its tokens, where the writer knew it."""

from __future__ import annotations

from collections.abc import Iterable

from phase8.data.indexed import IndexedDataset
from phase8.data.pair_record import MadeWith
from phase8.data.tokenizer import Tokenizer
from phase8.errors import DataError


def made_with(tokenizer: Tokenizer, *, eod_id: int | None) -> MadeWith:
    """The part of a pair's record about the tokenizer of its tokens.

    Args:
        tokenizer: The tokenizer.
        eod_id: The token that ends documents of the pair, which may differ from the tokenizer's own; None: there is none.
    """
    eod_token = tokenizer.eod_token if eod_id == tokenizer.eod_id else None
    return MadeWith(tokenizer_sha256=tokenizer.sha256, eod_id=eod_id, eod_token=eod_token)


def check_tokenizer(pairs: Iterable[IndexedDataset], tokenizer: Tokenizer) -> None:
    """Refuses a pair whose record names another tokenizer, or another token that ends documents.

    Raises:
        DataError: The record names another one.
    """
    otherwise = "or train on them as they are with --set data.allow_fingerprint_change=true"
    for pair in pairs:
        made = None if pair.record is None else pair.record.made_with
        if made is None:
            continue
        if made.tokenizer_sha256 != tokenizer.sha256:
            raise DataError(
                f"{pair.prefix} was made with a tokenizer of sha256 {made.tokenizer_sha256[:12]}, but that of data.tokenizer {tokenizer.path} is "
                f"{tokenizer.sha256[:12]}; name the tokenizer that made the data, {otherwise}"
            )
        if made.eod_id not in (None, tokenizer.eod_id):
            ended = f"token {made.eod_id}" + ("" if made.eod_token is None else f", {made.eod_token!r}")
            raise DataError(
                f"the documents of {pair.prefix} end in {ended}, but those of data.tokenizer {tokenizer.path} in {tokenizer.eod_id}, "
                f"{tokenizer.eod_token!r}; name the piece of the data as data.eod_token, {otherwise}"
            )
