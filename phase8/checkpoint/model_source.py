"""Opens whatever directory holds a model: a checkpoint, a run, consolidated weights, or a model for Hugging Face's transformers.

The config is in `metadata["config"]` in every case, and the tokenizer is an attachment; only a checkpoint has an optimizer and a position.
"""

from __future__ import annotations

from pathlib import Path

from phase8.checkpoint.consolidated_source import is_consolidated, open_consolidated
from phase8.checkpoint.deepspeed_source import is_deepspeed
from phase8.checkpoint.huggingface.source import open_hugging_face
from phase8.checkpoint.load import Checkpoint, find_checkpoint, is_saved_run, open_checkpoint
from phase8.checkpoint.step_directories import WEIGHTS_CONFIG_NAME, holds_weights_only
from phase8.checkpoint.weight_files import read_object, regular
from phase8.errors import CheckpointError


def open_model(directory: Path) -> Checkpoint:
    """Opens the model in a directory: the newest checkpoint of a run or of a directory of checkpoints, or `WeightFiles` without a manifest.

    Raises:
        CheckpointError: There is no model, it is damaged, or its format cannot be read.
    """
    is_run = is_saved_run(directory)
    if not is_run and is_deepspeed(directory):
        raise CheckpointError(
            f"{directory} is a checkpoint of DeepSpeed; import it: tools/reshard_checkpoint.py {directory} DST --trust-pickle --config FILE, with "
            "the config of its model."
        )
    if is_run or not holds_weights_only(directory):
        return open_checkpoint(find_checkpoint(directory))
    config = read_object(regular(directory / WEIGHTS_CONFIG_NAME))
    return open_consolidated(directory, config) if is_consolidated(config) else open_hugging_face(directory, config)


def tokenizer_of(checkpoint: Checkpoint) -> Path | None:
    """The tokenizer stored with a model, its bytes checked; None without one. Earlier releases kept no suffix where its file had none."""
    name = next((name for name in checkpoint.manifest.attachments if name.partition(".")[0] == "tokenizer"), None)
    return None if name is None else checkpoint.attachment(name)
