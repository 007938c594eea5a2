"""Causal attention to the last W tokens and to the first G tokens of the sequence, scored by distance or by dot product.

The sequence is cut into blocks of queries; each block sees the keys of its own span and of the block before it, so the cost
is linear in T. Scores:

- `dot`: q.k / sqrt(K).
- `lorentz`: q and k are lifted to the hyperboloid q0^2 - |q|^2 = 1 of the Lorentz model; with u = q0 k0 - q.k - 1 >= 0 the score is
  -beta log(1 + u + sqrt(u (u + 2) + eps)), the smoothed hyperbolic distance arccosh(1 + u) up to a constant that cancels in softmax.
  The height q0 - 1 is computed as |q|^2 / (1 + q0), which keeps u exact near coincidence.

Backward recomputes the scores from q, k and the logarithm of their sum, so nothing of size T x W is kept.

Shapes: B batch, T tokens, H heads, K head size, W window, G global tokens, P carried tokens, N query blocks, Q queries of a block,
J keys that a block sees (left + Q of the window, then the globals).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.kernels.dtypes import at_least_fp32
from phase8.kernels.window_state import VisibleKeys, WindowState, visible_keys

ARCCOSH_EPS = 1e-3


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
    """Attention of every token to its window and to the global tokens of its document.

    Args:
        q: Queries [B, T, H, K].
        k: Keys [B, T, H, K].
        v: Values [B, T, H, K].
        window: W, the token itself included.
        global_tokens: G, counted from the first token of the sequence.
        beta: Inverse temperature of the `lorentz` score, positive [H]; None: `dot` score.
        starts: True where a token begins a document, which sees nothing before it [B, T]; None: nowhere.
        state: The state that earlier calls carried; None: the sequence begins here and nothing is carried on.

    Returns:
        y [B, T, H, K] in the dtype of v, and the state to carry on (None without `state`).
    """
    seen = visible_keys(k, v, global_tokens=global_tokens, starts=starts, state=state)
    blocks = _Blocks(q.shape[1], seen, window)
    # What is compiled or exported has the plain operations: in torch's joint graph of forward and backward, gradients of its attention are wrong.
    is_traced = torch.compiler.is_compiling()
    y = _attend_by_dot(blocks, q) if beta is None and not is_traced else _attend(blocks, q, beta)[0]
    return y, None if state is None else seen.carried(window, q.shape[1])


def attend(q: Tensor, seen: VisibleKeys, beta: Tensor | None, window: int) -> tuple[Tensor, Tensor]:
    """Attention to the visible keys.

    Returns:
        y [B, T, H, K] in the dtype of the values, and the logarithm of the sum of exp(score), fp32 or wider [B, T, H].
    """
    blocks = _Blocks(q.shape[1], seen, window)
    y, scores, weights = _attend(blocks, q, beta)
    log_sum = scores.amax(-1) - weights.amax(-1).log()
    return y, blocks.to_queries(log_sum.transpose(2, 3))


def _attend_by_dot(blocks: _Blocks, q: Tensor) -> Tensor:
    """Output [B, T, H, K] of the `dot` score by torch's own attention, to which every block is a sequence."""
    seen = blocks.seen
    queries = blocks.of_queries(at_least_fp32(q))
    keys = blocks.of_keys(at_least_fp32(seen.keys), at_least_fp32(seen.global_keys))
    values = blocks.of_keys(at_least_fp32(seen.values), at_least_fp32(seen.global_values))
    visible = blocks.visible().expand(len(q), *(-1,) * 4)
    sequences = (x.flatten(0, 1).transpose(1, 2) for x in (queries, keys, values))
    y = F.scaled_dot_product_attention(*sequences, attn_mask=visible.flatten(0, 1))
    return blocks.to_queries(y.transpose(1, 2).unflatten(0, queries.shape[:2])).to(seen.values.dtype)


def _attend(blocks: _Blocks, q: Tensor, beta: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, T, H, K], and the masked scores and their softmax [B, N, H, Q, J]."""
    seen = blocks.seen
    keys = blocks.of_keys(at_least_fp32(seen.keys), at_least_fp32(seen.global_keys))
    scores = Scores(blocks.of_queries(at_least_fp32(q)), keys, beta).values.masked_fill_(~blocks.visible(), -torch.inf)
    weights = scores.softmax(-1)
    y = torch.einsum("bnhqj,bnjhk->bnqhk", weights.to(seen.values.dtype), blocks.of_keys(seen.values, seen.global_values))
    return blocks.to_queries(y), scores, weights


def attend_backward(
    dy: Tensor, y: Tensor, log_sum: Tensor, q: Tensor, seen: VisibleKeys, beta: Tensor | None, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, keys, values, global keys and global values in their dtypes, and of beta (0 without).

    Args:
        dy: Gradient of y [B, T, H, K].
        y: What `attend` returned.
        log_sum: What `attend` returned.
        q: As for `attend`.
        seen: As for `attend`.
        beta: As for `attend`.
        window: As for `attend`.
    """
    blocks = _Blocks(q.shape[1], seen, window)
    keys = blocks.of_keys(at_least_fp32(seen.keys), at_least_fp32(seen.global_keys))
    values = blocks.of_keys(at_least_fp32(seen.values), at_least_fp32(seen.global_values))
    scores = Scores(blocks.of_queries(at_least_fp32(q)), keys, beta)
    # The softmax is computed again; log_sum is for implementations that never hold a whole row of scores.
    weights = scores.values.masked_fill_(~blocks.visible(), -torch.inf).softmax(-1)
    wide_dy = blocks.of_queries(at_least_fp32(dy))
    dvalues = torch.einsum("bnhqj,bnqhk->bnjhk", weights, wide_dy)
    delta = blocks.of_queries((at_least_fp32(dy) * y).sum(-1)).transpose(2, 3)[..., None]
    dscores = torch.einsum("bnqhk,bnjhk->bnhqj", wide_dy, values).sub_(delta).mul_(weights)
    dqueries, dkeys, dbeta = scores.backward(dscores)
    dwindow_keys, dglobal_keys = blocks.to_keys(dkeys)
    dwindow_values, dglobal_values = blocks.to_keys(dvalues)
    gradients = (blocks.to_queries(dqueries), dwindow_keys, dwindow_values, dglobal_keys, dglobal_values)
    dtypes = (q.dtype, seen.keys.dtype, seen.values.dtype, seen.keys.dtype, seen.values.dtype)
    return *(gradient.to(dtype) for gradient, dtype in zip(gradients, dtypes, strict=True)), dbeta


class Scores:
    """Scores of every query with the keys of its block, `values` [B, N, H, Q, J], and their gradient.

    Args:
        queries: fp32 or wider [B, N, Q, H, K].
        keys: [B, N, J, H, K].
        beta: As for `attend`.
    """

    def __init__(self, queries: Tensor, keys: Tensor, beta: Tensor | None):
        self.queries, self.keys, self.beta = queries, keys, beta
        dot = torch.einsum("bnqhk,bnjhk->bnhqj", queries, keys)
        if beta is None:
            self.values = dot * queries.shape[-1] ** -0.5
            return
        query_height, key_height = _height(queries).transpose(2, 3)[..., None], _height(keys).transpose(2, 3)[..., None, :]
        self.distance, self.root = _SmoothArccosh.apply(query_height * (1 + key_height) + (key_height - dot))
        self.values = self.distance * -at_least_fp32(beta)[:, None, None]

    def backward(self, dscores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and beta; the slope of the distance is exactly 1 / root."""
        if self.beta is None:
            ddot = dscores * self.queries.shape[-1] ** -0.5
            return *self._backward_of_dot(ddot), dscores.new_zeros(self.queries.shape[3])
        dbeta = -torch.einsum("bnhqj,bnhqj->h", dscores, self.distance).to(self.beta.dtype)
        ddot = dscores.mul_(at_least_fp32(self.beta)[:, None, None]).div_(self.root)
        dqueries, dkeys = self._backward_of_dot(ddot)
        query_time, key_time = 1 + _height(self.queries), 1 + _height(self.keys)
        dqueries -= self.queries * (torch.einsum("bnhqj,bnjh->bnqh", ddot, key_time) / query_time)[..., None]
        dkeys -= self.keys * (torch.einsum("bnhqj,bnqh->bnjh", ddot, query_time) / key_time)[..., None]
        return dqueries, dkeys, dbeta

    def _backward_of_dot(self, ddot: Tensor) -> tuple[Tensor, Tensor]:
        return torch.einsum("bnhqj,bnjhk->bnqhk", ddot, self.keys), torch.einsum("bnhqj,bnqhk->bnjhk", ddot, self.queries)


class _SmoothArccosh(torch.autograd.Function):
    """log(1 + u + sqrt(u (u + 2) + eps)) and that root, whose reciprocal is exactly the slope: autograd keeps one tensor."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> tuple[Tensor, Tensor]:
        u = u.clamp(min=0)  # below 0 by rounding only, so backward does not need to cut the gradient there
        root = (u * (u + 2) + ARCCOSH_EPS).sqrt()
        ctx.save_for_backward(root)
        ctx.mark_non_differentiable(root)
        return torch.log(1 + u + root), root

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return grad / root


def _height(x: Tensor) -> Tensor:
    """Height above 1 on the hyperboloid, sqrt(1 + |x|^2) - 1, without cancellation: [..., K] -> [...]."""
    square = x.square().sum(-1)
    return square / (1 + (1 + square).sqrt())


class _Blocks:
    """Queries in blocks of up to W, each with the keys it can see: its own span, the block before, and the globals.

    Args:
        num_queries: T.
        seen: The keys; globals take part only when some query is beyond its window.
        window: W.
    """

    def __init__(self, num_queries: int, seen: VisibleKeys, window: int):
        self.num_queries, self.window, self.seen = num_queries, window, seen
        self.size = min(window, num_queries)
        self.num_blocks = -(-num_queries // self.size)
        self.num_carried = seen.keys.shape[1] - num_queries
        # A single block sees the carried keys; with several, which are W long, each sees the one before it.
        self.left = self.num_carried if self.num_blocks == 1 else self.size
        self.padding = self.num_blocks * self.size - num_queries
        self.num_globals = seen.global_keys.shape[1] if seen.num_seen + num_queries > window else 0

    def of_queries(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[B, T, ...] -> [B, N, Q, ...]."""
        return F.pad(x, (0, 0) * (x.dim() - 2) + (0, self.padding), value=fill).unflatten(1, (self.num_blocks, self.size))

    def to_queries(self, x: Tensor) -> Tensor:
        """[B, N, Q, ...] -> [B, T, ...]."""
        return x.flatten(1, 2)[:, : self.num_queries]

    def of_keys(self, window: Tensor, shared: Tensor) -> Tensor:
        """[B, P + T, ...] and [B, G, ...] -> [B, N, J, ...]."""
        window = F.pad(window, (0, 0) * (window.dim() - 2) + (self.left - self.num_carried, self.padding))
        if self.num_blocks == 1:
            parts = [window[:, None]]
        else:
            spans = window.unflatten(1, (self.num_blocks + 1, self.size))
            parts = [spans[:, :-1], spans[:, 1:]]
        if self.num_globals:
            parts.append(shared[:, None].expand(-1, self.num_blocks, *shared.shape[1:]))
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]

    def to_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The adjoint of `of_keys`: [B, N, J, ...] -> sums [B, P + T, ...] and [B, G, ...]."""
        window, shared = x[:, :, : self.left + self.size], x[:, :, self.left + self.size :].sum(1)
        if self.num_blocks > 1:
            spans = F.pad(window[:, :, self.size :], (0, 0) * (x.dim() - 2) + (1, 0))
            spans[:, :-1] += window[:, :, : self.size]
            window = spans
        window = window.flatten(1, 2)[:, self.left - self.num_carried :][:, : self.num_carried + self.num_queries]
        return window, shared if self.num_globals else torch.zeros_like(self.seen.global_keys, dtype=x.dtype)

    def visible(self) -> Tensor:
        """Whether a query sees a key, [1 or B, N, 1, Q, J]: a key of its document and window, or a global one outside its window."""
        device = self.seen.keys.device
        begin = torch.arange(self.num_blocks, device=device)[:, None] * self.size
        query = (begin + torch.arange(self.size, device=device))[..., None]
        key = (begin - self.left + torch.arange(self.left + self.size, device=device))[:, None, :]
        visible = (key <= query) & (query - key < self.window) & (key >= -self.num_carried)
        if self.num_globals:
            # A global token counts once: through the window while it is inside, through the globals afterwards.
            shared = torch.arange(self.num_globals, device=device) <= query + self.seen.num_seen - self.window
            visible = torch.cat((visible, shared), -1)
        visible = visible[None]
        if self.seen.documents is not None:
            queries = self.of_queries(self.seen.documents[:, self.num_carried :])
            visible = visible & (queries[..., None] == self.of_keys(self.seen.documents, self.seen.global_documents)[:, :, None])
        return visible[:, :, None]
