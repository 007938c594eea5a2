"""A model and its tokenizer from a directory alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from phase8.checkpoint.load import Checkpoint
from phase8.checkpoint.model_source import open_model, tokenizer_of
from phase8.checkpoint.quantization import quantization_of
from phase8.checkpoint.run_metadata import run_metadata
from phase8.checkpoint.state import MODEL_PREFIX, require_fit, restore_state
from phase8.config.schema import DataSection
from phase8.data.content import content_digest
from phase8.data.tokenizer import Tokenizer, load_tokenizer
from phase8.distributed.collectives import ALONE
from phase8.errors import CheckpointCorruptError, CheckpointError, ConfigError
from phase8.model.experts import Experts
from phase8.model.model import LanguageModel, build_model
from phase8.model.parameters import materialise
from phase8.model.quantized_layers import arrange, hold_quantized, scale_without_value
from phase8.precision.policy import compute_dtype
from phase8.tensor_parallel.embedding import VocabularyParallelEmbedding
from phase8.tensor_parallel.linear import Linear, WideLinear


def restore_model(directory: Path, *, device: torch.device) -> tuple[LanguageModel, DataSection, Checkpoint]:
    """Restores the model of a checkpoint, or of weights without a manifest; it is not trained.

    Args:
        directory: A checkpoint, a run directory, a directory of checkpoints (the newest is taken), or weights in another form.
        device: Device of the model.

    Raises:
        CheckpointError: It is damaged, missing, or not from a training run.
    """
    checkpoint = open_model(directory)
    config, quantization = run_metadata(checkpoint).config, quantization_of(checkpoint)
    model = build_model(config.model, dtype=compute_dtype(config.precision), device=torch.device("meta"))
    if quantization is not None:
        hold_quantized(model, quantization, stored={name.removeprefix(MODEL_PREFIX) for name in checkpoint.tensor_names})
    require_fit(checkpoint, model, widen=True)  # before memory is allocated
    materialise(model, device=device, axis=ALONE)
    restore_state(checkpoint, model, None, widen=True)
    if (name := scale_without_value(model)) is not None:
        raise CheckpointCorruptError(f"{checkpoint.path}: {name} has a scale that is no finite number; quantise the checkpoint again")
    arrange(model)
    return model.requires_grad_(False), config.data, checkpoint


@torch.no_grad()
def hold_in_compute_dtype(model: LanguageModel) -> None:
    """Casts the weights that every forward would cast to the dtype of the residual stream; results stay the same, but training would lose digits."""
    for module in model.modules():
        is_cast = isinstance(module, Linear | Experts | VocabularyParallelEmbedding) and not isinstance(module, WideLinear)
        for parameter in module.parameters(recurse=False) if is_cast else ():
            parameter.data = parameter.data.to(model.dtype)


def restore_tokenizer(checkpoint: Checkpoint, *, vocab_size: int, eod_token: str | None) -> Tokenizer:
    """The tokenizer stored in a checkpoint.

    Args:
        checkpoint: The checkpoint.
        vocab_size: Vocabulary size of the model.
        eod_token: The piece between documents; None: the tokenizer's own.

    Raises:
        CheckpointError: There is no tokenizer, or it has more ids than the model.
        DataError: It cannot be used.
    """
    path = tokenizer_of(checkpoint)
    if path is None:
        raise CheckpointError(f"{checkpoint.path} holds no tokenizer; train with data.tokenizer set, or give one with --tokenizer.")
    tokenizer = load_tokenizer(path, eod_token=eod_token)
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"the tokenizer stored in {checkpoint.path} has {tokenizer.vocab_size} ids, but its model has {vocab_size}; "
            "give the tokenizer it was trained with, with --tokenizer."
        )
    return tokenizer


def choose_tokenizer(
    checkpoint: Checkpoint, given: Path | None, *, vocab_size: int, eod_token: str | None, on_message: Callable[[str], None]
) -> Tokenizer:
    """The tokenizer that a command line names, else the one stored in a checkpoint.

    Args:
        checkpoint: The checkpoint.
        given: The file that --tokenizer names; None: it names none.
        vocab_size: Vocabulary size of the model.
        eod_token: The piece between documents; None: the tokenizer's own.
        on_message: Called with a sentence if the checkpoint has another tokenizer than the one that is named.

    Raises:
        CheckpointError: None is named, and there is none in the checkpoint, or it has more ids than the model.
        ConfigError: The one that is named has more ids than the model.
        DataError: It cannot be used.
    """
    if given is None:
        return restore_tokenizer(checkpoint, vocab_size=vocab_size, eod_token=eod_token)
    tokenizer = load_tokenizer(given, eod_token=eod_token)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"--tokenizer {given} has {tokenizer.vocab_size} ids, but the model has {vocab_size}; give the tokenizer it was trained with."
        )
    try:
        sentence = about_another_tokenizer(checkpoint, tokenizer, of="--tokenizer")
    except CheckpointError:  # the stored one is damaged, and the one that is named takes its place
        sentence = None
    if sentence is not None:
        on_message(sentence)
    return tokenizer


def about_another_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer, *, of: str) -> str | None:
    """A sentence that says that a checkpoint has another tokenizer; None if it has the same one or none.

    Args:
        checkpoint: The checkpoint.
        tokenizer: The tokenizer that is used with its weights.
        of: What names that tokenizer.

    Raises:
        CheckpointError: The stored tokenizer is damaged.
    """
    theirs = tokenizer_of(checkpoint)
    if theirs is None or content_digest(theirs) == content_digest(tokenizer.path):
        return None
    return f"{theirs} is the tokenizer of these weights, but that of {of}, {tokenizer.path}, is another: an id may mean other text"
