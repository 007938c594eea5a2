"""Documents of text files and JSON lines: which files to read, how to cut the reading into shards, and what is wrong with an input.

A text or source file is one document; a line of a `.jsonl` file is one document under a key of its object. Both may be gzipped.
"""

from __future__ import annotations

import gzip
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from phase8.errors import DataError

# A file named outright is read whatever its suffix; these are what is taken from a directory.
_PROSE = {".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc"}
_C_FAMILY = {".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".hh", ".cu", ".cuh", ".m", ".cs", ".java", ".go", ".rs", ".swift", ".scala", ".kt"}
_SCRIPTS = {".py", ".pyi", ".js", ".jsx", ".mjs", ".ts", ".tsx", ".rb", ".php", ".pl", ".pm", ".lua", ".r", ".jl", ".sh", ".bash", ".sql"}
_OTHER_CODE = {".hs", ".ml", ".mli", ".erl", ".ex", ".exs", ".clj", ".lisp", ".el", ".f", ".f90", ".proto", ".cmake"}
TEXT_SUFFIXES = frozenset(_PROSE | _C_FAMILY | _SCRIPTS | _OTHER_CODE)
JSON_LINES_SUFFIXES = frozenset({".jsonl", ".ndjson", ".jsonlines"})
_UTF8_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_FIBONACCI_HASH = 0x9E3779B1  # 2**32 over the golden ratio

T = TypeVar("T")
OnInvalid = Callable[[DataError], None]


@dataclass(frozen=True)
class Source:
    """An input file as it was found; a change of any field means its documents are read again."""

    path: str
    size_bytes: int
    modified_ns: int

    @property
    def is_compressed(self) -> bool:
        """Whether it is gzipped, by its name."""
        return self.path.endswith(".gz")

    @property
    def is_json_lines(self) -> bool:
        """Whether it holds a document per line, by its name (`.json` too, as Megatron's users call such files)."""
        return Path(self.path.removesuffix(".gz")).suffix.lower() in JSON_LINES_SUFFIXES | {".json"}


@dataclass(frozen=True)
class Span:
    """The part of a source whose documents begin in bytes [start, end)."""

    source: Source
    start: int
    end: int


def find_sources(inputs: Iterable[str | Path]) -> tuple[list[Source], int]:
    """The files to read, each once, in order: inputs as given, directories by path (hidden names and Python caches left out).

    Returns:
        The sources, and how many files of directories were passed over for their suffix.

    Raises:
        DataError: An input is missing or cannot be read, or a directory holds nothing to read.
    """
    sources: dict[str, Source] = {}
    num_passed_over = 0
    for name in map(Path, inputs):
        files = [name]
        if name.is_dir():
            found = sorted(_files_below(name), key=lambda path: path.relative_to(name).as_posix())
            files = [path for path in found if _is_text_name(path)]
            num_passed_over += len(found) - len(files)
            if not files:
                raise DataError(f"the directory {name} holds no text, source code or .jsonl file; name the files themselves to read other suffixes")
        for path in files:
            source = _source(path)
            sources.setdefault(source.path, source)
    return list(sources.values()), num_passed_over


def cut_shards(sources: Iterable[Source], shard_bytes: int) -> list[tuple[Span, ...]]:
    """Consecutive spans of about `shard_bytes` together; only uncompressed JSON lines can be cut within a file."""
    shards: list[tuple[Span, ...]] = []
    current: list[Span] = []
    filled = 0
    for source in sources:
        is_cut = source.is_json_lines and not source.is_compressed
        step = shard_bytes if is_cut else max(source.size_bytes, 1)
        for start in range(0, source.size_bytes, step):
            span = Span(source, start, min(start + step, source.size_bytes))
            if current and filled + span.end - span.start > shard_bytes:
                shards.append(tuple(current))
                current, filled = [], 0
            current.append(span)
            filled += span.end - span.start
    return [*shards, tuple(current)] if current else shards


def check_unchanged(sources: Iterable[Source]) -> None:
    """Makes sure that the files are still those that were found.

    Raises:
        DataError: One was changed, or cannot be read any more.
    """
    for source in sources:
        if _source(Path(source.path)) != source:
            raise DataError(f"the input {source.path} was changed while it was being read; run again when nothing writes to it")


def spread(items: Sequence[T]) -> list[T]:
    """The items in a fixed order of which every beginning is taken evenly from all over the sequence."""
    return [items[i] for i in sorted(range(len(items)), key=lambda i: i * _FIBONACCI_HASH % 2**32)]


def read_documents(span: Span, *, json_key: str, on_invalid: OnInvalid) -> Iterator[str]:
    """The texts of a span, exactly as stored (a leading byte order mark aside).

    Args:
        span: What to read.
        json_key: Where an object of JSON lines holds its text.
        on_invalid: Called with an error naming file and line for everything that is not a document; it raises to stop there, or
            returns to skip it.

    Raises:
        DataError: The file cannot be read at all.
    """
    with _opened(span.source, on_invalid) as file:
        if span.source.is_json_lines:
            yield from _json_lines(file, span, json_key=json_key, on_invalid=on_invalid)
        else:
            text = _text(file.read(), span.source.path, on_invalid)
            if text is not None:
                yield text


def _files_below(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read the input {error.filename}: {error.strerror}; make it readable or leave it out") from error

    for directory, subdirectories, files in os.walk(root, onerror=refuse):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".") and name != "__pycache__"]
        yield from (Path(directory, name) for name in files if not name.startswith("."))


def _is_text_name(path: Path) -> bool:
    return Path(path.name.removesuffix(".gz")).suffix.lower() in TEXT_SUFFIXES | JSON_LINES_SUFFIXES


def _source(path: Path) -> Source:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"the input {path} is not a regular file, so an interrupted run could not go on with it; store it in a file first")
        with path.open("rb"):
            return Source(str(path.resolve()), found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise DataError(f"cannot read the input {path}: {error.strerror}; give existing, readable files or directories") from error


@contextmanager
def _opened(source: Source, on_invalid: OnInvalid) -> Iterator[BinaryIO]:
    try:
        with gzip.open(source.path, "rb") if source.is_compressed else open(source.path, "rb") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        on_invalid(DataError(f"{source.path} is not a whole gzip file ({error}); compress or copy it again"))
    except OSError as error:
        raise DataError(f"cannot read the input {source.path}: {error.strerror or error}; it was there a moment ago") from error


def _text(content: bytes, place: str, on_invalid: OnInvalid) -> str | None:
    content = content.removeprefix(_UTF8_BYTE_ORDER_MARK)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        on_invalid(DataError(f"{place} is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}; convert it or leave it out"))
        return None


def _json_lines(file: BinaryIO, span: Span, *, json_key: str, on_invalid: OnInvalid) -> Iterator[str]:
    if span.start:
        file.seek(span.start - 1)
        file.readline()  # the rest of a line that begins in the span before
    first = position = file.tell()
    for num_lines_before, line in enumerate(iter(file.readline, b"")):
        if position >= span.end and not span.source.is_compressed:
            return
        position += len(line)
        if line.isspace():
            continue

        def report(problem: str, num_lines_before: int = num_lines_before) -> None:
            number = _num_lines(span.source.path, first) + num_lines_before + 1
            on_invalid(DataError(f"{span.source.path}, line {number}: {problem}"))

        text = _text_of_line(line, json_key, report)
        if text is not None:
            yield text


def _text_of_line(line: bytes, json_key: str, report: Callable[[str], None]) -> str | None:
    """The document of a line, or None after `report` was told what is wrong with it."""
    line = line.removeprefix(_UTF8_BYTE_ORDER_MARK)
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return report(f"byte {error.start} is 0x{line[error.start]:02x}, which is not UTF-8; convert the file")
    except (ValueError, RecursionError) as error:
        return report(f"not JSON ({error}); every line must be one object with the text under {json_key!r}")
    if not isinstance(record, dict) or json_key not in record:
        found = f"an object with the keys {', '.join(map(repr, record)) or '(none)'}" if isinstance(record, dict) else f"{type(record).__name__}"
        return report(f"found {found}, without the key {json_key!r}; name the key of the text with --json-key")
    text = record[json_key]
    if not isinstance(text, str):
        return report(f"{json_key!r} holds {type(text).__name__}, not a string; name the key of the text with --json-key")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return report(f"{json_key!r} holds the lone surrogate {text[error.start]!a}, which is not Unicode text; remove it")
    return text


def _num_lines(path: str, end: int) -> int:
    """Lines that end in the first `end` bytes of a file."""
    total, remaining = 0, end
    with open(path, "rb") as file:
        while chunk := file.read(min(remaining, 1 << 20)):
            total += chunk.count(b"\n")
            remaining -= len(chunk)
    return total
