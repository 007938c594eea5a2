"""`data.split`: division of one data set into training, validation and an unused rest, in Megatron's notation `969,30,1`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

from phase8.config.schema import DataSection
from phase8.errors import ConfigError

_NUMBER = re.compile(r"\d{1,15}(\.\d{1,15})?", re.ASCII)
_SHOWN_CHARACTERS = 60

Share = tuple[Fraction, Fraction]


def split_shares(text: str) -> tuple[Share, Share]:
    """Begin and end of the training and the validation part, as shares of the documents.

    Raises:
        ConfigError: The text is not a valid split.
    """
    numbers = [number.strip() for number in text.split(",")]
    if len(numbers) != 3 or not all(_NUMBER.fullmatch(number) for number in numbers):
        shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
        raise ConfigError(f"data.split is {shown!r}; it must be three numbers from 0 on, the shares of training, validation and neither: 969,30,1.")
    train, validation, rest = map(Fraction, numbers)
    if train == 0:
        raise ConfigError(f"data.split is {text!r}, which leaves nothing to train on; its first number must be above 0.")
    total = train + validation + rest
    return (Fraction(0), train / total), (train / total, (train + validation) / total)


def split_problems(data: DataSection) -> Iterator[str]:
    """The problems of `data.split`, one sentence each."""
    if data.split is None:
        return
    try:
        split_shares(data.split)
    except ConfigError as error:
        yield str(error)
    if data.train is None:
        yield f"data.split is {data.split!r}, but data.train is null and the embedded corpus is split already; set data.train, or leave both null."
    if data.validation is not None:
        yield f"data.split is {data.split!r} and takes the validation data from data.train, but data.validation is set too; leave one of them null."
