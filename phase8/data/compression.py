"""Compressed files as streams of bytes; all damage is reported by one error class.

A file that ends before its compressed stream is reported as damaged, never as short: gzip and zstd both mark the end of a stream.
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
# A compressed block of a few bytes can expand to 128 KiB, so this much input expands to 8 MiB at most.
_ZSTD_INPUT_BYTES = 256
_ZSTD_WINDOW_BYTES = 1 << 31  # the largest window, that of `zstd --long=31`


class DamagedStreamError(Exception):
    """A compressed file is incomplete or damaged; the message says how."""


@contextmanager
def decompressed(path: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Opens a file compressed according to its suffix; yields its content and the compressed file, whose position shows the progress.

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
    """The content of all frames of a zstd file. The package's own reader reports a truncated file as complete."""

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
        """Decompresses a little more; False at the end."""
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
