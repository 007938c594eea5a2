"""The way of tokens to the ranks of their experts, and back.

The ranks of an axis share E experts, E / ranks consecutive ones each. A rank sends the rows of its tokens to the ranks of their experts, which
compute the rows of all ranks together and send them back; backward goes the same way.

| slots | rows that travel | what the host has to know |
|---|---|---|
| padded (`slots.padded_slots`) | as many for each expert, empty ones too; those of one group of rows beside products of another | nothing |
| compact (`slots.compact_slots`) | those that are filled | how many, so it waits for the router |

Only filled slots are computed in both cases: the ranks tell each other how many there are.

Shapes: R ranks, E experts, B sequences of a rank, C slots of an expert for each, S slots of a rank, D model width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from phase8.distributed.collectives import Axis, begin_to_exchange, exchange_tokens, start_exchange
from phase8.exchanges import groups_of_rows
from phase8.expert_parallel.slots import Slots, inverse, moved

# Maps rows [S, D] and the ends of each expert's rows to the rows that the experts make of them.
ComputeRows = Callable[[Tensor, Tensor], Tensor]
# Divides the experts of this rank into as many groups, equally large, and returns the function that computes each of them.
DivideExperts = Callable[[int], list[ComputeRows]]
# Work beside the exchange, and what it returns.
Beside = Callable[[], Tensor | None]


def computed_where_experts_are(
    rows: Tensor, slots: Slots, experts: DivideExperts, axis: Axis, *, beside: Beside
) -> tuple[Tensor, Tensor | None]:
    """The rows that the experts make of a rank's rows [S, D]; and what `beside` returns.

    With compact slots of several ranks it is not worth compiling: sizes that the host reads would be compiled anew again and again.

    Args:
        rows: Rows of the slots.
        slots: The slots.
        experts: This rank's experts.
        axis: Ranks that share the experts.
        beside: Work that is enqueued while rows travel.
    """
    if axis.size == 1:
        (compute,), result = experts(1), beside()
        return compute(rows, slots.ends), result
    if slots.filled is None:
        return _compact(rows, slots.ends, experts, axis, beside)
    return _padded(rows, slots.filled, experts, axis, beside)


def _padded(rows: Tensor, filled: Tensor, experts: DivideExperts, axis: Axis, beside: Beside) -> tuple[Tensor, Tensor | None]:
    num_own = len(filled) // axis.size
    expert_groups, sequence_groups = groups_of_rows(num_own, filled.shape[1])
    num_groups = expert_groups * sequence_groups
    shares = [len(rows) // num_groups // axis.size] * axis.size
    told = start_exchange(filled, [num_own] * axis.size, [num_own] * axis.size, axis)
    arriving = [begin_to_exchange(of_group, shares, shares, axis) for of_group in rows.chunk(num_groups)]
    result = beside()
    filled_by_rank = told().view(axis.size, num_own, -1)
    filled_groups = [each for of_sequences in filled_by_rank.chunk(sequence_groups, dim=2) for each in of_sequences.chunk(expert_groups, dim=1)]
    returning = []
    for compute, arrived, of_group in zip(experts(expert_groups) * sequence_groups, arriving, filled_groups, strict=True):
        computed = _computed_where_filled(arrived(), of_group, compute)
        returning.append(begin_to_exchange(computed, shares, shares, axis))
    return torch.cat([returned() for returned in returning]), result


def _computed_where_filled(rows: Tensor, filled: Tensor, compute: ComputeRows) -> Tensor:
    """What a group of e experts makes of the rows in filled slots; empty ones get zeros.

    Args:
        rows: Rows in the order of the ranks that sent them, then of the experts, then of the sequences [R e B C, D].
        filled: Filled slots of each of these, the first ones [R, e, B].
        compute: The experts.
    """
    place, ends = _places_by_expert(filled, len(rows))
    slot = inverse(place, len(rows))
    return _computed_in_order(rows, slot, place, ends, compute)


def _computed_in_order(rows: Tensor, slot: Tensor, place: Tensor, ends: Tensor, compute: ComputeRows) -> Tensor:
    """What experts make of rows [S, D], in the order of the rows.

    Args:
        rows: The rows.
        slot: Row in each place of the order in which the rows of an expert come together [S].
        place: Place of each row in that order [S].
        ends: End of each expert's rows in that order.
        compute: The experts.
    """
    return moved(compute(moved(rows, slot, place), ends), place, slot)


def _places_by_expert(filled: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Places without gaps, those of one expert after the other: the place of each filled slot, S for an empty one [S]; and the ends [e]."""
    by_expert = filled.transpose(0, 1)
    ends = by_expert.flatten().cumsum(0).view(by_expert.shape)
    begins = (ends - by_expert).transpose(0, 1)
    number = torch.arange(num_slots // filled.numel(), device=filled.device)
    place = torch.where(number < filled[..., None], begins[..., None] + number, num_slots)
    return place.flatten(), ends[:, -1, -1].int()


def _compact(rows: Tensor, ends: Tensor, experts: DivideExperts, axis: Axis, beside: Beside) -> tuple[Tensor, Tensor | None]:
    (compute,) = experts(1)
    counts = ends.diff(prepend=ends.new_zeros(1)).long()
    shares = [len(ends) // axis.size] * axis.size
    counts_of_ranks = exchange_tokens(counts, shares, shares, axis).view(axis.size, -1)
    sent, received = torch.stack((counts.view(axis.size, -1).sum(1), counts_of_ranks.sum(1))).tolist()
    arriving = begin_to_exchange(rows[: sum(sent)], sent, received, axis)
    result = beside()
    by_rank = arriving()
    order = _order_by_expert(counts_of_ranks, sum(received))
    back = _computed_in_order(by_rank, order, inverse(order, len(order)), counts_of_ranks.sum(0).cumsum(0).int(), compute)
    returned = begin_to_exchange(back, received, sent, axis)()
    return torch.cat((returned, returned.new_zeros(len(rows) - sum(sent), rows.shape[-1]))), result


def _order_by_expert(counts: Tensor, num_rows: int) -> Tensor:
    """The order in which the rows of each expert come together, of rows in the order of ranks.

    Args:
        counts: Rows from each rank for each expert of this rank [R, E / R].
        num_rows: Their sum.
    """
    experts = torch.arange(counts.shape[1], device=counts.device).repeat(len(counts)).repeat_interleave(counts.flatten(), output_size=num_rows)
    return experts.argsort(stable=True)
