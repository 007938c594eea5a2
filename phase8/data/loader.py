"""From global sample numbers to microbatches of tokens.

Shapes: B sequences of a microbatch, T = sequence_length, S tokens of a slice (S = T unless ranks share sequences). A sample is T + 1 tokens, so that
inputs are the first T and targets the last T of them. Which tokens sample n holds depends on the data, the seed and n alone; workers only decide
who reads it. A rank that has a slice of each sequence reads S + 1 tokens from the files. Where documents begin in the whole sequence it knows from
the index, which is in memory.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from phase8.accelerator import GPU, present
from phase8.config.schema import DataSection, DataSource
from phase8.data.blend import BlendTable, integer_weights
from phase8.data.microbatch import Microbatch, split_sample
from phase8.data.order_history import OrderHistory
from phase8.data.sampler import SampleOrder, count_windows, evenly_spread_windows
from phase8.data.sources import open_sources
from phase8.data.streams import TokenStream
from phase8.data.token_ids import first_outside, outside_vocabulary
from phase8.errors import DataError, Phase8Error
from phase8.shared_sequence import WHOLE, SequenceSlice

# A sample: its global number in the order of training, or an explicit (source, window).
Sample = int | tuple[int, int]


class SequenceDataset(Dataset):
    """Training sequences by global sample number.

    Args:
        sources: The opened data sets, each at least one window long.
        weights: Blend weight of each source.
        sequence_length: T.
        vocab_size: Token ids must stay below it.
        seed: Seed of the order.
        own_slice: Slice of each sequence whose tokens are read.
    """

    def __init__(
        self,
        sources: Sequence[TokenStream],
        *,
        weights: Sequence[int],
        sequence_length: int,
        vocab_size: int,
        seed: int,
        own_slice: SequenceSlice = WHOLE,
    ):
        self.sources = tuple(sources)
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self.own_slice = own_slice
        num_windows = [count_windows(source.num_tokens, sequence_length) for source in sources]
        self.order = SampleOrder(seed=seed, num_windows=num_windows, blend=BlendTable(weights))
        self.history = OrderHistory()

    def follow(self, history: OrderHistory) -> None:
        """Takes the order that comes after other blends of the run."""
        order = self.order
        self.history = history
        self.order = SampleOrder(
            seed=order.seed, num_windows=order.num_windows, blend=order.blend, begin=history.begin, draws=history.draws
        )  # fmt: skip

    def __getitem__(self, sample: Sample) -> dict[str, torch.Tensor]:
        """One sample.

        Args:
            sample: Global sample number n, or (source, window) for a window outside the order of training.

        Shape:
            tokens: int64 [S + 1], the slice and the token after it; document_starts: bool [T + 1], True where a token of the whole sample
            begins a document, and at the first token, since a sample begins with a fresh state.

        Raises:
            DataError: A token id of the slice outside the vocabulary, or a file that has become shorter or cannot be read.
        """
        number, window = sample if isinstance(sample, tuple) else self.order.locate(sample)
        source, start, own = self.sources[number], window * self.sequence_length, self.own_slice.tokens(self.sequence_length)
        tokens = source.tokens(start + own.start, len(own) + 1)
        if (position := first_outside(tokens, self.vocab_size)) is not None:
            raise outside_vocabulary(*source.place(start + own.start + position), int(tokens[position]), self.vocab_size)
        document_starts = source.document_starts(start, self.sequence_length + 1)
        document_starts[0] = True
        return {"tokens": torch.from_numpy(tokens.astype(np.int64)), "document_starts": torch.from_numpy(document_starts)}

    def part(self, share: tuple[Fraction, Fraction], *, name: str) -> SequenceDataset:
        """The sequences of a share of the documents of every pair.

        Args:
            share: Begin and end, as shares of the number of documents.
            name: Name of the part, for messages.

        Raises:
            DataError: It is shorter than one sample.
        """
        sources = [source.part(share) for source in self.sources]
        for source in sources:
            if count_windows(source.num_tokens, self.sequence_length) == 0:
                raise DataError(
                    f"data.split leaves {source.num_documents} documents of {source.prefix} with {source.num_tokens} tokens for {name}, fewer "
                    f"than the {self.sequence_length + 1} of one sample with model.sequence_length {self.sequence_length}; make that share larger"
                )
        return SequenceDataset(
            sources,
            weights=self.order.blend.weights,
            sequence_length=self.sequence_length,
            vocab_size=self.vocab_size,
            seed=self.order.seed,
            own_slice=self.own_slice,
        )


def open_dataset(
    data: str | Sequence[DataSource],
    *,
    sequence_length: int,
    vocab_size: int,
    seed: int,
    key: str = "data.train",
    ignore_sequence_modes: bool = False,
    own_slice: SequenceSlice = WHOLE,
) -> SequenceDataset:
    """Opens a `.bin/.idx` prefix, all pairs that a pattern matches, or the sources of a blend.

    Args:
        data: The prefix, the pattern or the blend.
        sequence_length: T, `model.sequence_length`.
        vocab_size: `model.vocab_size`.
        seed: Seed of the order, `train.seed`.
        key: Config key that names the data, for messages.
        ignore_sequence_modes: Treat multimodal pairs as plain text.
        own_slice: Slice of each sequence whose tokens are read.

    Raises:
        DataError: A file is missing, or a source is empty or shorter than one sample.
        IndexedFormatError: A damaged or foreign pair.
    """
    entries = [DataSource(path=data, weight=1)] if isinstance(data, str) else data
    sources = open_sources(entries, key=key, ignore_sequence_modes=ignore_sequence_modes)
    for source in sources:
        if source.num_tokens == 0:
            raise DataError(f"{key}: {source.prefix} holds no tokens; prepare it from text that is not empty")
        if count_windows(source.num_tokens, sequence_length) == 0:
            raise DataError(
                f"{key}: {source.prefix} holds {source.num_tokens} tokens, fewer than the {sequence_length + 1} of one sample with "
                f"model.sequence_length {sequence_length}; shorten the sequence or add data"
            )
    try:
        weights = integer_weights([entry.weight for entry in entries])
    except DataError as error:
        raise DataError(f"{key}: {error}") from error
    return SequenceDataset(
        sources, weights=weights, sequence_length=sequence_length, vocab_size=vocab_size, seed=seed, own_slice=own_slice
    )


def microbatch_sample_numbers(*, samples_consumed: int, micro_batch_size: int, index: int = 0, num_readers: int = 1) -> Iterator[list[int]]:
    """Sample numbers of each microbatch of one reader, without end: readers take microbatches in turn from `samples_consumed` on.

    Args:
        samples_consumed: Samples that all readers have consumed so far.
        micro_batch_size: Samples of a microbatch.
        index: Which data-parallel rank reads.
        num_readers: Number of readers.
    """
    first = samples_consumed + index * micro_batch_size
    while True:
        yield list(range(first, first + micro_batch_size))
        first += num_readers * micro_batch_size


def evaluation_microbatches(dataset: SequenceDataset, *, num_samples: int, micro_batch_size: int) -> list[list[list[tuple[int, int]]]]:
    """Windows of each microbatch of an evaluation, by source: always the same ones, evenly spread over the source, in file order.

    They do not depend on the seed. A source with fewer windows than its share of `num_samples` gives each window once, a source whose
    share rounds to zero gives one; the last microbatch of a source may be smaller.
    """
    windows = evenly_spread_windows(num_samples, num_windows=dataset.order.num_windows, blend=dataset.order.blend)
    by_source = [[window for window in windows if window[0] == source] for source in range(len(dataset.sources))]
    return [[own[first : first + micro_batch_size] for first in range(0, len(own), micro_batch_size)] for own in by_source]


def build_loader(
    dataset: SequenceDataset, section: DataSection, *, sample_numbers: Iterable[Sequence[Sample]], taken_at_once: int = 1
) -> MicrobatchLoader:
    """Yields the microbatches of `sample_numbers`, in that order for any number of workers, each of the dataset's slice of the sequences.

    It does not use torch's global random generator. Iterating again starts again if `sample_numbers` is a list; an iterator
    continues, without the microbatches that workers had already fetched.

    Args:
        dataset: The sequences.
        section: Settings of workers, memory and document boundaries; the number of workers is explicit.
        sample_numbers: Sample numbers of each microbatch.
        taken_at_once: Microbatches that a step reads one after the other; the workers keep at least as many ready.

    Raises:
        DataError: While iterating, as raised by `SequenceDataset`, also from a worker.
    """
    return MicrobatchLoader(dataset, section, sample_numbers, taken_at_once)


class _Refusal(NamedTuple):
    """Carries an error out of a worker.

    Torch would turn the message of a raised error into a traceback. An exception object would, as a local of the frame that
    raises it, keep the loader alive in a reference cycle, and its workers would be stopped only seconds later.
    """

    kind: type[Phase8Error]
    message: str


class _Microbatches(Dataset):
    """A dataset of microbatches by their lists of samples, so that one fetch of a worker is one microbatch, as the trainer takes it."""

    def __init__(self, dataset: SequenceDataset, *, reset_at_document_boundaries: bool):
        self._dataset, self._resets = dataset, reset_at_document_boundaries

    def __getitem__(self, samples: Sequence[Sample]) -> Microbatch | _Refusal:
        try:
            fetched = [self._dataset[sample] for sample in samples]
        except Phase8Error as error:
            return _Refusal(type(error), str(error))
        whole = {name: torch.stack([sample[name] for sample in fetched]) for name in fetched[0]}
        return split_sample(whole, reset_at_document_boundaries=self._resets, own_slice=self._dataset.own_slice)


class MicrobatchLoader:
    """Yields microbatches; `build_loader` makes it."""

    def __init__(self, dataset: SequenceDataset, section: DataSection, sample_numbers: Iterable[Sequence[Sample]], taken_at_once: int):
        workers = section.num_workers > 0
        ahead = max(section.prefetch_factor, -(-taken_at_once // max(section.num_workers, 1)))
        self._loader: DataLoader | None = DataLoader(
            _Microbatches(dataset, reset_at_document_boundaries=section.reset_at_document_boundaries),
            batch_size=None,
            sampler=sample_numbers,
            num_workers=section.num_workers,
            pin_memory=section.pin_memory and present() == GPU,
            prefetch_factor=ahead if workers else None,
            persistent_workers=section.persistent_workers and workers,
            worker_init_fn=_leave_signals_to_trainer,
            generator=torch.Generator(),  # otherwise torch would seed its workers from the global generator, and change its state
        )

    def close(self) -> None:
        """Ends workers that are kept for another iteration; there must be none after this.

        Torch ends workers at once when their iterator is freed. Where the garbage collector finds the iterator in a cycle, the queues by which
        workers are told are closed before, and torch waits five seconds for each of them, in the middle of whatever else goes on.
        """
        self._loader = None

    def __iter__(self) -> Iterator[Microbatch]:
        assert self._loader is not None  # it was not closed
        fetched = _without_child_signals(self._loader)
        while True:
            try:
                microbatch = next(fetched)
            except StopIteration:
                return
            except RuntimeError as error:  # raised by torch when a worker was killed
                raise DataError(f"a loader worker died ({str(error).splitlines()[0]}); check memory and data.num_workers") from error
            if isinstance(microbatch, _Refusal):
                raise microbatch.kind(microbatch.message)
            yield microbatch


def _without_child_signals(loader: DataLoader) -> Iterator:
    """Iterates without torch's SIGCHLD handler, which would raise in the middle of a step; `next` finds a dead worker by itself."""
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _leave_signals_to_trainer(worker_id: int) -> None:
    """Makes a worker ignore signals that are sent to all processes of a job, so that the trainer can finish its step.

    Such signals come from Ctrl-C, a closing terminal (SIGHUP), and schedulers (SIGTERM, SIGUSR1). Only the trainer's own SIGTERM, by which
    its children at exit, is obeyed.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere a signal does not identify its sender
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_trainer_asks, args=(multiprocessing.parent_process().pid,), daemon=True).start()


def _end_when_trainer_asks(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
