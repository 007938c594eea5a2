"""Compressed inputs: all frames of a file, a premature end in either format, and memory that a bomb cannot have."""

from __future__ import annotations

import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from phase8.data.compression import DamagedStreamError, decompressed

COMPRESS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.compress}
NAMES = {".gz": "gzip", ".zst": "zstd"}
CONTENT = b"".join(b"line %d of many\n" % (i * i) for i in range(5000))


def read(path: Path) -> bytes:
    with decompressed(str(path)) as (file, _):
        return file.read()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_the_content_comes_back_as_lines_and_whole(tmp_path: Path, suffix: str):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(COMPRESS[suffix](CONTENT))
    assert read(path) == CONTENT
    with decompressed(str(path)) as (file, compressed):
        assert b"".join(iter(file.readline, b"")) == CONTENT
        assert compressed.tell() == path.stat().st_size


@pytest.mark.parametrize("suffix", COMPRESS)
def test_several_compressed_parts_are_one_content(tmp_path: Path, suffix: str):
    path = tmp_path / f"a{suffix}"
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" if suffix == ".zst" else b""  # what seekable zstd files end in
    path.write_bytes(COMPRESS[suffix](CONTENT) + COMPRESS[suffix](b"") + COMPRESS[suffix](b"the end") + skippable)
    assert read(path) == CONTENT + b"the end"


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("part", [0.0, 0.001, 0.4, 0.999])
def test_a_premature_end_is_damage(tmp_path: Path, suffix: str, part: float):
    path = tmp_path / f"a{suffix}"
    whole = COMPRESS[suffix](CONTENT) + COMPRESS[suffix](CONTENT)
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(DamagedStreamError, match=rf"a{suffix} is not a whole {NAMES[suffix]} file \(.+\); compress or copy it again"):
        read(path)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_bomb_is_read_in_bounded_memory(tmp_path: Path, suffix: str):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(COMPRESS[suffix](bytes(50_000_000)))
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    total = 0
    with decompressed(str(path)) as (file, _):
        while chunk := file.read(1 << 20):
            total += len(chunk)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 50_000_000
    assert peak < 20_000_000
