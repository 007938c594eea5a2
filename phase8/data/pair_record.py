"""The record of a `.bin/.idx` pair, written beside it as `<prefix>.meta.json`.

Computing it again would take reading every token. A record counts only if size and digest of `.bin` match it, since
other programs may have rewritten the pair and left the record.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from phase8.data.staging import read_json
from phase8.errors import DataError
from phase8.paths import real_path

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class MadeWith:
    """The tokenizer of a pair.

    Attributes:
        tokenizer_sha256: Hash of its file.
        eod_id: The token that ends documents; None: nothing does.
        eod_token: Its piece, where that is known.
    """

    tokenizer_sha256: str
    eod_id: int | None
    eod_token: str | None


@dataclass(frozen=True, kw_only=True)
class PairRecord:
    """Facts about the tokens of a pair.

    Attributes:
        bin_bytes: Size of `.bin`.
        bin_sha256: Hash of all bytes.
        content: Its `content_digest`, by which every start checks that the record still belongs to it.
        smallest_id: Smallest token id; None where there is no token.
        largest_id: Largest token id; None where there is no token.
        made_with: The tokenizer; None where the writer did not know it, and in records of earlier releases.
    """

    bin_bytes: int
    bin_sha256: str
    content: str
    smallest_id: int | None
    largest_id: int | None
    made_with: MadeWith | None = None

    def to_json(self) -> bytes:
        """The content of the file that `read_record` reads."""
        tree = {"version": VERSION, **asdict(self)}
        if self.made_with is None:
            del tree["made_with"]
        return json.dumps(tree, indent=1, sort_keys=True).encode() + b"\n"


class TokenTally:
    """Hash, size and range of all tokens of a `.bin`, accumulated while it is written."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._num_bytes = 0
        self._range: tuple[int, int] | None = None

    def add(self, tokens: np.ndarray) -> None:
        """Adds tokens that are written next."""
        self._hash.update(tokens.data)
        self._num_bytes += tokens.nbytes
        if tokens.size:
            found = int(tokens.min()), int(tokens.max())
            self._range = found if self._range is None else joined_range(self._range, found)

    def record(self, content: str, made_with: MadeWith | None) -> PairRecord:
        """The record of a `.bin` of these tokens, whose `content_digest` is `content`."""
        smallest, largest = (None, None) if self._range is None else self._range
        return PairRecord(
            bin_bytes=self._num_bytes,
            bin_sha256=self._hash.hexdigest(),
            content=content,
            smallest_id=smallest,
            largest_id=largest,
            made_with=made_with,
        )


def joined_range(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """The smallest range that contains both ranges."""
    return min(a[0], b[0]), max(a[1], b[1])


def refuse_own_source(prefix: str | Path, source: Path) -> None:
    """Refuses a pair to write that would replace the tokens it is made from.

    Raises:
        DataError: They are the same file.
    """
    if real_path(Path(f"{prefix}.bin")) == real_path(source):
        raise DataError(f"the pair {prefix} would replace its own source {source}; give another --output-prefix")


def record_path(prefix: str | Path) -> Path:
    """Path of the record of a pair."""
    return Path(f"{prefix}.meta.json")


def read_record(prefix: str | Path, *, bin_bytes: int, content: str) -> PairRecord | None:
    """Reads the record of a pair; None if there is none, or if it does not match the size and digest of `.bin`.

    Raises:
        DataError: The record cannot be read.
    """
    tree = read_json(record_path(prefix))
    if not isinstance(tree, dict) or tree.pop("version", None) != VERSION:
        return None
    made_with = _stored_made_with(tree["made_with"]) if "made_with" in tree else None
    if ("made_with" in tree and made_with is None) or {*tree, "made_with"} != PairRecord.__dataclass_fields__.keys():
        return None
    ids, digests = [tree["smallest_id"], tree["largest_id"]], [tree["bin_sha256"], tree["content"]]
    is_record = all(type(number) is int for number in ids) or ids == [None, None]
    is_record &= all(isinstance(digest, str) for digest in digests)
    return PairRecord(**tree | {"made_with": made_with}) if is_record and (tree["bin_bytes"], tree["content"]) == (bin_bytes, content) else None


def _stored_made_with(tree: object) -> MadeWith | None:
    if not isinstance(tree, dict) or tree.keys() != MadeWith.__dataclass_fields__.keys():
        return None
    eod_id, eod_token = tree["eod_id"], tree["eod_token"]
    is_whole = isinstance(tree["tokenizer_sha256"], str) and (eod_id is None or type(eod_id) is int)
    return MadeWith(**tree) if is_whole and (eod_token is None or isinstance(eod_token, str)) else None
