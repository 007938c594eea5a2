"""The exchanges of layers with other ranks, as each layer declares them next to its products. Plain numbers, no torch.

A layer that exchanges tokens has a method `exchanges`. A module made of such layers joins their exchanges by `then`, in the order of its forward.
The planner sums the exchanges that a model declares (`plan/communication.py`) and knows no layer by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Operation(StrEnum):
    """The kind of a collective or message."""

    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_REDUCE = "all_reduce"
    SEND = "send"
    RECEIVE = "receive"


@dataclass(frozen=True)
class Exchange:
    """A collective for all tokens of a microbatch, or several collectives that take a part of the tokens each.

    Args:
        operation: Kind of the collective.
        numbers_per_token: Numbers in the gathered output, or in the input that is reduced, per token of the microbatch.
        is_wide: Whether the numbers are fp32 or wider; otherwise they have the dtype of the residual stream.
        tokens_per_rank: Tokens that one collective takes, divided by the ranks of the axis; None: one collective takes all tokens.
        axis: Axis whose ranks take part.
    """

    operation: Operation
    numbers_per_token: int
    is_wide: bool = False
    tokens_per_rank: int | None = None
    axis: str = "tp"


@dataclass(frozen=True)
class Exchanges:
    """The exchanges of a layer, or of a sequence of layers, for a microbatch.

    Args:
        forward: Exchanges in the forward.
        backward: Exchanges in the backward.
        repeated: Exchanges in a recomputation of the forward that ends with this layer. Autograd stops when it has all that backward
            needs, so an exchange after which nothing is kept is not repeated.
    """

    forward: tuple[Exchange, ...] = ()
    backward: tuple[Exchange, ...] = ()
    repeated: tuple[Exchange, ...] = ()

    def then(self, after: Exchanges) -> Exchanges:
        """The exchanges of this layer followed by another one, which keeps its input for backward."""
        return Exchanges(self.forward + after.forward, after.backward + self.backward, self.forward + after.repeated)


NO_EXCHANGES = Exchanges()


def gathered(numbers_per_token: int, *, is_wide: bool = False) -> Exchanges:
    """The exchanges of a layer that gathers all tokens from the own ones; its backward sums and scatters the gradient."""
    return _dual(Operation.ALL_GATHER, Operation.REDUCE_SCATTER, numbers_per_token, is_wide)


def scattered(numbers_per_token: int, *, is_wide: bool = False) -> Exchanges:
    """The exchanges of a layer that sums and scatters summands of all tokens; its backward gathers the gradient."""
    return _dual(Operation.REDUCE_SCATTER, Operation.ALL_GATHER, numbers_per_token, is_wide)


def _dual(forward: Operation, backward: Operation, numbers_per_token: int, is_wide: bool) -> Exchanges:
    there = (Exchange(forward, numbers_per_token, is_wide),)
    return Exchanges(there, (Exchange(backward, numbers_per_token, is_wide),), there)
