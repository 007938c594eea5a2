"""`.idx` files that nobody wrote: a pair is read exactly as the format says, or refused in one sentence.

Every run of the tests tries 100 to 150 inputs of a kind, always the same. Thousands of new ones (minutes):

    python -m pytest -m full -s tests/data/test_fuzz_index.py
"""

from __future__ import annotations

import os
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phase8.data.index_file import DIALECTS
from phase8.data.indexed import IndexedDataset
from phase8.data.muse import import_muse
from phase8.errors import DataError, IndexedFormatError
from tests.checkpoint.fuzzing import NUMBERS, Tally, Watch, fuzz, mutated_bytes

WHOLE_NUMBERS = [number for number in NUMBERS if type(number) is int]
LENGTHS, INDEX, TOKENS = [3, 2, 0, 1], [0, 2, 2, 4], bytes.fromhex("0100 0200 0300 0400 0500 0600")
SIZES = {"u1": 1, "i1": 1, "i2": 2, "i4": 4, "i8": 8, "u2": 2, "u4": 4, "u8": 8}
CODES = {None: {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}}  # floats are no tokens
CODES |= dict.fromkeys(("megatron", "gpt-neox", "nanotron"), CODES[None]) | {"deepspeed": CODES[None] | {6: "u2", 7: "u4", 8: "u8"}}


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pairs are written and read; a good one was read before anything is watched."""
    place = tmp_path_factory.mktemp("fuzz")
    _write(place, _packed(_good()), TOKENS)
    assert IndexedDataset(place / "x").num_documents == 3
    return place


def _good(lengths: list[int] = LENGTHS, index: list[int] = INDEX, code: int = 8) -> dict[str, Any]:
    """The fields of an `.idx`."""
    offsets = [SIZES[CODES[None][code]] * sum(lengths[:i]) for i in range(len(lengths))]
    counts = {"n": None, "d": None}
    return {"magic": b"MMIDIDX\0\0", "version": 1, "code": code, **counts, "lengths": lengths, "offsets": offsets, "index": index, "tail": b""}


def _packed(fields: dict[str, Any]) -> bytes:
    """The bytes of an `.idx`; `n` and `d` are the true counts where they are None, and numbers wrap."""
    arrays = [fields[name] for name in ("lengths", "offsets", "index")]
    n, d = (len(array) if count is None else count for array, count in ((arrays[0], fields["n"]), (arrays[2], fields["d"])))
    content = fields["magic"] + struct.pack("<QBQQ", fields["version"] % 2**64, fields["code"] % 256, n % 2**64, d % 2**64)
    for size, array in zip((4, 8, 8), arrays, strict=True):
        content += b"".join((number % 2 ** (8 * size)).to_bytes(size, "little") for number in array)
    return content + fields["tail"]


def _write(directory: Path, index: bytes, tokens: bytes) -> None:
    (directory / "x.idx").write_bytes(index)
    (directory / "x.bin").write_bytes(tokens)


def _by_the_book(index: bytes, tokens: bytes, dialect: str | None) -> tuple[str, list[list[bytes]], bytes] | None:
    """Type, documents and modes of a pair, by docs alone; None where a rule is broken."""
    if len(index) < 34 or index[:17] != b"MMIDIDX\0\0" + struct.pack("<Q", 1) or index[17] not in CODES[dialect]:
        return None
    kind = CODES[dialect][index[17]]
    n, d = struct.unpack("<QQ", index[18:34])
    if d < 1 or len(index) not in (34 + 12 * n + 8 * d, 34 + 13 * n + 8 * d):
        return None
    lengths = struct.unpack(f"<{n}i", index[34 : 34 + 4 * n])
    offsets = struct.unpack(f"<{n}q", index[34 + 4 * n : 34 + 12 * n])
    starts = struct.unpack(f"<{d}q", index[34 + 12 * n : 34 + 12 * n + 8 * d])
    ends = [sum(lengths[: i + 1]) * SIZES[kind] for i in range(n)]
    if any(length < 0 for length in lengths) or list(offsets) != [0, *ends][:n] or [0, *ends][n] != len(tokens):
        return None
    if starts[0] != 0 or starts[-1] != n or list(starts) != sorted(starts):
        return None
    sequences = [tokens[begin:end] for begin, end in zip(offsets, ends, strict=True)]
    documents = [sequences[begin:end] for begin, end in pairwise(starts)]
    return kind, documents, index[34 + 12 * n + 8 * d :]


@st.composite
def _pairs(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """An `.idx` whose fields may have been edited, and a `.bin` that may have the length they say."""
    lengths, code = draw(st.lists(st.integers(0, 4), max_size=6)), draw(st.sampled_from(sorted(CODES[None])))
    cuts = draw(st.lists(st.integers(0, len(lengths)), max_size=4))
    fields = _good(lengths, [0, *sorted(cuts), len(lengths)] if lengths or cuts else [0], code)
    num_bytes = sum(lengths) * SIZES[CODES[None][code]]
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        name = draw(st.sampled_from([*fields, "code", "itemsize", *["lengths", "offsets", "index"] * 4]))
        number = draw(st.sampled_from(WHOLE_NUMBERS) | st.integers(-2, 12))
        if name in ("version", "code", "n", "d"):
            fields[name] = number
        elif name == "itemsize":  # another type, consistently
            fields["offsets"] = [number * sum(fields["lengths"][:i]) for i in range(len(fields["lengths"]))]
        elif name == "tail":
            fields["tail"] = draw(st.sampled_from([b"\0", bytes(4), b"\1\2\3\4", bytes(8), bytes(12)]))
        elif name == "magic":
            fields["magic"] = draw(st.sampled_from([b"MUSE\1\0\0\0\0", b"TNTIDX\0\0\0", b"MMIDIDX\0\1", b"", b"PK\3\4"]))
        else:
            at = draw(st.integers(0, max(0, len(fields[name]) - 1)))
            kind = draw(st.sampled_from(["set", "set", "nudge", "nudge", "nudge", "insert", "delete"]))
            if kind == "nudge" and fields[name][at:]:
                fields[name][at] += draw(st.sampled_from([-1, 1]))
            else:
                fields[name][at : at + (kind != "insert")] = [] if kind == "delete" else [number]
    index = _packed(fields)
    if draw(st.integers(0, 4)) == 0:
        index = draw(mutated_bytes(index))
    num_bytes = draw(st.sampled_from([num_bytes] * 8 + [num_bytes + 1, max(0, num_bytes - 1), 2 * num_bytes, num_bytes + 2, 0]))
    return index, (bytes(range(1, 256)) * (num_bytes // 255 + 1))[:num_bytes]


def _fuzz_pairs(directory: Path, watch: Watch, *, num_inputs: int, derandomize: bool) -> None:
    tally = Tally()

    @given(pair=_pairs(), dialect=st.sampled_from([None, None, *DIALECTS]))
    def check(pair: tuple[bytes, bytes], dialect: Any) -> None:
        _write(directory, *pair)
        expected = _by_the_book(*pair, dialect)
        try:
            with watch.over(directory):
                dataset = IndexedDataset(directory / "x", dialect=dialect)
                documents = [[sequence.tobytes() for sequence in dataset.document(k)] for k in range(dataset.num_documents)]
                starts = dataset.document_starts(0, dataset.num_tokens)
        except IndexedFormatError as error:
            assert expected is None
            tally.refused(error)
            return
        tally.count("loaded")
        modes = b"" if dataset.sequence_modes is None else dataset.sequence_modes.tobytes()
        assert (dataset.dtype, documents, modes) == (np.dtype(f"<{expected[0]}"), *expected[1:])
        assert dataset.tokens(0, dataset.num_tokens).tobytes() == pair[1]
        assert starts.sum() == sum(any(document) for document in documents)

    fuzz(check, num_inputs=num_inputs, derandomize=derandomize)()
    tally.check("Megatron's .idx", at_least=num_inputs, among={"loaded", "IndexedFormatError"})


def _fuzz_muse(directory: Path, watch: Watch, *, num_inputs: int, derandomize: bool) -> None:
    """The importer of the other `.idx`: what it writes is what the pair says, or it writes nothing."""
    tally, out = Tally(), directory / "out"
    tokens = np.arange(1, 11, dtype="<u4").tobytes()
    offsets, lengths = st.sampled_from([*range(12), 2**31, 2**32, 2**63, 2**64 - 1]), st.sampled_from([*range(5), 2**31, 2**64 - 1])
    inside = st.tuples(st.integers(0, 6), st.integers(0, 4))
    ranges = st.lists(st.one_of(inside, inside, inside, st.tuples(offsets, lengths)), max_size=4)

    @given(documents=ranges, counts=st.sampled_from([[], [], [-1], [0], [3]]), edit=st.integers(0, 3), data=st.data())
    def check(documents: list[tuple[int, int]], counts: list[int], edit: int, data: st.DataObject) -> None:
        numbers = [len(documents) if count < 0 else count for count in counts] + [number for document in documents for number in document]
        index = b"MUSE\1\0\0\0" + struct.pack(f"<{len(numbers)}Q", *numbers)
        _write(directory, data.draw(mutated_bytes(index)) if edit == 0 else index, tokens)
        for suffix in (".idx", ".bin", ".import.json"):
            Path(f"{out}{suffix}").unlink(missing_ok=True)
        try:
            import_muse(directory / "x", out, vocab_size=11, eod_id=None, tokenizer="t")
        except DataError as error:
            tally.refused(error)
            assert not os.path.exists(f"{out}.idx") and not list(directory.glob("*.partial"))
            return
        tally.count("loaded")
        found = IndexedDataset(out)
        content = (directory / "x.idx").read_bytes()
        stored = struct.unpack(f"<{len(content) // 8 - 1}Q", content[8:])
        pairs = zip(stored[len(stored) % 2 :: 2], stored[len(stored) % 2 + 1 :: 2], strict=True)
        expected = [list(range(offset + 1, offset + length + 1)) for offset, length in pairs if length]
        assert [[token for sequence in found.document(k) for token in sequence] for k in range(found.num_documents)] == expected

    fuzz(check, num_inputs=num_inputs, derandomize=derandomize)()
    tally.check("MUSE's .idx", at_least=num_inputs, among={"loaded", "IndexedFormatError"})


def test_pairs(directory: Path, watch: Watch) -> None:
    _fuzz_pairs(directory, watch, num_inputs=150, derandomize=True)


def test_muse_pairs(directory: Path, watch: Watch) -> None:
    _fuzz_muse(directory, watch, num_inputs=100, derandomize=True)


@pytest.mark.full
def test_many_pairs(directory: Path, watch: Watch) -> None:
    _fuzz_pairs(directory, watch, num_inputs=20_000, derandomize=False)


@pytest.mark.full
def test_many_muse_pairs(directory: Path, watch: Watch) -> None:
    _fuzz_muse(directory, watch, num_inputs=5000, derandomize=False)


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_a_pipe_is_refused_and_not_waited_for(directory: Path, tmp_path: Path, suffix: str) -> None:
    _write(tmp_path, _packed(_good()), TOKENS)
    (tmp_path / f"x{suffix}").unlink()
    os.mkfifo(tmp_path / f"x{suffix}")
    with pytest.raises(DataError, match=f"x{suffix} is not a regular file"):
        IndexedDataset(tmp_path / "x")


def test_a_name_with_nul_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="null byte"):
        IndexedDataset(f"{tmp_path}/a\0b")
