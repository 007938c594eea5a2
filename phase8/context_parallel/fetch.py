"""Tokens of a shared sequence, fetched from the ranks that hold them; backward sends their gradients home.

Each rank holds T consecutive tokens, in the order of the ranks. All ranks know what each of them wants, so one all-to-all exchange moves these
tokens and nothing else, whatever number of slices they lie in.

Shapes: B batch, T tokens of a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from phase8.distributed.collectives import Axis, exchange_tokens

Wanted = Sequence[Sequence[range]]


def fetch_tokens(x: Tensor, wanted: Wanted, axis: Axis) -> list[Tensor]:
    """Tokens of the whole sequence, by their numbers in it.

    Args:
        x: Tokens of this rank's slice [B, T, ...].
        wanted: For each rank of the axis, the ranges of tokens that it wants; each rank wants the same number of ranges.
        axis: Ranks that share the sequence.

    Returns:
        The tokens of each of this rank's ranges [B, len(range), ...].
    """
    pieces = list(_FetchTokens.apply(x, wanted, axis).split(_lengths_of_pieces(wanted[axis.index], axis.size, x.shape[1])))
    num_ranges = len(wanted[axis.index])
    return [torch.cat(pieces[place::num_ranges]).transpose(0, 1) for place in range(num_ranges)]


class _FetchTokens(torch.autograd.Function):
    """The fetched tokens first, [N, B, ...]: for each owner, its part of each range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wanted: Wanted, axis: Axis) -> Tensor:
        ctx.axis, ctx.shape = axis, x.shape
        length, sent = x.shape[1], [_parts(ranges, axis.index, x.shape[1]) for ranges in wanted]
        ctx.sent = [part for parts in sent for part in parts]
        ctx.num_sent = [sum(map(len, parts)) for parts in sent]
        ctx.num_fetched = [sum(map(len, _parts(wanted[axis.index], owner, length))) for owner in range(axis.size)]
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


def _lengths_of_pieces(ranges: Sequence[range], num_ranks: int, length: int) -> list[int]:
    """Tokens of each piece that a rank receives: for each owner, its part of each range."""
    return [len(part) for owner in range(num_ranks) for part in _parts(ranges, owner, length)]


def _parts(ranges: Sequence[range], owner: int, length: int) -> list[range]:
    """The part of each range that a rank holds, as places in its slice."""
    first = owner * length
    return [_within(range(tokens.start - first, tokens.stop - first), length) for tokens in ranges]


def _within(places: range, length: int) -> range:
    start = min(max(places.start, 0), length)
    return range(start, max(min(places.stop, length), start))
