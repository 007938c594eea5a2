"""What layers exchange with other ranks, as each layer declares it beside its products. Plain numbers, no torch.

A layer that exchanges tokens has a method `exchanges`; a module made of such layers composes theirs with `then`, in the order of its forward.
The planner sums what a model declares (`plan/communication.py`), and knows no layer by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Operation(StrEnum):
    """What ranks do together."""

    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_REDUCE = "all_reduce"
    SEND = "send"
    RECEIVE = "receive"


@dataclass(frozen=True)
class Exchange:
    """One collective for all tokens of a microbatch, or several that share them.

    Args:
        operation: What it does.
        numbers_per_token: Of its gathered output or of its input to be reduced, for each token of the microbatch.
        is_wide: The numbers are fp32 or wider; otherwise they have the dtype of the residual stream.
        tokens_per_rank: A collective takes so many tokens for each rank of the axis; None: it takes all.
        axis: The ranks that take part.
    """

    operation: Operation
    numbers_per_token: int
    is_wide: bool = False
    tokens_per_rank: int | None = None
    axis: str = "tp"


@dataclass(frozen=True)
class Exchanges:
    """What a layer, or a sequence of layers, exchanges for a microbatch.

    Args:
        forward: In its forward.
        backward: In its backward.
        repeated: In a recomputation of its forward that ends with it. Autograd stops when it has all that backward needs, so an exchange after
            which nothing is kept is not repeated.
    """

    forward: tuple[Exchange, ...] = ()
    backward: tuple[Exchange, ...] = ()
    repeated: tuple[Exchange, ...] = ()

    def then(self, after: Exchanges) -> Exchanges:
        """Those of this and of what runs after it, which keeps its input for backward."""
        return Exchanges(self.forward + after.forward, after.backward + self.backward, self.forward + after.repeated)


NO_EXCHANGES = Exchanges()


def gathered(numbers_per_token: int, *, is_wide: bool = False) -> Exchanges:
    """Own tokens become all tokens; backward sums and scatters their gradient."""
    return _dual(Operation.ALL_GATHER, Operation.REDUCE_SCATTER, numbers_per_token, is_wide)


def scattered(numbers_per_token: int, *, is_wide: bool = False) -> Exchanges:
    """Summands of all tokens become own tokens; backward gathers their gradient."""
    return _dual(Operation.REDUCE_SCATTER, Operation.ALL_GATHER, numbers_per_token, is_wide)


def _dual(forward: Operation, backward: Operation, numbers_per_token: int, is_wide: bool) -> Exchanges:
    there = (Exchange(forward, numbers_per_token, is_wide),)
    return Exchanges(there, (Exchange(backward, numbers_per_token, is_wide),), there)
