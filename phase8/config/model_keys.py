"""Which keys of the model section a model computes with, and by which of them two models differ."""

from __future__ import annotations

from typing import Any

from phase8.config.schema import ModelSection

# They set the first values of weights and nothing else: what they are does not matter to weights that are read.
FIRST_VALUES = frozenset({"memory_tokens", "init_std"})
# They change what is computed with weights, but neither their number nor their shapes.
WITHOUT_SHAPE = FIRST_VALUES | {"sequence_length", "rope_base", "norm_eps", "local_window_size", "global_tokens"}
_OF_WINDOW = frozenset({"local_window_size", "global_tokens", "score", "global_path"})
_OF_GLOBAL_PATH = frozenset({"chain", "memory_tokens"})


def keys_in_effect(model: ModelSection) -> dict[str, Any]:
    """Value of every key that the block of a model reads, as plain JSON; defaults that follow from other keys are written out."""
    unread = _OF_WINDOW | _OF_GLOBAL_PATH if model.block == "transformer" else frozenset() if model.global_path else _OF_GLOBAL_PATH
    written_out = {"head_size": model.head_width, "ffn_size": model.feed_forward_width, "convolution_size": model.convolution_taps}
    return {name: value for name, value in (model.model_dump(mode="json") | written_out).items() if name not in unread}


def model_differences(was: ModelSection, now: ModelSection) -> dict[str, tuple[Any, Any]]:
    """Key -> value of one model and of another, where they differ in a key that both of them read."""
    before, after = keys_in_effect(was), keys_in_effect(now)
    different = {name: (before[name], after[name]) for name in after if name in before and before[name] != after[name]}
    if was.num_layers == now.num_layers and was.window_sizes == now.window_sizes:
        different.pop("local_window_size", None)  # one pattern, written in two ways
    return different
