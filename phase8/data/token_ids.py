"""Checks that all token ids of a pair are inside the vocabulary, before the first step: by the writer's record, or by reading all tokens.

The result of reading all tokens is cached under the digest of the data, so it is done once, for data of other
projects too, and nothing is written beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import reduce
from pathlib import Path

import numpy as np

from phase8.data.indexed import IndexedDataset
from phase8.data.pair_record import joined_range
from phase8.data.staging import read_json, write_json
from phase8.errors import DataError, StorageError

OnProgress = Callable[[str, int, int], None]

_CHUNK_TOKENS = 1 << 21
_LONG_SCAN_BYTES = 1 << 28


def check_token_ids(pair: IndexedDataset, *, vocab_size: int, cache_dir: Path, on_progress: OnProgress) -> None:
    """Refuses a pair with an id outside the vocabulary.

    Args:
        pair: A pair; one without tokens, as a pattern may match, has no such id.
        vocab_size: `model.vocab_size`.
        cache_dir: Directory where the result of reading all tokens is cached, if it can be written.
        on_progress: Called with stage, tokens read and tokens in all, where reading takes more than a moment.

    Raises:
        DataError: An id is outside the vocabulary; the message names the first.
    """
    if pair.num_tokens == 0:
        return
    smallest, largest = _recorded_range(pair) or _cached_range(pair, cache_dir, on_progress)
    if smallest >= 0 and largest < vocab_size:
        return
    for start, count in _chunks(pair):
        tokens = pair.tokens(start, count)
        if (position := first_outside(tokens, vocab_size)) is not None:
            raise outside_vocabulary(pair.bin_path, start + position, int(tokens[position]), vocab_size)


def first_outside(tokens: np.ndarray, vocab_size: int) -> int | None:
    """Position of the first id outside the vocabulary."""
    if tokens.max() < vocab_size and tokens.min() >= 0:
        return None
    return int(np.argmax((tokens >= vocab_size) | (tokens < 0)))


def outside_vocabulary(path: Path, position: int, token: int, vocab_size: int) -> DataError:
    """The error about an id."""
    return DataError(
        f"{path} holds token id {token} at position {position}, but model.vocab_size is {vocab_size}; set it above the largest id, or prepare "
        "the data with the tokenizer of this model"
    )


def _recorded_range(pair: IndexedDataset) -> tuple[int, int] | None:
    record = pair.record
    return None if record is None or record.smallest_id is None or record.largest_id is None else (record.smallest_id, record.largest_id)


def _cached_range(pair: IndexedDataset, cache_dir: Path, on_progress: OnProgress) -> tuple[int, int]:
    key = f"{pair.content.replace(':', '-')}-{pair.bin_bytes}-{pair.dtype.name}"  # the same bytes are other ids in another dtype
    path = cache_dir / "token_ids" / f"{key}.json"
    with suppress(DataError):  # without a usable cache every start reads all tokens again, nothing worse
        stored = read_json(path)
        if isinstance(stored, list) and len(stored) == 2 and all(type(number) is int for number in stored):
            return stored[0], stored[1]
    found = _scanned_range(pair, on_progress)
    with suppress(StorageError):
        write_json(path, list(found))
    return found


def _scanned_range(pair: IndexedDataset, on_progress: OnProgress) -> tuple[int, int]:
    stage = f"reading all {pair.bin_bytes / 1e9:.1f} GB of {pair.bin_path} for its largest token id"

    def range_of(chunk: tuple[int, int]) -> tuple[int, int]:
        tokens = pair.tokens(*chunk)
        return int(tokens.min()), int(tokens.max())

    chunks, ranges = list(_chunks(pair)), []
    with ThreadPoolExecutor() as threads:  # reading and comparing release the interpreter lock
        for (start, _), found in zip(chunks, threads.map(range_of, chunks), strict=True):
            if pair.bin_bytes >= _LONG_SCAN_BYTES:
                on_progress(stage, start, pair.num_tokens)
            ranges.append(found)
    return reduce(joined_range, ranges)


def _chunks(pair: IndexedDataset) -> Iterator[tuple[int, int]]:
    """Start and length of chunks that together cover the pair."""
    return ((start, min(_CHUNK_TOKENS, pair.num_tokens - start)) for start in range(0, pair.num_tokens, _CHUNK_TOKENS))
