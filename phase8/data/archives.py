"""Archives of several files, which must not be taken for a text: their headers and padding may well be UTF-8."""

from __future__ import annotations

from phase8.data.compression import COMPRESSED_SUFFIXES, DamagedStreamError, decompressed

_TAR_MAGIC, _TAR_PLACE = b"ustar", 257
_ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06")  # of a file in it, and of the end, which is all that an empty one has


def archive_problem(path: str) -> str | None:
    """A sentence about a file whose content, decompressed as its suffix says, is a tar or zip archive; None for any other content.

    Raises:
        OSError: The file cannot be read.
    """
    kind = _kind(_head(path, _TAR_PLACE + len(_TAR_MAGIC)))
    return None if kind is None else f"{path} is a {kind} archive and not a text; unpack it and give the directory with its files"


def _head(path: str, num_bytes: int) -> bytes:
    """The first bytes of the content; none where the compressed stream is damaged, which its reader reports."""
    if not path.endswith(COMPRESSED_SUFFIXES):
        with open(path, "rb") as file:
            return file.read(num_bytes)
    try:
        with decompressed(path) as (file, _):
            return file.read(num_bytes)
    except DamagedStreamError:
        return b""


def _kind(head: bytes) -> str | None:
    if head.startswith(_ZIP_MAGICS):
        return "zip"
    # The fields of a header are padded with NUL bytes; a text may have the word at that place.
    return "tar" if head[_TAR_PLACE:] == _TAR_MAGIC and b"\0" in head[:_TAR_PLACE] else None
