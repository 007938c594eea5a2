"""What a slice of a sequence needs from the slices before it, as the states with which the layers carry on a sequence piece by piece.

The sequence is shared by the ranks of an axis, in their order; each holds T consecutive tokens. A rank fetches the last inputs of the convolution,
the keys and values that its first queries see, and one map of the recurrence's state from each other rank: a number of bytes that does not depend
on T. A slice may be shorter than the window, which then reaches over several ranks.

Where documents begin in the whole sequence every rank knows from its data.

Every exchange begins at once and returns a function that waits for it: what does not need its result may be computed in between.

Shapes: B batch, T tokens of a slice, S tokens of the sequence, H heads, K head size, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.context_parallel.fetch import begin_to_fetch
from phase8.context_parallel.green import green_scan_of_slice
from phase8.distributed.collectives import Axis, begin_to_gather
from phase8.kernels.running_sum import running_sum
from phase8.kernels.state_map import StateMap, state_after
from phase8.kernels.window_state import WindowState
from phase8.shared_sequence import Wanted, wanted_tokens


@dataclass(frozen=True)
class EarlierSlices:
    """The slices before this rank's.

    Args:
        axis: Ranks that share each sequence; more than one.
    """

    axis: Axis

    def own_part(self, starts: Tensor | None, length: int) -> Tensor | None:
        """The part of `starts` [B, S] that is about this slice of `length` tokens [B, T]."""
        return None if starts is None else starts[:, self.axis.index * length :][:, :length]

    def last_inputs(self, x: Tensor, count: int, starts: Tensor | None) -> Callable[[], Tensor]:
        """The inputs before the slice [B, count, C]; those of documents before the last one, and before the sequence, are 0.

        Args:
            x: Inputs of the slice [B, T, C].
            count: Number of inputs.
            starts: True where a token of the sequence begins a document [B, S]; None: nowhere.
        """
        wanted = wanted_tokens(x.shape[1], self.axis.size, before=count)
        fetched = begin_to_fetch(x, wanted, self.axis)

        def end() -> Tensor:
            inputs, _ = fetched()
            if starts is not None:
                documents, _ = self._documents(starts, wanted, x.shape[1])
                inputs = inputs * (documents == 0)[..., None]
            return F.pad(inputs, (0, 0, count - inputs.shape[1], 0))

        return end

    def window_state(self, k: Tensor, v: Tensor, *, window: int, global_tokens: int, starts: Tensor | None) -> Callable[[], WindowState]:
        """The state of window attention before the slice; arguments as of `window_attention`, but `starts` of the whole sequence [B, S]."""
        length = k.shape[1]
        wanted = wanted_tokens(length, self.axis.size, before=window - 1, first=global_tokens)
        fetched = begin_to_fetch(torch.cat((k, v), dim=-1), wanted, self.axis)

        def end() -> WindowState:
            kept, kept_globals = (part.chunk(2, dim=-1) for part in fetched())
            if starts is None:
                numbers = [torch.zeros(part[0].shape[:2], dtype=torch.int32, device=k.device) for part in (kept, kept_globals)]
            else:
                numbers = self._documents(starts, wanted, length)
            return WindowState(*kept, *kept_globals, *numbers, num_seen=self.axis.index * length)

        return end

    def all_keys(self, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of all tokens before the slice [B, P, H, K], and the numbers of their documents [B, P]; `starts` is [B, S]."""
        length = k.shape[1]
        wanted = wanted_tokens(length, self.axis.size, before=length * self.axis.size)
        kept, _ = begin_to_fetch(torch.cat((k, v), dim=-1), wanted, self.axis)()
        return *kept.chunk(2, dim=-1), self._documents(starts, wanted, length)[0]

    def entering_state(self, own: StateMap) -> Callable[[], Tensor]:
        """The delta rule's state before the slice [B, H, K, V]; `own` is what this slice does to it."""
        values = own.added.shape[-1]
        # One tensor: one collective, which every rank runs in backward, the first one too.
        told = begin_to_gather(torch.cat((own.matrix, own.added), dim=-1)[None], self.axis)

        def end() -> Tensor:
            earlier = told()[: self.axis.index]
            return state_after(StateMap, earlier[..., :-values], earlier[..., -values:])

        return end

    def green_scan(self, potential: Tensor, energy: Tensor, eta: Tensor, hopping: Tensor, starts: Tensor | None) -> Tensor:
        """The Green function of the slice [B, T, H, 2]; arguments as of the kernel of the same name."""
        return green_scan_of_slice(potential, energy, eta, hopping, starts, self.axis)

    def _documents(self, starts: Tensor, wanted: Wanted, length: int) -> list[Tensor]:
        """Numbers of the documents of the wanted tokens [B, P], of which the token before the slice has number 0, and earlier documents less."""
        numbers = running_sum(starts)
        newest = numbers[:, : self.axis.index * length][:, -1:].sum(1, keepdim=True, dtype=torch.int32)  # 0 where nothing is before the slice
        return [numbers[:, tokens.start : tokens.stop] - newest for tokens in wanted[self.axis.index]]
