"""What one forward is given."""

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
        targets: The tokens that follow, IGNORED_TARGET where nothing is to be predicted [B, T].
        starts: True where a document begins that sees nothing before it [B, T]; None: boundaries are not reset.
        num_valid: Number of targets that count.
    """

    tokens: Tensor
    targets: Tensor
    starts: Tensor | None
    num_valid: int

    def to(self, device: torch.device) -> Microbatch:
        """The same on a device."""
        tokens, targets, starts = (None if x is None else x.to(device, non_blocking=True) for x in (self.tokens, self.targets, self.starts))
        return Microbatch(tokens, targets, starts, self.num_valid)

    def without_targets(self) -> Microbatch:
        """The same with nothing to predict."""
        return Microbatch(self.tokens, torch.full_like(self.targets, IGNORED_TARGET), self.starts, 0)


def stand_in(batch_size: int, sequence_length: int, *, reset_at_document_boundaries: bool) -> Microbatch:
    """A microbatch of the usual shape with nothing to predict, for a rank that has none and takes part all the same."""
    tokens = torch.zeros(batch_size, sequence_length, dtype=torch.int64)
    starts = None
    if reset_at_document_boundaries:
        starts = torch.zeros(tokens.shape, dtype=torch.bool)
        starts[:, 0] = True
    return Microbatch(tokens, torch.full_like(tokens, IGNORED_TARGET), starts, 0)


def split_sample(sample: dict[str, Tensor], *, reset_at_document_boundaries: bool) -> Microbatch:
    """Inputs and targets of T + 1 tokens; with resets, the first token of a document is not predicted from another document."""
    tokens, targets = sample["tokens"][:, :-1], sample["tokens"][:, 1:]
    if not reset_at_document_boundaries:
        return Microbatch(tokens, targets, None, targets.numel())
    starts = sample["document_starts"]
    targets = targets.masked_fill(starts[:, 1:], IGNORED_TARGET)
    return Microbatch(tokens, targets, starts[:, :-1], int((targets != IGNORED_TARGET).sum()))
