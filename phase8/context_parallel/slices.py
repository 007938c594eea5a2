"""What a slice of a sequence needs from the slices before it, as the states with which the layers carry on a sequence piece by piece.

The sequence is shared by the ranks of an axis, in their order; each holds T consecutive tokens. A rank fetches the last inputs of the convolution,
the keys and values that its first queries see, and one map of the recurrence's state from each other rank: a number of bytes that does not depend
on T. A slice may be shorter than the window, which then reaches over several ranks.

Shapes: B batch, T tokens of a slice, H heads, K head size, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.context_parallel.fetch import Wanted, fetch_tokens
from phase8.context_parallel.green import green_scan_of_slice
from phase8.distributed.collectives import Axis, gather_tokens
from phase8.kernels.state_map import DecayMap, StateMap
from phase8.kernels.window_state import WindowState


@dataclass(frozen=True)
class EarlierSlices:
    """The slices before this rank's.

    Args:
        axis: Ranks that share each sequence; more than one.
    """

    axis: Axis

    def last_inputs(self, x: Tensor, count: int, starts: Tensor | None) -> Tensor:
        """The inputs before the slice [B, count, C]; those of documents before the last one, and before the sequence, are 0.

        Args:
            x: Inputs of the slice [B, T, C].
            count: Number of inputs.
            starts: True where a token begins a document [B, T]; None: nowhere.
        """
        wanted = self._before(x.shape[1], count)
        [inputs] = fetch_tokens(x, wanted, self.axis)
        if starts is not None:
            [documents] = self._documents(starts, wanted)
            inputs = inputs * (documents == 0)[..., None]
        return F.pad(inputs, (0, 0, count - inputs.shape[1], 0))

    def window_state(self, k: Tensor, v: Tensor, *, window: int, global_tokens: int, starts: Tensor | None) -> WindowState:
        """The state of window attention before the slice; arguments as of `window_attention`."""
        length = k.shape[1]
        wanted = self._before(length, window - 1, global_tokens)
        kept, kept_globals = (part.chunk(2, dim=-1) for part in fetch_tokens(torch.cat((k, v), dim=-1), wanted, self.axis))
        if starts is None:
            numbers = [torch.zeros(part[0].shape[:2], dtype=torch.int32, device=k.device) for part in (kept, kept_globals)]
        else:
            numbers = self._documents(starts, wanted)
        return WindowState(*kept, *kept_globals, *numbers, num_seen=self.axis.index * length)

    def entering_state(self, own: StateMap | DecayMap) -> Tensor:
        """The recurrence's state before the slice [B, H, K, V]; `own` is what this slice does to it."""
        values = own.added.shape[-1]
        # One tensor: one collective, which every rank runs in backward, the first one too.
        maps = gather_tokens(torch.cat((own.matrix, own.added), dim=-1)[None], self.axis)
        state = maps[:0, ..., -values:].sum(0)
        for earlier in maps[: self.axis.index]:
            state = type(own)(earlier[..., :-values], earlier[..., -values:])(state)
        return state

    def green_scan(self, potential: Tensor, energy: Tensor, eta: Tensor, hopping: Tensor, starts: Tensor | None) -> Tensor:
        """The Green function of the slice [B, T, H, 2]; arguments as of the kernel of the same name."""
        return green_scan_of_slice(potential, energy, eta, hopping, starts, self.axis)

    def _before(self, length: int, count: int, first: int | None = None) -> Wanted:
        """For each rank the `count` tokens before its slice, and the `first` ones of the sequence that lie before its slice."""
        begins = range(0, length * self.axis.size, length)
        return [[range(max(begin - count, 0), begin)] + ([] if first is None else [range(min(first, begin))]) for begin in begins]

    @torch.no_grad()
    def _documents(self, starts: Tensor, wanted: Wanted) -> list[Tensor]:
        """Numbers of the documents of the wanted tokens [B, P], of which the token before the slice has number 0, and earlier documents less."""
        numbers = starts.cumsum(1, dtype=torch.int32)
        begun = gather_tokens(numbers[None, :, -1:], self.axis)[: self.axis.index].sum(0, dtype=torch.int32)
        return [found - begun for found in fetch_tokens(numbers + begun, wanted, self.axis)]
