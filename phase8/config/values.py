"""What values a key may take: the types that `schema.py` is written in, each rule about one value in one place."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from phase8.errors import ConfigError
from phase8.paths import expand_path

_LARGEST = 10**12
# Given to pydantic while what a user has written is read. What a run has stored is expanded already, and stays as it is.
EXPAND_PATHS = {"expand_paths": True}


class SpelledInt(int):
    """A whole number that still knows how it was written, for keys that take a text."""

    spelling: str

    def __new__(cls, spelling: str) -> SpelledInt:
        """The number of a spelling."""
        number = super().__new__(cls, spelling)
        number.spelling = spelling
        return number


class SpelledFloat(float):
    """Likewise a number with a decimal point or an exponent."""

    spelling: str

    def __new__(cls, spelling: str) -> SpelledFloat:
        """The number of a spelling."""
        number = super().__new__(cls, spelling)
        number.spelling = spelling
        return number


def at_most(limit: int) -> AfterValidator:
    """Refuses numbers beyond what any run can use, which would overflow, or keep it busy for ever. No part of the type's description."""

    def check(value: float) -> float:
        if value > limit:
            raise ValueError(f"{value} is above {limit}, the most that is allowed; check the number of its digits")
        return value

    return AfterValidator(check)


def _as_spelled(value: object) -> object:
    return value.spelling if isinstance(value, (SpelledInt, SpelledFloat)) else value


def _expanded(path: str, info: ValidationInfo) -> str:
    if "\0" in path:
        raise ValueError(f"the path {path!r} holds a NUL character, which no path can")
    if not info.context:
        return path
    if not path:
        raise ValueError("the path is empty; write . for the directory of the process")
    try:
        return expand_path(path)
    except ConfigError as error:
        raise ValueError(str(error).removesuffix(".")) from None


AS_PATH = AfterValidator(_expanded)

PositiveInt = Annotated[int, Field(ge=1), at_most(_LARGEST)]
NonNegativeInt = Annotated[int, Field(ge=0), at_most(_LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveNumber = Annotated[int | float, Field(gt=0, allow_inf_nan=False), at_most(_LARGEST)]
Fraction = Annotated[float, Field(ge=0, le=1)]

Width = Annotated[PositiveInt, at_most(2**24)]
OptionalWidth = Annotated[NonNegativeInt, at_most(2**24)]
TapCount = Annotated[PositiveInt, at_most(4096)]
LayerCount = Annotated[PositiveInt, at_most(10_000)]
TokenCount = Annotated[PositiveInt, at_most(2**31 - 1)]
SequenceCount = Annotated[PositiveInt, at_most(2**31 - 1)]
ProcessCount = Annotated[NonNegativeInt, at_most(1024)]
RankCount = Annotated[PositiveInt, at_most(2**24)]
Seconds = Annotated[PositiveFloat, at_most(10**9)]

# A plain number under a key that takes a text is the text it is written as: run.name 010 is no ten.
Text = Annotated[str, BeforeValidator(_as_spelled)]
# `~` and variables of the environment are expanded, as in a shell.
PathText = Annotated[Text, AS_PATH]
