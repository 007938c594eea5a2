"""Linear attention with one scalar decay per head and token (the semiseparable form of Mamba-2 and RetNet).

    S_i = alpha_i S_{i-1} + (1 - alpha_i) k_i v_i^T / sqrt(K),    y_i = S_i^T q_i

Computed in chunks: inside a chunk as masked matrix products, between chunks as a scan of the chunk states.
Decay ratios appear only as exp(G_i - G_j) with i >= j, which never exceeds 1.

Shapes: B batch, T tokens, H heads, K key size, V value size, N chunks, C tokens of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.kernels.reference.associative_scan import linear_scan
from phase8.kernels.reference.dtypes import at_least_fp32

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
    length = q.shape[1]
    chunk = min(CHUNK_TOKENS, length)
    q, k, values, log_decay = (_chunks(at_least_fp32(x), chunk) for x in (q, k, v, log_decay))
    # Documents begun since the start of the chunk: 0 means still the document of the carried state.
    begun = None if starts is None else _chunks(starts[..., None], chunk).int().cumsum(2)
    weight = -torch.expm1(log_decay) * q.shape[-1] ** -0.5
    total = log_decay.cumsum(2)

    state_input = torch.exp(total[:, :, -1:] - total) * weight
    carried = torch.exp(total)
    if begun is not None:
        state_input = state_input * (begun == begun[:, :, -1:])
        carried = carried * (begun == 0)
    inputs = torch.einsum("bnchk,bnch,bnchv->bnhkv", k, state_input, values)
    chunk_decay = carried[:, :, -1, :, None, None]
    if initial_state is not None:
        inputs = torch.cat((inputs[:, :1] + chunk_decay[:, :1] * initial_state[:, None], inputs[:, 1:]), dim=1)
    after = linear_scan(chunk_decay, inputs)
    first = torch.zeros_like(after[:, :1]) if initial_state is None else initial_state[:, None]
    before = torch.cat((first, after[:, :-1]), dim=1)

    y = torch.einsum("bnchk,bnhkv->bnchv", q * carried[..., None], before) + _inside_chunks(q, k, values, (weight, total, begun))
    return y.flatten(1, 2)[:, :length].to(v.dtype), after[:, -1]


def _inside_chunks(q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
    """What each token reads from tokens of its own chunk and document [B, N, C, H, V]."""
    weight, total, begun = gates
    chunk = q.shape[2]
    visible = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    if begun is not None:
        visible = visible & (begun[..., 0][:, :, :, None] == begun[..., 0][:, :, None, :])[:, :, None]
    total = total.transpose(2, 3)
    # Masked before exp: above the diagonal the difference is positive and could overflow.
    ratio = (total[..., :, None] - total[..., None, :]).masked_fill(~visible, -torch.inf).exp()
    scores = torch.einsum("bnchk,bndhk->bnhcd", q, k) * ratio * weight.transpose(2, 3)[..., None, :]
    return torch.einsum("bnhcd,bndhv->bnchv", scores, v)


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """[B, T, ...] -> [B, N, C, ...]; the padding at the end has decay 1 and weight 0, so it leaves the state alone."""
    padding = -x.shape[1] % chunk
    if padding:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding))
    return x.unflatten(1, (-1, chunk))
