"""The loss on held-out sequences: that of each source, and their mean with the weights of the blend."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from phase8.data.loader import build_loader, evaluation_microbatches
from phase8.data.microbatch import Microbatch
from phase8.data.sources import source_names
from phase8.observe.metrics import SourceLoss
from phase8.train.build import Run
from phase8.train.unreadable import read_together

ROUNDS_TOGETHER = 32  # microbatches of a rank in a piece, between which a rank can say that it lives, or that it was asked to stop


@dataclass(frozen=True)
class Evaluation:
    """The measurements of an evaluation.

    Args:
        loss: Mean of the sources' losses, weighted by the blend, in nats per token.
        num_tokens: Number of predicted tokens over all sources.
        sources: Losses of the sources, in order.
    """

    loss: float
    num_tokens: int
    sources: tuple[SourceLoss, ...]


class HeldOutData:
    """The held-out sequences of a rank, which are the same in every evaluation.

    The sources are evaluated one after the other. A source that has fewer sequences than its share then gets a less precise loss, but
    keeps its weight.

    Args:
        run: Run that has validation data.
    """

    def __init__(self, run: Run):
        self._run = run
        shape, dataset = run.shape, run.data.validation
        microbatches = evaluation_microbatches(
            dataset, num_samples=run.config.train.evaluation_sequences, micro_batch_size=shape.micro_batch_size
        )
        self._names = source_names([source.prefix for source in dataset.sources])
        self._num_sequences = [sum(map(len, of_source)) for of_source in microbatches]
        # Every rank takes part in every forward: a rank with fewer microbatches than the rest repeats one, without targets.
        own = [of_source[run.engine.mesh.data_parallel_index :: shape.data_parallel_size] for of_source in microbatches]
        self._num_own, self._num_rounds = [len(each) for each in own], [-(-len(each) // shape.data_parallel_size) for each in microbatches]
        padded = [
            mine + every[-1:] * (num_rounds - len(mine)) for mine, every, num_rounds in zip(own, microbatches, self._num_rounds, strict=True)
        ]
        self._loader = build_loader(dataset, run.config.data, sample_numbers=list(itertools.chain.from_iterable(padded)))

    def close(self) -> None:
        """Ends the workers that wait for the next evaluation."""
        self._loader.close()

    def evaluate(self, goes_on: Callable[[], bool] = lambda: True) -> Evaluation | None:
        """Measures the losses of the present weights; every rank takes part.

        Args:
            goes_on: Function that is called between pieces, on all ranks at once, and tells all of them whether to go on.

        Returns:
            The losses; None: it was not to go on.

        Raises:
            DataError: The data cannot be read.
            UnreadableData: Some of several ranks cannot read the data.
        """
        blend = self._run.data.validation.order.blend
        batches = read_together(lambda: list(self._microbatches()))
        sources, first = [], 0
        for name, weight, num_sequences, num_rounds in zip(self._names, blend.weights, self._num_sequences, self._num_rounds, strict=True):
            pieces = []
            for begin in range(first, first + num_rounds, ROUNDS_TOGETHER):
                if begin > 0 and not goes_on():
                    return None
                pieces.append(self._run.engine.evaluate(batches[begin : min(begin + ROUNDS_TOGETHER, first + num_rounds)]))
            loss, num_tokens = _together(pieces)
            sources.append(SourceLoss(name=name, weight=weight, loss=loss, num_tokens=num_tokens, num_sequences=num_sequences))
            first += num_rounds
        return Evaluation(weighted_loss(sources), sum(source.num_tokens for source in sources), tuple(sources))

    def _microbatches(self) -> Iterator[Microbatch]:
        microbatches = iter(self._loader)
        for num_own, num_rounds in zip(self._num_own, self._num_rounds, strict=True):
            for index, microbatch in enumerate(itertools.islice(microbatches, num_rounds)):
                yield microbatch if index < num_own else microbatch.without_targets()


def _together(pieces: Sequence[tuple[float, int]]) -> tuple[float, int]:
    """The mean loss of pieces and their number of predicted tokens; a single piece keeps every bit of its loss."""
    if len(pieces) == 1:
        return pieces[0]
    num_tokens = sum(count for _, count in pieces)
    return math.fsum(loss * count for loss, count in pieces) / max(num_tokens, 1), num_tokens


def weighted_loss(sources: Sequence[SourceLoss]) -> float:
    """The mean of the sources' losses, weighted by the blend; sources without predicted tokens are left out."""
    counted = [source for source in sources if source.num_tokens]
    total = sum(source.weight for source in counted)
    return math.fsum(source.weight * source.loss for source in counted) / total if counted else 0.0
