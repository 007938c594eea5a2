"""Imports token files that have no Megatron index as a `.bin/.idx` pair; their documents are found from ids or a foreign index.

| layout | tokens | documents |
|---|---|---|
| raw (nanoGPT and many others) | uint16 or uint32, nothing else | end after each end-of-document id |
| llm.c | 1024 bytes of header, whose magic gives the type: 20240520 uint16, 20240801 uint32 | as raw |
| datatrove `X.ds` | raw | `X.ds.index`: the end of each, u64, in tokens |

llm.c writes the end-of-document id before each document instead of after it, so the first document is that id alone.
Sources: llm.c, dev/data/data_common.py; datatrove, pipeline/tokens/tokenizer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from phase8.data.indexed import MAX_SEQUENCE_TOKENS, IndexedWriter
from phase8.data.input_files import Source, check_unchanged, find_source
from phase8.data.pair_record import MadeWith, refuse_own_source
from phase8.data.staging import write_json
from phase8.errors import DataError

RawType = Literal["uint16", "uint32"]

_LLMC_HEADER_BYTES = 1024
_LLMC_MAGICS: dict[int, tuple[int, RawType]] = {20240520: (1, "uint16"), 20240801: (7, "uint32")}  # magic: version, type
_CHUNK_TOKENS = 1 << 20
_UPPER_HALVES = 64  # uint32 ids have upper 16 bits below this, since no vocabulary is larger than 2^22
_LARGEST_ID = 2**31 - 1  # the largest int32, Megatron's type for large vocabularies


@dataclass(frozen=True)
class RawReport:
    """Counts of an import; the log beside the destination holds the same fields.

    Attributes:
        layout: Layout of the source.
        source_dtype: Type of the tokens in the source.
        dtype: Type of the tokens in the pair.
        num_documents_ending_in_eod: Documents whose last token is `eod_id`; None without an `eod_id`.
        num_zero_length_documents: Documents dropped because they hold no token (datatrove).
    """

    source: str
    destination: str
    layout: Literal["raw", "llm.c", "datatrove"]
    source_dtype: RawType
    dtype: str
    eod_id: int | None
    largest_id: int
    num_documents: int
    num_tokens: int
    num_documents_ending_in_eod: int | None
    num_zero_length_documents: int


@dataclass(frozen=True)
class _Tokens:
    """The place of a source's tokens, and the ends of its documents if the source has them (int64, increasing, without empty documents)."""

    layout: Literal["raw", "llm.c", "datatrove"]
    dtype: RawType
    first_byte: int
    count: int
    ends: np.ndarray | None = None
    num_zero_length_documents: int = 0


def import_raw(
    source: Path,
    destination_prefix: str | Path,
    *,
    dtype: RawType | None,
    eod_id: int | None,
    vocab_size: int | None = None,
    made_with: MadeWith | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> RawReport:
    """Converts a file of raw tokens to a Megatron pair with the same tokens in the same order; one document is in memory at a time.

    Args:
        source: The file.
        destination_prefix: Path of the pair to write; `<destination_prefix>.import.json` becomes the log.
        dtype: Type of its tokens; None if a header or index gives it.
        eod_id: The token that ends a document; None only if an index gives the ends.
        vocab_size: Every id must be below it, if given.
        made_with: The tokenizer that made the tokens, for the record of the pair; None: it is not known.
        on_bytes: Called from time to time with the bytes read and the bytes in all.

    Raises:
        DataError: The file is missing, is not of the given type, or holds no documents. Nothing is written.
        StorageError: The destination cannot be written.
    """
    found = find_source(source)
    tokens = _tokens_of(source, found.size_bytes, dtype)
    _check_eod(tokens, eod_id, vocab_size, source)
    _check_type(tokens, source)
    refuse_own_source(destination_prefix, source)
    largest_id = num_documents = num_ending_in_eod = 0
    with IndexedWriter(destination_prefix, dtype=np.dtype("<u2" if tokens.dtype == "uint16" else "<i4"), made_with=made_with) as writer:
        for document in _documents(found, tokens, eod_id, min(vocab_size or 2**32, _LARGEST_ID + 1), on_bytes):
            writer.add_document(document)
            largest_id = max(largest_id, int(document.max()))
            num_documents += 1
            num_ending_in_eod += int(document[-1]) == eod_id
        if tokens.ends is None and num_ending_in_eod == 0:
            raise DataError(
                f"the end-of-document id {eod_id} never occurs in the {tokens.count:,} {tokens.dtype} tokens of {source}; give the --eod-id and "
                "--dtype that the data were written with"
            )
        check_unchanged([found])
    report = RawReport(
        source=str(source),
        destination=str(destination_prefix),
        layout=tokens.layout,
        source_dtype=tokens.dtype,
        dtype=writer.dtype.name,
        eod_id=eod_id,
        largest_id=largest_id,
        num_documents=num_documents,
        num_tokens=tokens.count,
        num_documents_ending_in_eod=None if eod_id is None else num_ending_in_eod,
        num_zero_length_documents=tokens.num_zero_length_documents,
    )
    write_json(Path(f"{destination_prefix}.import.json"), asdict(report))
    return report


def _tokens_of(source: Path, size: int, dtype: RawType | None) -> _Tokens:
    index = Path(f"{source}.index")
    tokens = _datatrove(source, size, index) if index.exists() else _llmc(source, size) or _raw(source, size, dtype)
    if dtype not in (None, tokens.dtype):
        raise DataError(f"{source} holds {tokens.dtype} tokens by its {tokens.layout} header or index, not {dtype}; leave --dtype out")
    if tokens.count == 0:
        raise DataError(f"{source} holds no token; give another file")
    return tokens


def _raw(source: Path, size: int, dtype: RawType | None) -> _Tokens:
    if dtype is None:
        raise DataError(f"nothing in {source} says of which type its tokens are; give --dtype uint16 or --dtype uint32")
    item_bytes = np.dtype(dtype).itemsize
    if size % item_bytes:
        raise DataError(f"{source} holds {size} bytes, no whole number of {dtype} of {item_bytes} bytes; copy it again or correct --dtype")
    return _Tokens("raw", dtype, 0, size // item_bytes)


def _llmc(source: Path, size: int) -> _Tokens | None:
    """The tokens after a header of llm.c; None if there is no such header."""
    header = np.fromfile(source, "<i4", count=3)
    if size < _LLMC_HEADER_BYTES or int(header[0]) not in _LLMC_MAGICS:
        return None
    (version, dtype), (magic, found_version, count) = _LLMC_MAGICS[int(header[0])], header.tolist()
    expected = _LLMC_HEADER_BYTES + count * np.dtype(dtype).itemsize
    if found_version != version or size != expected:
        raise DataError(
            f"{source} begins like a token file of llm.c (magic {magic}), but with version {found_version} and {count} tokens in {size} bytes, "
            f"where version {version} and {expected} bytes belong together; write or copy it again"
        )
    return _Tokens("llm.c", dtype, _LLMC_HEADER_BYTES, count)


def _datatrove(source: Path, size: int, index: Path) -> _Tokens:
    if Path(f"{source}.loss").exists():
        raise DataError(
            f"{source}.loss masks tokens that give no loss, which phase8 cannot; move it away to train on every token, or leave those documents out"
        )
    index_bytes = find_source(index).size_bytes
    ends = np.fromfile(index, "<u8")
    num_tokens = int(ends[-1]) if ends.size else 0
    dtypes: list[RawType] = [name for name in ("uint16", "uint32") if num_tokens * np.dtype(name).itemsize == size]
    if index_bytes % 8 or (ends[1:] < ends[:-1]).any() or not dtypes:
        raise DataError(
            f"{index} says that {ends.size} documents of {num_tokens} tokens in all, each end behind the one before, make up {source}, but that "
            f"holds {size} bytes, which is neither uint16 nor uint32, or the ends go backwards; copy both again"
        )
    distinct = np.unique(ends[ends > 0]).astype(np.int64)
    return _Tokens("datatrove", dtypes[0], 0, num_tokens, distinct, ends.size - distinct.size)


def _check_eod(tokens: _Tokens, eod_id: int | None, vocab_size: int | None, source: Path) -> None:
    if eod_id is None:
        if tokens.ends is None:
            raise DataError(f"nothing in {source} says where its documents end; give --eod-id N, the token that ends a document")
        return
    limit = min(vocab_size or 2**32, np.iinfo(tokens.dtype).max + 1, _LARGEST_ID + 1)
    if not 0 <= eod_id < limit:
        what = "vocabulary of the tokenizer" if vocab_size == limit else f"type {tokens.dtype} of {source}"
        raise DataError(f"--eod-id is {eod_id}, outside the {what}, which has ids 0 to {limit - 1}; give the id that ends a document in this data")


def _check_type(tokens: _Tokens, source: Path) -> None:
    """Refuses uint32 tokens that are read as uint16: their upper halves would be an id, mostly 0, at every second position."""
    if tokens.layout != "raw" or tokens.dtype != "uint16" or tokens.count % 2:
        return
    first = np.fromfile(source, "<u2", count=_CHUNK_TOKENS)
    is_zero = first == 0
    if 2 * is_zero[1::2].mean() > 1 > 2 * is_zero[::2].mean() and int(first[1::2].max()) < _UPPER_HALVES:
        raise DataError(
            f"{source} looks like uint32 tokens: read as uint16, ids would be 0 at {'every' if is_zero[1::2].all() else 'nearly every'} second "
            "place; give --dtype uint32"
        )


def _documents(
    source: Source, tokens: _Tokens, eod_id: int | None, limit: int, on_bytes: Callable[[int, int], None] | None
) -> Iterator[np.ndarray]:
    """The documents of a source in order; all ids are below `limit`."""
    begun: list[np.ndarray] = []
    for start, chunk in _chunks(source, tokens, limit):
        previous = 0
        for end in _ends_in(chunk, start, tokens.ends, eod_id).tolist():
            yield np.concatenate([*begun, chunk[previous:end]])
            begun, previous = [], end
        if previous < chunk.size:
            begun.append(chunk[previous:])
        if sum(part.size for part in begun) > MAX_SEQUENCE_TOKENS:
            raise DataError(f"{source.path}: the document before token {start + chunk.size} is longer than {MAX_SEQUENCE_TOKENS}, Megatron's limit")
        if on_bytes is not None:
            on_bytes(tokens.first_byte + (start + chunk.size) * np.dtype(tokens.dtype).itemsize, source.size_bytes)
    if begun:
        yield np.concatenate(begun)


def _chunks(source: Source, tokens: _Tokens, limit: int) -> Iterator[tuple[int, np.ndarray]]:
    """The tokens in parts, each with the number of tokens before it."""
    dtype = np.dtype(tokens.dtype).newbyteorder("<")
    with open(source.path, "rb") as file:
        file.seek(tokens.first_byte)
        for start in range(0, tokens.count, _CHUNK_TOKENS):
            chunk = np.fromfile(file, dtype, count=min(_CHUNK_TOKENS, tokens.count - start))
            if chunk.size == 0:
                raise DataError(f"{source.path} became shorter while it was being read; run again when nothing writes to it")
            if int(chunk.max()) >= limit:
                place = start + int(chunk.argmax())
                raise DataError(
                    f"{source.path} holds id {chunk.max()} at token {place}, where ids below {limit} are allowed; give another --dtype or the "
                    "tokenizer that made the data"
                )
            yield start, chunk


def _ends_in(chunk: np.ndarray, start: int, ends: np.ndarray | None, eod_id: int | None) -> np.ndarray:
    """The ends of documents in a chunk that begins at token `start`."""
    if ends is None:
        return np.flatnonzero(chunk == eod_id) + 1
    first, last = np.searchsorted(ends, (start, start + chunk.size), side="right")
    return ends[first:last] - start
