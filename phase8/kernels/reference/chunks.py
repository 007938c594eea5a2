"""Sequences cut into chunks, and what decays keep inside one: what the plain versions of both recurrences share.

Decay ratios appear only as exp(G_i - G_j) with i >= j, which never exceeds 1; G is the sum of log alpha from the start of the chunk.

Shapes: B batch, T tokens, H heads, N chunks, C tokens of a chunk.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.kernels.dtypes import at_least_fp32

CHUNK_TOKENS = 64


class Decays(NamedTuple):
    """The decays of all chunks, 0 wherever a document begins in between.

    Args:
        log_decay: log alpha [B, N, H, C].
        ratio: From token j to token i of a chunk, exp(G_i - G_j) for i >= j [B, N, H, C, C].
        from_start: From the state before the chunk to a token [B, N, H, C].
        to_end: From a token to the state after the chunk [B, N, H, C].
    """

    log_decay: Tensor
    ratio: Tensor
    from_start: Tensor
    to_end: Tensor

    @property
    def keeps(self) -> Tensor:
        """From the state before the chunk to the one after it [B, N, H, 1, 1]."""
        return self.from_start[..., -1, None, None]


def chunk_decays(log_decay: Tensor, starts: Tensor | None) -> Decays:
    """Cuts log alpha [B, T, H] and the mask of document starts [B, T] into chunks."""
    wide = at_least_fp32(log_decay)
    # A token with a smaller alpha keeps less than the rounding of what it adds. Without the bound, sums over a chunk would lose precision
    # in proportion to their size: ratios of later tokens would be wrong, or NaN.
    log_decay = chunks(wide.clamp(min=math.log(torch.finfo(wide.dtype).eps) - 10))
    total = log_decay.cumsum(-1)
    visible = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).tril()
    from_start, to_end = total.exp(), (total[..., -1:] - total).exp()
    if starts is not None:
        # Documents begun since the start of the chunk: 0 means the document of the incoming state.
        begun = chunks(starts[..., None]).int().cumsum(-1)
        visible = visible & (begun[..., :, None] == begun[..., None, :])
        from_start, to_end = from_start * (begun == 0), to_end * (begun == begun[..., -1:])
    # Masked before exp: above the diagonal the difference is positive and could overflow.
    ratio = (total[..., :, None] - total[..., None, :]).masked_fill(~visible, -torch.inf).exp()
    return Decays(log_decay, ratio, from_start, to_end)


def read_chunks(query: Tensor, key: Tensor, value: Tensor, state: Tensor, ratio: Tensor, gate: Tensor) -> Tensor:
    """The reads of each token, from a state outside its chunk and from the tokens of its chunk [B, N, H, C, V]."""
    return (query * gate[..., None]) @ state + (query @ key.mT * ratio) @ value


def chunks(x: Tensor) -> Tensor:
    """[B, T, H, ...] -> [B, N, H, C, ...]; the padding at the end is 0, which for log alpha means that it leaves the state alone."""
    chunk = min(CHUNK_TOKENS, x.shape[1])
    padding = -x.shape[1] % chunk
    if padding:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding))
    x = x.unflatten(1, (-1, chunk)).transpose(2, 3).contiguous()
    return x if x.dtype == torch.bool else at_least_fp32(x)


def tokens(x: Tensor, length: int) -> Tensor:
    """[B, N, H, C, ...] -> [B, T, H, ...]."""
    return x.transpose(2, 3).flatten(1, 2)[:, :length]
