"""Parameters of a chunk or a pipeline stage and exchanges of a chunk, as the layers of a model built without memory declare them."""

from __future__ import annotations

from functools import lru_cache

import torch

from phase8.config.model_section import ModelSection
from phase8.config.pipeline import Pipeline
from phase8.division import DividedShape
from phase8.exchanges import AnyExchange
from phase8.model.model import LanguageModel, build_model
from phase8.model.parameters import buffer_shapes, divided_shapes
from phase8.plan.communication import Chunk
from phase8.plan.stages import chunk_layers


@lru_cache(maxsize=1024)
def chunk_parameters(model: ModelSection, layers: range) -> Chunk:
    """The parameters of consecutive layers, with embedding, norm and head where the model begins or ends.

    Args:
        model: Model section with the shapes.
        layers: Layers of the chunk.
    """
    rest = divided_shapes(_without_memory(model, layers))
    blocks = tuple({name: rest.pop(name) for name in list(rest) if name.startswith(f"blocks.{layer}.")} for layer in layers)
    return Chunk(layers, blocks, rest)


@lru_cache(maxsize=1024)
def chunk_exchanges(
    model: ModelSection, layers: range, *, recompute: str, is_divided: bool, recompute_every_n_layers: int
) -> tuple[AnyExchange, ...]:
    """The exchanges of the layers of a chunk for a microbatch, forward and backward.

    Args:
        model: Model section with the shapes.
        layers: Layers of the chunk.
        recompute: Mode of recomputation: `none`, `full`, `selective` or `budget`.
        is_divided: Whether tensor-parallel ranks divide the layers.
        recompute_every_n_layers: Distance n of the recomputed layers 0, n, 2n, ...
    """
    how = {"recompute": recompute, "is_divided": is_divided, "recompute_every_n_layers": recompute_every_n_layers}
    found = _without_memory(model, layers).exchanges(**how)
    return found.forward + found.backward


@lru_cache(maxsize=1024)
def mixer_exchanges(model: ModelSection) -> tuple[AnyExchange, ...]:
    """The exchanges of the first layer's mixer in the forward of a microbatch."""
    (block,) = _without_memory(model, range(1)).blocks.values()
    return block.mixer.exchanges().forward


def stage_tensors(model: ModelSection, pipeline: Pipeline) -> tuple[dict[str, DividedShape], ...]:
    """The parameters and buffers of each pipeline stage by name; a tied embedding is in the first and in the last stage.

    Raises:
        ConfigError: There are fewer layers than virtual stages.
    """
    return tuple(
        {
            name: shape
            for layers in chunk_layers(model, pipeline, stage)
            for name, shape in (chunk_parameters(model, layers).parameters | buffer_shapes(_without_memory(model, layers))).items()
        }
        for stage in range(pipeline.num_stages)
    )


@lru_cache(maxsize=16)  # a few suffice: the functions above cache what they read from a model
def _without_memory(model: ModelSection, layers: range) -> LanguageModel:
    return build_model(model, dtype=torch.float32, device=torch.device("meta"), layers=layers)
