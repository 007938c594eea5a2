"""Compressed files as streams of bytes, with one error for all that is wrong with them.

A file that ends before its compressed stream does is damaged, never short: gzip and zstd both say where a stream ends.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from phase8.data.optional_packages import import_zstandard

COMPRESSED_SUFFIXES = (".gz", ".zst")
_NAMES = {".gz": "gzip", ".zst": "zstd"}
# A compressed block of a few bytes can become 128 KiB, so this much input becomes 8 MiB at most.
_ZSTD_INPUT_BYTES = 256
_ZSTD_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` needs, the largest there is


class DamagedStreamError(Exception):
    """A compressed file is not whole; the message says how."""


@contextmanager
def decompressed(path: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The content of a file that is compressed according to its suffix, and the compressed file, whose position tells how far reading has come.

    Raises:
        DamagedStreamError: Reading inside the block met damage or a premature end.
        OSError: The file cannot be read.
    """
    suffix = next(suffix for suffix in COMPRESSED_SUFFIXES if path.endswith(suffix))
    with open(path, "rb") as compressed:
        try:
            if not compressed.peek(1):
                raise EOFError("it is empty")
            yield (gzip.GzipFile(fileobj=compressed) if suffix == ".gz" else io.BufferedReader(_ZstdStream(compressed, path))), compressed
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DamagedStreamError(f"{path} is not a whole {_NAMES[suffix]} file ({error}); compress or copy it again") from error


class _ZstdStream(io.RawIOBase):
    """The content of all frames of a zstd file. The package's own reader takes a truncated file for a whole one."""

    def __init__(self, compressed: BinaryIO, path: str):
        self._compressed = compressed
        zstandard = import_zstandard(path)
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
        self._error = zstandard.ZstdError
        self._frame = self._decompressor.decompressobj()
        self._is_between_frames = True
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._output:
            if not self._fill():
                return 0
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _fill(self) -> bool:
        """Decompresses a little more; false at the end."""
        self._input = self._input or self._compressed.read(_ZSTD_INPUT_BYTES)
        if not self._input:
            if not self._is_between_frames:
                raise EOFError("it ends inside a frame")
            return False
        try:
            self._output = memoryview(self._frame.decompress(self._input))
        except self._error as error:
            raise EOFError(str(error)) from error
        self._input, self._is_between_frames = b"", self._frame.eof
        if self._frame.eof:
            self._input = self._frame.unused_data
            self._frame = self._decompressor.decompressobj()
        return True
