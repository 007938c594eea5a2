"""The training data of a run: the user's files, or the embedded corpus."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from phase8.config.schema import DataSource, RunConfig
from phase8.config.split import split_shares
from phase8.data.corpus import prepare_embedded_corpus
from phase8.data.fingerprint import data_fingerprint
from phase8.data.fingerprint_difference import describe_fingerprint_difference
from phase8.data.fitting_tokenizer import load_fitting_tokenizer
from phase8.data.loader import SequenceDataset, open_dataset
from phase8.data.made_with import check_tokenizer
from phase8.data.sources import pairs_by_pattern_in_both, source_names
from phase8.data.token_ids import check_token_ids
from phase8.data.tokenizer import Tokenizer
from phase8.errors import DataError
from phase8.shared_sequence import WHOLE, SequenceSlice


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Args:
        train: Training sequences.
        validation: Held-out sequences; None: no evaluation.
        tokenizer: The tokenizer; None if the config names none.
        reference_losses: Losses to compare with, by name, in nats per token.
        fingerprint: What determines, with the seed, the tokens of each sample; computed once, and recorded in every checkpoint.
        validation_fingerprint: The same of the held-out sequences; None: there are none.
        description: Text for the banner.
    """

    train: SequenceDataset
    validation: SequenceDataset | None
    tokenizer: Tokenizer | None
    reference_losses: dict[str, float]
    fingerprint: dict[str, object]
    validation_fingerprint: dict[str, object] | None
    description: str

    @property
    def fingerprints(self) -> str:
        """The fingerprints of training and held-out sequences, as text for other ranks."""
        return json.dumps([self.fingerprint, self.validation_fingerprint])

    def epochs(self, samples_consumed: int) -> dict[str, float]:
        """Epochs that each source of the training data has delivered, by its name, after this many samples."""
        names = source_names([source.prefix for source in self.train.sources])
        return dict(zip(names, self.train.order.epochs(samples_consumed), strict=True))


def open_run_data(
    config: RunConfig, *, on_progress: Callable[[str, int, int], None], check_ids: bool = True, own_slice: SequenceSlice = WHOLE
) -> RunData:
    """Opens the data of a config; prepares the embedded corpus on first use.

    Args:
        config: A valid config.
        on_progress: Called with stage, amount done and amount in all.
        check_ids: Check that the tokenizer made the tokens, where their writer recorded it, and that all ids are inside the vocabulary,
            which may read all of them; one rank of a run does this.
        own_slice: Slice of each sequence that this rank reads.

    Raises:
        DataError: A file is missing, damaged, too short, or does not fit the tokenizer or the model's vocabulary; a pattern mixes training
            and validation.
    """
    train, validation, tokenizer_path, references = config.data.train, config.data.validation, config.data.tokenizer, {}
    if train is None:
        corpus = prepare_embedded_corpus(config.data.cache_dir, vocab_size=config.model.vocab_size, on_progress=on_progress)
        train, validation, tokenizer_path = str(corpus.train_prefix), str(corpus.validation_prefix), corpus.tokenizer_path
        references = {"unigram entropy": corpus.unigram_entropy_nats}
    eod_token, vocab_size = config.data.eod_token, config.model.vocab_size
    tokenizer = None if tokenizer_path is None else load_fitting_tokenizer(tokenizer_path, eod_token=eod_token, vocab_size=vocab_size)
    sequences = _open(config, train, own_slice, key="data.train")
    held_out = None if validation is None else _open(config, validation, own_slice, key="data.validation")
    if held_out is not None:
        _check_apart(sequences, held_out)
    if config.data.split is not None:
        sequences, held_out = _split(sequences, config.data.split)
    fingerprint, of_held_out = data_fingerprint(sequences), None if held_out is None else data_fingerprint(held_out)
    if check_ids:
        pairs = {pair.prefix: pair for dataset in (sequences, held_out) if dataset for source in dataset.sources for pair in source.pairs}
        if tokenizer is not None and not config.data.allow_fingerprint_change:
            check_tokenizer(pairs.values(), tokenizer)
        for pair in pairs.values():
            check_token_ids(pair, vocab_size=config.model.vocab_size, cache_dir=Path(config.data.cache_dir), on_progress=on_progress)
    return RunData(sequences, held_out, tokenizer, references, fingerprint, of_held_out, _describe(config, sequences))


def check_same_data(own: RunData, of_first: str, *, rank: int) -> None:
    """Refuses data of a rank that are not those of the first rank, whose windows have other numbers: some would come twice, others never.

    Args:
        own: Data of the rank.
        of_first: `RunData.fingerprints` of the first rank.
        rank: Number of the rank.

    Raises:
        DataError: They differ.
    """
    for first, here in zip(json.loads(of_first), (own.fingerprint, own.validation_fingerprint), strict=True):
        if first is not None and here is not None and (differences := describe_fingerprint_difference(first, here)):
            raise DataError(f"the data on the host of rank {rank} are not those of rank 0: {differences[0]}; copy the same files to every host")


def _open(config: RunConfig, data: str | Sequence[DataSource], own_slice: SequenceSlice, *, key: str) -> SequenceDataset:
    model = config.model
    return open_dataset(
        data,
        sequence_length=model.sequence_length,
        vocab_size=model.vocab_size,
        seed=config.train.seed,
        key=key,
        ignore_sequence_modes=config.data.ignore_sequence_modes,
        own_slice=own_slice,
    )


def _check_apart(train: SequenceDataset, validation: SequenceDataset) -> None:
    both = pairs_by_pattern_in_both(train.sources, validation.sources)
    if both:
        raise DataError(
            f"data.train and data.validation both hold {both[0]}, on one side because a pattern matches it; narrow the pattern, for the loss on "
            "data that were trained on says nothing"
        )


def _split(dataset: SequenceDataset, text: str) -> tuple[SequenceDataset, SequenceDataset | None]:
    """The training and the validation part; no validation if its share is 0."""
    train, validation = split_shares(text)
    held_out = None if validation[0] == validation[1] else dataset.part(validation, name="validation")
    return dataset.part(train, name="training"), held_out


def _describe(config: RunConfig, sequences: SequenceDataset) -> str:
    num_tokens = sum(source.num_tokens for source in sequences.sources)
    num_documents = sum(source.num_documents for source in sequences.sources)
    if config.data.train is None:
        name = "Python standard library (embedded)"
    else:
        name = ", ".join(
            f"{source.prefix} ({weight} of {sum(sequences.order.blend.weights)}{f', {len(source.pairs)} pairs' if len(source.pairs) > 1 else ''})"
            for source, weight in zip(sequences.sources, sequences.order.blend.weights, strict=True)
        )
    return f"{name}: {num_tokens:,} tokens, {num_documents:,} documents"
