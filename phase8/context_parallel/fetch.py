"""Tokens of a shared sequence, fetched from the ranks that hold them; backward sends their gradients home.

Each rank holds T consecutive tokens, in the order of the ranks. All ranks know what each of them wants, so one all-to-all exchange moves these
tokens and nothing else, whatever number of slices they lie in.

Shapes: B batch, T tokens of a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from phase8.distributed.collectives import Axis, begin_to_exchange
from phase8.shared_sequence import Wanted, parts_of


def begin_to_fetch(x: Tensor, wanted: Wanted, axis: Axis) -> Callable[[], list[Tensor]]:
    """Begins to fetch tokens of the whole sequence, by their numbers in it; other work may run until they are needed, also in backward.

    Args:
        x: Tokens of this rank's slice [B, T, ...].
        wanted: For each rank of the axis, the ranges of tokens that it wants; each rank wants the same number of ranges.
        axis: Ranks that share the sequence.

    Returns:
        A function, to be called once, that waits for the tokens of each of this rank's ranges [B, len(range), ...] and returns them.
    """
    own, num_ranges, length = wanted[axis.index], len(wanted[axis.index]), x.shape[1]
    sent = [parts_of(ranges, axis.index, length) for ranges in wanted]
    fetched = [parts_of(own, owner, length) for owner in range(axis.size)]
    leaving = _ChosenTokens.apply(x, [part for parts in sent for part in parts if part])
    arriving = begin_to_exchange(leaving, [sum(map(len, parts)) for parts in sent], [sum(map(len, parts)) for parts in fetched], axis)

    def end() -> list[Tensor]:
        pieces = arriving().split([len(part) for parts in fetched for part in parts])
        return [torch.cat(pieces[place::num_ranges]).transpose(0, 1) for place in range(num_ranges)]

    return end


class _ChosenTokens(torch.autograd.Function):
    """The tokens of some parts of the slice one after the other, tokens first [N, B, ...]; several parts may have the same token.

    No part may be empty: torch.compile would keep a view of no tokens for backward, because it is small, and with it the memory of all tokens.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Sequence[range]) -> Tensor:
        ctx.parts, ctx.shape = parts, x.shape
        tokens = x.transpose(0, 1)
        return torch.cat([tokens[part.start : part.stop] for part in parts]) if parts else tokens.new_empty(0, *tokens.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        batch, length, *rest = ctx.shape
        home = grad.new_zeros(length, batch, *rest)
        for part, gradient in zip(ctx.parts, grad.split([len(part) for part in ctx.parts]), strict=True):
            home[part.start : part.stop] += gradient
        return home.transpose(0, 1), None
