"""Gated linear attention of a slice, which goes on from the slices before it: what slices add is told forwards, and gradients of it backwards.

Every slice tells what it adds to the state by itself, and which share of an entering state it keeps; so every rank knows the state that enters its
slice before it reads any. Backward, in the same way, it knows the gradient of the state that leaves the slice: with both, each direction computes
its slice once, as one process does.

Shapes: B batch, T tokens of a slice, H heads, K key size, V value size, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from phase8.distributed.collectives import Axis, pending_gather, placeholder, start_gather, wait_for
from phase8.exchanges import Exchanges, told
from phase8.kernels.gated_linear_attention import added_state, gated_linear_attention, gated_linear_attention_backward
from phase8.kernels.state_map import DecayMap, decay_map, state_after


def linear_attention_exchanges(num_heads: int, head_size: int) -> Exchanges:
    """What a slice tells: the state that it adds and what it keeps, and in backward the gradient that it adds."""
    return told(num_heads * head_size * (head_size + 1), num_heads * head_size * head_size)


def begin_linear_attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, starts: Tensor | None, axis: Axis) -> Callable[[], Tensor]:
    """Begins to tell what this slice adds; arguments as of `gated_linear_attention`, and the ranks that share the sequence.

    Returns:
        A function, to be called once, that waits for the other slices and returns y [B, T, H, V]. Work in between is done during the exchange, and
        so is its backward during the exchange of backward.
    """
    detached = [x.detach() for x in (q, k, v, log_decay)]
    own = decay_map(*detached[1:], starts)
    maps = start_gather(torch.cat((own.matrix, own.added), dim=-1)[None], axis)
    ways_back = _ReceiveGradients.apply(q, k, v, log_decay, starts, own.added, axis)

    def end() -> Tensor:
        return _Attend.apply(*ways_back, *detached, starts, maps(), axis)

    return end


class _Attend(torch.autograd.Function):
    """y from detached inputs. Backward begins the exchange, and passes on what `_ReceiveGradients` needs as the gradients of its placeholders."""

    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, dadded: Tensor, before: Tensor, kept: Tensor,
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, starts: Tensor | None, maps: Tensor, axis: Axis,
    ) -> Tensor:  # fmt: skip
        keeps, added = maps[..., :1], maps[..., 1:]
        entering = state_after(DecayMap, keeps[: axis.index], added[: axis.index])
        y, _ = gated_linear_attention(q, k, v, log_decay, starts, entering)
        ctx.axis = axis
        ctx.save_for_backward(q, log_decay, starts, entering, keeps)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, log_decay, starts, entering, keeps = ctx.saved_tensors
        own = added_state(q, grad, log_decay, starts, backwards=True)
        return grad, pending_gather(own[None], ctx.axis), entering, keeps, *[None] * 7


class _ReceiveGradients(torch.autograd.Function):
    """Placeholders: of the gradient of y, of what all slices add to gradients of states, of the state before this slice, and of what slices keep.

    The second one's gradient is still under way when it arrives here.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, starts: Tensor | None, own: Tensor, axis: Axis) -> tuple[Tensor, ...]:
        ctx.axis = axis
        ctx.save_for_backward(q, k, v, log_decay, starts)
        states = (axis.size, *own.shape)
        return tuple(placeholder(shape, like) for like, shape in ((v, v.shape), (own, states), (own, own.shape), (own, (*states[:-1], 1))))

    @staticmethod
    def backward(ctx: Any, grad: Tensor, pending: Tensor, entering: Tensor, keeps: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, starts = ctx.saved_tensors
        later = slice(ctx.axis.index + 1, None)
        # The last slice comes first: gradients of states go from the end of the sequence to its beginning.
        dstate = state_after(DecayMap, keeps[later].flip(0), wait_for(pending)[later].flip(0))
        *gradients, _ = gated_linear_attention_backward(grad, dstate, q, k, v, log_decay, starts, entering)
        return *gradients, None, None, None
