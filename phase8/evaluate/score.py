"""The losses of a model on pieces of its sources, summed by source and by position.

Every rank takes every n-th batch. Batches and what is in them do not depend on the number of ranks, and sums are in float64: the counts of several
ranks are exactly those of one, and losses differ by rounding.

Shapes: B pieces, L tokens of the longest of them, T tokens of a forward, V vocabulary, S sources, R ranges of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.distributed.collectives import ALONE, Axis, maximum_over, sum_over
from phase8.errors import DataError, OutOfMemoryError
from phase8.evaluate.pieces import SHAPE_STEP, Piece, batches
from phase8.evaluate.results import TOTAL, SourceResult, position_bounds, source_result
from phase8.evaluate.sources import Source, digest_of
from phase8.kernels.reference.cross_entropy import IGNORED_TARGET
from phase8.model.model import LanguageModel

_LOGITS_AT_ONCE = 1 << 28  # numbers of fp32: 1 GiB

OnProgress = Callable[[int, int], None]


def ignore_progress(done: int, total: int) -> None:
    """A progress callback that does nothing."""


@dataclass(frozen=True)
class Forward:
    """How pieces are read.

    Args:
        length: T, tokens of a forward; a longer piece is read T tokens at a time with carried state.
        batch_size: Pieces side by side; of several ranks, the smallest number counts.
        is_adjustable: More pieces are read side by side where they are shorter than T, and half as many where they do not fit into the memory.
        device: Device of the model.
    """

    length: int
    batch_size: int
    is_adjustable: bool
    device: torch.device


class _Sums:
    """Sums of a rank: losses and counts [S, R], bytes and tokens without known bytes [S]."""

    def __init__(self, num_sources: int, bounds: Sequence[int], device: torch.device):
        self._num_ranges = len(bounds) - 1
        self._inner_bounds = torch.tensor(bounds[1:-1], device=device)
        self.losses = torch.zeros(num_sources * self._num_ranges, dtype=torch.float64, device=device)
        self.counts = torch.zeros(num_sources * self._num_ranges, dtype=torch.int64, device=device)
        self.num_bytes, self.num_unknown = (torch.zeros(num_sources, dtype=torch.int64) for _ in range(2))

    def add(self, losses: Tensor, is_counted: Tensor, *, sources: Tensor, first_position: int) -> None:
        """Adds the losses [B, T] of predictions at consecutive positions, those that count, of pieces of the sources [B]."""
        positions = torch.arange(first_position, first_position + losses.shape[1], device=losses.device)
        places = sources[:, None] * self._num_ranges + torch.bucketize(positions, self._inner_bounds, right=True)
        places = places[is_counted]
        of_losses = torch.zeros_like(self.losses).index_add_(0, places, losses[is_counted].double())
        of_counts = torch.zeros_like(self.counts).index_add_(0, places, torch.ones_like(places))
        self.losses += of_losses  # no memory is needed any more: what does not fit must not be counted in part
        self.counts += of_counts

    def add_bytes(self, source: int, bytes_of_tokens: np.ndarray) -> None:
        """Adds the bytes of predicted tokens of a source, -1 where they are not known."""
        self.num_bytes[source] += int(bytes_of_tokens[bytes_of_tokens > 0].sum())
        self.num_unknown[source] += int((bytes_of_tokens < 0).sum())

    def over_ranks(self, ranks: Axis) -> tuple[Tensor, Tensor, list[int], list[int]]:
        """The sums over all ranks: losses and counts [S, R], bytes, and tokens without known bytes."""
        shape = (len(self.num_bytes), self._num_ranges)
        losses, counts = (sum_over(each.cpu(), ranks).view(shape) for each in (self.losses, self.counts))
        return losses, counts, sum_over(self.num_bytes, ranks).tolist(), sum_over(self.num_unknown, ranks).tolist()


def evaluate(
    model: LanguageModel,
    sources: Sequence[Source],
    pieces: Sequence[Piece],
    forward: Forward,
    *,
    ranks: Axis = ALONE,
    on_progress: OnProgress = ignore_progress,
) -> list[SourceResult]:
    """Measures the loss on every source; with several ranks each reads its share, and all get the results.

    Args:
        model: A whole model.
        sources: The sources.
        pieces: What is read of them.
        forward: How it is read.
        ranks: Axis of all ranks.
        on_progress: Called with the number of tokens that this rank has read and reads in all.

    Returns:
        The result of each source and, of several, that of all predictions together.

    Raises:
        DataError: The data cannot be read, or ranks have other data under the same names.
        OutOfMemoryError: The pieces of a batch, or one alone where the batch can be made smaller, do not fit into the device's memory.
    """
    _require_same(sources, pieces, ranks)
    bounds = position_bounds(max(piece.length for piece in pieces))
    sums = _Sums(len(sources), bounds, forward.device)
    # A plan of memory may give every rank another number, but batches must be the same ones.
    batch_size = -int(maximum_over(torch.tensor(-forward.batch_size), ranks))
    tokens_at_once = batch_size * forward.length
    own = batches(pieces, batch_size, tokens_at_once=tokens_at_once * forward.is_adjustable)[ranks.index :: ranks.size]
    done, total = 0, sum(piece.length for batch in own for piece in batch)
    on_progress(done, total)
    for batch in own:
        length = min(max(batch[0].length, SHAPE_STEP), forward.length)
        while batch:
            part = batch[: max(tokens_at_once // length, 1)] if forward.is_adjustable else batch
            try:
                _add_batch(sums, model, sources, part, forward)
            except torch.OutOfMemoryError as error:
                if len(part) == 1 or not forward.is_adjustable:
                    raise _out_of_memory(part, forward) from error
                tokens_at_once = len(part) // 2 * length
                continue
            batch = batch[len(part) :]
            done += sum(piece.length for piece in part)
            on_progress(done, total)
    return _results(sources, pieces, sums, bounds, ranks)


def _require_same(sources: Sequence[Source], pieces: Sequence[Piece], ranks: Axis) -> None:
    """Refuses, on every rank, what is not the same on all: each would take its share of something else."""
    if ranks.size == 1:
        return
    digest = digest_of(sources, pieces)
    largest, smallest = maximum_over(torch.tensor([digest, -digest]), ranks).abs().tolist()
    if largest != smallest:
        raise DataError("the ranks do not read the same tokens: hosts hold other data under the same names; copy the same files to every host")


@torch.inference_mode()
def _add_batch(sums: _Sums, model: LanguageModel, sources: Sequence[Source], batch: Sequence[Piece], forward: Forward) -> None:
    """Adds the losses of a batch; nothing is added where it does not fit into memory."""
    tokens, targets, starts = _read(sources, batch)
    rows = torch.tensor([piece.source for piece in batch], device=forward.device)
    tokens, targets, starts = (None if each is None else each.to(forward.device) for each in (tokens, targets, starts))
    found = torch.cat(list(_losses(model, tokens, targets, starts, length=forward.length)), dim=1)
    is_counted = targets != IGNORED_TARGET
    counted = is_counted.cpu().numpy()
    sums.add(found, is_counted, sources=rows, first_position=0)
    for row, piece in enumerate(batch):
        table = sources[piece.source].bytes_per_id
        if table is not None:
            ids = targets[row].cpu().numpy()[counted[row]]
            sums.add_bytes(piece.source, np.append(table, -1)[np.minimum(ids, len(table))])


def _read(sources: Sequence[Source], batch: Sequence[Piece]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, targets (IGNORED_TARGET where a prediction does not count) and starts of documents of a batch [B, L]."""
    longest = -(-max(piece.length for piece in batch) // SHAPE_STEP) * SHAPE_STEP
    tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORED_TARGET)
    starts = torch.zeros(len(batch), longest, dtype=torch.bool)
    has_starts = False
    for row, (source, first, length, num_context) in enumerate(batch):
        read = torch.from_numpy(sources[source].read(first, length + 1).astype(np.int64))
        tokens[row, :length], targets[row, num_context:length] = read[:-1], read[num_context + 1 :]
        if (starts_of := sources[source].starts) is not None:
            begins = torch.from_numpy(starts_of(first, length + 1))
            starts[row, :length], has_starts = begins[:-1], True
            targets[row, :length].masked_fill_(begins[1:], IGNORED_TARGET)
    starts[:, 0] = True
    return tokens, targets, starts if has_starts else None


def _losses(model: LanguageModel, tokens: Tensor, targets: Tensor, starts: Tensor | None, *, length: int) -> Iterator[Tensor]:
    """Yields the cross-entropies of consecutive targets, fp32 [B, T], 0 where a target is ignored."""
    is_carried = tokens.shape[1] > -(-length // SHAPE_STEP) * SHAPE_STEP
    states = model.empty_states(len(tokens)) if is_carried else None
    step = length if is_carried else tokens.shape[1]
    for first in range(0, tokens.shape[1], step):
        part = slice(first, first + step)
        hidden, states = model(tokens[:, part], None if starts is None else starts[:, part], states, first)
        yield _token_losses(model, hidden, targets[:, part])


def _token_losses(model: LanguageModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of every target; logits are formed for a part of the tokens at a time."""
    at_once = max(1, _LOGITS_AT_ONCE // model.section.vocab_size)
    parts = zip(hidden.flatten(0, 1).split(at_once), targets.flatten().split(at_once), strict=True)
    losses = [F.cross_entropy(model.logits(part), aims, ignore_index=IGNORED_TARGET, reduction="none") for part, aims in parts]
    return torch.cat(losses).view(targets.shape)


def _results(sources: Sequence[Source], pieces: Sequence[Piece], sums: _Sums, bounds: Sequence[int], ranks: Axis) -> list[SourceResult]:
    losses, counts, num_bytes, num_unknown = sums.over_ranks(ranks)
    known = [
        source.text_bytes if source.bytes_per_id is None else None if unknown else number
        for source, number, unknown in zip(sources, num_bytes, num_unknown, strict=True)
    ]
    numbers = [sum(piece.source == i for piece in pieces) for i in range(len(sources))]
    rows = [(source.name, losses[i].tolist(), counts[i].tolist(), known[i], numbers[i]) for i, source in enumerate(sources)]
    if len(sources) > 1:
        all_bytes = None if None in known else sum(filter(None, known))
        rows.append((TOTAL, losses.sum(0).tolist(), counts.sum(0).tolist(), all_bytes, sum(numbers)))
    return [
        source_result(name, loss_sums=of_ranges, num_tokens=tokens, num_bytes=size, num_sequences=number, bounds=bounds)
        for name, of_ranges, tokens, size, number in rows
    ]


def _out_of_memory(batch: Sequence[Piece], forward: Forward) -> OutOfMemoryError:
    length = min(forward.length, max(piece.length for piece in batch))
    remedy = "give a smaller --length" if len(batch) == 1 else "give a smaller --batch-size, or none"
    return OutOfMemoryError(f"{len(batch)} sequences of {length} tokens do not fit into the device's memory; {remedy}")
