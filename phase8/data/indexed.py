"""Reader and writer of Megatron's `.bin/.idx` token files.

`.bin` holds the token ids of all sequences, one after the other, without header or padding; `.idx` (index_file.py) says where each
sequence and each document begins. The writer renames `.bin` first and `.idx` last, so an `.idx` implies a complete `.bin`; in
between it writes a record of the tokens (pair_record.py), which other writers do not have.
"""

from __future__ import annotations

import errno
import hashlib
import os
from array import array
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from phase8.config.schema import Dialect
from phase8.data.content import content_digest
from phase8.data.index_file import DIALECTS, DTYPE_CODES, read_index, write_index
from phase8.data.pair_record import MadeWith, PairRecord, TokenTally, read_record, record_path
from phase8.data.token_file import TokenFile
from phase8.durable import fsync_path, partial_name, storage_errors
from phase8.errors import DataError

MAX_SEQUENCE_TOKENS = 2**31 - 1
_COPIED_TOKENS = 1 << 21


def best_dtype(vocab_size: int) -> np.dtype:
    """The token type Megatron's writer picks: uint16 below a vocabulary of 65500, else int32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class IndexedWriter:
    """A context manager that writes one `.bin/.idx` pair, completely or not at all.

    Until the block ends without an exception only temporary files exist, and a pair already under `prefix` stays as it is.

    Args:
        prefix: Path without `.bin` / `.idx`; missing directories are created.
        dtype: Integer type of the tokens, from `best_dtype(vocab_size)`.
        made_with: The tokenizer of the tokens, for the record; None: unknown.

    Raises:
        DataError: A type the format has no code for.
        StorageError: The files cannot be written, or the disk is full.
    """

    def __init__(self, prefix: str | Path, *, dtype: np.dtype, made_with: MadeWith | None = None):
        self.prefix = str(prefix)
        self._made_with = made_with
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in DTYPE_CODES:
            allowed = ", ".join(known.name for known in DTYPE_CODES)
            raise DataError(f"{prefix}: tokens of type {self.dtype.name} have no code in .idx; use one of {allowed}")
        self._bin_path, self._idx_path, self._record_path = _path(prefix, ".bin"), _path(prefix, ".idx"), record_path(prefix)
        self._bin_partial, self._idx_partial, self._record_partial = map(partial_name, (self._bin_path, self._idx_path, self._record_path))
        self._tally = TokenTally()
        self._lengths = array("i")
        self._document_index = array("q", [0])

    def __enter__(self) -> Self:
        with storage_errors(self._bin_path):
            self._bin_path.parent.mkdir(parents=True, exist_ok=True)
            self._bin: BinaryIO = self._bin_partial.open("xb", buffering=1 << 20)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                with storage_errors(self._bin_path):
                    self._publish()
        finally:
            with suppress(OSError):  # closing flushes, which fails again on a full disk
                self._bin.close()
            for partial in (self._bin_partial, self._idx_partial, self._record_partial):
                with suppress(OSError):
                    partial.unlink(missing_ok=True)

    def add_document(self, *sequences: np.ndarray) -> None:
        """Appends one document of one or more sequences.

        Args:
            sequences: One-dimensional integer arrays; a sequence may be empty.

        Raises:
            DataError: Nothing to add, a shape or type that is not tokens, an id outside the type of the file, or a sequence of more
                than 2^31 - 1 tokens. Nothing of the document is then written.
            StorageError: The disk is full.
        """
        if not sequences:
            raise DataError(f"{self.prefix}: document {len(self._document_index) - 1} has no sequence; give at least one")
        checked = [self._checked(sequence) for sequence in sequences]
        for sequence in checked:
            self._write(sequence)
        self._lengths.extend(sequence.size for sequence in checked)
        self._document_index.append(len(self._lengths))

    def append_indexed(self, prefix: str | Path) -> None:
        """Appends all documents of another pair of the same type, copying bytes in chunks.

        Raises:
            DataError: The pair is missing, holds another token type, or a mode per sequence (multimodal data).
            IndexedFormatError: The pair is damaged.
            StorageError: The disk is full.
        """
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype:
            raise DataError(f"{prefix} holds {other.dtype.name} tokens and cannot be appended to {self.prefix} of {self.dtype.name}")
        if other.sequence_modes is not None:
            raise DataError(f"{prefix} holds a mode per sequence (multimodal data), which would be lost; only text can be appended")
        for start in range(0, other.num_tokens, _COPIED_TOKENS):
            self._write(other.tokens(start, min(_COPIED_TOKENS, other.num_tokens - start)))
        first_sequence = len(self._lengths)
        self._lengths.frombytes(other.sequence_lengths.astype("=i4").tobytes())
        self._document_index.frombytes((other.document_index[1:] + first_sequence).astype("=i8").tobytes())

    def _write(self, tokens: np.ndarray) -> None:
        with storage_errors(self._bin_path):
            self._bin.write(tokens.data)
        self._tally.add(tokens)

    def _checked(self, sequence: np.ndarray) -> np.ndarray:
        tokens = np.asarray(sequence)
        place = f"{self.prefix}: a sequence of document {len(self._document_index) - 1}"
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise DataError(f"{place} has shape {tokens.shape} and type {tokens.dtype}; give one dimension of integers")
        if tokens.size > MAX_SEQUENCE_TOKENS:
            raise DataError(f"{place} holds {tokens.size} tokens; the format allows {MAX_SEQUENCE_TOKENS}, so split it")
        largest = np.iinfo(self.dtype).max
        if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) > largest):
            raise DataError(f"{place} holds ids from {tokens.min()} to {tokens.max()}; {self.dtype.name} allows 0 to {largest}")
        return np.ascontiguousarray(tokens, dtype=self.dtype)

    def _publish(self) -> None:
        self._bin.flush()
        os.fsync(self._bin.fileno())
        lengths, document_index = np.frombuffer(self._lengths, "=i4"), np.frombuffer(self._document_index, "=i8")
        _write_durably(self._idx_partial, lambda file: write_index(file, dtype=self.dtype, lengths=lengths, document_index=document_index))
        record = self._tally.record(content_digest(self._bin_partial), self._made_with)
        _write_durably(self._record_partial, lambda file: file.write(record.to_json()))
        for older in (self._idx_path, self._record_path):  # they must never describe the new .bin
            older.unlink(missing_ok=True)
        self._bin_partial.replace(self._bin_path)
        self._record_partial.replace(self._record_path)
        self._idx_partial.replace(self._idx_path)
        fsync_path(self._idx_path.parent)


def _write_durably(path: Path, write: Callable[[BinaryIO], object]) -> None:
    with path.open("xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


class IndexedDataset:
    """A `.bin/.idx` pair opened for reading: the index in memory, the tokens in the open file.

    Pickling keeps the path only, so a spawned loader worker opens (and checks) the files anew; another `.bin` that it finds there is not read.

    Args:
        prefix: Path without `.bin` / `.idx`.
        dialect: The project that wrote the pair, needed only where the type of the tokens would be ambiguous.
        identity: What `.bin` has to be, as in `TokenFile`.

    Attributes:
        dtype: Type of the tokens in the file.
        sequence_lengths: int32 [num_sequences].
        document_index: int64 [num_documents + 1], the first sequence of each document, then num_sequences.
        sequence_modes: int8 [num_sequences] of multimodal data, else None.

    Raises:
        DataError: A file is missing or cannot be read.
        IndexedFormatError: The files are damaged, foreign, or do not fit each other; the message names the check that failed.
    """

    def __init__(self, prefix: str | Path, *, dialect: Dialect | None = None, identity: tuple[int, int] | None = None):
        self.prefix = str(prefix)
        self.dialect = dialect
        if dialect is not None and dialect not in DIALECTS:
            raise DataError(f"{prefix}: dialect {dialect!r} is unknown; use one of {', '.join(DIALECTS)}")
        if "\0" in self.prefix:
            raise DataError(f"the data path {self.prefix!r} holds a null byte; give the path of the pair without .bin / .idx")
        self.bin_path, self.idx_path = _path(prefix, ".bin"), _path(prefix, ".idx")
        try:
            self._file = TokenFile(self.bin_path, identity=identity)
            self.bin_bytes = self._file.num_bytes
            index = read_index(self.idx_path, bin_bytes=self.bin_bytes, dialect=dialect)
        except OSError as error:
            remedy = "raise ulimit -n, or give fewer pairs" if error.errno == errno.EMFILE else "give the path of the pair without .bin / .idx"
            raise DataError(f"cannot read {error.filename or prefix}: {error.strerror or error}; {remedy}") from error
        self.dtype = index.dtype
        self.sequence_lengths, self.document_index, self.sequence_modes = index.lengths, index.document_index, index.modes
        self.num_sequences, self.num_documents = index.lengths.size, index.document_index.size - 1
        self.num_tokens = int(index.token_offsets[-1])
        self._sequence_starts = index.token_offsets
        self._document_starts = index.token_offsets[index.document_index[:-1]]

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.prefix, self.dialect, self._file.identity)

    def sequence(self, i: int) -> np.ndarray:
        """Tokens of sequence `i`, read-only."""
        if not 0 <= i < self.num_sequences:
            raise DataError(f"{self.prefix}: sequence {i} was asked for; there are {self.num_sequences}")
        return self.tokens(self._sequence_starts[i], self.sequence_lengths[i])

    def document(self, k: int) -> list[np.ndarray]:
        """The sequences of document `k`."""
        if not 0 <= k < self.num_documents:
            raise DataError(f"{self.prefix}: document {k} was asked for; there are {self.num_documents}")
        return [self.sequence(i) for i in range(int(self.document_index[k]), int(self.document_index[k + 1]))]

    def tokens(self, start: int, count: int) -> np.ndarray:
        """`count` tokens of the flat stream from `start` on, read-only and in the type of the file.

        Raises:
            DataError: The file has become shorter, or cannot be read.
        """
        self._check_range(start, count)
        return self._file.read(start, count, self.dtype)

    def document_starts(self, start: int, count: int) -> np.ndarray:
        """Bool [count]: True where a token of the flat stream begins a document."""
        self._check_range(start, count)
        first, last = np.searchsorted(self._document_starts, (start, start + count))
        flags = np.zeros(count, dtype=bool)
        flags[self._document_starts[first:last] - start] = True
        return flags

    def token_range(self, first_document: int, end_document: int) -> tuple[int, int]:
        """First token of a range of documents, and the token after its last."""
        first, end = self._sequence_starts[self.document_index[[first_document, end_document]]]
        return int(first), int(end)

    @cached_property
    def content(self) -> str:
        """Digest of `.bin`, from all or part of it."""
        return content_digest(self.bin_path)

    @cached_property
    def record(self) -> PairRecord | None:
        """The record that the pair's writer left for this `.bin`; None if there is none."""
        return read_record(self.prefix, bin_bytes=self.bin_bytes, content=self.content)

    @cached_property
    def _idx_sha256(self) -> str:
        with self.idx_path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def fingerprint(self) -> dict[str, object]:
        """Identifies the data without reading all tokens; includes the hash of all tokens where the writer recorded it."""
        whole = {} if self.record is None else {"bin_sha256": self.record.bin_sha256}
        return {"idx_sha256": self._idx_sha256, "bin_bytes": self.bin_bytes, "num_tokens": self.num_tokens, "content": self.content, **whole}

    def _check_range(self, start: int, count: int) -> None:
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise DataError(f"{self.prefix}: tokens {start} to {start + count} were asked for; there are {self.num_tokens}")


def _reopen(prefix: str, dialect: Dialect | None, identity: tuple[int, int]) -> IndexedDataset:
    return IndexedDataset(prefix, dialect=dialect, identity=identity)


def _path(prefix: str | Path, suffix: str) -> Path:
    """`prefix` + `suffix`; unlike `with_suffix` this keeps a dot in the prefix."""
    return Path(f"{prefix}{suffix}")
