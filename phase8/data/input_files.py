"""The input files of a preparation: which files the inputs stand for, how each is identified, and what a directory holds besides."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from phase8.data.archives import archive_problem
from phase8.data.compression import COMPRESSED_SUFFIXES
from phase8.data.content import WHOLE_BYTES, content_digest
from phase8.data.optional_packages import import_parquet, import_zstandard
from phase8.errors import DataError
from phase8.paths import real_path, why_unreadable

# A file that is named explicitly is read whatever its suffix; from a directory, files with these suffixes are read.
_PROSE = {".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc"}
_C_FAMILY = {".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".hh", ".cu", ".cuh", ".m", ".cs", ".java", ".go", ".rs", ".swift", ".scala", ".kt"}
_SCRIPTS = {".py", ".pyi", ".js", ".jsx", ".mjs", ".ts", ".tsx", ".rb", ".php", ".pl", ".pm", ".lua", ".r", ".jl", ".sh", ".bash", ".sql"}
_OTHER_CODE = {".hs", ".ml", ".mli", ".erl", ".ex", ".exs", ".clj", ".lisp", ".el", ".f", ".f90", ".proto", ".cmake"}
TEXT_SUFFIXES = frozenset(_PROSE | _C_FAMILY | _SCRIPTS | _OTHER_CODE)
JSON_LINES_SUFFIXES = frozenset({".jsonl", ".ndjson", ".jsonlines"})
_CACHE = "__pycache__"
_MAX_NAMED_SUFFIXES = 10
_MAX_NAMED_KEYS = 20


@dataclass(frozen=True)
class Source:
    """An input file as it was found; a change of any field means its documents are read again.

    Attributes:
        path: Absolute path under the name that the user gave, since the target of a symbolic link may have any name.
        size_bytes: Its size.
        digest: `content_digest` of it.
        changed_ns: Time of the inode's last change, which cannot be set back; None where the digest covers every byte.
    """

    path: str
    size_bytes: int
    digest: str
    changed_ns: int | None = None

    @property
    def is_compressed(self) -> bool:
        """Whether the name says that it is compressed by gzip or zstd."""
        return self.path.endswith(COMPRESSED_SUFFIXES)

    @property
    def is_json_lines(self) -> bool:
        """Whether the name says that each line is a document (`.json` counts, since Megatron's users call such files so)."""
        return _suffix_of_content(Path(self.path)) in JSON_LINES_SUFFIXES | {".json"}

    @property
    def is_parquet(self) -> bool:
        """Whether the name says that each row is a document."""
        return Path(self.path).suffix.lower() == ".parquet"


@dataclass(frozen=True)
class Span:
    """The part of a source whose documents begin in bytes [start, end)."""

    source: Source
    start: int
    end: int


class Document(NamedTuple):
    """A text, and the number of bytes that it took of its source (compressed bytes of a compressed source): the unit of progress."""

    text: str
    source_bytes: int


OnInvalid = Callable[[DataError], None]


@dataclass
class LeftOut:
    """Entries of directories that are not read, each once however often it is met.

    Attributes:
        suffixes: Suffix of each file whose suffix is not read.
        hidden_files: Files whose names begin with a dot.
        hidden_directories: Directories whose names do; what they hold is not counted.
        caches: Directories in which Python keeps what it compiled.
        dangling_links: Symbolic links without a target.
    """

    suffixes: dict[Path, str] = field(default_factory=dict)
    hidden_files: set[Path] = field(default_factory=set)
    hidden_directories: set[Path] = field(default_factory=set)
    caches: set[Path] = field(default_factory=set)
    dangling_links: list[str] = field(default_factory=list)

    @property
    def num_by_suffix(self) -> Counter[str]:
        """Number of files by suffix, for suffixes that are not read."""
        return Counter(self.suffixes.values())

    def add(self, other: LeftOut) -> None:
        """Adds what another directory leaves out."""
        self.suffixes |= other.suffixes
        self.hidden_files |= other.hidden_files
        self.hidden_directories |= other.hidden_directories
        self.caches |= other.caches
        self.dangling_links += [link for link in other.dangling_links if link not in self.dangling_links]

    def remove(self, read: Collection[Path]) -> None:
        """Removes what is read after all, since another input names it or a link with another name leads to it."""
        self.suffixes = {path: suffix for path, suffix in self.suffixes.items() if path not in read}
        self.hidden_files.difference_update(read)
        if self.hidden_directories or self.caches:
            entered = {directory for parent in {path.parent for path in read} for directory in (parent, *parent.parents)}
            self.hidden_directories -= entered
            self.caches -= entered

    @property
    def reasons(self) -> list[str]:
        """How many entries are not read and why, a clause for each reason; without links that lead to nothing."""
        files, hidden, directories, caches = map(len, (self.suffixes, self.hidden_files, self.hidden_directories, self.caches))
        counts = {
            f"{_counted(files, 'file has', 'files have')} no suffix of text ({describe_suffixes(self.num_by_suffix)})": files,
            f"{_counted(hidden, 'file is', 'files are')} hidden by a dot before the name": hidden,
            f"{_counted(directories, 'directory is', 'directories are')} hidden in the same way, with all below": directories,
            f"{_counted(caches, 'directory is a cache', 'directories are caches')} of Python": caches,
        }
        return [clause for clause, number in counts.items() if number]

    @property
    def sentence(self) -> str | None:
        """What is not read and how to read it, in words; None where there is nothing but links that lead to nothing."""
        if not self.reasons:
            return None
        return f"not everything below the inputs is read: {', '.join(self.reasons)}; name a file or a directory itself to read it"


def _counted(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def find_sources(inputs: Iterable[str | Path]) -> tuple[list[Source], LeftOut]:
    """Lists the files to read, each once: inputs in the given order, directories by path (without hidden names and Python caches).

    Symbolic links are followed; a directory or file that is reached in several ways is read once.

    Raises:
        DataError: An input is missing or cannot be read, is an archive, its format needs a package that is not installed, or a directory holds
            nothing to read.
    """
    sources: dict[Path, Source] = {}
    left_out = LeftOut()
    for name in map(Path, inputs):
        is_directory = name.is_dir()
        for path in _files_of_directory(name, left_out) if is_directory else [name]:
            identity = real_path(path)
            if identity not in sources:
                sources[identity] = find_source(path)
                _check_package(sources[identity])
            if not is_directory:
                _refuse_archive(sources[identity])
    left_out.remove(sources)
    return list(sources.values()), left_out


def find_source(path: Path) -> Source:
    """The current state of one file.

    Raises:
        DataError: It is missing, cannot be read, or is no regular file.
    """
    try:
        found = path.stat()
        name = str(real_path(path.parent) / path.name)
    except OSError as error:
        raise DataError(f"cannot read the input {path}: {why_unreadable(path, error)}; give existing, readable files or directories") from error
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"the input {path} is not a regular file, so an interrupted run could not go on with it; store it in a file first")
    return Source(name, found.st_size, content_digest(path), found.st_ctime_ns if found.st_size > WHOLE_BYTES else None)


def check_unchanged(sources: Iterable[Source]) -> None:
    """Checks that the files have not changed since they were found.

    Raises:
        DataError: One was changed, or cannot be read any more.
    """
    for source in sources:
        if find_source(Path(source.path)) != source:
            raise DataError(f"the input {source.path} was changed while it was being read; run again when nothing writes to it")


def describe_keys(keys: Collection[str]) -> str:
    """The keys of an object or the columns of a table in words; of many, the first."""
    words = [*map(repr, islice(keys, _MAX_NAMED_KEYS)), *(["..."] if len(keys) > _MAX_NAMED_KEYS else [])]
    return ", ".join(words) or "(none)"


def describe_suffixes(num_by_suffix: dict[str, int]) -> str:
    """Counts of files by suffix as words, the most frequent first."""
    ordered = sorted(num_by_suffix.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{suffix if suffix.isprintable() else ascii(suffix)}: {number:,}" for suffix, number in ordered[:_MAX_NAMED_SUFFIXES]]
    rest = ordered[_MAX_NAMED_SUFFIXES:]
    return ", ".join([*words, *([f"{len(rest):,} other suffixes: {sum(number for _, number in rest):,}"] if rest else [])])


def _files_of_directory(directory: Path, left_out: LeftOut) -> Iterator[Path]:
    """The files of a directory in a supported format, by path; what it holds besides is added to `left_out`."""
    besides = LeftOut()
    found = sorted(_files_below(directory, besides), key=lambda path: path.relative_to(directory).as_posix())
    is_empty = True
    for path in found:
        if path.is_symlink() and not path.exists():
            besides.dangling_links.append(str(real_path(path.parent) / path.name))
        elif not is_read(path):
            besides.suffixes[real_path(path)] = path.suffix.lower() or "without a suffix"
        else:
            is_empty = False
            yield path
    if is_empty:
        instead = f" ({', '.join(besides.reasons)})" if besides.reasons else ""
        raise DataError(
            f"the directory {directory} holds no text, source code, .jsonl or .parquet file{instead}; name the files themselves to read others"
        )
    left_out.add(besides)


def _files_below(root: Path, left_out: LeftOut) -> Iterator[Path]:
    """Every file below a directory, following links; a directory is visited once, under its own name rather than that of a link.

    Hidden names and caches are added to `left_out` instead.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read the input {error.filename}: {error.strerror}; make it readable or leave it out") from error

    visited: set[tuple[int, int]] = set()
    linked = [str(root)]
    while linked:
        begins, linked = sorted(linked), []
        for directory, subdirectories, files in (entry for begin in begins for entry in os.walk(begin, onerror=refuse)):
            found = os.stat(directory)
            if (found.st_dev, found.st_ino) in visited:
                subdirectories.clear()
                continue
            visited.add((found.st_dev, found.st_ino))
            left_out.hidden_files.update(real_path(Path(directory, name)) for name in files if name.startswith("."))
            left_out.hidden_directories.update(real_path(Path(directory, name)) for name in subdirectories if name.startswith("."))
            left_out.caches.update(real_path(Path(directory, name)) for name in subdirectories if name == _CACHE)
            subdirectories[:] = [name for name in subdirectories if not name.startswith(".") and name != _CACHE]
            paths = [os.path.join(directory, name) for name in subdirectories]
            linked += filter(os.path.islink, paths)  # os.walk lists links but does not enter them
            yield from (Path(directory, name) for name in files if not name.startswith("."))


def _suffix_of_content(path: Path) -> str:
    name = path.name
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return Path(name).suffix.lower()


def is_read(path: Path) -> bool:
    """Whether a file of a directory has a name that says that it holds documents."""
    return _suffix_of_content(path) in TEXT_SUFFIXES | JSON_LINES_SUFFIXES or path.suffix.lower() == ".parquet"


def _check_package(source: Source) -> None:
    """Refuses a format at once, not after hours of work, if its package is not installed."""
    if source.is_parquet:
        import_parquet(source.path)
    elif source.path.endswith(".zst"):
        import_zstandard(source.path)


def _refuse_archive(source: Source) -> None:
    """Refuses an archive that is named as an input at once; one among the files of a directory is found when these are read."""
    try:
        problem = None if source.is_parquet else archive_problem(source.path)
    except OSError as error:
        raise DataError(f"cannot read the input {source.path}: {error.strerror or error}; it was there a moment ago") from error
    if problem is not None:
        raise DataError(f"the input {problem}")
