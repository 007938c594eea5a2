"""Causal attention to the last W tokens and to the first G tokens of the sequence, scored by distance or by dot product.

The sequence is cut into blocks of queries; each block sees the keys of its own span and of the block before it, so the cost
is linear in T. Scores:

- `dot`: q.k / sqrt(K).
- `lorentz`: q and k are lifted to the hyperboloid q0^2 - |q|^2 = 1 of the Lorentz model; with u = q0 k0 - q.k - 1 >= 0 the score is
  -beta log(1 + u + sqrt(u (u + 2) + eps)), the smoothed hyperbolic distance arccosh(1 + u) up to a constant that cancels in softmax.
  q0 - 1 is computed as |q|^2 / (1 + q0), which keeps u exact near coincidence.

Shapes: B batch, T tokens, H heads, K head size, W window, G global tokens, P carried tokens, N query blocks, Q queries of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.kernels.reference.dtypes import at_least_fp32

ARCCOSH_EPS = 1e-3


@dataclass(frozen=True)
class WindowState:
    """What later tokens need of earlier ones: a constant number of keys and values, whatever the length.

    Args:
        keys: Of the last min(W - 1, seen) tokens [B, P, H, K].
        values: The same tokens [B, P, H, K].
        global_keys: Of the first min(G, seen) tokens [B, <=G, H, K].
        global_values: The same tokens.
        documents: Number of the document of each window token [B, P]; the last token seen so far has number 0, earlier ones less.
        global_documents: The same for the global tokens [B, <=G].
        num_seen: Tokens before this point.
    """

    keys: Tensor
    values: Tensor
    global_keys: Tensor
    global_values: Tensor
    documents: Tensor
    global_documents: Tensor
    num_seen: int


def empty_window_state(batch_size: int, num_heads: int, head_size: int, *, like: Tensor) -> WindowState:
    """The state before the first token."""
    nothing = like.new_zeros(batch_size, 0, num_heads, head_size)
    documents = torch.zeros(batch_size, 0, dtype=torch.int32, device=like.device)
    return WindowState(nothing, nothing, nothing, nothing, documents, documents, 0)


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
        state: What earlier calls carried; None: the sequence begins here and nothing is carried on.

    Returns:
        y [B, T, H, K] in the dtype of v, and the state to carry on (None without `state`).
    """
    carried = empty_window_state(q.shape[0], *q.shape[2:], like=k) if state is None else state
    num_queries, num_new_globals = q.shape[1], max(global_tokens - carried.global_keys.shape[1], 0)
    keys, values = torch.cat((carried.keys, k), 1), torch.cat((carried.values, v), 1)
    global_keys = torch.cat((carried.global_keys, k[:, :num_new_globals]), 1)
    global_values = torch.cat((carried.global_values, v[:, :num_new_globals]), 1)
    blocks = _Blocks(num_queries, keys.shape[1] - num_queries, window)
    visible = blocks.window_mask(q.device)
    sources, targets = blocks.of_keys(keys), blocks.of_keys(values)
    # A global token counts once: through the window while it is near, through the globals afterwards.
    with_globals = global_tokens > 0 and carried.num_seen + num_queries > window
    if with_globals:
        visible = torch.cat((visible, blocks.global_mask(global_keys.shape[1], carried.num_seen, q.device)), -1)
        sources, targets = blocks.append(sources, global_keys), blocks.append(targets, global_values)
    visible = visible[None]
    if starts is not None or state is not None:
        documents = _document_numbers(starts, k)
        key_documents = torch.cat((carried.documents, documents), 1)
        global_documents = torch.cat((carried.global_documents, documents[:, :num_new_globals]), 1)
        seen = blocks.of_keys(key_documents)
        seen = blocks.append(seen, global_documents) if with_globals else seen
        visible = visible & (blocks.of_queries(documents)[..., None] == seen[:, :, None, :])

    scores = torch.einsum("bnqhd,bnkhd->bnhqk", at_least_fp32(blocks.of_queries(q)), at_least_fp32(sources))
    if beta is None:
        scores = scores * q.shape[-1] ** -0.5
    else:
        heights = blocks.of_keys(_height(keys))
        heights = blocks.append(heights, _height(global_keys)) if with_globals else heights
        scores = _lorentz_score(scores, blocks.of_queries(_height(q)), heights, beta)
    scores = scores.masked_fill(~visible[:, :, None], -torch.inf)
    y = torch.einsum("bnhqk,bnkhd->bnqhd", scores.softmax(-1).to(v.dtype), targets).flatten(1, 2)[:, :num_queries]
    if state is None:
        return y, None
    newest = documents[:, -1:]
    keep = slice(max(keys.shape[1] - (window - 1), 0), None)
    return y, WindowState(
        keys[:, keep],
        values[:, keep],
        global_keys,
        global_values,
        key_documents[:, keep] - newest,
        global_documents - newest,
        state.num_seen + num_queries,
    )


def _height(x: Tensor) -> Tensor:
    """Height above 1 on the hyperboloid, sqrt(1 + |x|^2) - 1, without cancellation: [B, T, H, K] -> [B, T, H]."""
    square = at_least_fp32(x).square().sum(-1)
    return square / (1 + (1 + square).sqrt())


def _lorentz_score(dot: Tensor, q_height: Tensor, k_height: Tensor, beta: Tensor) -> Tensor:
    """Scores from dot products [B, N, H, Q, keys] and heights [B, N, Q, H] and [B, N, keys, H]."""
    q_height, k_height = q_height.transpose(2, 3)[..., None], k_height.transpose(2, 3)[..., None, :]
    u = q_height * (1 + k_height) + (k_height - dot)
    return -at_least_fp32(beta)[:, None, None] * _SmoothArccosh.apply(u)


class _SmoothArccosh(torch.autograd.Function):
    """log(1 + u + sqrt(u (u + 2) + eps)), whose slope is exactly the reciprocal of the root: one tensor is kept for backward."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        u = u.clamp(min=0)  # below 0 by rounding only, so backward does not cut the gradient there
        root = (u * (u + 2) + ARCCOSH_EPS).sqrt()
        ctx.save_for_backward(root)
        return torch.log(1 + u + root)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return grad / root


def _lift(x: Tensor) -> Tensor:
    """Height above 1 on the hyperboloid, sqrt(1 + |x|^2) - 1, without cancellation: [B, N, tokens, H, K] -> [B, N, H, tokens]."""
    square = at_least_fp32(x).square().sum(-1).transpose(2, 3)
    return square / (1 + (1 + square).sqrt())


def _document_numbers(starts: Tensor | None, k: Tensor) -> Tensor:
    """Number of each token's document [B, T]; 0 is the document of the carried tokens, if any."""
    if starts is None:
        return torch.zeros(k.shape[:2], dtype=torch.int32, device=k.device)
    return starts.cumsum(1, dtype=torch.int32)


class _Blocks:
    """Queries in blocks of up to W, each with the keys it can see: its own span and the block before.

    Args:
        num_queries: T.
        num_carried: Keys before the first query, at most W - 1.
        window: W.
    """

    def __init__(self, num_queries: int, num_carried: int, window: int):
        self.size = min(window, num_queries)
        self.num_blocks = -(-num_queries // self.size)
        self.window = window
        self.num_carried = num_carried
        # One block sees the carried keys; of several, which are W long, each sees the one before it.
        self.left = num_carried if self.num_blocks == 1 else self.size
        self.padding = self.num_blocks * self.size - num_queries

    def of_queries(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, N, Q, ...]."""
        return F.pad(x, (0, 0) * (x.dim() - 2) + (0, self.padding)).unflatten(1, (self.num_blocks, self.size))

    def of_keys(self, x: Tensor) -> Tensor:
        """[B, P + T, ...] -> [B, N, left + Q, ...]."""
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (self.left - self.num_carried, self.padding))
        if self.num_blocks == 1:
            return x[:, None]
        spans = x.unflatten(1, (self.num_blocks + 1, self.size))
        return torch.cat((spans[:, :-1], spans[:, 1:]), dim=2)

    def append(self, x: Tensor, shared: Tensor) -> Tensor:
        """`x` [B, N, keys, ...] followed by `shared` [B, G, ...] in every block."""
        return torch.cat((x, shared[:, None].expand(-1, self.num_blocks, *shared.shape[1:])), dim=2)

    def window_mask(self, device: torch.device) -> Tensor:
        """True where a key exists, is not later than the query and inside its window [N, Q, left + Q]."""
        query, key = self._positions(device)
        return (key <= query) & (query - key < self.window) & (key >= -self.num_carried)

    def global_mask(self, num_globals: int, num_seen: int, device: torch.device) -> Tensor:
        """True where a global token has left the window of the query [N, Q, G]."""
        query, _ = self._positions(device)
        return torch.arange(num_globals, device=device) <= query + num_seen - self.window

    def _positions(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions relative to the first query, of queries [N, Q, 1] and of keys [N, 1, left + Q]."""
        begin = torch.arange(self.num_blocks, device=device)[:, None] * self.size
        query = begin + torch.arange(self.size, device=device)
        key = begin - self.left + torch.arange(self.left + self.size, device=device)
        return query[..., None], key[:, None, :]
