"""Running sums along the sequence as one operator, since torch.compile may not write them itself.

Inductor of torch 2.11 computes long scans of several rows by a kernel whose code it cannot generate (`get_block_shape`, TypeError).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def running_sum(x: Tensor, *, from_end: bool = False) -> Tensor:
    """The sum of the tokens so far, or of those that are left, each counting itself; integers are summed as int32.

    Args:
        x: Numbers of each token [B, T, ...].
        from_end: Whether to sum from the last token backwards. Sums are exact where they begin.
    """
    return _forward(x if x.is_floating_point() else x.int(), from_end)


@torch.library.custom_op("phase8::running_sum", mutates_args=())
def _forward(x: Tensor, from_end: bool) -> Tensor:
    # Tokens last and one after the other: along any other dim a GPU has a single thread add up all tokens of a column.
    columns = x.movedim(1, -1).contiguous()
    sums = columns.flip(-1).cumsum(-1, dtype=x.dtype).flip(-1) if from_end else columns.cumsum(-1, dtype=x.dtype)
    return sums.movedim(-1, 1).contiguous()


@_forward.register_fake
def _(x: Tensor, from_end: bool) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
    ctx.from_end = inputs[1]


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _forward(grad, not ctx.from_end), None


_forward.register_autograd(_autograd, setup_context=_setup_context)
