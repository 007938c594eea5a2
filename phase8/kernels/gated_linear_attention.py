"""Gated linear attention as one operator: it saves only its inputs, and backward walks along the sequence again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phase8.kernels.backends import needs_no_operator, uses_triton
from phase8.kernels.reference import gated_linear_attention as reference

MAX_HEAD_BYTES = 512  # 256 values of 16 bits: chunks of queries and keys, and the state, must fit into the shared memory of a multiprocessor


def _runs_on_triton(q: Tensor, v: Tensor) -> bool:
    widest = max(q.shape[-1], v.shape[-1]) * v.element_size()
    return uses_triton(v) and v.dtype != torch.float64 and v.numel() > 0 and widest <= MAX_HEAD_BYTES


@torch.library.custom_op("phase8::gated_linear_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, starts: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    if _runs_on_triton(q, v):
        from phase8.kernels.gpu.gated_linear_attention import gated_linear_attention as attend

        return attend(q, k, v, log_decay, starts, initial_state)
    y, state = reference.gated_linear_attention(q, k, v, log_decay, starts, initial_state)
    return y.contiguous(), state.contiguous()


@torch.library.custom_op("phase8::gated_linear_attention_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    starts: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if _runs_on_triton(q, v):
        from phase8.kernels.gpu.gated_linear_attention_backward import gated_linear_attention_backward as attend_backward

        return attend_backward(dy, dstate, q, k, v, log_decay, starts, initial_state)
    gradients = reference.gated_linear_attention_backward(dy, dstate, q, k, v, log_decay, starts, initial_state)
    dq, dk, dv, dlog_decay, dinitial = (gradient.contiguous() for gradient in gradients)
    return dq, dk, dv, dlog_decay, dinitial


@torch.library.custom_op("phase8::added_state", mutates_args=())
def _added_state(key: Tensor, value: Tensor, log_decay: Tensor, starts: Tensor | None, backwards: bool) -> Tensor:
    if _runs_on_triton(key, value):
        from phase8.kernels.gpu.gated_linear_attention import added_state as add

        return add(key, value, log_decay, starts, backwards=backwards)
    return reference.added_state(key, value, log_decay, starts, backwards=backwards).contiguous()


@_added_state.register_fake
def _(key: Tensor, value: Tensor, log_decay: Tensor, starts: Tensor | None, backwards: bool) -> Tensor:
    return _fake_state(key, value)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, starts: Tensor | None, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), _fake_state(q, v)


@_backward.register_fake
def _(
    dy: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    starts: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dlog_decay = (x.new_empty(x.shape) for x in (q, k, v, log_decay))
    return dq, dk, dv, dlog_decay, _fake_state(q, v)


def _fake_state(q: Tensor, v: Tensor) -> Tensor:
    batch, _, num_heads, key_size = q.shape
    return q.new_empty((batch, num_heads, key_size, v.shape[-1]), dtype=torch.promote_types(q.dtype, torch.float32))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, starts, initial_state = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(v)
    *gradients, dinitial = _backward(dy, dstate, q, k, v, log_decay, starts, initial_state)
    return *gradients, None, None if initial_state is None else dinitial.to(initial_state.dtype)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, starts: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Linear attention with one decay per head and token; arguments and shapes as in the reference of the same name.

    Returns:
        y [B, T, H, V] in the dtype of v, and the state after the last token [B, H, K, V].
    """
    run = reference.gated_linear_attention if needs_no_operator(q) else _forward
    return run(q, k, v, log_decay, starts, initial_state)


def gated_linear_attention_backward(
    dy: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    starts: Tensor | None,
    initial_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients, for a function whose backward knows more than autograd does; arguments and results as in the reference of the same name."""
    return _backward(dy, dstate, q, k, v, log_decay, starts, initial_state)


def added_state(key: Tensor, value: Tensor, log_decay: Tensor, starts: Tensor | None = None, *, backwards: bool = False) -> Tensor:
    """What a piece of a sequence adds to the state, fp32 [B, H, K, V], without any result; not differentiable.

    Args:
        key: Keys [B, T, H, K]; backwards, queries.
        value: Values [B, T, H, V]; backwards, gradients of the results.
        log_decay: log alpha [B, T, H].
        starts: As in `gated_linear_attention`.
        backwards: Whether to walk from the last token to the first: what the piece adds to the gradient of the state before it.
    """
    run = reference.added_state if needs_no_operator(key) else _added_state
    return run(key, value, log_decay, starts, backwards=backwards)
