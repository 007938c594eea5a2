"""Content digests of files, cheap enough to be computed at every start; names, sizes and times are not trusted."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from phase8.errors import DataError

# Larger files are sampled: this many blocks of this size, evenly spread, the first and the last among them.
NUM_BLOCKS = 256
BLOCK_BYTES = 1 << 16
WHOLE_BYTES = NUM_BLOCKS * BLOCK_BYTES


def content_digest(path: Path) -> str:
    """Digest of size and content of a file: `sha256:<hex>` of all bytes up to 16 MiB, otherwise `sampled-sha256:<hex>` of 16 MiB of them.

    Equal contents give equal digests on every machine. Two files of equal size that differ only between the samples give equal digests as well.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(size.to_bytes(8, "little"))
            if size <= WHOLE_BYTES:
                digest.update(file.read())
                return f"sha256:{digest.hexdigest()}"
            for block in range(NUM_BLOCKS):
                file.seek(block * (size - BLOCK_BYTES) // (NUM_BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
            return f"sampled-sha256:{digest.hexdigest()}"
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; make it readable") from error
