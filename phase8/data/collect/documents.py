"""The documents of one file: its text, or the docstrings of a Python file; and what is not worth learning from.

A document is stored without trailing spaces, blank lines at its ends and carriage returns, so that texts that differ in nothing else are one.
"""

from __future__ import annotations

import ast
import gzip
import inspect
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from phase8.data.collect.roff import text_of_man_page

# Larger files are tables, amalgamations of sources that occur on their own, and logs.
MAX_FILE_BYTES = 1_000_000
MIN_DOCUMENT_BYTES = 128
MAX_LINE_CHARACTERS = 5_000
# Share of letters (all bytes beyond ASCII count as letters) and white space, below which a text is a table of numbers or of symbols.
MIN_LETTER_RATIO = {"python": 0.4, "c": 0.4, "prose": 0.65}

C_SUFFIXES = (".h", ".hpp", ".hh", ".cuh", ".c", ".cc", ".cpp", ".cu", ".inl")
PROSE_SUFFIXES = (".rst", ".md", ".txt", ".rst.gz", ".md.gz", ".txt.gz")
_MAN_PAGE = re.compile(r"/man[1-9][^/]*/[^/]+\.[1-9][a-z0-9]*(\.gz)?")
_LETTERS_AND_SPACE = bytes(byte for byte in range(256) if byte >= 128 or chr(byte).isalpha() or chr(byte).isspace())


class NotADocumentError(Exception):
    """A file or text that is left out; the message is the reason under which it is counted."""


def is_wanted(kind: str, path: str) -> bool:
    """Whether a file of this name holds documents of a kind (`python`, `c` or `prose`)."""
    if kind == "python":
        return path.endswith(".py")
    if kind == "c":
        return path.endswith(C_SUFFIXES)
    return path.endswith((*PROSE_SUFFIXES, ".py", "/METADATA")) or _MAN_PAGE.search(path) is not None


def document_of(kind: str, path: Path) -> str:
    """The document of a file, normalised.

    Args:
        kind: `python`, `c` or `prose`.
        path: A file that `is_wanted`.

    Raises:
        NotADocumentError: The file is left out.
    """
    text = _reader(kind, path)(_decoded(_content(path)))
    text = "\n".join([line.rstrip() for line in text.split("\n")]).strip("\n")
    _check(kind, text)
    return text


def _content(path: Path) -> bytes:
    """The bytes of a file, decompressed."""
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise NotADocumentError("unreadable") from error
    if len(content) > MAX_FILE_BYTES:
        raise NotADocumentError(f"above {MAX_FILE_BYTES:,} bytes")
    return content


def _decoded(content: bytes) -> str:
    if b"\0" in content:
        raise NotADocumentError("binary")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotADocumentError("not UTF-8") from error


def _reader(kind: str, path: Path) -> Callable[[str], str]:
    """How the document is got from the text of a file."""
    if kind != "prose":
        return str
    if path.suffix == ".py":
        return docstrings
    if path.name == "METADATA":  # of an installed package: headers, then its description
        return lambda text: text.partition("\n\n")[2]
    return text_of_man_page if _MAN_PAGE.search(path.as_posix()) else str


def docstrings(source: str) -> str:
    """The docstrings of a Python source in their order, without indentation, with a blank line between them.

    Raises:
        NotADocumentError: The source cannot be parsed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes that Python will refuse one day
            tree = ast.parse(source)
        return "\n\n".join(inspect.cleandoc(text) for text in _docstrings_below(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NotADocumentError("Python that cannot be parsed") from error


def _docstrings_below(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text is not None:
            yield text
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):  # no docstring is below an expression, but one may be below a handler of exceptions or a case
            yield from _docstrings_below(child)


def _check(kind: str, text: str) -> None:
    """Raises NotADocumentError for a text that is left out."""
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:  # a docstring may spell a lone surrogate
        raise NotADocumentError("not UTF-8") from error
    if len(encoded) < MIN_DOCUMENT_BYTES:
        raise NotADocumentError(f"below {MIN_DOCUMENT_BYTES} bytes")
    if max(map(len, text.split("\n"))) > MAX_LINE_CHARACTERS:
        raise NotADocumentError(f"lines of more than {MAX_LINE_CHARACTERS:,} characters")
    num_others = len(encoded.translate(None, _LETTERS_AND_SPACE))
    if num_others > (1 - MIN_LETTER_RATIO[kind]) * len(encoded):
        raise NotADocumentError("mostly numbers or symbols")
