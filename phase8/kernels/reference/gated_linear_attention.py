"""Linear attention with one scalar decay per head and token (the semiseparable form of Mamba-2 and RetNet).

    S_i = alpha_i S_{i-1} + w_i k_i v_i^T,    w_i = (1 - alpha_i) / sqrt(K),    y_i = S_i^T q_i

Computed in chunks: inside a chunk as masked matrix products, between chunks as a scan of the chunk states.

The gradients are the same recurrence with the roles exchanged. With dS_i, the gradient of S_i, which runs from the last token to the first:

    dS_i = alpha_{i+1} dS_{i+1} + q_i dy_i^T,    dq_i = S_i dy_i,    dk_i = w_i dS_i v_i,    dv_i = w_i dS_i^T k_i
    dlog alpha_i = alpha_i <S_{i-1}, dS_i> - alpha_i / sqrt(K) * k_i^T dS_i v_i

Shapes: B batch, T tokens, H heads, K key size, V value size, N chunks, C tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phase8.kernels.reference.associative_scan import linear_scan
from phase8.kernels.reference.chunks import chunk_decays, chunks, read_chunks, tokens


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
    decays = chunk_decays(log_decay, starts)
    queries, keys, values = (chunks(x) for x in (q, k, v))
    values = values * _weight(decays.log_decay, q.shape[-1])[..., None]
    before, final = _states((keys * decays.to_end[..., None]).mT @ values, decays.keeps, initial_state)
    y = read_chunks(queries, keys, values, before, decays.ratio, decays.from_start)
    return tokens(y, q.shape[1]).to(v.dtype), final


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
    decays = chunk_decays(log_decay, starts)
    token_weight = _weight(decays.log_decay, q.shape[-1])
    weight = token_weight[..., None]
    queries, keys, values, grads = (chunks(x) for x in (q, k, v, dy))
    before, final = _states((keys * decays.to_end[..., None]).mT @ (values * weight), decays.keeps, initial_state)
    dafter, dinitial = _states(((queries * decays.from_start[..., None]).mT @ grads).flip(1), decays.keeps.flip(1), dstate)
    dafter = dafter.flip(1)

    dqueries = read_chunks(grads, values, keys * weight, before.mT, decays.ratio, decays.from_start)
    dkeys = read_chunks(values, grads, queries, dafter.mT, decays.ratio.mT, decays.to_end)  # without the weight, which may be 0
    dvalues = read_chunks(keys, queries, grads, dafter, decays.ratio.mT, decays.to_end) * weight

    # What crosses from token j - 1 to token j, alpha_j <S_{j-1}, dS_j>: what crosses the end of the chunk, plus what is read from j on, less
    # what is written from j on. Sums stay inside chunks: over a sequence, rounding would exceed the values of short memories.
    read, written = (queries * dqueries).sum(-1), (keys * dkeys).sum(-1)
    change = read - token_weight * written
    crossing_end = (torch.cat((before[:, 1:], final[:, None]), dim=1) * dafter).sum((-1, -2))
    crossing = crossing_end[..., None] + change.flip(-1).cumsum(-1).flip(-1)
    dlog_decay = crossing - decays.log_decay.exp() * q.shape[-1] ** -0.5 * written

    length = q.shape[1]
    gradients = (tokens(x, length) for x in (dqueries, dkeys * weight, dvalues, dlog_decay))
    return *(gradient.to(x.dtype) for gradient, x in zip(gradients, (q, k, v, log_decay), strict=True)), dinitial


def added_state(key: Tensor, value: Tensor, log_decay: Tensor, starts: Tensor | None, *, backwards: bool) -> Tensor:
    """The state after the last token where there was none before the first, or with `backwards` dS before the first token.

    Args:
        key: Keys [B, T, H, K]; with `backwards`, queries.
        value: Values [B, T, H, V]; with `backwards`, gradients of y.
        log_decay: log alpha.
        starts: Document boundaries.
        backwards: The direction.
    """
    decays = chunk_decays(log_decay, starts)
    keys, values = chunks(key), chunks(value)
    if backwards:
        return _states(((keys * decays.from_start[..., None]).mT @ values).flip(1), decays.keeps.flip(1), None)[1]
    values = values * _weight(decays.log_decay, key.shape[-1])[..., None]
    return _states((keys * decays.to_end[..., None]).mT @ values, decays.keeps, None)[1]


def _weight(log_decay: Tensor, key_size: int) -> Tensor:
    """The weight w of every token."""
    return -torch.expm1(log_decay) * key_size**-0.5


def _states(added: Tensor, decay: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """States before each chunk and after the last one, where chunks keep the share `decay` and add `added` [B, N, H, K, V]."""
    if initial is not None:
        added = torch.cat((added[:, :1] + decay[:, :1] * initial[:, None], added[:, 1:]), dim=1)
    after = linear_scan(decay, added)
    first = torch.zeros_like(after[:, :1]) if initial is None else initial[:, None].to(after.dtype)
    return torch.cat((first, after[:, :-1]), dim=1), after[:, -1]
