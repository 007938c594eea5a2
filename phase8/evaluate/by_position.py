"""The loss of a model on held-out sequences, for each source and for each place in the sequence.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.config.schema import DataSection
from phase8.data.loader import SequenceDataset, build_loader, evaluation_microbatches
from phase8.data.microbatch import Microbatch
from phase8.data.sources import source_names
from phase8.errors import OutOfMemoryError
from phase8.kernels.reference.cross_entropy import IGNORED_TARGET
from phase8.model.model import LanguageModel

_LOGITS_AT_ONCE = 1 << 28  # numbers of fp32: 1 GiB


@dataclass(frozen=True)
class PlaceLoss:
    """The loss at the positions first <= i < end of a sequence.

    Args:
        first: First position.
        end: Position after the last one.
        loss: Mean in nats per token; None: no token is predicted there.
        num_tokens: Predicted tokens.
    """

    first: int
    end: int
    loss: float | None
    num_tokens: int


@dataclass(frozen=True)
class SourceResult:
    """The loss on one source.

    Args:
        name: Name of the source.
        loss: Mean in nats per token.
        num_tokens: Predicted tokens.
        num_sequences: Sequences.
        places: The loss by place; each range is twice as long as the one before it.
    """

    name: str
    loss: float
    num_tokens: int
    num_sequences: int
    places: tuple[PlaceLoss, ...]

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss)


def evaluate_sources(
    model: LanguageModel,
    dataset: SequenceDataset,
    section: DataSection,
    *,
    num_sequences: int,
    micro_batch_size: int,
    device: torch.device,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[SourceResult]:
    """Measures the loss on every source, on the sequences that an evaluation of a training run takes.

    Args:
        model: A whole model.
        dataset: The sequences.
        section: Settings of the data: workers, and whether document boundaries are reset.
        num_sequences: Sequences in all, evenly spread over each source.
        micro_batch_size: Sequences of a forward.
        device: Device of the model.
        on_progress: Called with the number of sequences done and in all.

    Raises:
        DataError: The data cannot be read.
        OutOfMemoryError: A microbatch does not fit into the device's memory.
    """
    by_source = evaluation_microbatches(dataset, num_samples=num_sequences, micro_batch_size=micro_batch_size)
    names, total = source_names([source.prefix for source in dataset.sources]), sum(len(batch) for batches in by_source for batch in batches)
    found, done = [], 0
    for name, batches in zip(names, by_source, strict=True):
        sums, counts = torch.zeros(2, dataset.sequence_length, dtype=torch.float64, device=device)
        for batch in build_loader(dataset, section, sample_numbers=batches):
            microbatch = batch.to(device)
            losses = _token_losses(model, microbatch)
            sums += losses.sum(0, dtype=torch.float64)
            counts += (microbatch.targets != IGNORED_TARGET).sum(0)
            done += len(losses)
            on_progress(done, total)
        found.append(_result(name, sums.cpu(), counts.cpu(), num_sequences=sum(map(len, batches))))
    return found


@torch.inference_mode()
def _token_losses(model: LanguageModel, microbatch: Microbatch) -> Tensor:
    """The cross-entropy of every target, 0 where there is none, fp32 [B, T]; logits are formed for a part of the tokens at a time."""
    try:
        hidden, _ = model(microbatch.tokens, microbatch.starts)
        rows, targets = hidden.flatten(0, 1), microbatch.targets.flatten()
        at_once = max(1, _LOGITS_AT_ONCE // model.section.vocab_size)
        parts = zip(rows.split(at_once), targets.split(at_once), strict=True)
        losses = [F.cross_entropy(model.logits(part), aims, ignore_index=IGNORED_TARGET, reduction="none") for part, aims in parts]
        return torch.cat(losses).view(microbatch.targets.shape)
    except torch.OutOfMemoryError as error:
        batch, length = microbatch.tokens.shape
        raise OutOfMemoryError(f"{batch} sequences of {length} tokens do not fit into the device's memory; give a smaller --batch-size") from error


def _result(name: str, sums: Tensor, counts: Tensor, *, num_sequences: int) -> SourceResult:
    places = tuple(_place(sums, counts, first, end) for first, end in _ranges(len(sums)))
    return SourceResult(name, float(sums.sum() / counts.sum()), int(counts.sum()), num_sequences, places)


def _place(sums: Tensor, counts: Tensor, first: int, end: int) -> PlaceLoss:
    num_tokens = int(counts[first:end].sum())
    return PlaceLoss(first, end, float(sums[first:end].sum()) / num_tokens if num_tokens else None, num_tokens)


def _ranges(length: int) -> list[tuple[int, int]]:
    """0 to 63, 64 to 127, 128 to 255, ... up to a length."""
    bounds = [0, *(1 << power for power in range(6, length.bit_length()) if 1 << power < length), length]
    return list(itertools.pairwise(bounds))


def position_table(found: Sequence[SourceResult]) -> str:
    """A Markdown table: a row for each source, a column for each range of positions."""
    ranges = [f"{place.first:,} to {place.end - 1:,}" for place in found[0].places]
    rows = [["loss, nats per token", "all", "perplexity", *ranges], ["---"] * (3 + len(ranges))]
    for source in found:
        places = ["" if place.loss is None else f"{place.loss:.4f}" for place in source.places]
        rows.append([source.name, f"{source.loss:.4f}", f"{source.perplexity:.3f}", *places])
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
