"""Weights that `tools/reshard_checkpoint.py --format consolidated` or `tools/quantize_checkpoint.py` wrote, opened as if they were a checkpoint.

| file | content |
|---|---|
| `config.json` | the config of the run, and `quantization` where weights have eight or four bits |
| `model.safetensors` | the weights under their names in the model |
| `tokenizer.*` | becomes the attachment |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from phase8.checkpoint.quantization import NUMBER_DTYPES
from phase8.checkpoint.step_directories import WEIGHTS_NAME
from phase8.checkpoint.untrusted import shown_name
from phase8.checkpoint.weight_files import STORED_DTYPES, WeightFiles, open_tensor_file, regular, weights_of
from phase8.errors import CheckpointCorruptError, CheckpointMismatchError


def is_consolidated(config: dict[str, Any]) -> bool:
    """Whether the content of a config.json is a config of phase8; that of transformers has `model_type` instead of sections."""
    return "model_type" not in config and isinstance(config.get("model"), dict)


def open_consolidated(directory: Path, config: dict[str, Any]) -> WeightFiles:
    """Opens consolidated weights and reads their header. Whether they fit the config is checked when they are loaded into a model.

    Args:
        directory: The directory of the weights.
        config: Content of its config.json.

    Raises:
        CheckpointCorruptError: A file is missing, damaged or leads elsewhere.
        CheckpointMismatchError: A tensor cannot be a weight.
    """
    path = regular(directory / WEIGHTS_NAME)
    opened = open_tensor_file(path)
    dtypes = (*STORED_DTYPES, *NUMBER_DTYPES) if config.get("quantization") is not None else STORED_DTYPES
    for key, stored in opened.file.tensors.items():
        if stored.dtype not in dtypes:
            raise CheckpointMismatchError(
                f"{path}: {shown_name(key)} has dtype {stored.dtype}, but weights are {', '.join(dtypes)}; consolidate the checkpoint again"
            )
    tokenizer = next((regular(found) for found in sorted(directory.glob("tokenizer.*"))), None)
    places = {key: (WEIGHTS_NAME, key) for key in opened.file.tensors}
    try:
        return weights_of(directory, {WEIGHTS_NAME: opened}, places, config=config, tokenizer=tokenizer, form="consolidated")
    except ValidationError:
        raise CheckpointCorruptError(
            f"{path} holds a name or a shape that no tensor of a model has; consolidate the checkpoint again"
        ) from None
