"""Conversion of a checkpoint from what it is to what was asked for.

| SRC | DST `phase8` | DST `consolidated`, `hf` |
|---|---|---|
| a checkpoint, a run | the same state for other ranks | its weights in one file |
| consolidated weights, Hugging Face's form | step 0, weights in fp32 | the same weights in the other form |
| a checkpoint of DeepSpeed | as of consolidated weights, which are written beside DST for the time | as of consolidated weights |
"""

from __future__ import annotations

from contextlib import ExitStack

import torch

from phase8.checkpoint.load import Checkpoint
from phase8.checkpoint.model_source import open_model
from phase8.checkpoint.reshard.reshard import consolidate, reshard
from phase8.checkpoint.reshard.rewrite import OnProgress
from phase8.checkpoint.weight_files import WeightFiles
from phase8.config.pipeline import pipeline_of
from phase8.config.schema import RunConfig
from phase8.conversion.layout import parallel_section, topology_of
from phase8.conversion.merged_form import merged_form
from phase8.conversion.options import ConversionOptions
from phase8.conversion.origin import checked, config_of, without_pickles
from phase8.conversion.upcycled import upcycled
from phase8.optim.state import declared_for
from phase8.plan.chunks import stage_tensors


def convert(options: ConversionOptions, *, on_progress: OnProgress) -> str:
    """Converts a checkpoint; returns a line that describes the result.

    Args:
        options: What to convert into what; `check` has accepted it.
        on_progress: Called with stage, bytes done and bytes in all.

    Raises:
        ConfigError: The options do not fit the source, or the model cannot have the layout.
        CheckpointError: The source is damaged or missing, or the destination cannot be used.
        StorageError: The destination cannot be written.
    """
    with ExitStack() as stack:
        source = open_model(without_pickles(options, stack))
        config = config_of(source)
        origin = options.source if options.trust_pickle else source.path
        if is_import := isinstance(source, WeightFiles):
            source = checked(source, config, options, on_progress=on_progress)
        if options.upcycle_experts is not None:
            source, config = upcycled(source, config, options.upcycle_experts, top_k=options.upcycle_top_k)
            is_import = True
        if options.format == "phase8":
            copy = _reshard(source, config, options, on_progress, dtype=torch.float32 if is_import else None)  # master weights are fp32
            relation = "equal to" if options.upcycle_experts is None else "whose experts begin as the feed-forward of"
            num_files = len(copy.manifest.files)
            held = f"{len(copy.tensor_names)} tensors in {num_files} file{'' if num_files == 1 else 's'}"
            return f"{copy.path}: step {copy.step}, {held}, {relation} {origin}"
        dtype = {None: None, "bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
        form = merged_form(source, config, options)
        path = consolidate(source, options.destination, form=form, dtype=dtype, on_progress=on_progress)
    return f"{path}: {path.stat().st_size:,} bytes, the weights of {origin}"


def _reshard(
    source: Checkpoint, config: RunConfig, options: ConversionOptions, on_progress: OnProgress, *, dtype: torch.dtype | None
) -> Checkpoint:
    parallel = parallel_section(config, options)
    topology = topology_of(parallel, config.model, options)
    stages, declare = stage_tensors(config.model, pipeline_of(parallel)), declared_for(config.optim)
    return reshard(source, options.destination, stages=stages, topology=topology, declare=declare, dtype=dtype, on_progress=on_progress)
