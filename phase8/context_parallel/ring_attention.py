"""Causal attention to a sequence that ranks share, by torch's own ring attention.

Each rank keeps its queries and sees the keys of one slice after the other, so no rank has a mask, or scores, of all keys.

Slices are consecutive tokens in the order of the ranks, so later ranks see more keys and earlier ones wait for them. torch can balance that by
giving each rank an early and a late part, but neither the convolution nor the data of this project divide a sequence so.

It stands on private functions of `torch.distributed.tensor.experimental`, which are the same from torch 2.11 to 2.13: its public form exchanges
`scaled_dot_product_attention` everywhere, and knows none for CPUs.

Keys may have fewer heads than queries: these go round the ring as they are, and where torch's operator needs as many, they are repeated for each use.

Shapes: B batch, H heads of queries, J heads of keys and values, T tokens of a slice, K head size.

Source: H. Liu et al., "Ring attention with blockwise transformers for near-infinite context" (2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.distributed.collectives import Axis

_SEQUENCE_DIM = 2
_PADDED_QUERIES = 32  # of torch's memory-efficient attention
_ATEN = torch.ops.aten


class _Attention(NamedTuple):
    """Attention to the keys of one slice.

    Args:
        forward: Operator that returns the output, the logarithm of the sum of exponentials, and what backward needs besides.
        backward: Its backward.
        gradient: Name of the gradient among the arguments of backward.
        arguments: Arguments of forward besides queries, keys and values.
        more: Maps what forward returns besides to arguments of backward.
    """

    forward: Callable[..., tuple[Any, ...]]
    backward: Callable[..., tuple[Any, ...]]
    gradient: str
    arguments: dict[str, Any]
    more: Callable[[tuple[Any, ...]], dict[str, Any]]


_CPU = _Attention(
    _ATEN._scaled_dot_product_flash_attention_for_cpu,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward,
    "grad_out",
    {},
    lambda rest: {},
)
_FLASH = _Attention(
    _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_flash_attention_backward,
    "grad_out",
    {},
    lambda rest: dict(zip(("cum_seq_q", "cum_seq_k", "max_q", "max_k", "philox_seed", "philox_offset"), rest, strict=False)),
)
_EFFICIENT = _Attention(
    _ATEN._scaled_dot_product_efficient_attention,
    _ATEN._scaled_dot_product_efficient_attention_backward,
    "grad_out_",
    {"attn_bias": None, "compute_log_sumexp": True},
    lambda rest: {"attn_bias": None, "philox_seed": rest[0], "philox_offset": rest[1], "grad_input_mask": [True, True, True, False]},
)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> Tensor:
    """The output of the slice's queries, which see the keys of their own slice up to their own, and all keys of earlier slices.

    Args:
        q: Queries of this rank's slice [B, H, T, K].
        k: Keys [B, J, T, K]; J divides H.
        v: Values [B, J, T, K].
        axis: Ranks that share the sequence; more than one.

    Returns:
        [B, H, T, K].
    """
    # Queries with other strides gave wrong outputs on CPUs; torch makes keys and values contiguous itself.
    return _RingAttention.apply(q.contiguous(), k, v, axis)


def _attention(q: Tensor, k: Tensor) -> _Attention:
    if q.device.type == "cpu":
        return _CPU
    if q.dtype in (torch.bfloat16, torch.float16):
        return _FLASH
    efficient = _without_padding(_EFFICIENT)
    return efficient if q.shape[1] == k.shape[1] else _with_repeated_keys(efficient)


def _without_padding(attention: _Attention) -> _Attention:
    """An attention with a logarithm of the sum for each query, as the ring merges them, by one that pads them to whole tiles of queries."""

    def forward(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Any, ...]:
        out, logsumexp, *rest = attention.forward(q, k, v, **arguments)
        return out, logsumexp[..., : q.shape[_SEQUENCE_DIM]], *rest

    def backward(*, logsumexp: Tensor, **arguments: Any) -> tuple[Any, ...]:
        # With infinity the padded queries have the weight 0.
        padded = F.pad(logsumexp, (0, -logsumexp.shape[-1] % _PADDED_QUERIES), value=torch.inf)
        return attention.backward(logsumexp=padded, **arguments)

    return attention._replace(forward=forward, backward=backward)


def _with_repeated_keys(attention: _Attention) -> _Attention:
    """An attention to fewer heads of keys than of queries, by one that needs as many of both."""

    def forward(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Any, ...]:
        count = q.shape[1] // k.shape[1]
        return attention.forward(q, *(x.repeat_interleave(count, dim=1) for x in (k, v)), **arguments)

    def backward(*, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> tuple[Any, ...]:
        count = query.shape[1] // key.shape[1]
        k, v = (x.repeat_interleave(count, dim=1) for x in (key, value))
        dq, dk, dv, *rest = attention.backward(query=query, key=k, value=v, **arguments)
        return dq, *(x.unflatten(1, (-1, count)).sum(2) for x in (dk, dv)), *rest

    return attention._replace(forward=forward, backward=backward)


@contextmanager
def _consecutive_slices(dtype: torch.dtype) -> Iterator[Any]:
    """The module, whose global options are those of this function while it is used; sums are in fp32, or in float64 where numbers are."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring

    options, before = ring._cp_options, dict(vars(ring._cp_options))
    options.enable_load_balance, options.convert_to_f32 = False, dtype != torch.float64
    try:
        yield ring
    finally:
        vars(options).update(before)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> Tensor:
        attention = _attention(q, k)
        with _consecutive_slices(q.dtype) as ring:
            out, logsumexp, *rest = ring._templated_ring_attention(
                axis.group, _SEQUENCE_DIM, attention.forward, q, k, v, is_causal=True, dropout_p=0.0, **attention.arguments
            )
        out = out.to(q.dtype)
        ctx.axis, ctx.more = axis, attention.more(tuple(rest))
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, logsumexp = ctx.saved_tensors
        attention = _attention(q, k)
        with _consecutive_slices(q.dtype) as ring:
            dq, dk, dv, *_ = ring._templated_ring_attention_backward(
                ctx.axis.group, _SEQUENCE_DIM, attention.backward, grad_out=grad.contiguous(), grad_out_name=attention.gradient,
                query=q, key=k, value=v, out=out, logsumexp=logsumexp, is_causal=True, dropout_p=0.0, **ctx.more,
            )  # fmt: skip
        return dq, dk, dv, None
