"""A Llama as Hugging Face's transformers saves it, opened as if it were a checkpoint of ours: without a manifest, so one is made.

    config.json                                         what it computes
    model.safetensors                                   its weights; or
    model.safetensors.index.json, *.safetensors         which of several files has which of them
    tokenizer.json or tokenizer.model                   becomes the attachment

Anybody may have written it: only regular files directly in the directory are read, none is executed, and no size is believed before the
files themselves have it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phase8.checkpoint.checksum import checksum_of, checksum_of_next
from phase8.checkpoint.layout import MANIFEST_NAME, step_of
from phase8.checkpoint.llama import llama_name, llama_tensors
from phase8.checkpoint.llama_config import model_section_of
from phase8.checkpoint.load import Checkpoint
from phase8.checkpoint.manifest import (
    FILE_NAME_PATTERN,
    FORMAT,
    FORMAT_VERSION,
    TENSOR_FILE_SUFFIX,
    AttachmentEntry,
    Manifest,
    Slice,
    TensorEntry,
    TensorFileEntry,
    json_problem,
)
from phase8.checkpoint.rewrite import OnProgress
from phase8.checkpoint.state import MODEL_PREFIX
from phase8.checkpoint.tensor_file import TensorFile, open_for_reading
from phase8.checkpoint.untrusted import shown, shown_name, strict_json
from phase8.config.schema import ModelSection
from phase8.errors import CheckpointCorruptError, CheckpointMismatchError

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
STORED_DTYPES = ("F32", "BF16", "F16")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # the one that transformers itself prefers comes first
_MAX_JSON_BYTES = 2**24  # a hundred times what the largest models have


def is_llama_directory(path: Path) -> bool:
    """Whether a directory is in Hugging Face's form, of whatever model, rather than a checkpoint of ours."""
    is_own = os.path.lexists(path / MANIFEST_NAME) or step_of(path.name) is not None
    return not is_own and os.path.lexists(path / CONFIG_FILE)


@dataclass(frozen=True)
class LlamaDirectory:
    """A Llama that is ours by its config and by the headers of its files; made by `open_llama`.

    Args:
        path: Its directory.
        model: What it is here.
        files: The tensor files by name, and what is to be expected of each.
        places: Name here -> file and name there.
        tokenizer: Its file, if there is one.
    """

    path: Path
    model: ModelSection
    files: Mapping[str, tuple[TensorFile, TensorFileEntry]]
    places: Mapping[str, tuple[str, str]]
    tokenizer: Path | None

    @property
    def is_bf16(self) -> bool:
        """No weight is stored more precisely."""
        return {stored.dtype for file, _ in self.files.values() for stored in file.tensors.values()} == {"BF16"}

    def as_checkpoint(self, metadata: dict[str, Any], *, on_progress: OnProgress) -> Checkpoint:
        """A checkpoint of step 0 whose tensors are read from these files. Reads every byte once, so that later changes are found.

        Args:
            metadata: Of a run that has done nothing yet.
            on_progress: Told of bytes read.

        Raises:
            CheckpointCorruptError: A file cannot be read, or changes meanwhile.
        """
        tensors, done = {}, 0
        total = sum(stored.num_bytes for file, _ in self.files.values() for stored in file.tensors.values())
        for name, (file_name, key) in self.places.items():
            file = self.files[file_name][0]
            stored = file.tensors[key]
            whole = Slice(file=file_name, key=key, offsets=[0] * len(stored.shape), shape=stored.shape, checksum=file.checksum(key))
            tensors[MODEL_PREFIX + name] = TensorEntry(dtype=stored.dtype, shape=stored.shape, slices=[whole])
            done += stored.num_bytes
            on_progress("reading", done, total)
        manifest = Manifest(
            format=FORMAT,
            format_version=FORMAT_VERSION,
            step=0,
            metadata=metadata,
            files={name: entry for name, (_, entry) in self.files.items()},
            tensors=tensors,
            attachments=self._attachments(),
        )
        return Checkpoint(self.path, manifest)

    def _attachments(self) -> dict[str, AttachmentEntry]:
        if self.tokenizer is None:
            return {}
        with open_for_reading(self.tokenizer) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            return {self.tokenizer.name: AttachmentEntry(size_bytes=num_bytes, checksum=checksum_of_next(file, num_bytes))}


def open_llama(directory: Path) -> LlamaDirectory:
    """A directory in Hugging Face's form, of which config, index and headers have been read and agree.

    Raises:
        CheckpointCorruptError: A file is missing, damaged, leads elsewhere or is a pickle.
        CheckpointMismatchError: It is another model than the transformer baseline can be.
    """
    config_path = _regular(directory / CONFIG_FILE)
    model = model_section_of(_read_object(config_path), config_path)
    files: dict[str, tuple[TensorFile, TensorFileEntry]] = {}
    found: dict[str, str] = {}
    for name, expected in _tensor_files(directory).items():
        entry = _entry_of(_regular(directory / name))
        file = TensorFile(directory / name, size_bytes=entry.size_bytes, header_checksum=entry.header_checksum)
        if expected is not None and (differing := file.tensors.keys() ^ expected) != set():
            raise CheckpointCorruptError(
                f"{directory / INDEX_FILE}: weight_map and {name} disagree whether {shown_name(min(differing))} lies there; import another copy"
            )
        files[name] = file, entry
        found |= dict.fromkeys(file.tensors, name)
    tokenizer = next((_regular(directory / name) for name in _TOKENIZERS if os.path.lexists(directory / name)), None)
    return LlamaDirectory(directory, model, files, _places(directory, model, files, found), tokenizer)


def _places(
    directory: Path, model: ModelSection, files: Mapping[str, tuple[TensorFile, TensorFileEntry]], found: dict[str, str]
) -> dict[str, tuple[str, str]]:
    """Name here -> file and name there, of exactly the tensors that the model has.

    Raises:
        CheckpointMismatchError: One is missing, too many, or of another shape or dtype.
    """
    result = {}
    for name, shape in llama_tensors(model):
        key = llama_name(name)
        if key not in found:
            raise CheckpointMismatchError(f"{directory} lacks the tensor {key!r}, which its {CONFIG_FILE} asks for; import another copy")
        file_name = found.pop(key)
        stored = files[file_name][0].tensors[key]
        if stored.shape != shape:
            raise CheckpointMismatchError(
                f"{directory / file_name}: {key!r} has shape {shown(stored.shape)}, by {CONFIG_FILE} it has {shown(shape)}; import another copy"
            )
        if stored.dtype not in STORED_DTYPES:
            raise CheckpointMismatchError(
                f"{directory / file_name}: {key!r} has dtype {stored.dtype}, but weights are {', '.join(STORED_DTYPES)}; convert them before"
            )
        result[name] = file_name, key
    if found:
        key, file_name = next(iter(found.items()))
        raise CheckpointMismatchError(
            f"{directory / file_name} holds {shown_name(key)}, for which the transformer baseline of {CONFIG_FILE} has no place; import another model"
        )
    return result


def _tensor_files(directory: Path) -> Mapping[str, set[str] | None]:
    """The files of the weights, and the tensors that the index says they hold; None: it is the only one, without an index.

    Raises:
        CheckpointCorruptError: There are none, or not one set of them, or the index names what is no file here.
    """
    single, index = (os.path.lexists(directory / name) for name in (SINGLE_FILE, INDEX_FILE))
    if single and index:
        raise CheckpointCorruptError(f"{directory} holds {SINGLE_FILE} and {INDEX_FILE}; remove the one that is not meant")
    if single:
        return {SINGLE_FILE: None}
    if not index:
        pickle = next((name for name in _PICKLES if os.path.lexists(directory / name)), None)
        reason = "" if pickle is None else f" but {pickle}, a pickle, which may run code and is never read"
        raise CheckpointCorruptError(f"{directory} holds no {SINGLE_FILE} and no {INDEX_FILE}{reason}; save the weights as safetensors")
    path = _regular(directory / INDEX_FILE)
    names = _read_object(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointCorruptError(f"{path}: weight_map is {shown(names)}, but an object of file names is needed; import another copy")
    result: dict[str, set[str]] = {}
    for key, name in names.items():
        is_name = isinstance(name, str) and re.fullmatch(FILE_NAME_PATTERN, name) is not None and name.endswith(TENSOR_FILE_SUFFIX)
        if not is_name or (name not in result and not os.path.lexists(directory / name)):
            found = shown_name(name) if isinstance(name, str) else shown(name)
            what = "not in SRC" if is_name else "not the name of a safetensors file in SRC"
            raise CheckpointCorruptError(f"{path}: weight_map.{shown_name(key)} is {found}, which is {what}; import another copy")
        result.setdefault(name, set()).add(key)
    return result


def _regular(path: Path) -> Path:
    """A path that is no link; what else it may be is found when it is opened."""
    if path.is_symlink():
        raise CheckpointCorruptError(f"{path} is a link, which may lead outside of SRC and is not followed; import a copy made with cp -rL")
    return path


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointCorruptError: It holds none.
    """
    with open_for_reading(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > _MAX_JSON_BYTES:
            raise CheckpointCorruptError(f"{path} has {num_bytes} bytes, but at most {_MAX_JSON_BYTES} are read; import another copy")
        data = file.read(num_bytes)
    try:
        document = strict_json(data, encoding="utf-8")
    except ValueError as error:
        raise CheckpointCorruptError(f"{path} is not valid JSON ({error}); import another copy") from error
    if not isinstance(document, dict):
        raise CheckpointCorruptError(f"{path} holds {shown(document)}, but a JSON object is needed; import another copy")
    if (problem := json_problem(document, path.name)) is not None:
        raise CheckpointCorruptError(f"{path} cannot be used: {problem if problem.isprintable() else ascii(problem)}; import another copy")
    return document


def _entry_of(path: Path) -> TensorFileEntry:
    """Length and checksum of the header, which a manifest would say."""
    with open_for_reading(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        length = file.read(8)
        header_bytes = int.from_bytes(length, "little")
        if len(length) < 8 or header_bytes > min(size_bytes - 8, _MAX_JSON_BYTES):
            raise CheckpointCorruptError(f"{path} is not a safetensors file; import another copy")
        return TensorFileEntry(size_bytes=size_bytes, header_checksum=checksum_of(length + file.read(header_bytes)))
