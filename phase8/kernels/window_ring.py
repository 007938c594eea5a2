"""Window attention of one token to keys and values that are kept in a ring and written in place.

The first G slots hold the first G tokens of the sequence, and the token at position p has slot G + p mod W. Each sequence has a position of its own,
on the device, so that one recording serves every position.

Shapes: B sequences, H heads of queries, J heads of keys and values, K head size, W window, G global tokens, S = G + W slots.

Head h of the queries reads head h J / H of the keys, rounded down.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.kernels.dtypes import at_least_fp32
from phase8.kernels.reference.window_attention import Scores
from phase8.kernels.window_state import WindowState


@dataclass(frozen=True)
class RingPlace:
    """The places of one token of each sequence, the same in all layers of a window.

    Args:
        rows: Number of each sequence [B, 1], or with global tokens [B, 2].
        slots: Slots that the token is written to, of the same shape.
        bias: Summand of the scores: 0 for visible slots, else -inf [B, 1, 1, slots that are in use].
    """

    rows: Tensor
    slots: Tensor
    bias: Tensor


def ring_place(position: Tensor, *, window: int, global_tokens: int, dtype: torch.dtype, longest: int | None = None) -> RingPlace:
    """The places of tokens.

    Args:
        position: Their positions, int64 [B].
        window: Window W.
        global_tokens: Global tokens G.
        dtype: Dtype of the queries.
        longest: The largest of the positions or more, so that slots beyond it are not read; None: all slots are read.
    """
    device = position.device
    last = global_tokens + position % window
    slots = last[:, None] if global_tokens == 0 else torch.stack((position.where(position < global_tokens, last), last), dim=1)
    # Slot W + s is visible from position s on. A global token counts once: through the window while it is inside, through its own slot afterwards.
    visible_from = torch.arange(window if longest is None else min(window, longest + 1), device=device)
    if global_tokens:
        visible_from = torch.cat((torch.arange(window, window + global_tokens, device=device), visible_from))
    hidden = visible_from > position[:, None]
    bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
    rows = torch.arange(len(position), device=device)[:, None].expand_as(slots)
    return RingPlace(rows, slots, bias[:, None, None])


def ring_attention_step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, place: RingPlace, beta: Tensor | None) -> Tensor:
    """Writes a token to its slots, and computes its attention to all that it sees.

    Args:
        q: Query [B, H, K].
        k: Key [B, J, K].
        v: Value [B, J, K].
        keys: Keys of all slots [B, S, J, K], written in place.
        values: Values of all slots, written in place.
        place: Places of the token.
        beta: Inverse temperature of the `lorentz` score [H], which has a head of keys for each head of queries; None: `dot` score.

    Returns:
        y [B, H, K].
    """
    keys.index_put_((place.rows, place.slots), k[:, None].expand(-1, place.slots.shape[1], -1, -1))
    values.index_put_((place.rows, place.slots), v[:, None].expand(-1, place.slots.shape[1], -1, -1))
    keys, values = keys[:, : place.bias.shape[-1]], values[:, : place.bias.shape[-1]]
    if beta is None:
        queries = q.unflatten(1, (k.shape[1], -1))  # the heads that share a key are its queries, so that no key is copied
        return F.scaled_dot_product_attention(queries, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=place.bias).flatten(1, 2)
    scores = Scores(at_least_fp32(q)[:, None, None], at_least_fp32(keys)[:, None], beta).values[:, 0]
    weights = (scores + place.bias).softmax(-1).to(values.dtype)
    return (weights @ values.transpose(1, 2))[:, :, 0]


def fill_ring(keys: Tensor, values: Tensor, rows: Tensor, state: WindowState, *, window: int) -> None:
    """Copies the state after the first tokens of some sequences to their slots.

    Args:
        keys: Keys of all slots [B, S, J, K], written in place.
        values: Values of all slots.
        rows: Numbers of the sequences [n].
        state: State of n sequences.
        window: W.
    """
    num_kept, num_globals, global_tokens = state.keys.shape[1], state.global_keys.shape[1], keys.shape[1] - window
    positions = torch.arange(state.num_seen - num_kept, state.num_seen, device=keys.device)
    slots = global_tokens + positions % window
    keys[rows[:, None], slots], values[rows[:, None], slots] = state.keys, state.values
    keys[rows, :num_globals], values[rows, :num_globals] = state.global_keys, state.global_values
