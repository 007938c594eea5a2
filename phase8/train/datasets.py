"""Which data a run trains on: the user's files, or the embedded corpus."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from phase8.config.schema import DataSource, RunConfig
from phase8.data.corpus import prepare_embedded_corpus
from phase8.data.loader import SequenceDataset, data_fingerprint, open_dataset
from phase8.data.tokenizer import Tokenizer, load_tokenizer
from phase8.errors import DataError


@dataclass(frozen=True)
class RunData:
    """The data of a run.

    Args:
        train: Training sequences.
        validation: Held-out sequences; None: no evaluation.
        tokenizer: None when the config names none.
        reference_losses: Losses to compare with, by name, in nats per token.
        fingerprint: What decides, with the seed, which tokens a sample holds; hashed once, for every checkpoint records it.
        description: For the banner.
    """

    train: SequenceDataset
    validation: SequenceDataset | None
    tokenizer: Tokenizer | None
    reference_losses: dict[str, float]
    fingerprint: dict[str, object]
    description: str


def open_run_data(config: RunConfig, *, on_progress: Callable[[str, int, int], None]) -> RunData:
    """Opens the data of a config; prepares the embedded corpus on first use.

    Raises:
        DataError: A file is missing, damaged, too short, or does not fit the model's vocabulary.
    """
    train, validation, tokenizer_path, references = config.data.train, config.data.validation, config.data.tokenizer, {}
    if train is None:
        corpus = prepare_embedded_corpus(config.data.cache_dir, vocab_size=config.model.vocab_size, on_progress=on_progress)
        train, validation, tokenizer_path = str(corpus.train_prefix), str(corpus.validation_prefix), corpus.tokenizer_path
        references = {"unigram entropy": corpus.unigram_entropy_nats}
    tokenizer = None if tokenizer_path is None else load_tokenizer(Path(tokenizer_path), eod_token=config.data.eod_token)
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"tokenizer {tokenizer_path} has {tokenizer.vocab_size} ids, but model.vocab_size is {config.model.vocab_size}; "
            f"set model.vocab_size to {tokenizer.vocab_size} or more."
        )
    sequences = _open(config, train, key="data.train")
    held_out = None if validation is None else _open(config, validation, key="data.validation")
    return RunData(sequences, held_out, tokenizer, references, data_fingerprint(sequences), _describe(config, sequences))


def _open(config: RunConfig, data: str | Sequence[DataSource], *, key: str) -> SequenceDataset:
    model = config.model
    return open_dataset(data, sequence_length=model.sequence_length, vocab_size=model.vocab_size, seed=config.train.seed, key=key)


def _describe(config: RunConfig, sequences: SequenceDataset) -> str:
    num_tokens = sum(source.num_tokens for source in sequences.sources)
    num_documents = sum(source.num_documents for source in sequences.sources)
    if config.data.train is None:
        name = "Python standard library (embedded)"
    else:
        name = ", ".join(
            f"{source.prefix} ({weight} of {sum(sequences.order.blend.weights)})"
            for source, weight in zip(sequences.sources, sequences.order.blend.weights, strict=True)
        )
    return f"{name}: {num_tokens:,} tokens, {num_documents:,} documents"
