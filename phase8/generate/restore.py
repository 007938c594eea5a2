"""A model and its tokenizer from a checkpoint alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from phase8.checkpoint.load import Checkpoint, find_checkpoint, open_checkpoint
from phase8.checkpoint.state import restore_state
from phase8.config.load import config_from_mapping
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
    saved: Any = checkpoint.metadata.get("config")
    if not isinstance(saved, dict):
        raise CheckpointError(f"{checkpoint.path} holds no config; give a checkpoint written by launch/pretrain.py.")
    config = config_from_mapping(saved, source=str(checkpoint.path))
    model = build_model(config.model, dtype=compute_dtype(config.precision), device=device)
    restore_state(checkpoint, model, None)
    return model, config.data, checkpoint


def restore_tokenizer(checkpoint: Checkpoint, *, vocab_size: int, eod_token: str | None) -> Tokenizer:
    """The tokenizer stored in a checkpoint.

    Args:
        checkpoint: The checkpoint.
        vocab_size: Ids of its model.
        eod_token: The piece between documents; None: the tokenizer's own.

    Raises:
        CheckpointError: There is none, or it has more ids than the model.
        DataError: It cannot be used.
    """
    names = [name for name in checkpoint.manifest.attachments if name.startswith("tokenizer.")]
    if not names:
        raise CheckpointError(f"{checkpoint.path} holds no tokenizer; train with data.tokenizer set, or give one with --tokenizer.")
    tokenizer = load_tokenizer(checkpoint.attachment(names[0]), eod_token=eod_token)
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"the tokenizer stored in {checkpoint.path} has {tokenizer.vocab_size} ids, but its model has {vocab_size}; "
            "give the tokenizer it was trained with, with --tokenizer."
        )
    return tokenizer
