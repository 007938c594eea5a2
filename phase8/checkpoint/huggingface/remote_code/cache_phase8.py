"""What the model keeps between two pieces of a sequence: the same size at any length, but for layers of full attention.

Shapes: B batch, H heads, J heads of keys and values, K head size, W window, G global tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class LayerState:
    """The state of a layer; None for what the layer does not have, or has not begun.

    Args:
        convolution: Last taps - 1 inputs of the convolution [B, taps - 1, (H + 2 J) K].
        keys: Keys of the last W - 1 tokens at most, the newest last; of a row that has seen fewer, the first ones mean nothing [B, <W, J, K].
        values: Their values.
        global_keys: Keys of the first G tokens [B, G, J, K].
        global_values: Their values.
        memory: State of the recurrence, fp32 [B, H, K, K].
        chain: The chain's Green function of the last token, fp32 [B, H, 2].
    """

    convolution: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    global_keys: Tensor | None = None
    global_values: Tensor | None = None
    memory: Tensor | None = None
    chain: Tensor | None = None

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replaces every tensor by what a function makes of it."""
        for field in fields(self):
            value = vars(self)[field.name]
            if value is not None:
                setattr(self, field.name, function(value))


class Phase8Cache:
    """The states of all layers, and how much each row has read. It has what `generate` asks a cache for, and cannot go back to earlier tokens.

    Args:
        num_layers: Number of layers.
    """

    is_compileable = False
    is_croppable = False
    is_linear = ()  # by layer; the model finds by itself which tokens are new

    def __init__(self, num_layers: int):
        self.layers = [LayerState() for _ in range(num_layers)]
        self.num_columns = 0  # tokens read, the masked ones included
        self.seen: Tensor | None = None  # tokens read without the masked ones, of all rows [1] or of each [B]

    def __len__(self) -> int:
        return len(self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens read, the masked ones included; it is the same for all layers."""
        return self.num_columns

    def advance(self, num_columns: int, lengths: Tensor | None, seen: Tensor) -> None:
        """Counts a piece that was read: its columns, the tokens of each row (None: all), and those read before."""
        self.num_columns += num_columns
        self.seen = seen + (num_columns if lengths is None else lengths)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the rows with these numbers, for beam search."""
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Takes the rows with these numbers."""
        self._change(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Forgets everything."""
        self.__init__(len(self.layers))

    def _change(self, function: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            layer.change(function)
        if self.seen is not None and len(self.seen) > 1:
            self.seen = function(self.seen)

    def seen_before(self, device: torch.device) -> Tensor:
        """Number of tokens that the rows have read [1 or B]."""
        return torch.zeros(1, dtype=torch.long, device=device) if self.seen is None else self.seen
