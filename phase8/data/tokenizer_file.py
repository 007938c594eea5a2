"""Reads a tokenizer file without trusting it: it may be an endless pipe, a device, terabytes large, or JSON nested without end."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

from phase8.errors import DataError
from phase8.paths import why_unreadable

# The character that stands for a space in the pieces of sentencepiece, and in text that is given to it.
SPACE_MARK = "\u2581"
# The largest published tokenizers are about 40 MB.
MAX_BYTES = 1 << 29


def read_tokenizer_file(path: Path) -> bytes:
    """The content of a tokenizer file.

    Raises:
        DataError: The file is missing, unreadable, not a regular file, or larger than any tokenizer.
    """
    remedy = "give a sentencepiece .model or a tokenizer.json"
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            kind = "a directory" if stat.S_ISDIR(found.st_mode) else "a pipe or device, which cannot be read again at every start"
            raise DataError(f"cannot read the tokenizer {path}: it is {kind}; {remedy}")
        if found.st_size > MAX_BYTES:
            raise DataError(f"the tokenizer {path} has {found.st_size:,} bytes, but none has more than {MAX_BYTES:,}; {remedy}")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {why_unreadable(path, error)}; {remedy}") from error
    except ValueError as error:  # a NUL in the path
        raise DataError(f"cannot read the tokenizer {path}: {error}; {remedy}") from error


def tokenizer_digest(path: Path) -> str:
    """SHA-256 of a tokenizer file.

    Raises:
        DataError: As `read_tokenizer_file`.
    """
    return hashlib.sha256(read_tokenizer_file(path)).hexdigest()


def parse_tokenizer_json(content: bytes, path: Path) -> dict[str, Any]:
    """Parses the JSON object of a `tokenizer.json`, whose first character is known to be a brace.

    Raises:
        DataError: It is not JSON, or nested more deeply than any tokenizer is.
    """
    try:
        parsed: dict[str, Any] = json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise DataError(f"{path} begins like JSON but is nested too deeply to be a tokenizer; give a tokenizer.json or a .model") from error
    except ValueError as error:
        raise DataError(f"{path} begins like JSON but is not ({error}); give a whole tokenizer.json or a sentencepiece .model") from error
    return parsed
