"""A model and its tokenizer from a checkpoint alone."""

from __future__ import annotations

from pathlib import Path

import torch

from phase8.checkpoint.load import Checkpoint, find_checkpoint, open_checkpoint
from phase8.checkpoint.run_metadata import run_metadata
from phase8.checkpoint.state import check_model, restore_state
from phase8.config.schema import DataSection
from phase8.data.tokenizer import Tokenizer, load_tokenizer
from phase8.errors import CheckpointError
from phase8.model.model import LanguageModel, build_model
from phase8.precision.policy import compute_dtype


def restore_model(directory: Path, *, device: torch.device) -> tuple[LanguageModel, DataSection, Checkpoint]:
    """The model of a checkpoint, as it was trained.

    Args:
        directory: A checkpoint, a run directory, or a directory of checkpoints (the newest is taken).
        device: Where to put it.

    Raises:
        CheckpointError: It is damaged, missing, or not of a training run.
    """
    checkpoint = open_checkpoint(find_checkpoint(directory))
    metadata = run_metadata(checkpoint)
    dtype = compute_dtype(metadata.precision)
    check_model(checkpoint, build_model(metadata.model, dtype=dtype, device=torch.device("meta")))  # before memory is taken
    model = build_model(metadata.model, dtype=dtype, device=device)
    restore_state(checkpoint, model, None)
    return model, metadata.data, checkpoint


def restore_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer stored in a checkpoint.

    Raises:
        CheckpointError: There is none.
    """
    names = [name for name in checkpoint.manifest.attachments if name.startswith("tokenizer.")]
    if not names:
        raise CheckpointError(f"{checkpoint.path} holds no tokenizer; train with data.tokenizer set, or give one with --tokenizer.")
    return load_tokenizer(checkpoint.attachment(names[0]))
