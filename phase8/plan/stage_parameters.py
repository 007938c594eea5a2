"""The parameters of each pipeline stage, by name, and how tensor-parallel ranks divide them."""

from __future__ import annotations

import torch

from phase8.checkpoint.reshard.rank_regions import Division
from phase8.config.pipeline import Pipeline
from phase8.config.schema import ModelSection
from phase8.model.model import build_model
from phase8.model.parameters import iterate_specs
from phase8.plan.stages import chunk_layers


def stage_parameters(model: ModelSection, pipeline: Pipeline) -> tuple[dict[str, Division], ...]:
    """The stages in order; a tied embedding is in the first and in the last.

    Raises:
        ConfigError: There are fewer layers than virtual stages.
    """
    return tuple(
        {
            name: Division(list(parameter.shape), spec.shard_dim)
            for layers in chunk_layers(model, pipeline, stage)
            for name, parameter, spec in iterate_specs(
                build_model(model, dtype=torch.float32, device=torch.device("meta"), layers=layers)
            )
        }
        for stage in range(pipeline.num_stages)
    )
