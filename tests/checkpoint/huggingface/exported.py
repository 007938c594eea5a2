"""Models written for transformers by the command line."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from phase8.checkpoint.save import save_checkpoint
from phase8.config.load import config_to_mapping
from phase8.config.model_section import ModelSection
from phase8.config.schema import RunConfig
from phase8.model.model import LanguageModel
from tests.model.small import perturbed_model
from tests.tools.doors import load_door


def run(*arguments: object) -> int:
    return load_door("reshard_checkpoint").main([str(argument) for argument in arguments])


def checkpoint_of(directory: Path, section: ModelSection, *, attachments=None, metadata=None, **sections) -> tuple[LanguageModel, Path]:
    """A model in which nothing is hidden by zeros, and its checkpoint of step 7."""
    model = perturbed_model(section, dtype=torch.float32)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("router.bias"):
                buffer.copy_(torch.linspace(-0.3, 0.3, len(buffer)))
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    config = config_to_mapping(RunConfig(model=section, **sections))
    path = save_checkpoint(directory / "c", step=7, tensors=tensors, metadata={"config": config, **(metadata or {})}, attachments=attachments or {})
    return model, path


def exported(directory: Path, section: ModelSection, *options: str, **arguments) -> tuple[LanguageModel, Path]:
    """A model and its directory for transformers."""
    model, source = checkpoint_of(directory, section, **arguments)
    assert run(source, directory / "hf", "--format", "hf", *options) == 0
    return model, directory / "hf"


def loaded(directory: Path, **arguments) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **arguments)
