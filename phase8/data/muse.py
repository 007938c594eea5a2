"""Importer of the `MUSE` `.bin/.idx` pairs of the ResNet-BK research code; they share Megatron's file endings but not its format.

`.bin` is u32 tokens. `.idx` is the magic `MUSE`, a u32 version, then a pair of u64 per document: offset and length, both in tokens.
The writer of chat data puts a u64 count before the pairs, which the original readers refuse; both dialects are read here.

The format says nothing about the tokenizer or about ends of documents, so the importer asks for both and writes them into its log.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from phase8.data.index_file import MAGIC as MEGATRON_MAGIC
from phase8.data.indexed import MAX_SEQUENCE_TOKENS, IndexedWriter, best_dtype
from phase8.data.pair_record import MadeWith, refuse_own_source
from phase8.data.staging import write_json
from phase8.data.token_file import TokenFile
from phase8.errors import DataError, IndexedFormatError
from phase8.paths import why_unreadable

MAGIC = b"MUSE"
HEADER_BYTES = 8
TOKEN_TYPE = np.dtype("<u4")
MAX_LOGGED_RANGES = 100


@dataclass(frozen=True)
class MuseReport:
    """Counts of an import; the log beside the destination holds the same fields.

    Attributes:
        layout: `pairs`, or `counted` with a document count before the pairs.
        num_documents: Documents written.
        num_tokens: Tokens written.
        num_zero_length_documents: Documents dropped because they hold no token.
        num_documents_ending_in_eod: Documents whose last token is `eod_id`; None without an `eod_id`.
        num_overlapping_ranges: Documents that begin before an earlier one ends; their shared tokens are written twice.
        num_overlapping_tokens: Tokens of the overlapping ranges.
        overlapping_ranges: The first 100 of these ranges, first token and end.
        num_uncovered_ranges: Ranges of `.bin` that belong to no document; they are left out.
        num_uncovered_tokens: Tokens of the uncovered ranges.
        uncovered_ranges: The first 100 of these ranges, first token and end.
    """

    source: str
    destination: str
    tokenizer: str
    eod_id: int | None
    vocab_size: int
    dtype: str
    layout: Literal["pairs", "counted"]
    num_documents: int
    num_tokens: int
    num_zero_length_documents: int
    num_documents_ending_in_eod: int | None
    num_overlapping_ranges: int
    num_overlapping_tokens: int
    overlapping_ranges: list[tuple[int, int]]
    num_uncovered_ranges: int
    num_uncovered_tokens: int
    uncovered_ranges: list[tuple[int, int]]


def import_muse(
    source_prefix: str | Path,
    destination_prefix: str | Path,
    *, vocab_size: int, eod_id: int | None, tokenizer: str, made_with: MadeWith | None = None,
) -> MuseReport:
    """Converts a MUSE pair to a Megatron pair, each document to one document of one sequence, in the same order.

    Args:
        source_prefix: Path of the MUSE pair without `.bin` / `.idx`, such as `<dataset>/train`.
        destination_prefix: Path of the pair to write; `<destination_prefix>.import.json` becomes the log.
        vocab_size: Vocabulary size of the tokenizer that made the tokens; every id must be below it.
        eod_id: Token that ends a document in this data, None if there is none. It is counted and logged, never added.
        tokenizer: Name or file of the tokenizer, for the log.
        made_with: The same tokenizer, for the record of the pair; None: it is not known.

    Raises:
        IndexedFormatError: The pair is damaged or not MUSE.
        DataError: A file is missing, a token is not below the vocabulary size, or the new pair would replace this one.
        StorageError: The destination cannot be written.
    """
    if eod_id is not None and not 0 <= eod_id < vocab_size:
        raise DataError(f"the end-of-document id {eod_id} is outside the vocabulary of {vocab_size}; give the data's own --tokenizer")
    bin_path, idx_path = Path(f"{source_prefix}.bin"), Path(f"{source_prefix}.idx")
    try:
        layout, offsets, lengths = _read_documents(idx_path)
        tokens = _open_tokens(bin_path)
    except OSError as error:
        place = error.filename or source_prefix
        raise DataError(f"cannot read {place}: {why_unreadable(Path(place), error)}; give the path without .idx") from error
    num_tokens = tokens.num_bytes // TOKEN_TYPE.itemsize
    _check_documents(offsets, lengths, num_tokens, idx_path)
    refuse_own_source(destination_prefix, bin_path)
    kept = np.flatnonzero(lengths)
    with IndexedWriter(destination_prefix, dtype=best_dtype(vocab_size), made_with=made_with) as writer:
        last_tokens = _copy_documents(writer, tokens, np.stack([offsets[kept], lengths[kept]], axis=1), vocab_size)
    overlapping, uncovered = _overlaps_and_gaps(offsets[kept].astype(np.int64), lengths[kept].astype(np.int64), num_tokens)
    report = MuseReport(
        source=str(source_prefix),
        destination=str(destination_prefix),
        tokenizer=tokenizer,
        eod_id=eod_id,
        vocab_size=vocab_size,
        dtype=writer.dtype.name,
        layout=layout,
        num_documents=kept.size,
        num_tokens=int(lengths.sum()),
        num_zero_length_documents=lengths.size - kept.size,
        num_documents_ending_in_eod=None if eod_id is None else last_tokens.count(eod_id),
        num_overlapping_ranges=len(overlapping),
        num_overlapping_tokens=int(np.diff(overlapping).sum()),
        overlapping_ranges=[(int(start), int(end)) for start, end in overlapping[:MAX_LOGGED_RANGES]],
        num_uncovered_ranges=len(uncovered),
        num_uncovered_tokens=int(np.diff(uncovered).sum()),
        uncovered_ranges=[(int(start), int(end)) for start, end in uncovered[:MAX_LOGGED_RANGES]],
    )
    write_json(Path(f"{destination_prefix}.import.json"), asdict(report))
    return report


def _read_documents(path: Path) -> tuple[Literal["pairs", "counted"], np.ndarray, np.ndarray]:
    """Layout, and offset and length of each document in tokens (uint64)."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = file.read(HEADER_BYTES)
        if header.startswith(MEGATRON_MAGIC[: len(header)]) and header:
            raise IndexedFormatError(f"{path} is Megatron's format already; use the pair as it is")
        if len(header) < HEADER_BYTES or not header.startswith(MAGIC):
            raise IndexedFormatError(f"{path} begins with {header!r}, not with {MAGIC!r} and a version; it is not a MUSE index")
        version = int.from_bytes(header[len(MAGIC) :], "little")
        if version != 1:
            raise IndexedFormatError(f"{path} is of MUSE version {version}; only version 1 is known")
        if size % 8:
            raise IndexedFormatError(f"{path} is damaged: {size} bytes are no whole number of u64; copy the pair again")
        numbers = np.frombuffer(file.read(size - HEADER_BYTES), "<u8")
    if numbers.size % 2 == 0:
        return "pairs", numbers[0::2], numbers[1::2]
    if int(numbers[0]) != numbers.size // 2:
        raise IndexedFormatError(
            f"{path} is damaged: {numbers.size} numbers are neither pairs nor a count with pairs, since the first is {numbers[0]} and not "
            f"{numbers.size // 2}; copy the pair again"
        )
    return "counted", numbers[1::2], numbers[2::2]


def _open_tokens(path: Path) -> TokenFile:
    tokens = TokenFile(path)
    if tokens.num_bytes % TOKEN_TYPE.itemsize:
        raise IndexedFormatError(f"{path} is damaged: {tokens.num_bytes} bytes are no whole number of u32 tokens; copy the pair again")
    return tokens


def _check_documents(offsets: np.ndarray, lengths: np.ndarray, num_tokens: int, path: Path) -> None:
    # The second test subtracts: the sum of two u64 may wrap.
    outside = np.flatnonzero((offsets > num_tokens) | (lengths > num_tokens - np.minimum(offsets, num_tokens)))
    if outside.size:
        number = outside[0]
        raise IndexedFormatError(
            f"{path}: document {number} is {lengths[number]} tokens from {offsets[number]} on, but .bin holds {num_tokens} tokens; one of "
            "the two is truncated or belongs to another pair, so copy both again"
        )
    too_long = np.flatnonzero(lengths > MAX_SEQUENCE_TOKENS)
    if too_long.size:
        number = too_long[0]
        raise DataError(f"{path}: document {number} holds {lengths[number]} tokens; Megatron's format allows {MAX_SEQUENCE_TOKENS}")


def _copy_documents(writer: IndexedWriter, tokens: TokenFile, ranges: np.ndarray, vocab_size: int) -> list[int]:
    """Writes each range (offset, length) as a document and returns its last token."""
    largest_allowed = min(vocab_size, 2**31) - 1
    last_tokens = []
    for offset, length in ranges.tolist():
        document = tokens.read(offset, length, TOKEN_TYPE)
        if document.max() > largest_allowed:
            raise DataError(
                f"{tokens.path}: the document at token {offset} holds id {document.max()}, but the tokenizer has {vocab_size} ids and at most "
                f"{largest_allowed} is allowed; name the tokenizer that made the data with --tokenizer"
            )
        writer.add_document(document)
        last_tokens.append(int(document[-1]))
    return last_tokens


def _overlaps_and_gaps(offsets: np.ndarray, lengths: np.ndarray, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranges (start, end) shared with an earlier document, and ranges of no document; int64 [n, 2] each."""
    order = np.argsort(offsets, kind="stable")
    starts = np.append(offsets[order], num_tokens)
    ends = np.append((offsets + lengths)[order], num_tokens)
    covered_until = np.concatenate([[0], np.maximum.accumulate(ends[:-1])])
    overlapping = np.stack([starts, np.minimum(ends, covered_until)], axis=1)[:-1]
    uncovered = np.stack([covered_until, starts], axis=1)
    return overlapping[overlapping[:, 0] < overlapping[:, 1]], uncovered[uncovered[:, 0] < uncovered[:, 1]]
