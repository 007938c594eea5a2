"""The layers of each virtual stage of a pipeline, divided so that all take equally long by the FLOPs of layers and head."""

from __future__ import annotations

from functools import lru_cache

from phase8.config.model_section import ModelSection
from phase8.config.pipeline import Pipeline
from phase8.model.flops import forward_flops_per_token, layer_flops_per_token
from phase8.pipeline_parallel.partition import partition_layers
from phase8.pipeline_parallel.schedules import virtual_stage


@lru_cache(maxsize=1024)
def virtual_stage_layers(model: ModelSection, pipeline: Pipeline) -> tuple[range, ...]:
    """The layers of each virtual stage, in the order of the model; the cost of the embedding is neglected.

    Raises:
        ConfigError: There are fewer layers than virtual stages.
    """
    return partition_layers(
        layer_flops_per_token(model),
        num_stages=pipeline.num_stages,
        num_chunks=pipeline.num_chunks,
        head_cost=forward_flops_per_token(model)["head"],
    )


def chunk_layers(model: ModelSection, pipeline: Pipeline, stage: int) -> tuple[range, ...]:
    """The layers of each chunk of a stage."""
    layers = virtual_stage_layers(model, pipeline)
    return tuple(layers[virtual_stage(stage, chunk, num_stages=pipeline.num_stages)] for chunk in range(pipeline.num_chunks))
