"""One safetensors file, written and read tensor by tensor with checksums on the way.

The files are ordinary safetensors files (the tests read them with the safetensors library). The library itself is not used here
because it gives and takes whole files: a checkpoint needs the checksum of exactly the bytes that go to disk, the operating
system's own error when a disk is full, and no second copy of a model in memory.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from phase8.checkpoint.checksum import CHUNK_BYTES, checksum_of, checksum_of_next, crc32, format_crc32, read_chunks, read_into
from phase8.checkpoint.direct_writer import DirectWriter
from phase8.checkpoint.untrusted import shown, strict_json
from phase8.errors import CheckpointCorruptError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
RESERVED_KEY = "__metadata__"
MAX_DIMS = 64
_MAX_HEADER_BYTES = 2**30
_CAN_FORGET = hasattr(os, "posix_fadvise")


@dataclass(frozen=True)
class WrittenFile:
    """The manifest's facts about a file just written; `checksums` has one entry per key."""

    size_bytes: int
    header_checksum: str
    checksums: dict[str, str]


@dataclass(frozen=True)
class StoredTensor:
    """An entry of a safetensors header; `begin` is an offset from the start of the file."""

    dtype: str
    shape: list[int]
    begin: int
    num_bytes: int


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], *, read: Callable[[str], Tensor] | None = None) -> WrittenFile:
    """Writes a new safetensors file and waits until it is on the disk.

    Args:
        path: The file; it must not exist.
        tensors: On any device and with any strides; copied to the host one at a time. The widest dtype is stored first, so that
            readers that map the file find every tensor aligned.
        read: Returns the tensor of a name when it is written, with the dtype and shape of `tensors` (which may then be on the meta device),
            so that only one is in memory at a time. None: the tensors themselves are written.

    Raises:
        OSError: As the operating system says.
    """
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header = _header_bytes({name: tensors[name] for name in names})
    checksums = {}
    with DirectWriter(path) as file:
        file.write(header)
        for name in names:
            tensor = tensors[name] if read is None else read(name)
            checksums[name] = _write_bytes(file, byte_view(tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()))
            del tensor  # frees it before the next one is read
    return WrittenFile(file.size_bytes, checksum_of(header), checksums)


def _header_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, Any] = {RESERVED_KEY: {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_bytes(file: DirectWriter, data: memoryview) -> str:
    crc = 0
    for begin in range(0, len(data), CHUNK_BYTES):
        chunk = data[begin : begin + CHUNK_BYTES]
        file.write(chunk)
        crc = crc32(chunk, crc)
    return format_crc32(crc)


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the host, without a copy."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


@contextmanager
def open_for_reading(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file of a checkpoint; links, devices and pipes are refused, and every error names the file.

    Raises:
        CheckpointCorruptError: It is missing, not a regular file, shorter than it must be, or the disk does not give its bytes.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise CheckpointCorruptError(f"{path} is not a regular file; use another checkpoint")
        with open(descriptor, "rb") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointCorruptError(f"{path} is missing; use another checkpoint") from error
    except EOFError as error:
        raise CheckpointCorruptError(f"{path} is shorter than its manifest says; use another checkpoint") from error
    except OSError as error:
        raise CheckpointCorruptError(f"{path} cannot be read ({error.strerror}); restore access to it or use another checkpoint") from error


class TensorFile:
    """A safetensors file whose header matches the checksum in the manifest.

    Args:
        path: The file.
        size_bytes: Its length by the manifest.
        header_checksum: Checksum of its header by the manifest.

    Raises:
        CheckpointCorruptError: The file or its header differs, or the header is malformed.
    """

    def __init__(self, path: Path, *, size_bytes: int, header_checksum: str):
        self.path = path
        with open_for_reading(path) as file:
            found_bytes = os.fstat(file.fileno()).st_size
            if found_bytes != size_bytes:
                raise CheckpointCorruptError(f"{path} has {found_bytes} bytes, its manifest says {size_bytes}; use another checkpoint")
            length = file.read(8)
            header_bytes = int.from_bytes(length, "little")
            if len(length) < 8 or header_bytes > min(size_bytes - 8, _MAX_HEADER_BYTES):
                raise CheckpointCorruptError(f"{path} is not a safetensors file; use another checkpoint")
            header = file.read(header_bytes)
        if checksum_of(length + header) != header_checksum:
            raise CheckpointCorruptError(f"{path}: its header does not have the checksum of its manifest; use another checkpoint")
        self.tensors = _parse_header(header, path, size_bytes=size_bytes)

    def read_into(self, key: str, destination: Tensor, *, for_the_last_time: bool = False) -> str:
        """Fills a contiguous host tensor of the entry's size, and returns the checksum of the bytes read.

        Args:
            key: The entry.
            destination: The tensor to be filled.
            for_the_last_time: The page cache may drop the bytes: a whole checkpoint in it would evict the data of other processes.
        """
        stored = self.tensors[key]
        with open_for_reading(self.path) as file:
            file.seek(stored.begin)
            checksum = read_into(file, byte_view(destination))
            if for_the_last_time and _CAN_FORGET:
                os.posix_fadvise(file.fileno(), stored.begin, stored.num_bytes, os.POSIX_FADV_DONTNEED)
        return checksum

    def chunks(self, key: str) -> Iterator[memoryview]:
        """Yields an entry's bytes in pieces; a piece is valid until the next one is requested."""
        stored = self.tensors[key]
        with open_for_reading(self.path) as file:
            file.seek(stored.begin)
            yield from read_chunks(file, stored.num_bytes)

    def checksum(self, key: str) -> str:
        """Checksum of an entry's bytes, in constant memory."""
        stored = self.tensors[key]
        with open_for_reading(self.path) as file:
            file.seek(stored.begin)
            return checksum_of_next(file, stored.num_bytes)

    def checksums(self) -> Iterator[tuple[str, str]]:
        """(key, checksum) of every entry, in one pass over the file and in constant memory."""
        with open_for_reading(self.path) as file:
            for key, stored in sorted(self.tensors.items(), key=lambda item: item[1].begin):
                file.seek(stored.begin)
                yield key, checksum_of_next(file, stored.num_bytes)


def _parse_header(header: bytes, path: Path, *, size_bytes: int) -> dict[str, StoredTensor]:
    """Parses a header, whose byte ranges must tile the rest of the file."""
    try:
        document = strict_json(header, encoding="utf-8")
        document.pop(RESERVED_KEY, None)
        data_begin = 8 + len(header)
        tensors = {
            key: StoredTensor(entry["dtype"], entry["shape"], data_begin + entry["data_offsets"][0], _range_bytes(entry))
            for key, entry in document.items()
        }
        end = data_begin
        for stored in sorted(tensors.values(), key=lambda stored: (stored.begin, stored.num_bytes)):
            if stored.begin != end:
                raise ValueError("its byte ranges have gaps or overlap")
            end += stored.num_bytes
        if end != size_bytes:
            raise ValueError("its byte ranges do not end with the file")
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise CheckpointCorruptError(f"{path}: its safetensors header is not valid ({error}); use another checkpoint") from error
    return tensors


def _range_bytes(entry: dict[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    if len(entry["shape"]) > MAX_DIMS:
        raise ValueError(f"a shape has {len(entry['shape'])} dims, but at most {MAX_DIMS} are stored")
    sizes = [begin, end, *entry["shape"]]
    if any(type(size) is not int or size < 0 for size in sizes):
        raise ValueError("a shape or byte range is not made of non-negative whole numbers")
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {shown(entry['dtype'])} is none of {', '.join(DTYPES)}")
    if end - begin != math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize:
        raise ValueError("a byte range does not have the length of its dtype and shape")
    return end - begin
