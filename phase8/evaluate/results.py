"""The results of an evaluation: losses by source and by position, as a table and as JSON."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

TOTAL = "total"


@dataclass(frozen=True)
class PositionLoss:
    """The loss of the predictions that are made at the positions first <= i < end of what is read together.

    Args:
        first: First position.
        end: Position after the last one.
        loss: Mean in nats per token; None: no token is predicted there.
        num_tokens: Predicted tokens.
    """

    first: int
    end: int
    loss: float | None
    num_tokens: int


@dataclass(frozen=True)
class SourceResult:
    """The loss on one source, or on all of them.

    Args:
        name: Name of the source.
        loss: Mean in nats per token.
        num_tokens: Predicted tokens.
        num_bytes: UTF-8 bytes of their text; None: unknown.
        num_sequences: Windows, or documents read with a carried state.
        positions: The loss by position; each range is twice as long as the one before it.
    """

    name: str
    loss: float
    num_tokens: int
    num_bytes: int | None
    num_sequences: int
    positions: tuple[PositionLoss, ...]

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss) if self.loss < 700 else self.loss * math.inf  # not a number stays one

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the model needs for a byte of the text, which models with other tokenizers may be compared by; None: the bytes are unknown."""
        return self.loss * self.num_tokens / math.log(2) / self.num_bytes if self.num_bytes else None

    def as_json(self) -> dict[str, object]:
        """All of it as JSON; null where there is no number."""
        return {
            "name": self.name,
            "loss": _finite(self.loss),
            "perplexity": _finite(self.perplexity),
            "bits_per_byte": _finite(self.bits_per_byte),
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
            "num_sequences": self.num_sequences,
            "positions": [vars(position) | {"loss": _finite(position.loss)} for position in self.positions],
        }


def position_bounds(length: int) -> list[int]:
    """Bounds of the ranges of positions: 0, 64, 128, 256, ... and the length."""
    return [0, *(1 << power for power in range(6, length.bit_length()) if 1 << power < length), length]


def source_result(
    name: str, *, loss_sums: Sequence[float], num_tokens: Sequence[int], num_bytes: int | None, num_sequences: int, bounds: Sequence[int]
) -> SourceResult:
    """The result from sums over the ranges of positions.

    Args:
        name: Name of the source.
        loss_sums: Sum of the losses of each range, in nats.
        num_tokens: Predicted tokens of each range.
        num_bytes: Bytes of all predicted tokens; None: unknown.
        num_sequences: Windows or documents.
        bounds: Bounds of the ranges.
    """
    ranges = zip(itertools.pairwise(bounds), loss_sums, num_tokens, strict=True)
    positions = tuple(PositionLoss(first, end, loss / number if number else None, number) for (first, end), loss, number in ranges)
    total = sum(num_tokens)
    return SourceResult(name, sum(loss_sums) / total if total else math.nan, total, num_bytes, num_sequences, positions)


def table(results: Sequence[SourceResult]) -> str:
    """A Markdown table: a row for each source, a column for each range of positions."""
    ranges = [f"{position.first:,} to {position.end - 1:,}" for position in results[0].positions]
    rows = [["loss, nats per token", "all", "perplexity", "bits per byte", "tokens", *ranges], ["---"] * (5 + len(ranges))]
    for result in results:
        bits = "unknown" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
        losses = ["" if position.loss is None else f"{position.loss:.4f}" for position in result.positions]
        rows.append([result.name, f"{result.loss:.4f}", f"{result.perplexity:.3f}", bits, f"{result.num_tokens:,}", *losses])
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
