"""The input of one forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phase8.kernels.reference.cross_entropy import IGNORED_TARGET


@dataclass(frozen=True)
class Microbatch:
    """Inputs and targets of one forward.

    Args:
        tokens: Inputs [B, T].
        targets: The tokens that follow, IGNORED_TARGET where nothing is predicted [B, T].
        starts: True where a document begins, which sees nothing before it [B, T]; None: boundaries are not reset. Where ranks share sequences,
            `tokens` and `targets` are slices, and `starts` that of the whole sequences.
        num_valid: Number of targets that count.
    """

    tokens: Tensor
    targets: Tensor
    starts: Tensor | None
    num_valid: int

    def to(self, device: torch.device) -> Microbatch:
        """A copy on a device."""
        tokens, targets, starts = (None if x is None else x.to(device, non_blocking=True) for x in (self.tokens, self.targets, self.starts))
        return Microbatch(tokens, targets, starts, self.num_valid)

    def slice(self, index: int, count: int) -> Microbatch:
        """One of `count` slices of equal length of every sequence, for ranks that share sequences; each knows all starts of documents."""
        if count == 1:
            return self
        tokens, targets = (x.chunk(count, dim=1)[index].contiguous() for x in (self.tokens, self.targets))
        return Microbatch(tokens, targets, self.starts, int((targets != IGNORED_TARGET).sum()))

    def without_targets(self) -> Microbatch:
        """A copy without targets."""
        return Microbatch(self.tokens, torch.full_like(self.targets, IGNORED_TARGET), self.starts, 0)


def stand_in(batch_size: int, sequence_length: int, *, reset_at_document_boundaries: bool) -> Microbatch:
    """A microbatch of the usual shape without targets, for a rank that has no data but must take part."""
    tokens = torch.zeros(batch_size, sequence_length, dtype=torch.int64)
    starts = None
    if reset_at_document_boundaries:
        starts = torch.zeros(tokens.shape, dtype=torch.bool)
        starts[:, 0] = True
    return Microbatch(tokens, torch.full_like(tokens, IGNORED_TARGET), starts, 0)


def split_sample(sample: dict[str, Tensor], *, reset_at_document_boundaries: bool) -> Microbatch:
    """Splits T + 1 tokens into inputs and targets; with resets, the first token of a document is not predicted from another document."""
    tokens, targets = sample["tokens"][:, :-1], sample["tokens"][:, 1:]
    if not reset_at_document_boundaries:
        return Microbatch(tokens, targets, None, targets.numel())
    starts = sample["document_starts"]
    targets = targets.masked_fill(starts[:, 1:], IGNORED_TARGET)
    return Microbatch(tokens, targets, starts[:, :-1], int((targets != IGNORED_TARGET).sum()))
