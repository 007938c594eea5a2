"""Window attention as one operator. It is opaque to the compiler, and saves q, k, v, y and one number per query."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phase8.kernels.backends import keeps_for_backward, uses_triton
from phase8.kernels.limits import MAX_HEAD_SIZE
from phase8.kernels.reference import window_attention as reference
from phase8.kernels.window_state import VisibleKeys, WindowState, visible_keys


def _runs_on_gpu(q: Tensor) -> bool:
    return uses_triton(q) and q.dtype != torch.float64 and q.shape[-1] <= MAX_HEAD_SIZE


@torch.library.custom_op("phase8::window_attention", mutates_args=())
def _forward(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    global_keys: Tensor | None,
    global_values: Tensor | None,
    documents: Tensor | None,
    global_documents: Tensor | None,
    beta: Tensor | None,
    window: int,
    global_tokens: int,
    num_seen: int,
) -> tuple[Tensor, Tensor]:
    seen = _seen(keys, values, global_keys, global_values, documents, global_documents, global_tokens, num_seen)
    if _runs_on_gpu(q):
        from phase8.kernels.gpu.window_attention import attend

        return attend(q, seen, beta, window)
    y, log_sum = reference.attend(q, seen, beta, window)
    return y.contiguous(), log_sum.contiguous()


@torch.library.custom_op("phase8::window_attention_backward", mutates_args=())
def _backward(
    dy: Tensor,
    y: Tensor,
    log_sum: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    global_keys: Tensor | None,
    global_values: Tensor | None,
    documents: Tensor | None,
    global_documents: Tensor | None,
    beta: Tensor | None,
    window: int,
    global_tokens: int,
    num_seen: int,
) -> list[Tensor]:
    seen = _seen(keys, values, global_keys, global_values, documents, global_documents, global_tokens, num_seen)
    if _runs_on_gpu(q):
        from phase8.kernels.gpu.window_attention_backward import attend_backward
    else:
        attend_backward = reference.attend_backward
    dq, dkeys, dvalues, dglobal_keys, dglobal_values, dbeta = attend_backward(dy, y, log_sum, q, seen, beta, window)
    dq, dkeys, dvalues = (gradient.contiguous() for gradient in (dq, dkeys, dvalues))
    gradients = [dq, dkeys, dvalues]
    if global_keys is None:
        # The globals are the first keys, so the gradients of both roles are summed here.
        dkeys[:, :global_tokens] += dglobal_keys
        dvalues[:, :global_tokens] += dglobal_values
    else:
        gradients += [dglobal_keys.contiguous(), dglobal_values.contiguous()]
    return gradients if beta is None else [*gradients, dbeta]


def _seen(
    keys: Tensor,
    values: Tensor,
    global_keys: Tensor | None,
    global_values: Tensor | None,
    documents: Tensor | None,
    global_documents: Tensor | None,
    global_tokens: int,
    num_seen: int,
) -> VisibleKeys:
    """Arguments for an operator, which takes no two tensors that share memory: globals that are the first keys are passed as None."""
    if global_keys is None:
        global_keys, global_values = keys[:, :global_tokens], values[:, :global_tokens]
        global_documents = None if documents is None else documents[:, :global_tokens]
    return VisibleKeys(keys, values, global_keys, global_values, documents, global_documents, num_seen)


@_forward.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return values.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


@_backward.register_fake
def _(
    dy: Tensor,
    y: Tensor,
    log_sum: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    global_keys: Tensor | None,
    global_values: Tensor | None,
    documents: Tensor | None,
    global_documents: Tensor | None,
    beta: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, keys, values, global_keys, global_values, beta) if x is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.global_tokens, ctx.num_seen = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *saved, global_keys, global_values, documents, global_documents, beta = ctx.saved_tensors
    tensors = (*saved, global_keys, global_values, documents, global_documents, beta)
    gradients = iter(_backward(dy, *tensors, ctx.window, ctx.global_tokens, ctx.num_seen))
    dq, dkeys, dvalues = (next(gradients) for _ in range(3))
    dglobals = (None, None) if global_keys is None else (next(gradients), next(gradients))
    return dq, dkeys, dvalues, *dglobals, None, None, next(gradients, None), None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    global_tokens: int,
    beta: Tensor | None = None,
    starts: Tensor | None = None,
    state: WindowState | None = None,
) -> tuple[Tensor, WindowState | None]:
    """Attention of every token to its window and to the global tokens; arguments and results as in the reference of the same name."""
    if keeps_for_backward(q):
        return reference.window_attention(q, k, v, window=window, global_tokens=global_tokens, beta=beta, starts=starts, state=state)
    return _by_operator(q, k, v, window=window, global_tokens=global_tokens, beta=beta, starts=starts, state=state)


def _by_operator(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, global_tokens: int, beta: Tensor | None, starts: Tensor | None, state: WindowState | None
) -> tuple[Tensor, WindowState | None]:
    seen = visible_keys(k, v, global_tokens=global_tokens, starts=starts, state=state)
    carried = (None, None, None) if state is None else (seen.global_keys, seen.global_values, seen.global_documents)
    y, _ = _forward(
        q, seen.keys, seen.values, *carried[:2], seen.documents, carried[2], beta, window, min(global_tokens, k.shape[1]), seen.num_seen
    )
    return y, None if state is None else seen.carried(window, q.shape[1])
