"""The gated delta rule as one operator: it saves only its inputs, and backward solves and walks along the sequence again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phase8.kernels.backends import needs_no_operator, uses_triton
from phase8.kernels.reference import gated_delta_rule as reference

MAX_HEAD_BYTES = 256  # 128 values of 16 bits: the gradients of queries and keys of a chunk must fit into the registers of a program


def _runs_on_triton(q: Tensor, v: Tensor) -> bool:
    widest = max(q.shape[-1], v.shape[-1]) * v.element_size()
    return uses_triton(v) and v.dtype != torch.float64 and v.numel() > 0 and widest <= MAX_HEAD_BYTES


@torch.library.custom_op("phase8::gated_delta_rule", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, starts: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    if _runs_on_triton(q, v):
        from phase8.kernels.gpu.gated_delta_rule import gated_delta_rule as attend

        return attend(q, k, v, log_decay, beta, starts, initial_state)
    y, state = reference.gated_delta_rule(q, k, v, log_decay, beta, starts, initial_state)
    return y.contiguous(), state.contiguous()


@torch.library.custom_op("phase8::gated_delta_rule_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    starts: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if _runs_on_triton(q, v):
        from phase8.kernels.gpu.gated_delta_rule_backward import gated_delta_rule_backward as attend_backward

        return attend_backward(dy, dstate, q, k, v, log_decay, beta, starts, initial_state)
    gradients = reference.gated_delta_rule_backward(dy, dstate, q, k, v, log_decay, beta, starts, initial_state)
    dq, dk, dv, dlog_decay, dbeta, dinitial = (gradient.contiguous() for gradient in gradients)
    return dq, dk, dv, dlog_decay, dbeta, dinitial


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, starts: Tensor | None, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), _fake_state(q, v)


@_backward.register_fake
def _(
    dy: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    starts: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dlog_decay, dbeta = (x.new_empty(x.shape) for x in (q, k, v, log_decay, beta))
    return dq, dk, dv, dlog_decay, dbeta, _fake_state(q, v)


def _fake_state(q: Tensor, v: Tensor) -> Tensor:
    batch, _, num_heads, key_size = q.shape
    return q.new_empty((batch, num_heads, key_size, v.shape[-1]), dtype=torch.promote_types(q.dtype, torch.float32))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, beta, starts, initial_state = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(v)
    *gradients, dinitial = _backward(dy, dstate, q, k, v, log_decay, beta, starts, initial_state)
    return *gradients, None, None if initial_state is None else dinitial.to(initial_state.dtype)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, starts: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence with one decay and one replaced share per head and token; arguments and shapes as in the reference of the same name.

    Returns:
        y [B, T, H, V] in the dtype of v, and the state after the last token [B, H, K, V].
    """
    run = reference.gated_delta_rule if needs_no_operator(q) else _forward
    return run(q, k, v, log_decay, beta, starts, initial_state)
