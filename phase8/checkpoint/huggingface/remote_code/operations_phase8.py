"""The operations of the Phase 8 block in plain PyTorch. Each reads a piece of a sequence and what earlier pieces have left.

A row may have fewer tokens in a piece than others: what follows its own tokens is arbitrary, is seen by none of them, and leaves no trace.

Shapes: B batch, T tokens of the piece, P carried tokens, H heads, J heads of keys and values (H, but for grouped-query attention), K head size,
W window, G global tokens, N chunks, C tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ARCCOSH_EPS = 1e-3
QUERIES_AT_ONCE = 512
CHUNK_TOKENS = 64
_ENDS = ("low", "high")
_Map = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Piece:
    """The place of a piece in each sequence.

    Args:
        seen: Number of tokens before the piece, the same for all rows [1] or one for each [B].
        lengths: Number of tokens of each row in the piece [B]; None: T in all of them.
        angles: Rotary angles of its tokens, fp32 [1 or B, T, K/2].
    """

    seen: Tensor
    lengths: Tensor | None
    angles: Tensor

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Piece:
        """The same on another device; accelerate calls it where layers are spread over several."""
        lengths = None if self.lengths is None else self.lengths.to(device, non_blocking=non_blocking)
        return Piece(self.seen.to(device, non_blocking=non_blocking), lengths, self.angles.to(device, non_blocking=non_blocking))

    def is_token(self, num_tokens: int) -> Tensor | None:
        """Whether a place of a row is one of its tokens [B, T]; None: all are."""
        if self.lengths is None:
            return None
        return torch.arange(num_tokens, device=self.lengths.device) < self.lengths[:, None]

    def newest(self, x: Tensor, num_carried: int, num_kept: int) -> Tensor:
        """The last `num_kept` entries of each row, from the carried ones and those of the piece [B, P + T, ...]; none may be missing."""
        if self.lengths is None:
            return x[:, x.shape[1] - num_kept :]
        places = num_carried + self.lengths[:, None] - num_kept + torch.arange(num_kept, device=x.device)
        return _take(x, places)


def _take(x: Tensor, places: Tensor) -> Tensor:
    """Entries of each row [B, n, ...] at places [B, n]; a place before the first entry gives the first."""
    return x.take_along_dim(places.clamp(min=0).view(*places.shape, *[1] * (x.dim() - 2)), dim=1)


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or unchanged when it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotary_angles(positions: Tensor, head_size: int, *, base: float, scaling: Mapping[str, Any]) -> Tensor:
    """Angles of positions [rows, T], fp32 [rows, T, K/2], computed in fp64 where the device has it, so that far positions keep their phase."""
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    frequencies = base ** (-torch.arange(0, head_size, 2, dtype=wide, device=positions.device) / head_size)
    if scaling["type"] == "linear":
        frequencies = frequencies / scaling["factor"]
    elif scaling["type"] == "llama3":  # low frequencies are divided, high ones are kept, and those between are blended
        turns, low, high = scaling["original_sequence_length"] * frequencies / (2 * torch.pi), *(scaling[f"{end}_frequency_factor"] for end in _ENDS)
        frequencies = (frequencies / scaling["factor"]).lerp(frequencies, ((turns - low) / (high - low)).clamp(0, 1))
    return torch.remainder(positions[..., None] * frequencies, 2 * torch.pi).float()


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """`x` [B, T, H, K] turned by angles; channel i pairs with channel i + K/2."""
    first, second = at_least_fp32(x).chunk(2, dim=-1)
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


def causal_convolution(x: Tensor, weight: Tensor, before: Tensor | None, piece: Piece) -> tuple[Tensor, Tensor]:
    """A depthwise convolution along the sequence.

    Args:
        x: Input [B, T, channels].
        weight: Taps of each channel, the last one for the token itself [channels, taps].
        before: The taps - 1 inputs before the piece; None: the sequence begins here.
        piece: The place of the piece.

    Returns:
        The output, and the inputs to carry on [B, taps - 1, channels].
    """
    kept = weight.shape[1] - 1
    padded = F.pad(x, (0, 0, kept, 0)) if before is None else torch.cat((before, x), dim=1)
    y = F.conv1d(padded.transpose(1, 2), weight[:, None].to(x.dtype), groups=weight.shape[0]).transpose(1, 2)
    return y, piece.newest(padded, kept, kept)


def attention(
    q: Tensor, keys: Tensor, values: Tensor, shared: tuple[Tensor, Tensor] | None, *, window: int | None, beta: Tensor | None, piece: Piece
) -> Tensor:
    """Causal attention to the window and to the first tokens of the sequence, one block of queries after the other [B, T, H, K].

    Args:
        q: Queries [B, T, H, K].
        keys: Carried keys and those of the piece [B, P + T, J, K].
        values: Their values.
        shared: Keys and values of the first G tokens of the sequence [B, G, H, K]; None: no token is global.
        window: W, the token itself included; None: all earlier tokens.
        beta: Inverse temperature of the hyperbolic score [H]; None: scaled dot product.
        piece: The place of the piece.
    """
    num_queries, num_carried = q.shape[1], keys.shape[1] - q.shape[1]
    if window is None and num_carried == 0 and beta is None:
        return _swapped(_dot_product_attention(*map(_swapped, (q, keys, values)), None))
    at_once = num_queries if window is None else max(window, QUERIES_AT_ONCE)
    found = []
    for begin in range(0, num_queries, at_once):
        end = min(begin + at_once, num_queries)
        first = 0 if window is None else max(num_carried + begin - (window - 1), 0)
        query = torch.arange(begin, end, device=q.device)[:, None]
        key = torch.arange(first - num_carried, end, device=q.device)
        visible = (key <= query) & (key >= -piece.seen[:, None, None])
        if window is not None:
            visible = visible & (query - key < window)
        block_keys, block_values = keys[:, first : num_carried + end], values[:, first : num_carried + end]
        if shared is not None and window is not None:
            # A global token counts once: through the window while it is inside, as a global one afterwards.
            outside = torch.arange(shared[0].shape[1], device=q.device) <= query + piece.seen[:, None, None] - window
            visible = torch.cat((visible.expand(len(outside), -1, -1), outside), dim=-1)
            block_keys, block_values = torch.cat((block_keys, shared[0]), dim=1), torch.cat((block_values, shared[1]), dim=1)
        found.append(_attend(*map(_swapped, (q[:, begin:end], block_keys, block_values)), visible[:, None], beta))
    return _swapped(torch.cat(found, dim=2))


def first_tokens(x: Tensor, before: Tensor | None, num_global: int, piece: Piece) -> Tensor:
    """Entries of the first G tokens of the sequence, as far as they are known, zeros beyond [B, G, H, K]; x: those of the piece [B, T, H, K]."""
    places = torch.arange(num_global, device=x.device) - piece.seen[:, None]
    is_here = (places >= 0) & (places < (x.shape[1] if piece.lengths is None else piece.lengths[:, None]))
    here = _take(x, places.clamp(max=x.shape[1] - 1).expand(x.shape[0], -1))
    return torch.where(is_here[..., None, None], here, torch.zeros_like(here) if before is None else before)


def _swapped(x: Tensor) -> Tensor:
    """[B, T, H, K] -> [B, H, T, K], or back."""
    return x.transpose(1, 2)


def _dot_product_attention(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
    """Attention [B, H, queries, K] to the visible keys [B, J, keys, K]; None: causal. Head h of the queries reads head h J / H, rounded down."""
    queries_per_key = q.shape[1] // keys.shape[1]
    if queries_per_key > 1 and q.shape[2] == 1 and visible is not None:  # the heads that share a key are its queries, and no key is copied
        return F.scaled_dot_product_attention(q.unflatten(1, (-1, queries_per_key)).squeeze(3), keys, values, attn_mask=visible).reshape(q.shape)
    if queries_per_key > 1:
        keys, values = (x.repeat_interleave(queries_per_key, dim=1) for x in (keys, values))
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=visible, is_causal=visible is None)


def _attend(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, beta: Tensor | None) -> Tensor:
    """Attention [B, H, queries, K] to the visible keys.

    The hyperbolic score is -beta times the distance of q and k, lifted to the hyperboloid q0^2 - |q|^2 = 1: log(1 + u + sqrt(u (u + 2) + eps)) with
    u = q0 k0 - q.k - 1.
    """
    if beta is None:
        return _dot_product_attention(q, keys, values, visible)
    with torch.autocast(q.device.type, enabled=False):
        q, wide_keys = at_least_fp32(q), at_least_fp32(keys)
        query_height, key_height = _height(q)[..., None], _height(wide_keys)[..., None, :]
        u = (query_height * (1 + key_height) + (key_height - q @ wide_keys.mT)).clamp(min=0)
        scores = torch.log(1 + u + (u * (u + 2) + ARCCOSH_EPS).sqrt()) * -at_least_fp32(beta)[:, None, None]
        return scores.masked_fill(~visible, -torch.inf).softmax(-1).to(values.dtype) @ values


def _height(x: Tensor) -> Tensor:
    """Height above 1 on the hyperboloid, sqrt(1 + |x|^2) - 1, without cancellation."""
    square = x.square().sum(-1)
    return square / (1 + (1 + square).sqrt())


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, rate: Tensor | None, memory: Tensor | None, piece: Piece
) -> tuple[Tensor, Tensor]:
    """The gated recurrence of the global path, in chunks: y_i = S_i^T q_i, S_i = alpha_i S_{i-1} + k_i u_i^T.

    Gated linear attention writes u_i = (1 - alpha_i) / sqrt(K) v_i, the gated delta rule u_i = rate_i (v_i - alpha_i S_{i-1}^T k_i).

    Args:
        q: Queries [B, T, H, K].
        k: Keys.
        v: Values.
        log_decay: log alpha, not positive, fp32 [B, T, H].
        rate: Share of what a key holds that is replaced, over the squared length of the key, fp32 [B, T, H]; None: gated linear attention.
        memory: S before the piece, fp32 [B, H, K, K]; None: 0.
        piece: The place of the piece.

    Returns:
        y in the dtype of v, and S after the last token of each row.
    """
    num_tokens, is_token = q.shape[1], piece.is_token(q.shape[1])
    # Smaller decays keep less than rounding, and would spoil the sums of others.
    log_decay = log_decay.clamp(min=math.log(torch.finfo(log_decay.dtype).eps) - 10)
    if is_token is not None:  # a decay of 1 and a rate of 0 leave the memory alone
        log_decay = log_decay.masked_fill(~is_token[..., None], 0.0)
        rate = None if rate is None else rate.masked_fill(~is_token[..., None], 0.0)
    with torch.autocast(q.device.type, enabled=False):
        queries, keys, values, logs = (_chunks(x) for x in (q, k, v, log_decay))
        total = logs.cumsum(-1)
        below = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=q.device).tril()
        ratio = (total[..., :, None] - total[..., None, :]).masked_fill(~below, -torch.inf).exp()
        from_start, to_end = total.exp()[..., None], (total[..., -1:] - total).exp()[..., None]
        if rate is None:
            written, replaced = values * (-torch.expm1(logs) * q.shape[-1] ** -0.5)[..., None], None
        else:
            rates = _chunks(rate)[..., None]
            system = rates * (keys @ keys.mT * ratio.tril(-1))
            right = torch.cat((rates * values, from_start * rates * keys), dim=-1)
            written, replaced = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split(v.shape[-1], dim=-1)
        kept_keys, keeps = (to_end * keys).mT, from_start[..., -1:, :]
        memory = keys.new_zeros(*keys[:, 0].shape[:2], k.shape[-1], v.shape[-1]) if memory is None else memory
        before, all_written = [], []
        for chunk in range(keys.shape[1]):
            before.append(memory)
            all_written.append(written[:, chunk] if replaced is None else written[:, chunk] - replaced[:, chunk] @ memory)
            memory = keeps[:, chunk] * memory + kept_keys[:, chunk] @ all_written[-1]
        y = from_start * queries @ torch.stack(before, 1) + (queries @ keys.mT * ratio) @ torch.stack(all_written, 1)
    return y.transpose(2, 3).flatten(1, 2)[:, :num_tokens].to(v.dtype), memory


def _chunks(x: Tensor) -> Tensor:
    """[B, T, H, ...] -> fp32 or wider [B, N, H, C, ...], padded with zeros."""
    size = min(CHUNK_TOKENS, x.shape[1])
    x = F.pad(at_least_fp32(x), (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % size))
    return x.unflatten(1, (-1, size)).transpose(2, 3)


def green_chain(
    potential: Tensor, energy: Tensor, eta: Tensor, hopping: Tensor, before: Tensor | None, piece: Piece
) -> tuple[Tensor, Tensor]:
    """The causal Green function of a tridiagonal operator, g_i = 1 / (E + i eta - a_i - b2 g_{i-1}): a product of Möbius maps, by doubling.

    Args:
        potential: a, fp32 [B, T, H].
        energy: E [H].
        eta: Imaginary part of the energy, positive [H].
        hopping: b2, not negative [H].
        before: g before the piece [B, H, 2]; None: 0.
        piece: The place of the piece.

    Returns:
        g [B, T, H, 2], real and imaginary part, and that of the last token of each row [B, H, 2].
    """
    denominator = torch.complex(energy - potential, eta.expand_as(potential))
    zero = torch.zeros_like(denominator)
    maps: _Map = (zero, torch.ones_like(denominator), zero - hopping, denominator)
    distance = 1
    while distance < potential.shape[1]:
        composed = _compose(tuple(entry[:, :-distance] for entry in maps), tuple(entry[:, distance:] for entry in maps))
        maps = tuple(torch.cat((entry[:, :distance], rest), dim=1) for entry, rest in zip(maps, composed, strict=True))
        distance *= 2
    a, b, c, d = maps
    first = zero[:, :1] if before is None else torch.view_as_complex(before.contiguous())[:, None]
    g = (a * first + b) / (c * first + d)
    return torch.view_as_real(g), torch.view_as_real(piece.newest(torch.cat((first, g), dim=1), 1, 1)[:, 0])


def _compose(early: _Map, late: _Map) -> _Map:
    """The matrix product late @ early; a Möbius map has no scale, so the largest entry may be made 1."""
    (a1, b1, c1, d1), (a2, b2, c2, d2) = early, late
    product = (a2 * a1 + b2 * c1, a2 * b1 + b2 * d1, c2 * a1 + d2 * c1, c2 * b1 + d2 * d1)
    scale = torch.stack([torch.view_as_real(entry.detach()).abs().amax(-1) for entry in product]).amax(0).reciprocal()
    return tuple(entry * scale for entry in product)
