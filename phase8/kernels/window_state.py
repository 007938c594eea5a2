"""The state of window attention, and the keys that a piece of a sequence can see.

Shapes: B batch, T tokens, H heads, K head size, W window, G global tokens, P carried tokens (at most W - 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phase8.kernels.running_sum import running_sum


@dataclass(frozen=True)
class WindowState:
    """The keys and values that later tokens need: a constant number, whatever the length.

    Args:
        keys: Keys of the last min(W - 1, seen) tokens [B, P, H, K].
        values: Values of the same tokens [B, P, H, K].
        global_keys: Keys of the first min(G, seen) tokens [B, <=G, H, K].
        global_values: Values of the same tokens.
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

    def copied(self) -> WindowState:
        """The same state in memory of its own."""
        return WindowState(*(part.clone() if isinstance(part, Tensor) else part for part in vars(self).values()))


@dataclass(frozen=True)
class VisibleKeys:
    """Every key that the queries of a piece may see, the carried ones first.

    Args:
        keys: [B, P + T, H, K].
        values: [B, P + T, H, K].
        global_keys: Keys of the first <=G tokens of the sequence [B, <=G, H, K].
        global_values: Values of the same tokens.
        documents: Number of the document of each key [B, P + T]; None: all the same.
        global_documents: The same for the global tokens [B, <=G].
        num_seen: Tokens of the sequence before the first query.
    """

    keys: Tensor
    values: Tensor
    global_keys: Tensor
    global_values: Tensor
    documents: Tensor | None
    global_documents: Tensor | None
    num_seen: int

    def carried(self, window: int, num_queries: int) -> WindowState:
        """The state after the last query; needs documents."""
        keep = slice(max(self.keys.shape[1] - (window - 1), 0), None)
        newest = self.documents[:, -1:]
        return WindowState(
            self.keys[:, keep],
            self.values[:, keep],
            self.global_keys,
            self.global_values,
            self.documents[:, keep] - newest,
            self.global_documents - newest,
            self.num_seen + num_queries,
        )


def empty_window_state(batch_size: int, num_heads: int, head_size: int, *, like: Tensor) -> WindowState:
    """The state before the first token."""
    nothing = like.new_zeros(batch_size, 0, num_heads, head_size)
    documents = torch.zeros(batch_size, 0, dtype=torch.int32, device=like.device)
    return WindowState(nothing, nothing, nothing, nothing, documents, documents, 0)


def visible_keys(k: Tensor, v: Tensor, *, global_tokens: int, starts: Tensor | None, state: WindowState | None) -> VisibleKeys:
    """The carried keys followed by those of this piece.

    Args:
        k: Keys of the piece [B, T, H, K].
        v: Values [B, T, H, K].
        global_tokens: G, counted from the first token of the sequence.
        starts: True where a token begins a document [B, T]; None: nowhere.
        state: The state that earlier pieces carried; None: the sequence begins here.
    """
    documents = None if starts is None else running_sum(starts)
    if state is None:
        global_documents = None if documents is None else documents[:, :global_tokens]
        return VisibleKeys(k, v, k[:, :global_tokens], v[:, :global_tokens], documents, global_documents, 0)
    if documents is None:
        documents = torch.zeros(k.shape[:2], dtype=torch.int32, device=k.device)
    num_new = max(global_tokens - state.global_keys.shape[1], 0)
    return VisibleKeys(
        torch.cat((state.keys, k), 1),
        torch.cat((state.values, v), 1),
        torch.cat((state.global_keys, k[:, :num_new]), 1),
        torch.cat((state.global_values, v[:, :num_new]), 1),
        torch.cat((state.documents, documents), 1),
        torch.cat((state.global_documents, documents[:, :num_new]), 1),
        state.num_seen,
    )
