"""The gated delta rule: a recurrence that replaces what a key already holds, instead of adding to it.

    S_i = alpha_i S_{i-1} + k_i u_i^T,    u_i = beta_i (v_i - alpha_i S_{i-1}^T k_i),    y_i = S_i^T q_i

that is, S_i = alpha_i (I - beta_i k_i k_i^T) S_{i-1} + beta_i k_i v_i^T. It is stable where beta_i |k_i|^2 <= 2.
Source: S. Yang, J. Kautz, A. Hatamizadeh, "Gated Delta Networks", arXiv 2412.06464.

Computed in chunks. With S the state before a chunk, gamma_i = exp(G_i), Gamma_ij = exp(G_i - G_j) for i >= j, G the sum of log alpha from the
start of the chunk, all u of a chunk solve a triangular system, and the rest is gated linear attention with u as values:

    A = strictly lower(diag(beta) (Gamma * K K^T)),    X = (I + A)^-1,    U = X diag(beta) (V - diag(gamma) K S)
    Y = diag(gamma) Q S + lower(Gamma * Q K^T) U,      S' = gamma_C S + (diag(exp(G_C - G)) K)^T U

Backward solves the transposed system: with dU the gradient of U, w = X^T dU is that of diag(beta) (V - diag(gamma) K S), and dA = -w U^T.

Shapes: B batch, T tokens, H heads, K key size, V value size, N chunks, C tokens of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from phase8.kernels.reference.chunks import Decays, chunk_decays, chunks, read_chunks, tokens


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, starts: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence above for every token.

    Args:
        q: Queries [B, T, H, K].
        k: Keys [B, T, H, K].
        v: Values [B, T, H, V].
        log_decay: log alpha, not positive, fp32 [B, T, H].
        beta: Share of what a key holds that is replaced, divided by the squared length of the key, fp32 [B, T, H].
        starts: True where a token begins a document: the state before it is dropped [B, T]; None: nowhere.
        initial_state: S before the first token, fp32 [B, H, K, V]; None: 0.

    Returns:
        y [B, T, H, V] in the dtype of v, and the state after the last token, fp32 [B, H, K, V].
    """
    decays = chunk_decays(log_decay, starts)
    queries, keys, values, rates = _operands(q, k, v, beta)
    solved = _solve(keys, values, rates, decays, initial_state)
    y = read_chunks(queries, keys, solved.written, solved.before, decays.ratio, decays.from_start)
    return tokens(y, q.shape[1]).to(v.dtype), solved.final


def gated_delta_rule_backward(
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
    """The gradients, by the equations above.

    Args:
        dy: Gradient of y [B, T, H, V].
        dstate: Gradient of the state after the last token [B, H, K, V]; None: 0.
        q: As in the forward, like all that follow.
        k: Keys.
        v: Values.
        log_decay: log alpha.
        beta: Replaced share.
        starts: Document boundaries.
        initial_state: S before the first token.

    Returns:
        Gradients of q, k, v, log_decay, beta and initial_state, each in the dtype of its tensor, the last one in that of the arithmetic.
    """
    decays = chunk_decays(log_decay, starts)
    queries, keys, values, rates = _operands(q, k, v, beta)
    grads, solved = chunks(dy), _solve(keys, values, rates, decays, initial_state)
    before, written = solved.before, solved.written
    from_start, to_end, strictly_earlier = decays.from_start[..., None], decays.to_end[..., None], decays.ratio.tril(-1)

    dwritten = (queries @ keys.mT * decays.ratio).mT @ grads
    dread, dafter = [torch.empty(0)] * keys.shape[1], [torch.empty(0)] * keys.shape[1]
    dstate = torch.zeros_like(solved.final) if dstate is None else dstate.to(keys.dtype)
    for n in reversed(range(keys.shape[1])):
        dafter[n] = dstate
        dread[n] = solved.inverse[:, n].mT @ (dwritten[:, n] + (to_end * keys)[:, n] @ dstate)
        dread_rated = (from_start * rates * keys)[:, n].mT @ dread[n]
        dstate = decays.keeps[:, n] * dstate + (from_start * queries)[:, n].mT @ grads[:, n] - dread_rated
    w, dafter_chunks = torch.stack(dread, 1), torch.stack(dafter, 1)
    dvalues = rates * w

    dqueries = read_chunks(grads, written, keys, before.mT, decays.ratio, decays.from_start)
    # A key is read with, to find what it holds, and written with.
    dkeys_read = -read_chunks(dvalues, written, keys, before.mT, strictly_earlier, decays.from_start)
    dkeys_written = read_chunks(written, grads, queries, dafter_chunks.mT, decays.ratio.mT, decays.to_end)
    dkeys_written -= (written @ dvalues.mT * strictly_earlier.mT) @ keys
    held = from_start * (keys @ before) + (keys @ keys.mT * strictly_earlier) @ written
    drates = (w * (values - held)).sum(-1)

    # What crosses from token j - 1 to token j: what crosses the end of the chunk, plus what is read from j on, less what is written from j on.
    change = (queries * dqueries).sum(-1) + (keys * (dkeys_read - dkeys_written)).sum(-1)
    after = torch.cat((before[:, 1:], solved.final[:, None]), dim=1)
    crossing = (after * dafter_chunks).sum((-1, -2))[..., None] + change.flip(-1).cumsum(-1).flip(-1)

    gradients = [tokens(x, q.shape[1]) for x in (dqueries, dkeys_read + dkeys_written, dvalues, crossing, drates)]
    if starts is not None:
        gradients[3] = gradients[3].masked_fill(starts[..., None], 0)  # nothing crosses there; what is left is rounding
    return *(gradient.to(x.dtype) for gradient, x in zip(gradients, (q, k, v, log_decay, beta), strict=True)), dstate


class _Solved(NamedTuple):
    """What the triangular systems of all chunks give.

    Args:
        inverse: X [B, N, H, C, C].
        written: U [B, N, H, C, V].
        before: State before each chunk [B, N, H, K, V].
        final: State after the last chunk [B, H, K, V].
    """

    inverse: Tensor
    written: Tensor
    before: Tensor
    final: Tensor


def _operands(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chunks of queries, keys, values and, as a column, rates [B, N, H, C, 1]."""
    return chunks(q), chunks(k), chunks(v), chunks(beta)[..., None]


def _solve(keys: Tensor, values: Tensor, rates: Tensor, decays: Decays, initial: Tensor | None) -> _Solved:
    """Solves the systems, and carries the state from chunk to chunk."""
    system = rates * (keys @ keys.mT * decays.ratio.tril(-1))
    identity = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device).expand_as(system)
    inverse = torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True)
    offered = inverse @ (rates * values)
    replaced = inverse @ (decays.from_start[..., None] * rates * keys)
    kept_keys = decays.to_end[..., None] * keys
    shape = (*keys.shape[:1], keys.shape[2], keys.shape[-1], values.shape[-1])
    state = keys.new_zeros(shape) if initial is None else initial.to(keys.dtype)
    before, written = [], []
    for n in range(keys.shape[1]):
        before.append(state)
        written.append(offered[:, n] - replaced[:, n] @ state)
        state = decays.keeps[:, n] * state + kept_keys[:, n].mT @ written[-1]
    return _Solved(inverse, torch.stack(written, 1), torch.stack(before, 1), state)
