r"""Parsing, checking and writing of Megatron's `.idx` file.

Little-endian, and unaligned since the header is 34 bytes:

| bytes | type | field |
|---|---|---|
| 9 | | magic `MMIDIDX\0\0` |
| 8 | u64 | version 1 |
| 1 | u8 | dtype code |
| 8 | u64 | N sequences |
| 8 | u64 | D = documents + 1 |
| 4N | i32 | tokens per sequence |
| 8N | i64 | byte offset of each sequence in `.bin` |
| 8D | i64 | document k is the sequences [index[k], index[k + 1]) |
| N, optional | i8 | mode of each sequence (multimodal data); visible only in the length of the file |

Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py. Megatron checks little of this; here the two files are checked against
each other completely before they are used.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from phase8.config.schema import Dialect
from phase8.data.token_file import open_regular_file
from phase8.errors import IndexedFormatError

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")

_COMMON_CODES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8"}
DIALECTS: dict[str, dict[int, str]] = {
    "megatron": _COMMON_CODES | {6: "<f8", 7: "<f4", 8: "<u2"},
    "gpt-neox": _COMMON_CODES | {6: "<f4", 7: "<f8", 8: "<u2"},
    "nanotron": _COMMON_CODES | {6: "<f8", 7: "<f8", 8: "<u2"},
    "deepspeed": _COMMON_CODES | {6: "<u2", 7: "<u4", 8: "<u8"},
}
DTYPE_CODES = {np.dtype(name): code for code, name in DIALECTS["megatron"].items() if np.dtype(name).kind != "f"}


class Index(NamedTuple):
    """A checked `.idx`.

    Shape:
        lengths: int32 [N]; document_index: int64 [D]; modes: int8 [N] or None; token_offsets: int64 [N + 1], tokens before each
        sequence and then the total.
    """

    dtype: np.dtype
    lengths: np.ndarray
    document_index: np.ndarray
    modes: np.ndarray | None
    token_offsets: np.ndarray


def write_index(file: BinaryIO, *, dtype: np.dtype, lengths: np.ndarray, document_index: np.ndarray) -> None:
    """Writes an `.idx` byte for byte as Megatron's builder does."""
    file.write(HEADER.pack(MAGIC, VERSION, DTYPE_CODES[dtype], lengths.size, document_index.size))
    file.write(np.ascontiguousarray(lengths, "<i4").data)
    file.write(np.ascontiguousarray(_token_offsets(lengths)[:-1] * dtype.itemsize, "<i8").data)
    file.write(np.ascontiguousarray(document_index, "<i8").data)


def read_index(path: Path, *, bin_bytes: int, dialect: Dialect | None) -> Index:
    """Reads an `.idx` and checks it against itself and the size of its `.bin`.

    Args:
        path: The `.idx` file.
        bin_bytes: Size of the `.bin` file.
        dialect: The project that wrote the file; None accepts every type that only one project can have meant.

    Raises:
        DataError: It is no regular file.
        IndexedFormatError: Any check that fails, by name.
    """
    with os.fdopen(open_regular_file(path), "rb") as file:
        num_sequences, index_length, code, has_modes = _read_header(file, path)

        def read(dtype: str, count: int) -> np.ndarray:
            values = np.frombuffer(file.read(count * np.dtype(dtype).itemsize), dtype=dtype)
            if values.size != count:
                raise _damaged(path, "it was cut short while being read")
            return values

        lengths, byte_offsets, document_index = read("<i4", num_sequences), read("<i8", num_sequences), read("<i8", index_length)
        modes = read("|i1", num_sequences) if has_modes else None
    if lengths.size and lengths.min() < 0:
        raise _damaged(path, f"sequence {lengths.argmin()} has {lengths.min()} tokens")
    token_offsets = _token_offsets(lengths)
    dtype = _token_dtype(code, int(token_offsets[-1]), bin_bytes, path=path, dialect=dialect)
    wrong = np.flatnonzero(byte_offsets != token_offsets[:-1] * dtype.itemsize)
    if wrong.size:
        raise _damaged(path, f"the byte offset of sequence {wrong[0]} is not the total length of the sequences before it")
    if document_index[0] != 0 or document_index[-1] != num_sequences:
        raise _damaged(path, f"the document index runs from {document_index[0]} to {document_index[-1]}, not 0 to {num_sequences}")
    if (document_index[1:] < document_index[:-1]).any():
        raise _damaged(path, "the document index goes backwards")
    return Index(dtype, lengths, document_index, modes, token_offsets)


def _read_header(file: BinaryIO, path: Path) -> tuple[int, int, int, bool]:
    """Number of sequences, entries of the document index, dtype code, and whether modes follow; both counts are checked against the file size."""
    size = os.fstat(file.fileno()).st_size
    header = file.read(HEADER.size)
    if header.startswith(b"MUSE"):
        raise IndexedFormatError(f"{path} is a MUSE index (ResNet-BK), not Megatron's; import it with tools/prepare_data.py first")
    if header.startswith(b"TNTIDX\0\0"):
        raise IndexedFormatError(f"{path} is an index of older fairseq (TNTIDX), not Megatron's; prepare the text again")
    if header[: len(MAGIC)] != MAGIC[: len(header)]:
        raise IndexedFormatError(f"{path} begins with {header[:9]!r} where Megatron's .idx has {MAGIC!r}; it is not such an index")
    if len(header) < HEADER.size:
        raise _damaged(path, f"it holds {size} bytes, less than the {HEADER.size} of the header")
    _, version, code, num_sequences, index_length = HEADER.unpack(header)
    if version != VERSION:
        raise IndexedFormatError(f"{path} is of format version {version}; only version {VERSION} is known")
    if index_length < 1:
        raise _damaged(path, "its document index is empty, where even a file without documents has one entry")
    # Both counts are u64 and not trusted: they are compared with the size of the file before memory is allocated.
    expected = HEADER.size + 12 * num_sequences + 8 * index_length
    if size not in (expected, expected + num_sequences):
        raise _damaged(path, f"{num_sequences} sequences and {index_length - 1} documents take {expected} bytes, but it holds {size}")
    return num_sequences, index_length, code, size > expected


def _token_dtype(code: int, num_tokens: int, bin_bytes: int, *, path: Path, dialect: Dialect | None) -> np.dtype:
    """The dtype of a dtype code, which four projects number differently from 6 on, checked against the size of `.bin`."""
    if code not in DIALECTS["megatron"]:
        raise _damaged(path, f"its dtype code is {code}, where 1 to 8 exist")
    readings = {name: np.dtype(codes[code]) for name, codes in DIALECTS.items()}
    fitting = {name: dtype for name, dtype in readings.items() if dtype.itemsize * num_tokens == bin_bytes}
    chosen = readings[dialect or "megatron"]
    integers = chosen.kind != "f"  # tokens never are floats
    if integers and (dialect or "megatron") in fitting:
        return chosen
    if dialect is None and fitting and code not in _COMMON_CODES:
        writers = " or ".join(f"{writer} ({dtype.name})" for writer, dtype in fitting.items())
        raise IndexedFormatError(
            f"{path} has dtype code {code}, which with {bin_bytes} bytes for {num_tokens} tokens is from {writers}; tokens are integers, "
            "so if DeepSpeed wrote it, list it in a blend YAML with dialect: deepspeed, else prepare the text again"
        )
    if not integers:
        raise IndexedFormatError(f"{path} has dtype code {code}, {chosen.name} in {dialect or 'megatron'}, but tokens are integers")
    raise IndexedFormatError(
        f"{path} promises {num_tokens} tokens of {chosen.name}, {num_tokens * chosen.itemsize} bytes, but its .bin holds {bin_bytes}; "
        "one of the two is truncated or belongs to another pair, so write or copy both again"
    )


def _damaged(path: Path, finding: str) -> IndexedFormatError:
    return IndexedFormatError(f"{path} is damaged: {finding}; write or copy the .bin/.idx pair again")


def _token_offsets(lengths: np.ndarray) -> np.ndarray:
    offsets = np.zeros(lengths.size + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
