"""Streams: the tokens of several pairs, or of a share of their documents, as if they were one file."""

from __future__ import annotations

import pickle
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phase8.data.indexed import IndexedDataset, IndexedWriter
from phase8.data.loader import open_dataset
from phase8.data.streams import TokenStream
from phase8.errors import DataError


def write(prefix: Path, lengths: list[int], first: int = 0, dtype: str = "<u2") -> IndexedDataset:
    """Documents of these lengths that count up from `first`."""
    with IndexedWriter(prefix, dtype=np.dtype(dtype)) as writer:
        for length in lengths:
            writer.add_document(np.arange(first, first + length))
            first += length
    return IndexedDataset(prefix)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    files=st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=1, max_size=4),
    cuts=st.tuples(st.fractions(0, 1), st.fractions(0, 1)).map(sorted),
)
def test_a_stream_is_its_documents_one_after_the_other(tmp_path_factory, files, cuts):
    directory, pairs, first = tmp_path_factory.mktemp("stream"), [], 0
    for i, lengths in enumerate(files):
        pairs.append(write(directory / str(i), lengths, first, ["<u2", "<i4"][i % 2]))
        first += sum(lengths)
    chosen = [document for pair in pairs for document in range(round(cuts[0] * pair.num_documents), round(cuts[1] * pair.num_documents))]
    stream = TokenStream("all", pairs).part(tuple(cuts))
    documents = [
        np.concatenate([*pair.document(k), np.empty(0, int)]).astype(int).tolist()
        for pair in pairs
        for k in range(round(cuts[0] * pair.num_documents), round(cuts[1] * pair.num_documents))
    ]
    flat = [token for document in documents for token in document]
    starts = [i == 0 for document in documents for i in range(len(document))]
    assert (stream.num_tokens, stream.num_documents) == (len(flat), len(chosen))
    for start in range(len(flat)):
        for count in range(1, len(flat) - start + 1):
            assert stream.tokens(start, count).tolist() == flat[start : start + count]
            assert stream.document_starts(start, count).tolist() == starts[start : start + count]
        path, position = stream.place(start)
        assert IndexedDataset(str(path)[:-4]).tokens(position, 1)[0] == flat[start]


def test_reading_outside_is_refused(tmp_path):
    stream = TokenStream("s", [write(tmp_path / "a", [4])])
    for start, count in ((-1, 2), (3, 2), (5, 1)):
        with pytest.raises(DataError, match="asked for; there are 4"):
            stream.tokens(start, count)


def test_each_window_of_a_pattern_comes_once_per_epoch(tmp_path):
    for i, length in enumerate((13, 4, 64)):  # the second is shorter than a window
        write(tmp_path / f"s{i}", [length], 100 * i)
    dataset = open_dataset(f"{tmp_path}/s*", sequence_length=8, vocab_size=300, seed=1)
    assert dataset.order.num_windows == (10,)
    whole = [*range(13), *range(100, 104), *range(200, 264)]
    for epoch in (0, 1):
        windows = sorted(dataset[10 * epoch + i]["tokens"].tolist() for i in range(10))
        assert windows == [whole[8 * i : 8 * i + 9] for i in range(10)]
    assert dataset[0, 1]["document_starts"].tolist() == [True, *[False] * 4, True, *[False] * 3]
    assert [sample["tokens"].tolist() for sample in map(pickle.loads(pickle.dumps(dataset)).__getitem__, range(10))] == [
        dataset[n]["tokens"].tolist() for n in range(10)
    ]


def test_a_bad_token_of_a_pattern_is_named_by_its_file(tmp_path):
    write(tmp_path / "s0", [13]), write(tmp_path / "s1", [20], 40)
    dataset = open_dataset(f"{tmp_path}/s*", sequence_length=8, vocab_size=50, seed=1)
    with pytest.raises(DataError, match=r"s1.bin holds token id 50 at position 10, but"):
        dataset[0, 2]


def test_parts_are_disjoint_and_must_hold_a_window(tmp_path):
    write(tmp_path / "a", [10] * 10)
    dataset = open_dataset(str(tmp_path / "a"), sequence_length=8, vocab_size=100, seed=1)
    train, validation = dataset.part((Fraction(0), Fraction(8, 10)), name="training"), dataset.part((Fraction(8, 10), Fraction(1)), name="validation")
    seen = [{token for i in range(part.order.num_windows[0]) for token in part[0, i]["tokens"].tolist()} for part in (train, validation)]
    assert max(seen[0]) < 80 <= min(seen[1])
    assert [part.sources[0].num_documents for part in (train, validation)] == [8, 2]
    with pytest.raises(DataError, match=r"data.split leaves 0 documents of .*a with 0 tokens for validation, fewer than the 9 of one sample"):
        dataset.part((Fraction(99, 100), Fraction(1)), name="validation")
