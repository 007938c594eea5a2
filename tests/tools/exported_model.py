"""A small model with random weights and a tokenizer of bytes, exported to Hugging Face's form as users do it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch

from phase8.checkpoint.save import save_checkpoint
from phase8.config.load import config_to_mapping, load_config
from phase8.model.model import LanguageModel, build_model
from phase8.model.parameters import initialise
from tests.tools.doors import load_door

MODEL = ("model.d_model=24", "model.num_layers=2", "model.num_heads=3", "model.vocab_size=300", "model.sequence_length=64",
         "model.ffn_size=40", "precision.dtype=fp32")  # fmt: skip


class Exported(NamedTuple):
    """The model, and where its export is."""

    model: LanguageModel
    tokenizer: tokenizers.Tokenizer
    directory: Path


def export(directory: Path, settings: Sequence[str], *, texts: Sequence[str], noise: float) -> Exported:
    """Exports a model of `MODEL` and some settings, its weights perturbed by so much noise, with a tokenizer that is trained on texts."""
    config = load_config(os.devnull, (*MODEL, *settings))
    model = build_model(config.model, dtype=torch.float32, device=torch.device("cpu"))
    initialise(model, seed=0)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=noise)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    attachments = {"tokenizer.json": tokenizer.to_str().encode()}
    saved = save_checkpoint(directory / "c", step=1, tensors=tensors, metadata={"config": config_to_mapping(config)}, attachments=attachments)
    assert load_door("reshard_checkpoint").main([str(saved), str(directory / "hf"), "--format", "hf"]) == 0
    return Exported(model, tokenizer, directory / "hf")
