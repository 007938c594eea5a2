"""The parameters of some layers of a model, by what FSDP handles together."""

from __future__ import annotations

from functools import lru_cache

import torch

from phase8.config.schema import ModelSection
from phase8.model.model import build_model
from phase8.model.parameters import iterate_specs
from phase8.plan.communication import Chunk, Parameter


@lru_cache(maxsize=1024)
def chunk_parameters(model: ModelSection, layers: range) -> Chunk:
    """The parameters of consecutive layers, with embedding, norm and head where the model begins or ends.

    Args:
        model: Shapes.
        layers: Of the chunk.
    """
    chunk = build_model(model, dtype=torch.float32, device=torch.device("meta"), layers=layers)
    found = {name: Parameter(tuple(parameter.shape), spec.shard_dim, name) for name, parameter, spec in iterate_specs(chunk)}
    blocks = tuple(tuple(found.pop(name) for name in list(found) if name.startswith(f"blocks.{layer}.")) for layer in layers)
    return Chunk(layers, blocks, rest=tuple(found.values()))
