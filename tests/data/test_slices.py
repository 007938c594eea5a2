"""Ranks that share sequences: each reads the tokens of its slice only, and together they have what one process has."""

import os
from fractions import Fraction

import numpy as np
import pytest
import torch

from phase8.config.schema import DataSection, DataSource
from phase8.data.fingerprint import data_fingerprint
from phase8.data.indexed import IndexedWriter
from phase8.data.loader import build_loader, evaluation_microbatches, open_dataset
from phase8.data.microbatch import stand_in
from phase8.data.token_file import TokenFile
from phase8.errors import DataError
from phase8.kernels.reference.cross_entropy import IGNORED_TARGET
from phase8.shared_sequence import WHOLE, SequenceSlice

LENGTH = 16
NUM_SEQUENCES = 24
# Boundaries of documents fall inside slices, between them, on the token after a sequence and on its first one; most documents cross slices.
PACKED, LONG = [3, 1, 12, 5, 23, 4, 4, 8, 1, 1, 2, 50, 7, 33, 16, 40, 3, 61], [400]


def write(prefix, lengths, *, first_token=0):
    with IndexedWriter(prefix, dtype=np.dtype("<u2")) as writer:
        for length in lengths:
            writer.add_document(np.arange(first_token, first_token + length))
            first_token += length


@pytest.fixture
def blend(tmp_path):
    """Packed documents, one long document, and a pattern of two pairs, whose border lies inside of a sequence."""
    write(tmp_path / "packed", PACKED)
    write(tmp_path / "long", LONG, first_token=1000)
    write(tmp_path / "pair-1", [30, 11], first_token=2000)
    write(tmp_path / "pair-2", [60, 20], first_token=3000)
    return [DataSource(path=str(tmp_path / name), weight=weight) for name, weight in {"packed": 2, "long": 1, "pair-*": 1}.items()]


def opened(data, own_slice=WHOLE, *, vocab_size=5000):
    return open_dataset(data, sequence_length=LENGTH, vocab_size=vocab_size, seed=5, own_slice=own_slice)


def microbatches(dataset, *, resets, num_workers=0):
    section = DataSection(pin_memory=False, num_workers=num_workers, reset_at_document_boundaries=resets)
    numbers = [list(range(first, first + 3)) for first in range(0, NUM_SEQUENCES, 3)]
    return list(build_loader(dataset, section, sample_numbers=numbers))


def are_together(slices, whole):
    """Whether the microbatches of all slices are those of whole sequences."""
    for parts, batch in zip(zip(*slices, strict=True), whole, strict=True):
        assert torch.equal(torch.cat([part.tokens for part in parts], dim=1), batch.tokens)
        assert torch.equal(torch.cat([part.targets for part in parts], dim=1), batch.targets)
        assert [part.num_valid for part in parts] == [int((part.targets != IGNORED_TARGET).sum()) for part in parts]
        assert sum(part.num_valid for part in parts) == batch.num_valid
        for part in parts:
            assert part.tokens.shape == part.targets.shape == (len(batch.tokens), LENGTH // len(parts))
            assert part.starts is batch.starts is None or torch.equal(part.starts, batch.starts)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize(("count", "num_workers"), [(2, 0), (4, 0), (16, 0), (4, 3)])
@pytest.mark.parametrize("resets", [False, True])
def test_slices_are_those_of_what_one_process_reads(blend, count, num_workers, resets):
    whole = microbatches(opened(blend), resets=resets)
    assert (sum(batch.num_valid for batch in whole) < NUM_SEQUENCES * LENGTH) == resets
    slices = [microbatches(opened(blend, SequenceSlice(index, count)), resets=resets, num_workers=num_workers) for index in range(count)]
    are_together(slices, whole)


@pytest.mark.parametrize("lengths", [(4_194_305,), (999_983, 3, 524_288, 2_670_031)], ids=["one long document", "packed documents"])
def test_slices_of_a_million_tokens(tmp_path, lengths):
    with IndexedWriter(tmp_path / "long", dtype=np.dtype("<i4")) as writer:
        for length, end in zip(lengths, np.cumsum(lengths), strict=True):
            writer.add_document(np.arange(end - length, end))
    begins = set(np.cumsum(lengths).tolist())
    for index in (0, 3, 7):
        dataset = open_dataset(str(tmp_path / "long"), sequence_length=1 << 20, vocab_size=1 << 23, seed=5, own_slice=SequenceSlice(index, 8))
        for window in range(4):
            sample, first = dataset[0, window], (8 * window + index) << 17
            assert np.array_equal(sample["tokens"], np.arange(first, first + (1 << 17) + 1))
            found = set((sample["document_starts"].nonzero().flatten() + (window << 20)).tolist())
            assert found == {window << 20} | {begin for begin in begins if window << 20 <= begin <= (window + 1) << 20 and begin < sum(lengths)}


@pytest.mark.parametrize("share", [(Fraction(0), Fraction(3, 5)), (Fraction(3, 5), Fraction(1))])
def test_slices_of_a_part_of_the_documents(blend, share):
    def part(own_slice):
        return opened(blend[:1], own_slice).part(share, name="a part")

    are_together([microbatches(part(SequenceSlice(index, 4)), resets=True) for index in range(4)], microbatches(part(WHOLE), resets=True))


def test_slices_of_an_evaluation(blend):
    def read(own_slice):
        dataset = opened(blend, own_slice)
        by_source = evaluation_microbatches(dataset, num_samples=8, micro_batch_size=2)
        section = DataSection(pin_memory=False, num_workers=0, reset_at_document_boundaries=True)
        return list(build_loader(dataset, section, sample_numbers=[numbers for source in by_source for numbers in source]))

    are_together([read(SequenceSlice(index, 2)) for index in range(2)], read(WHOLE))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_rank_reads_its_tokens_and_the_one_after_them(blend, count, monkeypatch):
    read, numbers = TokenFile.read, []

    def counting(file, start, number, dtype):
        numbers.append(number)
        return read(file, start, number, dtype)

    monkeypatch.setattr(TokenFile, "read", counting)
    for index in range(count):
        microbatches(opened(blend, SequenceSlice(index, count)), resets=True)
        assert sum(numbers) == NUM_SEQUENCES * (LENGTH // count + 1)
        numbers.clear()


def test_an_id_outside_the_vocabulary_is_named_by_who_reads_it(tmp_path):
    write(tmp_path / "text", [LENGTH + 1])  # the ids are the positions
    for index in range(4):
        dataset = opened(str(tmp_path / "text"), SequenceSlice(index, 4), vocab_size=10)
        if index < 2:
            dataset[0]  # tokens 0 to 4, and 4 to 8
        else:
            with pytest.raises(DataError, match=f"holds token id {max(10, 4 * index)} at position {max(10, 4 * index)}, but"):
                dataset[0]


def test_what_a_file_has_lost_is_missed_by_who_reads_it(tmp_path):
    write(tmp_path / "text", [LENGTH + 1])
    first, last = (opened(str(tmp_path / "text"), SequenceSlice(index, 2)) for index in range(2))
    os.truncate(tmp_path / "text.bin", 2 * 9)
    assert first[0]["tokens"].tolist() == list(range(9))
    with pytest.raises(DataError, match="is shorter than when it was opened"):
        last[0]


def test_all_ranks_record_the_same_data(blend):
    assert data_fingerprint(opened(blend, SequenceSlice(1, 4))) == data_fingerprint(opened(blend))


@pytest.mark.parametrize("resets", [False, True])
def test_a_stand_in_has_the_shapes_of_what_it_stands_for(blend, resets):
    for own_slice in (WHOLE, SequenceSlice(1, 4)):
        batch = microbatches(opened(blend, own_slice), resets=resets)[0]
        found = stand_in(3, LENGTH, reset_at_document_boundaries=resets, own_slice=own_slice)
        assert (found.tokens.shape, found.targets.shape) == (batch.tokens.shape, batch.targets.shape) and found.num_valid == 0
        assert found.starts is batch.starts is None or found.starts.shape == batch.starts.shape
