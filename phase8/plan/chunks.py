"""Parameters of a chunk or a pipeline stage and exchanges of a chunk, as the layers of a model built without memory declare them."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import torch

from phase8.config.model_section import LayerKind, ModelSection
from phase8.config.pipeline import Pipeline
from phase8.distributed.collectives import ALONE
from phase8.division import DividedShape
from phase8.exchanges import AnyExchange
from phase8.model.block import Block
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
    of_kind = {kind: divided_shapes(_block(model, kind)) for kind in set(_kinds(model, layers))}
    blocks = tuple(
        {f"blocks.{layer}.{name}": shape for name, shape in of_kind[kind].items()} for layer, kind in zip(layers, _kinds(model, layers), strict=True)
    )
    rest = {name: shape for end in _ends(model, layers) for name, shape in divided_shapes(end).items()}
    return Chunk(layers, blocks, rest)


@lru_cache(maxsize=1024)
def chunk_exchanges(
    model: ModelSection, layers: range, *, recompute: str, is_divided: bool, recompute_every_n_layers: int
) -> Counter[AnyExchange]:
    """The exchanges of the layers of a chunk for a microbatch, forward and backward, and how many there are of each.

    Args:
        model: Model section with the shapes.
        layers: Layers of the chunk.
        recompute: Mode of recomputation: `none`, `full`, `selective` or `budget`.
        is_divided: Whether tensor-parallel ranks divide the layers.
        recompute_every_n_layers: Distance n of the recomputed layers 0, n, 2n, ...
    """
    found, recomputed = Counter[AnyExchange](), range(0, model.num_layers, recompute_every_n_layers)
    for end in _ends(model, layers):
        exchanges = end.exchanges(recompute=recompute, is_divided=is_divided, recompute_every_n_layers=recompute_every_n_layers)
        found.update(exchanges.forward + exchanges.backward)
    alike = Counter((kind, layer in recomputed) for layer, kind in zip(layers, _kinds(model, layers), strict=True))
    for (kind, is_recomputed), times in alike.items():
        exchanges = _block(model, kind).exchanges(recompute=recompute if is_recomputed else "none", is_divided=is_divided)
        found.update({each: times * number for each, number in Counter(exchanges.forward + exchanges.backward).items()})
    return found


@lru_cache(maxsize=1024)
def mixer_exchanges(model: ModelSection) -> tuple[AnyExchange, ...]:
    """The exchanges of the first layer's mixer in the forward of a microbatch."""
    return _block(model, model.layer_kinds[0]).mixer.exchanges().forward


def stage_tensors(model: ModelSection, pipeline: Pipeline) -> tuple[dict[str, DividedShape], ...]:
    """The parameters and buffers of each pipeline stage by name; a tied embedding is in the first and in the last stage.

    Raises:
        ConfigError: There are fewer layers than virtual stages.
    """
    return tuple(
        {
            name: shape
            for layers in chunk_layers(model, pipeline, stage)
            for name, shape in (chunk_parameters(model, layers).parameters | _buffers(model, layers)).items()
        }
        for stage in range(pipeline.num_stages)
    )


def _buffers(model: ModelSection, layers: range) -> dict[str, DividedShape]:
    """The buffers of a chunk by name."""
    of_kind = {kind: buffer_shapes(_block(model, kind)) for kind in set(_kinds(model, layers))}
    found = {name: shape for end in _ends(model, layers) for name, shape in buffer_shapes(end).items()}
    for layer, kind in zip(layers, _kinds(model, layers), strict=True):
        found |= {f"blocks.{layer}.{name}": shape for name, shape in of_kind[kind].items()}
    return found


def _kinds(model: ModelSection, layers: range) -> tuple[LayerKind, ...]:
    """The kind of each layer of a chunk."""
    return model.layer_kinds[layers.start : layers.stop]


@lru_cache(maxsize=64)  # a few suffice: the functions above cache what they read from blocks
def _block(model: ModelSection, kind: LayerKind) -> Block:
    """The first block of a kind; all of them have the same parameters, buffers and exchanges."""
    with torch.device("meta"):
        return Block(model, model.layer_kinds.index(kind), axis=ALONE)


def _ends(model: ModelSection, layers: range) -> list[LanguageModel]:
    """A chunk without its blocks: what comes before the first layer of the model and after the last one, if those are in the chunk."""
    empty = [range(0)] * (layers.start == 0) + [range(model.num_layers, model.num_layers)] * (layers.stop == model.num_layers)
    return [build_model(model, dtype=torch.float32, device=torch.device("meta"), layers=each) for each in empty]
