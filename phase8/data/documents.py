"""Documents of the inputs: division into shards, and the texts of each part.

| input | a document is | can be cut |
|---|---|---|
| text or source file | the whole file; with a document separator, the text between two separator lines | with a separator |
| `.jsonl` and similar | the text under a key of each line (json_lines.py) | yes |
| `.parquet` | the text in a column of each row (parquet.py) | yes, by row groups |
| `.gz`, `.zst` of the first two | as uncompressed | no |

A tar or zip archive is no document, whatever its name says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, TypeVar

from phase8.data.archives import archive_problem
from phase8.data.compression import DamagedStreamError, decompressed
from phase8.data.input_files import Document, OnInvalid, Source, Span
from phase8.data.json_lines import read_json_lines
from phase8.data.parquet import read_parquet
from phase8.data.utf8 import BYTE_ORDER_MARK
from phase8.errors import DataError

_FIBONACCI_HASH = 0x9E3779B1  # 2**32 over the golden ratio
_CHECKED_BYTES = 1 << 20

T = TypeVar("T")


def cut_shards(sources: Iterable[Source], shard_bytes: int, *, document_separator: str | None = None) -> list[tuple[Span, ...]]:
    """Divides sources into consecutive spans of about `shard_bytes`; files that can be cut are."""
    shards: list[tuple[Span, ...]] = []
    current: list[Span] = []
    filled = 0
    for source in sources:
        has_parts = source.is_json_lines or source.is_parquet or document_separator is not None
        step = shard_bytes if has_parts and not source.is_compressed else max(source.size_bytes, 1)
        # An empty text has no document, but an empty compressed file is damaged, and its reader reports that.
        size = max(source.size_bytes, int(source.is_compressed or source.is_parquet))
        for start in range(0, size, step):
            span = Span(source, start, min(start + step, source.size_bytes))
            if current and filled + span.end - span.start > shard_bytes:
                shards.append(tuple(current))
                current, filled = [], 0
            current.append(span)
            filled += span.end - span.start
    return [*shards, tuple(current)] if current else shards


def separator_problem(separator: str | None) -> str | None:
    """A sentence about a document separator that no line can hold, so that a file would silently be one document; None: it can be used."""
    if separator is None or (separator.strip() and separator == separator.strip() and len(separator.splitlines()) == 1):
        return None
    return f"--document-separator is {separator!r}; it must be what one line holds, with something in it and no space around it"


def spread(items: Sequence[T]) -> list[T]:
    """The items in a fixed order in which every prefix is spread evenly over the sequence."""
    return [items[i] for i in sorted(range(len(items)), key=lambda i: i * _FIBONACCI_HASH % 2**32)]


def is_whole(source: Source, on_invalid: OnInvalid) -> bool:
    """Whether a compressed file can be read to its end; otherwise calls `on_invalid`. Checksums come after the data that they cover."""
    try:
        with _opened(source) as (file, _):
            while source.is_compressed and file.read(_CHECKED_BYTES):
                pass
    except DamagedStreamError as error:
        on_invalid(DataError(str(error)))
        return False
    return True


def read_documents(span: Span, *, json_key: str, on_invalid: OnInvalid, document_separator: str | None = None) -> Iterator[Document]:
    """Yields the texts of a span exactly as stored, except for a leading byte order mark.

    Args:
        span: What to read.
        json_key: Key of the text in an object of JSON lines; the column in Parquet.
        on_invalid: Called with an error naming file and line for everything that is not a document; it raises to stop, or
            returns to skip it.
        document_separator: Content of the lines that separate documents of a text file; None if a file is one document.

    Raises:
        DataError: The source cannot be read at all.
    """
    source = span.source
    if source.is_parquet:
        yield from read_parquet(span, column=json_key, on_invalid=on_invalid)
        return
    try:
        with _opened(source) as (file, stored):
            if (problem := archive_problem(source.path)) is not None:
                if span.start == 0:  # once for a file that is cut
                    on_invalid(DataError(problem))
            elif source.is_json_lines:
                yield from read_json_lines(file, stored, span, json_key=json_key, on_invalid=on_invalid)
            elif document_separator is not None:
                yield from _between_separators(file, stored, span, document_separator.encode(), on_invalid)
            else:
                text = _text(file.read().removeprefix(BYTE_ORDER_MARK), source.path, on_invalid)
                if text is not None:
                    yield Document(text, source.size_bytes)
    except DamagedStreamError as error:
        on_invalid(DataError(str(error)))


@contextmanager
def _opened(source: Source) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Opens a source; yields its content, and the file whose position shows how much has been read."""
    try:
        if source.is_compressed:
            with decompressed(source.path) as files:
                yield files
        else:
            with open(source.path, "rb") as file:
                yield file, file
    except OSError as error:
        raise DataError(f"cannot read the input {source.path}: {error.strerror or error}; it was there a moment ago") from error


def _between_separators(file: BinaryIO, stored: BinaryIO, span: Span, separator: bytes, on_invalid: OnInvalid) -> Iterator[Document]:
    """The documents after the separators that begin in a span; the first document of a file follows none. Empty ones are left out."""
    path, is_cut = span.source.path, not span.source.is_compressed
    if span.start:
        file.seek(span.start - 1)
        file.readline()  # the rest of a line that began in the span before
    document = None if span.start else bytearray()  # None until the first separator of the span
    begin = position = stored.tell()
    while line := file.readline():
        line_begin, position = position, position + len(line)
        if line_begin == 0:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if line.strip() != separator:
            if document is not None:
                document += line
            elif line_begin >= span.end:
                return
            continue
        if document:
            yield from _document(document, path, begin, stored.tell(), on_invalid)
        if is_cut and line_begin >= span.end:
            return
        document, begin = bytearray(), stored.tell()
    if document:
        yield from _document(document, path, begin, stored.tell(), on_invalid)


def _document(content: bytearray, path: str, begin: int, end: int, on_invalid: OnInvalid) -> Iterator[Document]:
    text = _text(content, f"{path}, the document from byte {begin} on,", on_invalid)
    content.clear()
    if text is not None:
        yield Document(text, end - begin)


def _text(content: bytes | bytearray, place: str, on_invalid: OnInvalid) -> str | None:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        on_invalid(DataError(f"{place} is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}; convert it or leave it out"))
        return None
