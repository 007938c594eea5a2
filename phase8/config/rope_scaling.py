"""The section of the config that scales rotary frequencies, so that a model trained on short sequences can be trained on longer ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from phase8.config.section import Section, key
from phase8.config.values import PositiveFloat, ScalingFactor, TokenCount

_READ_BY: dict[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_frequency_factor", "high_frequency_factor", "original_sequence_length"),
}


class RopeScaling(Section):
    """Scaling of the rotary frequencies of the transformer; the defaults are those of Llama 3.1."""

    type: Literal["none", "linear", "llama3"] = key(
        "none", "linear divides every rotary frequency by the factor; llama3 divides low ones, keeps high ones, and blends between"
    )
    factor: ScalingFactor = key(8.0, "divisor of the frequencies")
    low_frequency_factor: PositiveFloat = key(
        1.0, "llama3: frequencies with at most this many turns in original_sequence_length are divided by the whole factor"
    )
    high_frequency_factor: PositiveFloat = key(4.0, "llama3: frequencies with at least this many turns in original_sequence_length are kept")
    original_sequence_length: TokenCount = key(8192, "llama3: tokens of the sequences with which the frequencies were trained first")

    @property
    def in_effect(self) -> dict[str, Any]:
        """The keys that this type of scaling reads, as plain JSON."""
        return self.model_dump(mode="json", include={"type", *_READ_BY[self.type]})


UNSCALED = RopeScaling()


def null_is_unscaled(value: object) -> object:
    """An empty section for null."""
    return {} if value is None else value


def scaling_problems(rope_scaling: RopeScaling, *, block: str) -> Iterator[str]:
    """The problems of a scaling in a model with these blocks, one sentence each."""
    if rope_scaling.type != "none" and block != "transformer":
        yield (
            f"model.rope_scaling.type is {rope_scaling.type}, but model.block is {block}, whose rotary positions are those of a window and need no "
            "scaling for longer sequences; set model.rope_scaling.type to none."
        )
    if rope_scaling.type == "llama3" and rope_scaling.high_frequency_factor <= rope_scaling.low_frequency_factor:
        yield (
            f"model.rope_scaling.high_frequency_factor {rope_scaling.high_frequency_factor} is not above model.rope_scaling.low_frequency_factor "
            f"{rope_scaling.low_frequency_factor}; choose a larger one, 4 and 1 for example."
        )
