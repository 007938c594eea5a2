"""The way of tokens to the ranks of their experts, and back.

The ranks of an axis share E experts, E / ranks consecutive ones each. A rank sends the rows of its tokens to the ranks of their experts, which
compute the rows of all ranks together and send them back; backward goes the same way.

| slots | rows that travel | what the host has to know |
|---|---|---|
| padded (`slots.padded_slots`) | as many for each expert, empty ones too; those of one group of experts beside products of another | nothing |
| compact (`slots.compact_slots`) | those that are filled | how many, so it waits for the router |

Shapes: R ranks, E experts, S slots of a rank, D model width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from phase8.distributed.collectives import Axis, begin_to_exchange, exchange_tokens
from phase8.exchanges import groups_of_experts

# Maps rows [S, D] and the ends of each expert's rows to the rows that the experts make of them.
ComputeRows = Callable[[Tensor, Tensor], Tensor]
# Divides the experts of this rank into as many groups, equally large, and returns the function that computes each of them.
DivideExperts = Callable[[int], list[ComputeRows]]
# Work beside the exchange, and what it returns.
Beside = Callable[[], Tensor | None]


def computed_where_experts_are(
    rows: Tensor, ends: Tensor, experts: DivideExperts, axis: Axis, *, is_padded: bool, beside: Beside
) -> tuple[Tensor, Tensor | None]:
    """The rows that the experts make of a rank's rows [S, D]; and what `beside` returns.

    With compact slots of several ranks it is not worth compiling: sizes that the host reads would be compiled anew again and again.

    Args:
        rows: Rows of the slots.
        ends: For each of the E experts, the end of its rows.
        experts: This rank's experts.
        axis: Ranks that share the experts.
        is_padded: Whether each expert has the same number of slots.
        beside: Work that is enqueued while rows travel.
    """
    if axis.size == 1:
        (compute,), result = experts(1), beside()
        return compute(rows, ends), result
    return (_padded if is_padded else _compact)(rows, ends, experts, axis, beside)


def _padded(rows: Tensor, ends: Tensor, experts: DivideExperts, axis: Axis, beside: Beside) -> tuple[Tensor, Tensor | None]:
    num_own = len(ends) // axis.size
    num_groups = groups_of_experts(num_own)
    shares = [len(rows) // num_groups // axis.size] * axis.size
    arriving = [begin_to_exchange(of_group, shares, shares, axis) for of_group in rows.chunk(num_groups)]
    result = beside()
    returning = []
    for compute, arrived in zip(experts(num_groups), arriving, strict=True):
        computed = _by_expert(arrived(), num_own // num_groups, compute, axis)
        returning.append(begin_to_exchange(computed, shares, shares, axis))
    return torch.cat([returned() for returned in returning]), result


def _by_expert(rows: Tensor, num_experts: int, compute: ComputeRows, axis: Axis) -> Tensor:
    """What a group of experts makes of rows [S, D], which are in the order of the ranks that sent them, and then of the experts."""
    by_rank = rows.view(axis.size, num_experts, -1, rows.shape[-1])
    ends = torch.arange(1, num_experts + 1, device=rows.device, dtype=torch.int32) * (len(rows) // num_experts)
    by_expert = by_rank.transpose(0, 1)  # of one expert without a copy
    return compute(by_expert.flatten(0, 2), ends).view(by_expert.shape).transpose(0, 1).flatten(0, 2)


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
    computed = compute(by_rank[order], counts_of_ranks.sum(0).cumsum(0).int())
    back = computed[order.argsort()]  # each row once, so no direction of these reads adds up
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
