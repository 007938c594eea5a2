"""Checks that data and tokenizer belong together: the record of a pair names the tokenizer of its tokens, where the writer knew it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from phase8.data.indexed import IndexedDataset
from phase8.data.pair_record import MadeWith
from phase8.data.tokenizer import Tokenizer
from phase8.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Wording:
    """What a refusal says of the tokenizer and of the way out.

    Attributes:
        named: What the tokenizer is called, in front of its path.
        other_tokenizer: What to do about data of another tokenizer.
        other_end: What to do about documents that end in another token.
    """

    named: str
    other_tokenizer: str
    other_end: str


_OTHERWISE = "or train on them as they are with --set data.allow_fingerprint_change=true"
OF_TRAINING = Wording(
    named="data.tokenizer",
    other_tokenizer=f"name the tokenizer that made the data, {_OTHERWISE}",
    other_end=f"name the piece of the data as data.eod_token, {_OTHERWISE}",
)


def made_with(tokenizer: Tokenizer, *, eod_id: int | None) -> MadeWith:
    """The part of a pair's record about the tokenizer of its tokens.

    Args:
        tokenizer: The tokenizer.
        eod_id: The token that ends documents of the pair, which may differ from the tokenizer's own; None: there is none.
    """
    eod_token = tokenizer.eod_token if eod_id == tokenizer.eod_id else None
    return MadeWith(tokenizer_sha256=tokenizer.sha256, eod_id=eod_id, eod_token=eod_token)


def check_tokenizer(pairs: Iterable[IndexedDataset], tokenizer: Tokenizer, *, wording: Wording = OF_TRAINING) -> None:
    """Refuses a pair whose record names another tokenizer, or another token that ends documents.

    Args:
        pairs: The pairs; one whose record names no tokenizer is accepted.
        tokenizer: The tokenizer that ids are taken to be of.
        wording: What the refusal says of it.

    Raises:
        DataError: The record names another one.
    """
    for pair in pairs:
        made = None if pair.record is None else pair.record.made_with
        if made is None:
            continue
        if made.tokenizer_sha256 != tokenizer.sha256:
            raise DataError(
                f"{pair.prefix} was made with a tokenizer of sha256 {made.tokenizer_sha256[:12]}, but that of {wording.named} {tokenizer.path} is "
                f"{tokenizer.sha256[:12]}; {wording.other_tokenizer}"
            )
        if made.eod_id not in (None, tokenizer.eod_id):
            ended = f"token {made.eod_id}" + ("" if made.eod_token is None else f", {made.eod_token!r}")
            raise DataError(
                f"the documents of {pair.prefix} end in {ended}, but those of {wording.named} {tokenizer.path} in {tokenizer.eod_id}, "
                f"{tokenizer.eod_token!r}; {wording.other_end}"
            )
