"""Places for tokens in the rows that experts compute, and the moves of tokens to these rows and back.

Each token has k choices, the experts that compute it. A choice that an expert takes gets a row of its own, its slot; a choice that is dropped gets
none. Rows of an expert are consecutive and in the order of tokens, whatever happens to the tokens of other experts, so what an expert takes of a
sequence depends on earlier tokens only. Neither direction adds into memory that another token adds to: results are the same in every run.

Shapes: N tokens, B sequences of T tokens, k choices of a token, E experts, S slots, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phase8.exchanges import groups_of_rows
from phase8.kernels.running_sum import running_sum


@dataclass(frozen=True)
class Slots:
    """The slots of all choices.

    Args:
        slot: Slot of each choice; S: the choice is dropped [N, k].
        choice: Number of the choice (token * k + place among its choices) in each slot; N k: the slot is empty [S].
        ends: For each expert, in the order of the rows, the end of its rows, int32 [E]; rows from the last end on belong to no expert. None: there
            are gaps.
        filled: Number of slots that each expert fills of those it has for each sequence, the first ones [E, B]; None: there are no gaps.
    """

    slot: Tensor
    choice: Tensor
    ends: Tensor | None = None
    filled: Tensor | None = None

    @property
    def is_kept(self) -> Tensor:
        """Whether an expert takes the choice [N, k]."""
        return self.slot < len(self.choice)


def places_in_sequence(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """For each choice, the number of earlier choices of the same expert in its sequence; and the number of choices of each expert.

    Args:
        chosen: Experts of each token, all different [B, T, k].
        num_experts: Number of experts E.

    Returns:
        The places [B, T, k], and the counts [B, E].
    """
    so_far = running_sum(_is_of_expert(chosen.flatten(1), num_experts))
    places = so_far.gather(2, chosen.flatten(1)[..., None])[..., 0] - 1
    return places.view(chosen.shape), so_far[:, -1]


def compact_slots(chosen: Tensor, is_kept: Tensor | None, num_experts: int) -> Slots:
    """Slots without gaps, as many as there are choices: those of the first expert, of the second one, and so on; empty ones come last.

    Args:
        chosen: Experts of each token [N, k].
        is_kept: Whether the expert takes the choice [N, k]; None: it takes all.
        num_experts: Number of experts E.
    """
    of_expert = _is_of_expert(chosen.flatten(), num_experts)
    if is_kept is not None:
        of_expert = of_expert & is_kept.view(-1, 1)
    so_far = running_sum(of_expert[None])[0]
    ends = so_far[-1].cumsum(0)
    begins = ends - so_far[-1]
    places = begins[chosen] + so_far.gather(1, chosen.view(-1, 1)).view(chosen.shape) - 1
    slot = places if is_kept is None else places.where(is_kept, chosen.numel())
    return Slots(slot, inverse(slot.flatten(), chosen.numel()), ends=ends.int())


def padded_slots(chosen: Tensor, places: Tensor, counts: Tensor, capacity: int, *, num_ranks: int = 1) -> Slots:
    """The same number of slots for each expert and sequence, whatever was chosen; a choice whose place is beyond them is dropped.

    Rows are in the order in which they travel: of the first group of sequences those of every rank's first group of experts, those of every rank's
    second one, and so on, then those of the second group of sequences.

    Args:
        chosen: Experts of each token [B, T, k].
        places: Place of each choice among those of its expert in its sequence [B, T, k].
        counts: Choices of each expert in each sequence [B, E].
        capacity: Slots of an expert for each sequence.
        num_ranks: Ranks that share the experts.
    """
    batch, num_experts = counts.shape
    num_slots = num_experts * batch * capacity
    sequence = torch.arange(batch, device=chosen.device).view(-1, 1, 1)
    own = num_experts // num_ranks
    expert_groups, sequence_groups = groups_of_rows(own, batch)
    experts, sequences = own // expert_groups, batch // sequence_groups  # of a group
    rank, number = chosen // own, chosen % own
    travelling = (number // experts * num_ranks + rank) * experts + number % experts
    block = (sequence // sequences * num_experts + travelling) * sequences + sequence % sequences
    slot = (block * capacity + places).where(places < capacity, num_slots).flatten(0, 1)
    return Slots(slot, inverse(slot.flatten(), num_slots), filled=counts.T.clamp(max=capacity).long())


def _is_of_expert(chosen: Tensor, num_experts: int) -> Tensor:
    """Whether each choice is that of each expert [..., E]."""
    return chosen[..., None] == torch.arange(num_experts, device=chosen.device)


def inverse(target: Tensor, size: int) -> Tensor:
    """For each of `size` places the source that goes there, and the number of sources for a place that gets none.

    Args:
        target: Place of each source, all different; `size`: it goes nowhere.
        size: Number of places.
    """
    sources = torch.arange(len(target), device=target.device)
    source = torch.full((size + 1,), len(target), device=target.device).scatter(0, target, sources)
    return source[:-1]  # the last place got all that goes nowhere


def to_slots(x: Tensor, slots: Slots) -> Tensor:
    """Copies each token to the slots of its choices: [N, D] -> [S, D]; empty slots are zero."""
    return _ToSlots.apply(x, slots.slot, slots.choice)


def from_slots(rows: Tensor, weights: Tensor, slots: Slots) -> Tensor:
    """For each token, the weighted sum of the rows of its choices [N, D]; what is dropped does not count.

    Args:
        rows: Rows of the slots [S, D].
        weights: Weight of each choice, fp32 or wider [N, k].
        slots: Slots of the choices.
    """
    # The cast is outside: torch.compile of torch 2.11 takes the gradient of a Function that ends with a cast to its own dtype for zero.
    return _FromSlots.apply(rows, weights, slots.slot, slots.choice).to(rows.dtype)


def moved(rows: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Moves rows to other places [S, D] -> [P, D]; a place without a source gets zeros.

    Args:
        rows: The rows; those without a target may hold anything.
        source: Row that goes to each place; S: none [P].
        target: Place to which each row goes, the inverse of `source`; P: none [S].
    """
    return _Moved.apply(rows, source, target)


class _ToSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor, choice: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.num_slots = len(choice)
        return _taken(x, choice, slot)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slot,) = ctx.saved_tensors
        return _read(grad, slot, ctx.num_slots).sum(1), None, None


class _FromSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, slot: Tensor, choice: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, slot, choice)
        return (_read(rows, slot, len(choice)) * weights[..., None]).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weights, slot, choice = ctx.saved_tensors
        of_weights = (_read(rows, slot, len(choice)) * grad[:, None].to(weights.dtype)).sum(-1)
        factors = torch.cat((weights.flatten(), weights.new_zeros(1)))[choice]
        return (_taken(grad, choice, slot) * factors[:, None]).to(rows.dtype), of_weights, None, None


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(target)
        ctx.num_places = len(source)
        return _read(rows, source, len(target))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (target,) = ctx.saved_tensors
        return _read(grad, target, ctx.num_places), None, None


def _taken(x: Tensor, choice: Tensor, slot: Tensor) -> Tensor:
    """The token of the choice in each slot, zero where there is none."""
    is_filled = choice < slot.numel()
    token = torch.where(is_filled, choice, 0) // slot.shape[1]
    return torch.where(is_filled[:, None], x[token], 0)


def _read(rows: Tensor, slot: Tensor, num_slots: int) -> Tensor:
    """The row of each choice [..., D], zero where it is dropped: rows that no expert has computed may hold anything."""
    is_kept = slot < num_slots
    return torch.where(is_kept[..., None], rows[torch.where(is_kept, slot, 0)], 0)
