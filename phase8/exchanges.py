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
    ALL_TO_ALL = "all_to_all"
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
class SliceExchange:
    """A collective of ranks that share sequences, the same whatever their length.

    Args:
        operation: Kind of the collective.
        numbers: Numbers per fetched token, or of a rank's part of what is gathered, for each sequence of the microbatch.
        is_wide: As of `Exchange`.
        before: Tokens that each rank fetches from before its slice; None: tokens are not fetched.
        first: First tokens of the sequence that each rank fetches.
        is_return: Whether the gradients of fetched tokens are sent home.
        is_divided: Whether tensor-parallel ranks divide the numbers; otherwise each has all of them.
    """

    operation: Operation
    numbers: int
    is_wide: bool = False
    before: int | None = None
    first: int = 0
    is_return: bool = False
    is_divided: bool = True
    axis: str = "cp"


@dataclass(frozen=True)
class RingExchange:
    """What ranks that share sequences see of all tokens: one gather, or as many messages to the next rank as there are ranks.

    Args:
        operation: Kind of the collective.
        numbers_per_token: Numbers of a token, which tensor-parallel ranks divide.
        is_wide: As of `Exchange`.
    """

    operation: Operation
    numbers_per_token: int
    is_wide: bool = False
    axis: str = "cp"


@dataclass(frozen=True)
class ExpertExchange:
    """An all-to-all of ranks that share experts: the rows of the experts that tokens choose, out or back.

    Args:
        numbers_per_row: Numbers of a row.
        num_experts: Experts of the layer.
        tells_counts: Whether the exchange begins with the counts of rows.
    """

    numbers_per_row: int
    num_experts: int
    tells_counts: bool = False
    operation: Operation = Operation.ALL_TO_ALL
    axis: str = "ep"


AnyExchange = Exchange | SliceExchange | RingExchange | ExpertExchange


@dataclass(frozen=True)
class Exchanges:
    """The exchanges of a layer, or of a sequence of layers, for a microbatch.

    Args:
        forward: Exchanges in the forward.
        backward: Exchanges in the backward.
        repeated: Exchanges in a recomputation of the forward that ends with this layer. Autograd stops when it has all that backward
            needs, so an exchange after which nothing is kept is not repeated.
    """

    forward: tuple[AnyExchange, ...] = ()
    backward: tuple[AnyExchange, ...] = ()
    repeated: tuple[AnyExchange, ...] = ()

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


# More groups hide more of the exchanges, but their products are smaller.
_MOST_GROUPS = 4


def groups_of_rows(num_own: int, num_sequences: int) -> tuple[int, int]:
    """The groups of rows, equally large, one after the other of which a rank exchanges and computes, so that rows travel beside products.

    Experts are divided first, because a group of sequences adds to the gradients of the same weights.

    Args:
        num_own: Number of experts of a rank.
        num_sequences: Number of sequences of a microbatch.

    Returns:
        The number of groups of experts, and the number of groups of sequences into which the rows of each of them are divided.
    """
    of_experts = _largest_divisor(num_own, _MOST_GROUPS)
    return of_experts, _largest_divisor(num_sequences, _MOST_GROUPS // of_experts)


def _largest_divisor(number: int, most: int) -> int:
    return next(count for count in range(min(number, most), 0, -1) if number % count == 0)


def _dual(forward: Operation, backward: Operation, numbers_per_token: int, is_wide: bool) -> Exchanges:
    there = (Exchange(forward, numbers_per_token, is_wide),)
    return Exchanges(there, (Exchange(backward, numbers_per_token, is_wide),), there)


def fetched(numbers_per_token: int, *, before: int, first: int = 0) -> Exchanges:
    """The exchanges of a layer that fetches tokens from before its slice of a sequence; its backward sends their gradients home."""
    there = (SliceExchange(Operation.ALL_TO_ALL, numbers_per_token, before=before, first=first),)
    return Exchanges(there, (SliceExchange(Operation.ALL_TO_ALL, numbers_per_token, before=before, first=first, is_return=True),), there)


def told(numbers: int, numbers_back: int | None = None) -> Exchanges:
    """The exchanges of a layer whose slices of a sequence tell each other wide numbers, and in backward other ones or the gradients of these.

    Args:
        numbers: Numbers that each slice tells.
        numbers_back: Numbers that each slice tells in backward; None: the gradients, which are summed.
    """
    there = (SliceExchange(Operation.ALL_GATHER, numbers, is_wide=True),)
    operation = Operation.REDUCE_SCATTER if numbers_back is None else Operation.ALL_GATHER
    return Exchanges(there, (SliceExchange(operation, numbers if numbers_back is None else numbers_back, is_wide=True),), there)


def round_a_ring(numbers_per_token: int) -> Exchanges:
    """The exchanges of a layer whose slices see numbers of all slices; in backward they do so again, and gradients go round from rank to rank."""
    there = (RingExchange(Operation.ALL_GATHER, numbers_per_token),)
    return Exchanges(there, (*there, RingExchange(Operation.ALL_TO_ALL, numbers_per_token, is_wide=True)), there)


def counted(numbers: int) -> Exchanges:
    """The exchanges of a layer whose slices of a sequence tell each other counts, which have no gradient."""
    there = (SliceExchange(Operation.ALL_GATHER, numbers, is_wide=True, is_divided=False),)
    return Exchanges(there, (), there)


def computed_by_experts(numbers_per_row: int, *, num_experts: int) -> Exchanges:
    """The exchanges of a layer that sends rows to the ranks of their experts and gets them back; backward does the same with gradients."""
    out = ExpertExchange(numbers_per_row, num_experts, tells_counts=True)
    back = ExpertExchange(numbers_per_row, num_experts)
    return Exchanges((out, back), (back, back), (out, back))
