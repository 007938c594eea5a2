"""Linear attention with one scalar decay per head and token (the semiseparable form of Mamba-2 and RetNet).

    S_i = alpha_i S_{i-1} + w_i k_i v_i^T,    w_i = (1 - alpha_i) / sqrt(K),    y_i = S_i^T q_i

Computed in chunks: inside a chunk as masked matrix products, between chunks as a scan of the chunk states.
Decay ratios appear only as exp(G_i - G_j) with i >= j, which never exceeds 1; G is the sum of log alpha from the start of the chunk.

The gradients are the same recurrence with the roles exchanged. With dS_i, the gradient of S_i, which runs from the last token to the first:

    dS_i = alpha_{i+1} dS_{i+1} + q_i dy_i^T,    dq_i = S_i dy_i,    dk_i = w_i dS_i v_i,    dv_i = w_i dS_i^T k_i
    dlog alpha_i = alpha_i <S_{i-1}, dS_i> - alpha_i / sqrt(K) * k_i^T dS_i v_i

Shapes: B batch, T tokens, H heads, K key size, V value size, N chunks, C tokens of a chunk.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.kernels.dtypes import at_least_fp32
from phase8.kernels.reference.associative_scan import linear_scan

CHUNK_TOKENS = 64


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, starts: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence above for every token.

    Args:
        q: Queries [B, T, H, K].
        k: Keys [B, T, H, K].
        v: Values [B, T, H, V].
        log_decay: log alpha, not positive, fp32 [B, T, H].
        starts: True where a token begins a document: the state before it is dropped [B, T]; None: nowhere.
        initial_state: S before the first token, fp32 [B, H, K, V]; None: 0.

    Returns:
        y [B, T, H, V] in the dtype of v, and the state after the last token, fp32 [B, H, K, V].
    """
    gates = _gates(log_decay, starts, q.shape[-1])
    queries, keys, values = (_chunks(x) for x in (q, k, v))
    values = values * gates.weight[..., None]
    before, final = _states((keys * gates.to_end[..., None]).mT @ values, gates.decay, initial_state)
    y = _read(queries, keys, values, before, gates.ratio, gates.from_start)
    return _tokens(y, q.shape[1]).to(v.dtype), final


def gated_linear_attention_backward(
    dy: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    starts: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The recurrences of the gradients.

    Args:
        dy: Gradient of y [B, T, H, V].
        dstate: Gradient of the state after the last token [B, H, K, V]; None: 0.
        q: As in the forward, like all that follow.
        k: Keys.
        v: Values.
        log_decay: log alpha.
        starts: Document boundaries.
        initial_state: S before the first token.

    Returns:
        Gradients of q, k, v, log_decay and initial_state, each in the dtype of its tensor, the last one in that of the arithmetic.
    """
    gates = _gates(log_decay, starts, q.shape[-1])
    weight = gates.weight[..., None]
    queries, keys, values, grads = (_chunks(x) for x in (q, k, v, dy))
    before, final = _states((keys * gates.to_end[..., None]).mT @ (values * weight), gates.decay, initial_state)
    dafter, dinitial = _states(((queries * gates.from_start[..., None]).mT @ grads).flip(1), gates.decay.flip(1), dstate)
    dafter = dafter.flip(1)

    dqueries = _read(grads, values, keys * weight, before.mT, gates.ratio, gates.from_start)
    dkeys = _read(values, grads, queries, dafter.mT, gates.ratio.mT, gates.to_end)  # without the weight, which may be 0
    dvalues = _read(keys, queries, grads, dafter, gates.ratio.mT, gates.to_end) * weight

    # What crosses from token j - 1 to token j, alpha_j <S_{j-1}, dS_j>: what crosses the end of the chunk, plus what is read from j on, less
    # what is written from j on. Sums stay inside chunks: over a sequence, rounding would exceed the values of short memories.
    read, written = (queries * dqueries).sum(-1), (keys * dkeys).sum(-1)
    change = read - gates.weight * written
    crossing_end = (torch.cat((before[:, 1:], final[:, None]), dim=1) * dafter).sum((-1, -2))
    crossing = crossing_end[..., None] + change.flip(-1).cumsum(-1).flip(-1)
    dlog_decay = crossing - gates.log_decay.exp() * q.shape[-1] ** -0.5 * written

    length = q.shape[1]
    gradients = (_tokens(x, length) for x in (dqueries, dkeys * weight, dvalues, dlog_decay))
    return *(gradient.to(x.dtype) for gradient, x in zip(gradients, (q, k, v, log_decay), strict=True)), dinitial


class _Gates(NamedTuple):
    """The decays of all chunks, 0 wherever a document begins in between.

    Args:
        log_decay: log alpha [B, N, H, C].
        weight: w [B, N, H, C].
        ratio: From token j to token i of a chunk, exp(G_i - G_j) for i >= j [B, N, H, C, C].
        from_start: From the state before the chunk to a token [B, N, H, C].
        to_end: From a token to the state after the chunk [B, N, H, C].
    """

    log_decay: Tensor
    weight: Tensor
    ratio: Tensor
    from_start: Tensor
    to_end: Tensor

    @property
    def decay(self) -> Tensor:
        """From the state before the chunk to the one after it [B, N, H, 1, 1]."""
        return self.from_start[..., -1, None, None]


def _gates(log_decay: Tensor, starts: Tensor | None, key_size: int) -> _Gates:
    wide = at_least_fp32(log_decay)
    # A token with a smaller alpha keeps less than the rounding of what it adds. Without the bound, sums over a chunk would lose precision
    # in proportion to their size: ratios of later tokens would be wrong, or NaN.
    log_decay = _chunks(wide.clamp(min=math.log(torch.finfo(wide.dtype).eps) - 10))
    total = log_decay.cumsum(-1)
    visible = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).tril()
    from_start, to_end = total.exp(), (total[..., -1:] - total).exp()
    if starts is not None:
        # Documents begun since the start of the chunk: 0 means the document of the incoming state.
        begun = _chunks(starts[..., None]).int().cumsum(-1)
        visible = visible & (begun[..., :, None] == begun[..., None, :])
        from_start, to_end = from_start * (begun == 0), to_end * (begun == begun[..., -1:])
    # Masked before exp: above the diagonal the difference is positive and could overflow.
    ratio = (total[..., :, None] - total[..., None, :]).masked_fill(~visible, -torch.inf).exp()
    return _Gates(log_decay, -torch.expm1(log_decay) * key_size**-0.5, ratio, from_start, to_end)


def _states(added: Tensor, decay: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """States before each chunk and after the last one, where chunks keep the share `decay` and add `added` [B, N, H, K, V]."""
    if initial is not None:
        added = torch.cat((added[:, :1] + decay[:, :1] * initial[:, None], added[:, 1:]), dim=1)
    after = linear_scan(decay, added)
    first = torch.zeros_like(after[:, :1]) if initial is None else initial[:, None].to(after.dtype)
    return torch.cat((first, after[:, :-1]), dim=1), after[:, -1]


def _read(query: Tensor, key: Tensor, value: Tensor, state: Tensor, ratio: Tensor, gate: Tensor) -> Tensor:
    """The reads of each token, from a state outside its chunk and from the tokens of its chunk [B, N, H, C, V]."""
    return (query * gate[..., None]) @ state + (query @ key.mT * ratio) @ value


def _chunks(x: Tensor) -> Tensor:
    """[B, T, H, ...] -> [B, N, H, C, ...]; the padding at the end has decay 1 and weight 0, so it leaves the state alone."""
    chunk = min(CHUNK_TOKENS, x.shape[1])
    padding = -x.shape[1] % chunk
    if padding:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding))
    x = x.unflatten(1, (-1, chunk)).transpose(2, 3).contiguous()
    return x if x.dtype == torch.bool else at_least_fp32(x)


def _tokens(x: Tensor, length: int) -> Tensor:
    """[B, N, H, C, ...] -> [B, T, H, ...]."""
    return x.transpose(2, 3).flatten(1, 2)[:, :length]
