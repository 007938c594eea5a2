"""Types of config values, in which `schema.py` is written; each rule about a single value is defined here once."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from phase8.errors import ConfigError
from phase8.paths import expand_path

_LARGEST = 10**12
# Context of validation while user input is read. Stored configs are already expanded, and are not expanded again.
EXPAND_PATHS = {"expand_paths": True}


class SpelledInt(int):
    """A whole number that keeps its original spelling, for keys that take text."""

    spelling: str

    def __new__(cls, spelling: str) -> SpelledInt:
        """The number of a spelling."""
        number = super().__new__(cls, spelling)
        number.spelling = spelling
        return number


class SpelledFloat(float):
    """A number with a decimal point or an exponent that keeps its original spelling."""

    spelling: str

    def __new__(cls, spelling: str) -> SpelledFloat:
        """The number of a spelling."""
        number = super().__new__(cls, spelling)
        number.spelling = spelling
        return number


def at_most(limit: int) -> AfterValidator:
    """Refuses numbers larger than any run needs, which would overflow or never finish. The bound is not part of the type's description."""

    def check(value: float) -> float:
        if value > limit:
            raise ValueError(f"{value} is above {limit}, the most that is allowed; check the number of its digits")
        return value

    return AfterValidator(check)


def _as_spelled(value: object) -> object:
    return value.spelling if isinstance(value, (SpelledInt, SpelledFloat)) else value


def _named_global_path(value: object) -> object:
    """The name of a global path; earlier releases had true for the linear recurrence, the only one then, and false for none."""
    return ("linear" if value else "none") if isinstance(value, bool) else value


def bf16_is_the_dtype(linear: str | None, info: ValidationInfo) -> str | None:
    """None for bf16: linear layers have no format of their own where they compute in that of the model."""
    if linear != "bf16":
        return linear
    if (dtype := info.data.get("dtype", linear)) != linear:  # a dtype with an error of its own is missing
        raise ValueError(f"linear layers in bf16 need precision.dtype bf16, but it is {dtype}; set one of them to the other, or linear to null")
    return None


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
NegativeFloat = Annotated[float, Field(lt=0, allow_inf_nan=False)]
PositiveNumber = Annotated[int | float, Field(gt=0, allow_inf_nan=False), at_most(_LARGEST)]
Fraction = Annotated[float, Field(ge=0, le=1)]
ScalingFactor = Annotated[float, Field(ge=1, allow_inf_nan=False)]

Width = Annotated[PositiveInt, at_most(2**24)]
OptionalWidth = Annotated[NonNegativeInt, at_most(2**24)]
TapCount = Annotated[PositiveInt, at_most(4096)]
LayerCount = Annotated[PositiveInt, at_most(10_000)]
TokenCount = Annotated[PositiveInt, at_most(2**31 - 1)]
SequenceCount = Annotated[PositiveInt, at_most(2**31 - 1)]
ProcessCount = Annotated[NonNegativeInt, at_most(1024)]
RankCount = Annotated[PositiveInt, at_most(2**24)]
Seconds = Annotated[PositiveFloat, at_most(10**9)]

# A bare number under a text key is taken as the text that was written: run.name 010 stays 010, not 10.
Text = Annotated[str, BeforeValidator(_as_spelled)]
# What the global path computes, by its name.
GlobalPathName = Annotated[Literal["delta", "linear", "none"], BeforeValidator(_named_global_path)]
# Which values pass SiLU: none, those that the global path reads, or those of every path.
SiluOfValues = Literal["none", "global", "all"]
# `~` and environment variables are expanded, as in a shell.
PathText = Annotated[Text, AS_PATH]
