"""The input of one forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from phase8.kernels.reference.cross_entropy import IGNORED_TARGET
from phase8.shared_sequence import WHOLE, SequenceSlice


@dataclass(frozen=True)
class Microbatch:
    """Inputs and targets of one forward: B sequences of T tokens, of which this rank has a slice of S tokens (S = T unless ranks share sequences).

    Args:
        tokens: Inputs of the slice [B, S].
        targets: The tokens that follow, IGNORED_TARGET where nothing is predicted [B, S].
        starts: True where a document begins, which sees nothing before it, in the whole sequences [B, T]; None: boundaries are not reset.
        num_valid: Number of targets of the slice that count.
    """

    tokens: Tensor
    targets: Tensor
    starts: Tensor | None
    num_valid: int

    def to(self, device: torch.device) -> Microbatch:
        """A copy on a device, also of what is there already."""
        return self._copied(lambda x: x.to(device, non_blocking=True, copy=True))

    def pin_memory(self) -> Microbatch:
        """A copy in page-locked memory; torch's loader calls it."""
        return self._copied(lambda x: x.pin_memory())

    def _copied(self, copy: Callable[[Tensor], Tensor]) -> Microbatch:
        return Microbatch(copy(self.tokens), copy(self.targets), None if self.starts is None else copy(self.starts), self.num_valid)

    def without_targets(self) -> Microbatch:
        """A copy without targets."""
        return Microbatch(self.tokens, torch.full_like(self.targets, IGNORED_TARGET), self.starts, 0)


def stand_in(batch_size: int, sequence_length: int, *, reset_at_document_boundaries: bool, own_slice: SequenceSlice = WHOLE) -> Microbatch:
    """A microbatch of the usual shape without targets, for a rank that has no data but must take part.

    Args:
        batch_size: B.
        sequence_length: T.
        reset_at_document_boundaries: Whether the microbatch has `starts`.
        own_slice: Slice of the sequences that the rank has.
    """
    tokens = torch.zeros(batch_size, len(own_slice.tokens(sequence_length)), dtype=torch.int64)
    starts = None
    if reset_at_document_boundaries:
        starts = torch.zeros(batch_size, sequence_length, dtype=torch.bool)
        starts[:, 0] = True
    return Microbatch(tokens, torch.full_like(tokens, IGNORED_TARGET), starts, 0)


def split_sample(sample: dict[str, Tensor], *, reset_at_document_boundaries: bool, own_slice: SequenceSlice = WHOLE) -> Microbatch:
    """Splits S + 1 tokens into inputs and targets; with resets, the first token of a document is not predicted from another document.

    The tensors are contiguous: a view with gaps is copied to a device by way of other memory, which is not page-locked, and the host waits for it.

    Args:
        sample: `tokens`, those of the slice and the one after them [B, S + 1], and where boundaries are reset, `document_starts` of the whole
            sequences and of the token after them [B, T + 1].
        reset_at_document_boundaries: Whether documents see nothing of the documents before them.
        own_slice: Slice of the sequences that `tokens` are.
    """
    tokens, targets = sample["tokens"][:, :-1].contiguous(), sample["tokens"][:, 1:].contiguous()
    if not reset_at_document_boundaries:
        return Microbatch(tokens, targets, None, targets.numel())
    starts = sample["document_starts"]
    own = own_slice.tokens(starts.shape[1] - 1)
    targets = targets.masked_fill(starts[:, own.start + 1 : own.stop + 1], IGNORED_TARGET)
    return Microbatch(tokens, targets, starts[:, :-1].contiguous(), int((targets != IGNORED_TARGET).sum()))
