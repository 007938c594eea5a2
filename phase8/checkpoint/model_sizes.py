"""Checks by a few comparisons whether stored tensors can belong to the model that a stored config describes, before anything is built.

A model that passes may still differ, which comparing exact shapes shows; but building those takes no more memory than the tensors do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from phase8.checkpoint.untrusted import shown
from phase8.config.model_section import ModelSection
from phase8.config.validate import model_problems

EMBEDDING = "embedding.weight"
_IN_A_BLOCK = re.compile(r"blocks\.([0-9]{1,18})\.(.+)")


def sizes_problem(
    model: ModelSection, shapes: Mapping[str, Sequence[int]], *, packed: Callable[[tuple[int, ...]], tuple[int, ...]] | None = None
) -> str | None:
    """Why a model cannot have these parameters, or None.

    Args:
        model: Model section of a file whose origin is not trusted.
        shapes: Shapes of the stored parameters, by their name in the model.
        packed: The shape in which matrices [..., F, D] are stored if their numbers have few bits; None: as they are.
    """
    if (problem := next(model_problems(model), None)) is not None:
        return problem.removesuffix(".")
    if (problem := _layers_problem(model, shapes)) is not None:
        return problem
    stored = {tuple(shape) for shape in shapes.values()}
    for keys, shape in _shapes_of(model):
        if shape not in stored and (packed is None or packed(shape) not in stored):
            sizes = " and ".join(f"{key} {shown(value)}" for key, value in keys.items())
            return f"{sizes} {'make' if len(keys) > 1 else 'makes'} a weight of shape {shown(list(shape))}, and none has it"
    embedding = shapes.get(EMBEDDING)
    if embedding is None or list(embedding) != [model.vocab_size, model.d_model]:
        found = "is missing" if embedding is None else f"has shape {shown(list(embedding))}"
        return f"model.vocab_size is {model.vocab_size} and model.d_model {model.d_model}, but {EMBEDDING} {found}"
    return None


def _layers_problem(model: ModelSection, shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Whether the stored layers match the number in the config, and layers of a kind have one form."""
    layers: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        if (found := _IN_A_BLOCK.fullmatch(name)) is not None:
            layers.setdefault(found[1], set()).add((found[2], tuple(shape)))
    # Numbers are compared last, when it is known that layers can be counted.
    if len(layers) != model.num_layers or any(str(layer) not in layers for layer in range(model.num_layers)):
        return f"model.num_layers is {shown(model.num_layers)}, but there are weights of {len(layers)} layers"
    first_of_kind: dict[tuple[bool, bool], int] = {}
    for layer, kind in enumerate(model.layer_kinds):
        first = first_of_kind.setdefault((kind.window > 0, kind.has_experts), layer)
        if layers[str(layer)] != layers[str(first)]:
            return f"layer {layer} has other weights than layer {first}"
    return None


def _shapes_of(model: ModelSection) -> Iterator[tuple[dict[str, object], tuple[int, ...]]]:
    """Keys, and the shape of a weight that they determine. Together they bound every width: D, V, N heads times head size, F, rank, experts, taps."""
    D, N, F, rank = model.d_model, model.attention_width, model.feed_forward_width, model.low_rank_rank
    widths = {"model.num_heads": model.num_heads, "model.head_size": model.head_width}
    yield {"model.vocab_size": model.vocab_size, "model.d_model": D}, (model.vocab_size, D)
    yield widths | ({"model.low_rank_rank": rank} if rank else {}), (N, rank or D)
    if model.num_kv_heads is not None:
        yield {"model.num_kv_heads": model.num_kv_heads, "model.head_size": model.head_width}, (model.key_value_width, rank or D)
    if rank:
        yield {"model.low_rank_rank": rank}, (rank, D)
    if not all(model.has_experts):
        yield {"model.ffn_size": F}, (F, rank if rank and model.ffn == "low_rank_swiglu" else D)
    if any(model.has_experts):
        yield {"model.num_experts": model.num_experts, "model.expert_ffn_size": model.expert_width}, (model.num_experts, model.expert_width, D)
    if any(model.has_experts) and model.shared_experts:
        keys = {"model.shared_experts": model.shared_experts, "model.expert_ffn_size": model.expert_width}
        yield keys, (model.shared_experts * model.expert_width, D)
    if model.convolution_taps > 1:
        yield {"model.convolution_size": model.convolution_taps}, (model.queries_per_key + 2, model.key_value_width, model.convolution_taps)
