"""Tokens of a shared sequence, fetched from the ranks that hold them; backward sends their gradients home.

Each rank holds T consecutive tokens, in the order of the ranks. All ranks know what each of them wants, so one all-to-all exchange moves these
tokens and nothing else, whatever number of slices they lie in.

Shapes: B batch, T tokens of a slice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phase8.distributed.collectives import Axis, exchange_tokens
from phase8.shared_sequence import Wanted, parts_of


def fetch_tokens(x: Tensor, wanted: Wanted, axis: Axis) -> list[Tensor]:
    """Tokens of the whole sequence, by their numbers in it.

    Args:
        x: Tokens of this rank's slice [B, T, ...].
        wanted: For each rank of the axis, the ranges of tokens that it wants; each rank wants the same number of ranges.
        axis: Ranks that share the sequence.

    Returns:
        The tokens of each of this rank's ranges [B, len(range), ...].
    """
    own, num_ranges = wanted[axis.index], len(wanted[axis.index])
    lengths = [len(part) for owner in range(axis.size) for part in parts_of(own, owner, x.shape[1])]
    pieces = _FetchTokens.apply(x, wanted, axis).split(lengths)
    return [torch.cat(pieces[place::num_ranges]).transpose(0, 1) for place in range(num_ranges)]


class _FetchTokens(torch.autograd.Function):
    """The fetched tokens first, [N, B, ...]: for each owner, its part of each range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wanted: Wanted, axis: Axis) -> Tensor:
        ctx.axis, ctx.shape = axis, x.shape
        length, sent = x.shape[1], [parts_of(ranges, axis.index, x.shape[1]) for ranges in wanted]
        ctx.sent = [part for parts in sent for part in parts]
        ctx.num_sent = [sum(map(len, parts)) for parts in sent]
        ctx.num_fetched = [sum(map(len, parts_of(wanted[axis.index], owner, length))) for owner in range(axis.size)]
        tokens = x.transpose(0, 1)
        return exchange_tokens(torch.cat([tokens[part.start : part.stop] for part in ctx.sent]), ctx.num_sent, ctx.num_fetched, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        returned = exchange_tokens(grad, ctx.num_fetched, ctx.num_sent, ctx.axis)
        batch, length, *rest = ctx.shape
        home = returned.new_zeros(length, batch, *rest)
        for part, gradient in zip(ctx.sent, returned.split([len(part) for part in ctx.sent]), strict=True):
            home[part.start : part.stop] += gradient  # several ranks may have fetched the same token
        return home.transpose(0, 1), None, None
