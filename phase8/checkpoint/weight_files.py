"""Weights in safetensors files without a manifest, read as a checkpoint of step 0; the config beside them describes them.

Their origin is not trusted: only regular files directly in the directory are read, nothing is executed, and a size counts only when the
files themselves have it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phase8.checkpoint.checksum import checksum_of, checksum_of_next
from phase8.checkpoint.load import Checkpoint
from phase8.checkpoint.manifest import FORMAT, FORMAT_VERSION, AttachmentEntry, Manifest, Slice, TensorEntry, TensorFileEntry, json_problem
from phase8.checkpoint.state import MODEL_PREFIX
from phase8.checkpoint.tensor_file import TensorFile, open_for_reading
from phase8.checkpoint.untrusted import printable, shown, strict_json
from phase8.errors import CheckpointCorruptError

STORED_DTYPES = ("F32", "BF16", "F16")
_MAX_JSON_BYTES = 2**24  # a hundred times the size for the largest models
_NOT_READ_YET = "crc32:00000000"


@dataclass(frozen=True)
class OpenedFile:
    """A safetensors file whose header has been read, with the entry that a manifest would have for it."""

    file: TensorFile
    entry: TensorFileEntry


class WeightFiles(Checkpoint):
    """A checkpoint of step 0 that holds weights alone. There are no checksums, but bytes that are read twice must be the same.

    Args:
        path: Its directory.
        manifest: Built from the headers of the files; checksums may be `_NOT_READ_YET`.
        files: Files by name; they may hold more tensors than the manifest names.
        form: Program that writes this format: `consolidated` is phase8, `hf` is transformers.
    """

    def __init__(self, path: Path, manifest: Manifest, files: Mapping[str, TensorFile], *, form: Literal["consolidated", "hf"]):
        super().__init__(path, manifest)
        self.form = form
        self._files = dict(files)
        self._checksums: dict[tuple[str, str], str] = {}

    def with_checksums(self, metadata: dict[str, Any], *, on_progress: Callable[[str, int, int], None]) -> WeightFiles:
        """Returns a copy with other metadata after reading every byte once, so that later changes are noticed.

        Args:
            metadata: Metadata of a run at step 0.
            on_progress: Called with the number of bytes read.

        Raises:
            CheckpointCorruptError: A file cannot be read, or changes while it is read.
        """
        tensors, done = {}, 0
        total = sum(entry.size_bytes for entry in self.manifest.tensors.values())
        for name, entry in self.manifest.tensors.items():
            (part,) = entry.slices
            checksum = self._files[part.file].checksum(part.key)
            tensors[name] = entry.model_copy(update={"slices": [part.model_copy(update={"checksum": checksum})]})
            done += entry.size_bytes
            on_progress("reading", done, total)
        return WeightFiles(self.path, self.manifest.model_copy(update={"metadata": metadata, "tensors": tensors}), self._files, form=self.form)

    def verify(self) -> None:
        """Reads every byte that is used, in constant memory.

        Raises:
            CheckpointCorruptError: Bytes are missing or have changed.
        """
        for name, entry in self.manifest.tensors.items():
            (part,) = entry.slices
            self._check_slice(name, part, self._files[part.file].checksum(part.key))
        for name in self.manifest.attachments:
            self.attachment(name)

    def _check_slice(self, name: str, part: Slice, checksum: str) -> None:
        known = checksum if part.checksum == _NOT_READ_YET else part.checksum
        known = self._checksums.setdefault((part.file, part.key), known)
        super()._check_slice(name, part.model_copy(update={"checksum": known}), checksum)


def weights_of(
    directory: Path,
    files: Mapping[str, OpenedFile],
    places: Mapping[str, tuple[str, str]],
    *,
    config: dict[str, Any],
    tokenizer: Path | None,
    form: Literal["consolidated", "hf"],
) -> WeightFiles:
    """Builds a checkpoint from opened files.

    Args:
        directory: The directory of the files.
        files: Files by name.
        places: Maps names in the model to file and key.
        config: Config in the form that a run records.
        tokenizer: Becomes the attachment; None: no tokenizer.
        form: Format, as for `WeightFiles`.
    """
    tensors = {}
    for name, (file_name, key) in places.items():
        stored = files[file_name].file.tensors[key]
        whole = Slice(file=file_name, key=key, offsets=[0] * len(stored.shape), shape=stored.shape, checksum=_NOT_READ_YET)
        tensors[MODEL_PREFIX + name] = TensorEntry(dtype=stored.dtype, shape=stored.shape, slices=[whole])
    manifest = Manifest(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        step=0,
        metadata={"config": config},
        files={name: opened.entry for name, opened in files.items()},
        tensors=tensors,
        attachments={} if tokenizer is None else {tokenizer.name: _attachment(tokenizer)},
    )
    return WeightFiles(directory, manifest, {name: opened.file for name, opened in files.items()}, form=form)


def regular(path: Path) -> Path:
    """Returns a path that is no symbolic link; other kinds of file are checked when it is opened.

    Raises:
        CheckpointCorruptError: It is a link.
    """
    if path.is_symlink():
        raise CheckpointCorruptError(f"{path} is a link, which may lead elsewhere and is not followed; use a copy made with cp -rL")
    return path


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointCorruptError: The file holds no JSON object.
    """
    with open_for_reading(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > _MAX_JSON_BYTES:
            raise CheckpointCorruptError(f"{path} has {num_bytes} bytes, but at most {_MAX_JSON_BYTES} are read; use another copy")
        data = file.read(num_bytes)
    try:
        document = strict_json(data, encoding="utf-8")
    except ValueError as error:
        raise CheckpointCorruptError(f"{path} is not valid JSON ({error}); use another copy") from error
    if not isinstance(document, dict):
        raise CheckpointCorruptError(f"{path} holds {shown(document)}, but a JSON object is needed; use another copy")
    if (problem := json_problem(document, path.name)) is not None:
        raise CheckpointCorruptError(f"{path} cannot be used: {printable(problem)}; use another copy")
    return document


def open_tensor_file(path: Path) -> OpenedFile:
    """Opens a safetensors file and reads its header.

    Raises:
        CheckpointCorruptError: It is no safetensors file.
    """
    with open_for_reading(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        length = file.read(8)
        header_bytes = int.from_bytes(length, "little")
        if len(length) < 8 or header_bytes > min(size_bytes - 8, _MAX_JSON_BYTES):
            raise CheckpointCorruptError(f"{path} is not a safetensors file; use another copy")
        entry = TensorFileEntry(size_bytes=size_bytes, header_checksum=checksum_of(length + file.read(header_bytes)))
    return OpenedFile(TensorFile(path, size_bytes=entry.size_bytes, header_checksum=entry.header_checksum), entry)


def _attachment(path: Path) -> AttachmentEntry:
    with open_for_reading(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        return AttachmentEntry(size_bytes=num_bytes, checksum=checksum_of_next(file, num_bytes))
