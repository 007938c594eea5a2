"""What is converted: a checkpoint, weights in another form, or a checkpoint of DeepSpeed."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from phase8.checkpoint.deepspeed_source import consolidate_deepspeed, is_deepspeed
from phase8.checkpoint.load import Checkpoint
from phase8.checkpoint.quantization import require_as_trained
from phase8.checkpoint.reshard.rewrite import OnProgress, check_destination
from phase8.checkpoint.run_metadata import run_metadata
from phase8.checkpoint.state import require_fit
from phase8.checkpoint.weight_files import WeightFiles
from phase8.config.load import config_to_mapping, load_config
from phase8.config.schema import RunConfig
from phase8.conversion.beginning import metadata_of_beginning
from phase8.conversion.layout import parallel_section
from phase8.conversion.options import ConversionOptions
from phase8.errors import ConfigError
from phase8.model.model import build_model


def without_pickles(options: ConversionOptions, stack: ExitStack) -> Path:
    """SRC, or the weights of a checkpoint of DeepSpeed in a directory beside DST that goes with the stack.

    Raises:
        ConfigError: SRC is such a checkpoint, and nobody has said that it is trusted, or what its model is; or it is none.
    """
    source = options.source
    if not is_deepspeed(source):
        for option, value in (("--trust-pickle", options.trust_pickle), ("--config", options.config)):
            if value:
                raise ConfigError(f"{option} is for a checkpoint that DeepSpeed wrote, and {source} is none; leave it out.")
        return source
    if not options.trust_pickle:
        raise ConfigError(
            f"{source} is a checkpoint of DeepSpeed, made of pickles, which can run any code when they are read; if you know where it comes from, "
            "give --trust-pickle."
        )
    if options.config is None:
        raise ConfigError(f"{source} does not say what its model is; give the model's config with --config.")
    config = config_to_mapping(load_config(options.config))
    check_destination(source, options.destination)  # before all weights are read
    options.destination.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(stack.enter_context(TemporaryDirectory(dir=options.destination.parent, prefix=f".{options.destination.name}.")))
    consolidate_deepspeed(source, directory, config)
    return directory


def checked(source: WeightFiles, config: RunConfig, options: ConversionOptions, *, on_progress: OnProgress) -> Checkpoint:
    """Checks weights without a manifest and opens them as a checkpoint. Whatever can be refused is refused before they are read."""
    if options.format == source.form == "hf":
        raise ConfigError(f"--format is hf, but {source.path} is in that form already; leave it out to import it.")
    parallel_section(config, options)
    check_destination(source.path, options.destination)
    return source.with_checksums(metadata_of_beginning(config), on_progress=on_progress)


def config_of(source: Checkpoint) -> RunConfig:
    """The config of a checkpoint; its model section describes the weights."""
    require_as_trained(source)
    config = run_metadata(source).config
    require_fit(source, build_model(config.model, dtype=torch.float32, device=torch.device("meta")), widen=True)
    return config
