"""Saving a checkpoint: written aside, made durable, then renamed. Nothing that exists is ever overwritten."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phase8.checkpoint.checksum import CHUNK_BYTES, format_crc32
from phase8.checkpoint.layout import MANIFEST_NAME, commit, saving_directory
from phase8.checkpoint.manifest import (
    FILE_NAME_PATTERN,
    FORMAT,
    FORMAT_VERSION,
    MAX_DIMS,
    MAX_STEP,
    TENSOR_FILE_SUFFIX,
    TENSOR_NAME_PATTERN,
    AttachmentEntry,
    Manifest,
    Slice,
    TensorEntry,
    TensorFileEntry,
    json_problem,
    manifest_bytes,
)
from phase8.checkpoint.tensor_file import DTYPE_NAMES, RESERVED_KEY, write_tensor_file
from phase8.durable import fsync_path
from phase8.errors import CheckpointError, StorageError

DEFAULT_MAX_FILE_BYTES = 4 * 2**30
_GROUP = re.compile(r"[a-z][a-z0-9_]{0,49}")


def save_checkpoint(
    root: Path,
    *,
    step: int,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, Any],
    attachments: Mapping[str, Path],
    max_file_bytes: int = DEFAULT_MAX_FILE_BYTES,
) -> Path:
    """The directory of a checkpoint that is complete and on the disk when this returns.

    At every instant, a crash of the machine included, the directory under `root` holds every checkpoint it held before and no
    part of a new one under a checkpoint's name. A step that is there already is replaced only after its successor is committed.

    Args:
        root: The `checkpoints` directory of a run; created if missing.
        step: Optimizer steps done.
        tensors: Named `<group>.<name>`, e.g. `model.head.weight`; each group is stored in its own files `<group>-00000.safetensors`.
        metadata: Exactly JSON: null, booleans, finite numbers, strings, lists, dicts with string keys.
        attachments: File name in the checkpoint -> file to copy.
        max_file_bytes: A new file is begun when the tensors of one would exceed this.

    Raises:
        CheckpointError: Something in the arguments cannot be stored; nothing was written.
        StorageError: The disk is full, read-only or fails; what was written is removed.
    """
    with _storage_errors(root, step):
        _check_savable(step=step, tensors=tensors, metadata=metadata, attachments=attachments)
        if not root.is_dir():
            root.mkdir(parents=True, exist_ok=True)
            fsync_path(root.parent)
        with saving_directory(root, step) as directory:
            files, entries = _write_tensors(directory, tensors, max_file_bytes)
            manifest = Manifest(
                format=FORMAT,
                format_version=FORMAT_VERSION,
                step=step,
                metadata=metadata,
                files=files,
                tensors=entries,
                attachments={name: _copy_attachment(source, directory / name) for name, source in attachments.items()},
            )
            _write_durably(directory / MANIFEST_NAME, [manifest_bytes(manifest)])
            fsync_path(directory)
            return commit(directory, root, step)


def _write_tensors(
    directory: Path, tensors: Mapping[str, Tensor], max_file_bytes: int
) -> tuple[dict[str, TensorFileEntry], dict[str, TensorEntry]]:
    files, entries = {}, {}
    for file_name, names in _plan_files(tensors, max_file_bytes).items():
        written = write_tensor_file(directory / file_name, {_key(name): tensors[name] for name in names})
        files[file_name] = TensorFileEntry(size_bytes=written.size_bytes, header_checksum=written.header_checksum)
        for name in names:
            shape = list(tensors[name].shape)
            part = Slice(file=file_name, key=_key(name), offsets=[0] * len(shape), shape=shape, checksum=written.checksums[_key(name)])
            entries[name] = TensorEntry(dtype=DTYPE_NAMES[tensors[name].dtype], shape=shape, slices=[part])
    return files, entries


def _plan_files(tensors: Mapping[str, Tensor], max_file_bytes: int) -> dict[str, list[str]]:
    """File name -> names of its tensors: groups apart, in the given order, files cut before they exceed the limit."""
    groups: dict[str, list[list[str]]] = {}
    size_bytes = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: _group(item[0])):
        files = groups.setdefault(_group(name), [])
        if not files or size_bytes + tensor.nbytes > max_file_bytes:
            files.append([])
            size_bytes = 0
        files[-1].append(name)
        size_bytes += tensor.nbytes
    return {f"{group}-{index:05d}{TENSOR_FILE_SUFFIX}": names for group, files in groups.items() for index, names in enumerate(files)}


def _group(name: str) -> str:
    return name.partition(".")[0]


def _key(name: str) -> str:
    """Entry of the safetensors file: without the group, so that a model file alone is a plain state dict."""
    return name.partition(".")[2]


def _copy_attachment(source: Path, destination: Path) -> AttachmentEntry:
    crc, size_bytes = 0, 0

    def chunks() -> Iterator[bytes]:
        nonlocal crc, size_bytes
        with open(source, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                crc, size_bytes = zlib.crc32(chunk, crc), size_bytes + len(chunk)
                yield chunk

    _write_durably(destination, chunks())
    return AttachmentEntry(size_bytes=size_bytes, checksum=format_crc32(crc))


def _write_durably(path: Path, chunks: Iterable[bytes]) -> None:
    with open(path, "xb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def _check_savable(*, step: int, tensors: Mapping[str, Tensor], metadata: dict[str, Any], attachments: Mapping[str, Path]) -> None:
    """Refuses, before anything is written, what would not come back as it was."""
    if type(step) is not int or not 0 <= step <= MAX_STEP:
        raise CheckpointError(f"a checkpoint's step is a whole number from 0 to {MAX_STEP}, not {step!r}")
    for name, tensor in tensors.items():
        if (problem := _tensor_problem(name, tensor)) is not None:
            raise CheckpointError(f"cannot save {name!r} as a tensor: {problem}")
    if type(metadata) is not dict:
        raise CheckpointError(f"metadata is of type {type(metadata).__name__}; it must be a dict of JSON values")
    if (problem := json_problem(metadata, "metadata")) is not None:
        raise CheckpointError(f"cannot save the metadata: {problem}")
    for name, source in attachments.items():
        if not re.fullmatch(FILE_NAME_PATTERN, name) or name.endswith(TENSOR_FILE_SUFFIX) or name == MANIFEST_NAME:
            raise CheckpointError(
                f"{name!r} cannot be the name of an attachment; use letters, digits, '.', '_' and '-', and no name of the checkpoint's own files"
            )
        if not source.is_file():
            raise CheckpointError(f"the attachment {name!r} cannot be copied from {source}: there is no such file")


def _tensor_problem(name: str, tensor: Tensor) -> str | None:
    if not re.fullmatch(TENSOR_NAME_PATTERN, name):
        return "a name is at most 1000 printable ASCII characters without spaces"
    if not _GROUP.fullmatch(_group(name)) or _key(name) in ("", RESERVED_KEY):
        return "a name is a group of files and a name in it, such as model.head.weight"
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"it is of type {type(tensor).__name__}; only plain tensors are stored, everything else belongs into the metadata as JSON"
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dim() > MAX_DIMS:
        return f"it is a {tensor.layout} tensor of {tensor.dim()} dims on {tensor.device}; only dense ones of up to {MAX_DIMS} dims are stored"
    if tensor.dtype not in DTYPE_NAMES:
        return f"its dtype {tensor.dtype} is none that safetensors files can hold"
    return None


@contextmanager
def _storage_errors(root: Path, step: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = "" if error.filename is None else f": {error.filename}"
        raise StorageError(
            f"step {step} could not be saved under {root} ({error.strerror}{place}); "
            "make room or permission there, or choose another run.output_dir; checkpoints saved before are untouched"
        ) from error
