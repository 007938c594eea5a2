"""The manifest of a checkpoint: its files, the place of each tensor in them, and everything that is not a tensor.

The file is JSON. Its last 31 bytes are `"checksum": "crc32:0123abcd"`, a line feed, `}` and a line feed; the CRC-32 is that of
all bytes before them, so a change of any byte is found. See docs/checkpoint_format.md.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from phase8.checkpoint.checksum import PATTERN, checksum_of
from phase8.checkpoint.coverage import coverage_problem
from phase8.checkpoint.step_directories import MANIFEST_NAME
from phase8.checkpoint.tensor_file import DTYPES, MAX_DIMS
from phase8.checkpoint.untrusted import printable, shortened, shown, shown_name, strict_json
from phase8.errors import CheckpointCorruptError, CheckpointMismatchError

FORMAT = "phase8-checkpoint"
FORMAT_VERSION = 1
FILE_NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}$"
TENSOR_NAME_PATTERN = r"^[!-~]{1,1000}$"
TENSOR_FILE_SUFFIX = ".safetensors"
MAX_JSON_DEPTH = 100
MAX_MANIFEST_BYTES = 2**30
_TRAILER = re.compile(rb'"checksum": "(?P<checksum>crc32:[0-9a-f]{8})"\n\}\n')
_TRAILER_BYTES = 31
_MAX_BYTES = 2**63 - 1
MAX_STEP = 10**18 - 1  # eighteen digits in a directory name

_Place = tuple[Any, str | int]  # the place of the containing value (None for the root), and the key or index in it
Size = Annotated[int, Field(ge=0, le=_MAX_BYTES)]
Shape = Annotated[list[Size], Field(max_length=MAX_DIMS)]
Checksum = Annotated[str, Field(pattern=PATTERN)]
FileName = Annotated[str, Field(pattern=FILE_NAME_PATTERN)]
TensorName = Annotated[str, Field(pattern=TENSOR_NAME_PATTERN)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Slice(_Record):
    """A region of a tensor and the place of its bytes: entry `key` of the safetensors file `file`."""

    file: FileName
    key: TensorName
    offsets: Shape
    shape: Shape
    checksum: Checksum


class TensorEntry(_Record):
    """A tensor: its safetensors dtype, its global shape and the slices that tile it."""

    dtype: str
    shape: Shape
    slices: Annotated[list[Slice], Field(min_length=1)]

    @property
    def size_bytes(self) -> int:
        """Size of the whole tensor in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class TensorFileEntry(_Record):
    """A safetensors file: its length, and the checksum of its first 8 + N bytes, N being the length of its JSON header."""

    size_bytes: Size
    header_checksum: Checksum


class AttachmentEntry(_Record):
    """A file stored unchanged, such as the tokenizer."""

    size_bytes: Size
    checksum: Checksum


class Manifest(_Record):
    """The content of `manifest.json`."""

    format: Literal["phase8-checkpoint"]
    format_version: Annotated[int, Field(ge=1, le=FORMAT_VERSION)]  # a Literal would accept true and 1.0 as well
    step: Size
    metadata: dict[str, Any]
    files: dict[FileName, TensorFileEntry]
    tensors: dict[TensorName, TensorEntry]
    attachments: dict[FileName, AttachmentEntry]

    def slices_by_file(self) -> dict[str, dict[str, tuple[str, Slice]]]:
        """Maps file and key to (tensor name, slice), for everything that the files must hold."""
        result: dict[str, dict[str, tuple[str, Slice]]] = {name: {} for name in self.files}
        for name, entry in self.tensors.items():
            for part in entry.slices:
                result[part.file][part.key] = name, part
        return result


def manifest_bytes(manifest: Manifest) -> bytes:
    """Content of `manifest.json`: one line per file, tensor and attachment."""
    fields = []
    for name, value in manifest.model_dump().items():
        if name in ("files", "tensors", "attachments") and value:
            entries = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items())
            fields.append(f' "{name}": {{\n{entries}\n }}')
        else:
            fields.append(f' "{name}": {json.dumps(value, allow_nan=False)}')
    body = ("{\n" + ",\n".join(fields) + ",\n ").encode("ascii")
    return body + f'"checksum": "{checksum_of(body)}"\n}}\n'.encode("ascii")


def parse_manifest(data: bytes, path: Path) -> Manifest:
    """Parses what `manifest_bytes` wrote, and checks every rule of the format that needs no other file.

    Args:
        data: Content of the file.
        path: Path of the file, for error messages.

    Raises:
        CheckpointCorruptError: It is damaged or breaks a rule.
        CheckpointMismatchError: It is intact but of a newer format.
    """
    document = _parse_json(data, path)
    if document.get("format") != FORMAT:
        _refuse(path, f"format is {shown(document.get('format'))}, a checkpoint has {FORMAT!r}")
    version = document.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise CheckpointMismatchError(
            f"{path}: format_version {version} is newer than this installation of phase8 can read ({FORMAT_VERSION}); install a newer phase8"
        )
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        _refuse(path, f"{shown('.'.join(str(part) for part in first['loc']))} is {shown(first['input'])}: {first['msg']}")
    if (problem := json_problem(manifest.metadata, "metadata")) is not None:
        _refuse(path, problem)
    if (problem := consistency_problem(manifest)) is not None:
        _refuse(path, problem)
    return manifest


def _parse_json(data: bytes, path: Path) -> dict[str, Any]:
    body, trailer = data[:-_TRAILER_BYTES], data[-_TRAILER_BYTES:]
    match = _TRAILER.fullmatch(trailer)
    if match is None:
        _refuse(path, "it does not end with its checksum; it is truncated or altered")
    if (found := checksum_of(body)) != match["checksum"].decode():
        _refuse(path, f"its bytes have checksum {found}, not {match['checksum'].decode()} as written at its end")
    try:
        document = strict_json(data, encoding="ascii")
    except ValueError as error:
        _refuse(path, f"it is not valid JSON ({error})")
    if not isinstance(document, dict):
        _refuse(path, "it is not a JSON object")
    document.pop("checksum", None)
    return document


def json_problem(value: Any, where: str) -> str | None:
    """Why `value` is not exactly a JSON value (it would come back changed, or not at all); None if it is one.

    Tuples, numpy scalars and subclasses are refused rather than converted.
    """
    # A place links to the place of its container: spelled out for every value, places would take far more memory than the values.
    stack: list[tuple[Any, _Place, int]] = [(value, (None, where), 0)]
    while stack:
        item, place, depth = stack.pop()
        if depth > MAX_JSON_DEPTH:
            return f"{_path(place)} is nested deeper than {MAX_JSON_DEPTH} levels"
        if type(item) is float and not math.isfinite(item):
            return f"{_path(place)} is {item}, which JSON cannot hold; store null or a finite number"
        if type(item) is dict:
            for key, child in item.items():
                if type(key) is not str:
                    return f"{_path(place)} has the key {key!r}, of type {type(key).__name__}; keys of JSON objects are strings"
                stack.append((child, (place, key), depth + 1))
        elif type(item) is list:
            stack.extend((child, (place, index), depth + 1) for index, child in enumerate(item))
        elif item is not None and type(item) not in (bool, int, float, str):
            return f"{_path(place)} is of type {type(item).__name__}; only null, booleans, numbers, strings, lists and dicts of these are stored"
    return None


def _path(place: _Place) -> str:
    """Spells a place, for example `metadata.a[0]`."""
    parts = []
    holder, name = place
    while holder is not None:
        parts.append(f"[{name}]" if type(name) is int else f".{shortened(str(name))}")
        holder, name = holder
    return shortened(str(name) + "".join(reversed(parts)))


def consistency_problem(manifest: Manifest) -> str | None:
    """The first broken rule that spans several entries, or None."""
    for name in manifest.files:
        if not name.endswith(TENSOR_FILE_SUFFIX):
            return f"the tensor file {name!r} does not end in {TENSOR_FILE_SUFFIX!r}"
    for name in manifest.attachments:
        if name.endswith(TENSOR_FILE_SUFFIX) or name == MANIFEST_NAME:
            return f"the attachment {name!r} has a name that belongs to another kind of file"
    places = set()
    used = dict.fromkeys(manifest.files, 0)
    for name, entry in manifest.tensors.items():
        if (problem := _tensor_problem(entry)) is not None:
            return f"tensor {shown_name(name)}: {problem}"
        for part in entry.slices:
            if part.file not in manifest.files:
                return f"tensor {shown_name(name)} lies in {part.file!r}, which is not among the files"
            if (part.file, part.key) in places:
                return f"two slices lie in entry {shown_name(part.key)} of {part.file!r}"
            places.add((part.file, part.key))
            used[part.file] += math.prod(part.shape) * DTYPES[entry.dtype].itemsize
    files = {file for file, _ in places}
    if unused := [name for name in manifest.files if name not in files]:
        return f"no tensor lies in the file {unused[0]!r}"
    small = next((name for name, file in manifest.files.items() if used[name] > file.size_bytes), None)
    return None if small is None else f"the file {small!r} has {manifest.files[small].size_bytes} bytes, but its tensors have {used[small]}"


def _tensor_problem(entry: TensorEntry) -> str | None:
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        return f"dtype {shown(entry.dtype)} is none of {', '.join(DTYPES)}"
    # Zero-sized dims count as one: torch computes strides from all dims, and they must not overflow.
    if math.prod(max(1, size) for size in entry.shape) * dtype.itemsize > _MAX_BYTES:
        return f"shape {shown(entry.shape)} is beyond every memory"
    return coverage_problem(entry.shape, entry.slices)


def _refuse(path: Path, problem: str) -> NoReturn:
    raise CheckpointCorruptError(f"{path} cannot be used: {printable(problem)}; use another checkpoint")
