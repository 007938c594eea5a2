"""Opens a directory of Hugging Face's transformers, a Llama or what `--format hf` wrote, as if it were a checkpoint of phase8. It runs no code of it.

| file | content |
|---|---|
| `config.json` | the architecture |
| `model.safetensors`, or | its weights |
| `model.safetensors.index.json` and `*.safetensors` | which of several files has which of them |
| `tokenizer.json` or `tokenizer.model` | becomes the attachment |
| `tokenizer_config.json` | may say that the former was made of the latter, which is the attachment then |
| `generation_config.json` | the token ids that end a text |
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from phase8.checkpoint.huggingface.config import model_section_of
from phase8.checkpoint.huggingface.llama import llama_name, llama_tensors
from phase8.checkpoint.huggingface.phase8_model import MODEL_TYPE, exported_name, own_name, section_of, stays_in_fp32
from phase8.checkpoint.huggingface.repeats import require_repeat
from phase8.checkpoint.huggingface.text_settings import RESETS, id_settings, text_settings
from phase8.checkpoint.manifest import FILE_NAME_PATTERN, TENSOR_FILE_SUFFIX
from phase8.checkpoint.step_directories import INDEX_NAME, WEIGHTS_CONFIG_NAME, WEIGHTS_NAME
from phase8.checkpoint.untrusted import shown, shown_name
from phase8.checkpoint.weight_files import STORED_DTYPES, OpenedFile, WeightFiles, open_tensor_file, read_object, regular, weights_of
from phase8.config.model_section import ModelSection
from phase8.errors import CheckpointCorruptError, CheckpointMismatchError

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # transformers prefers the first one too
TOKENIZER_CONFIG_NAME, GENERATION_CONFIG_NAME = "tokenizer_config.json", "generation_config.json"
CONVERTED_FROM = "converted_from"  # its key for the name of the file of which tokenizer.json was made


def open_hugging_face(directory: Path, config: dict[str, Any]) -> WeightFiles:
    """Opens a directory in Hugging Face's format, after checking that config, index and headers agree.

    Args:
        directory: The directory.
        config: Content of its config.json.

    Raises:
        CheckpointCorruptError: A file is missing, damaged, a pickle, or a link out of the directory.
        CheckpointMismatchError: No model of phase8 can represent it.
    """
    path, is_own = directory / WEIGHTS_CONFIG_NAME, config.get("model_type") == MODEL_TYPE
    model = section_of(config, path) if is_own else model_section_of(config, path)
    files: dict[str, OpenedFile] = {}
    found: dict[str, OpenedFile] = {}
    for name, expected in _tensor_files(directory).items():
        files[name] = opened = open_tensor_file(regular(directory / name))
        if expected is not None and (differing := opened.file.tensors.keys() ^ expected) != set():
            raise CheckpointCorruptError(
                f"{directory / INDEX_NAME}: weight_map and {name} disagree whether {shown_name(min(differing))} lies there; use another copy"
            )
        found |= dict.fromkeys(opened.file.tensors, opened)
    places = _own_places(directory, model, found) if is_own else _places(directory, model, found)
    names = [name for name in places if not (is_own and stays_in_fp32(name))]
    is_bf16 = {found[key].file.tensors[key].dtype for _, key in map(places.__getitem__, names)} == {"BF16"}  # every weight that may be
    ours: dict[str, Any] = {"model": model.model_dump(mode="json"), "precision": {"dtype": "bf16" if is_bf16 else "fp32"}}
    tokenizer = _tokenizer_of(directory)
    ours["data"] = {} if tokenizer is None else text_settings(tokenizer, _object(directory, TOKENIZER_CONFIG_NAME))
    generation = _object(directory, GENERATION_CONFIG_NAME)
    ours["data"] |= id_settings({directory / GENERATION_CONFIG_NAME: generation, path: config}, vocab_size=model.vocab_size)
    if config.get(RESETS) is True:
        ours["data"][RESETS] = True
    try:
        return weights_of(directory, files, places, config=ours, tokenizer=tokenizer, form="hf")
    except ValidationError:
        raise CheckpointCorruptError(f"{directory} holds a name or a shape that no tensor of a model has; use another copy") from None


def _tokenizer_of(directory: Path) -> Path | None:
    """The file of the tokenizer; of two, the one of which the other was made."""
    found = [regular(directory / name) for name in _TOKENIZERS if os.path.lexists(directory / name)]
    if len(found) > 1:
        original = _object(directory, TOKENIZER_CONFIG_NAME).get(CONVERTED_FROM)
        found = [path for path in found if path.name == original] or found
    return found[0] if found else None


def _object(directory: Path, name: str) -> dict[str, Any]:
    """Content of a JSON file; empty without the file."""
    path = directory / name
    return read_object(regular(path)) if os.path.lexists(path) else {}


def _own_places(directory: Path, model: ModelSection, found: Mapping[str, OpenedFile]) -> dict[str, tuple[str, str]]:
    """As `_places`, for a model that is no Llama; shapes and missing tensors are found when the weights are loaded into a model.

    Raises:
        CheckpointMismatchError: A tensor is superfluous, or of another dtype.
    """
    result = {}
    for key, opened in found.items():
        path, name, stored = opened.file.path, own_name(key), opened.file.tensors[key]
        if name is None:
            raise CheckpointMismatchError(f"{path} holds {shown_name(key)}, which is no parameter of a model here; use another copy")
        if name == "head.weight" and model.tie_embeddings and exported_name("embedding.weight") in found:
            require_repeat(key, found, model)
            continue
        _require_weight(path, key, stored.dtype)
        result[name] = path.name, key
    return result


def _places(directory: Path, model: ModelSection, found: Mapping[str, OpenedFile]) -> dict[str, tuple[str, str]]:
    """Maps each parameter name to its file and its key there; every other stored tensor must repeat one of them or the config.

    Raises:
        CheckpointMismatchError: A tensor is missing, superfluous, or of another shape or dtype.
    """
    result = {}
    for name, shape in llama_tensors(model):
        key = llama_name(name)
        if key not in found:
            raise CheckpointMismatchError(f"{directory} lacks the tensor {key!r}, which its {WEIGHTS_CONFIG_NAME} asks for; use another copy")
        path, stored = found[key].file.path, found[key].file.tensors[key]
        if stored.shape != shape:
            raise CheckpointMismatchError(
                f"{path}: {key!r} has shape {shown(stored.shape)}, by {WEIGHTS_CONFIG_NAME} it has {shown(shape)}; use another copy"
            )
        _require_weight(path, key, stored.dtype)
        result[name] = path.name, key
    for key in sorted(found.keys() - {key for _, key in result.values()}):
        require_repeat(key, found, model)
    return result


def _require_weight(path: Path, key: str, dtype: str) -> None:
    if dtype not in STORED_DTYPES:
        raise CheckpointMismatchError(f"{path}: {shown_name(key)} has dtype {dtype}, but weights are {', '.join(STORED_DTYPES)}; convert them before")


def _tensor_files(directory: Path) -> Mapping[str, set[str] | None]:
    """The files of the weights, each with the tensors that the index assigns to it; None: the only file, without an index.

    Raises:
        CheckpointCorruptError: There are no files, files of several sets, or an index that names a missing file.
    """
    single, index = (os.path.lexists(directory / name) for name in (WEIGHTS_NAME, INDEX_NAME))
    if single and index:
        raise CheckpointCorruptError(f"{directory} holds {WEIGHTS_NAME} and {INDEX_NAME}; remove the one that is not meant")
    if single:
        return {WEIGHTS_NAME: None}
    if not index:
        pickle = next((name for name in _PICKLES if os.path.lexists(directory / name)), None)
        reason = "" if pickle is None else f" but {pickle}, a pickle, which may run code and is never read"
        raise CheckpointCorruptError(f"{directory} holds no {WEIGHTS_NAME} and no {INDEX_NAME}{reason}; save the weights as safetensors")
    path = regular(directory / INDEX_NAME)
    names = read_object(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointCorruptError(f"{path}: weight_map is {shown(names)}, but an object of file names is needed; use another copy")
    result: dict[str, set[str]] = {}
    for key, name in names.items():
        is_name = isinstance(name, str) and re.fullmatch(FILE_NAME_PATTERN, name) is not None and name.endswith(TENSOR_FILE_SUFFIX)
        if not is_name or (name not in result and not os.path.lexists(directory / name)):
            found = shown_name(name) if isinstance(name, str) else shown(name)
            what = "not there" if is_name else "not the name of a safetensors file there"
            raise CheckpointCorruptError(f"{path}: weight_map.{shown_name(key)} is {found}, which is {what}; use another copy")
        result.setdefault(name, set()).add(key)
    return result
