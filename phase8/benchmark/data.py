"""Random tokens for benchmarks: any vocabulary and any sequence length in a moment, read through the real loader."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from phase8.config.load import with_settings
from phase8.config.schema import RunConfig
from phase8.data.indexed import IndexedWriter, best_dtype

MIN_TOKENS = 1 << 20
MIN_WINDOWS = 4
DOCUMENT_TOKENS = 1000


@contextmanager
def on_random_tokens(config: RunConfig) -> Iterator[RunConfig]:
    """Yields a config that trains on random tokens, which exist until the block ends. Equal vocabulary and length give equal tokens."""
    with TemporaryDirectory() as directory:
        prefix = Path(directory) / "random"
        write_random_tokens(prefix, vocab_size=config.model.vocab_size, sequence_length=config.model.sequence_length)
        yield with_settings(
            config, {"data.train": str(prefix), "data.validation": None, "data.tokenizer": None, "observe.sample_prompt": None}
        )


def write_random_tokens(prefix: Path, *, vocab_size: int, sequence_length: int) -> None:
    """Writes a `.bin/.idx` pair of documents of random ids: a million tokens, or more where a few sequences need more.

    Args:
        prefix: Path without suffix.
        vocab_size: Ids are below it.
        sequence_length: Length of the training sequences.
    """
    num_tokens = max(MIN_TOKENS, MIN_WINDOWS * sequence_length) + 1  # one more, the last target
    dtype = best_dtype(vocab_size)
    tokens = np.random.default_rng(0).integers(0, vocab_size, size=num_tokens).astype(dtype)
    with IndexedWriter(prefix, dtype=dtype) as writer:
        for start in range(0, num_tokens, DOCUMENT_TOKENS):
            writer.add_document(tokens[start : start + DOCUMENT_TOKENS])
