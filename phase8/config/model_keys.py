"""The keys of the model section that a model computes with, and the keys in which two models differ."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import Any

from phase8.config.model_section import ModelSection

# Keys that only affect initial weights; they do not matter for weights that are loaded.
FIRST_VALUES = frozenset({"memory_tokens", "init_std"})
# Keys that change the computation, but neither number nor shapes of the weights; windows that a layer gets or loses do, see `shape_differences`.
WITHOUT_SHAPE = FIRST_VALUES | {
    "sequence_length", "rotary", "rope_base", "rope_scaling", "norm_eps", "local_window_size", "global_tokens", "decay_floor", "global_activation",
    "global_gate_activation", "value_activation",
    "top_k", "capacity_factor", "router_score", "routed_scaling_factor", "balance_loss_weight", "router_z_loss_weight", "router_bias_rate",
}  # fmt: skip
# Keys that only the Phase 8 block reads.
KEYS_OF_WINDOW = frozenset({"local_window_size", "global_tokens", "score", "global_path"})
# Keys that only a block with a global path reads.
KEYS_OF_GLOBAL_PATH = frozenset({
    "chain", "decay_floor", "global_activation", "global_gate", "global_gate_activation", "global_skip", "memory_tokens",
})  # fmt: skip
# Keys that only a model with experts reads.
KEYS_OF_EXPERTS = frozenset({
    "num_experts", "top_k", "expert_ffn_size", "shared_experts", "capacity_factor", "moe_every_n_layers", "first_dense_layers", "router_score",
    "routed_scaling_factor", "balance_loss_weight", "router_z_loss_weight", "router_bias_rate",
})  # fmt: skip


def keys_in_effect(model: ModelSection) -> dict[str, Any]:
    """Value of every key that a model's block reads, as plain JSON; defaults derived from other keys are filled in."""
    unread = frozenset() if model.has_global_path else KEYS_OF_GLOBAL_PATH | (KEYS_OF_WINDOW if model.block == "transformer" else frozenset())
    unread |= frozenset() if model.ffn == "moe" else KEYS_OF_EXPERTS
    unread |= frozenset() if model.block == "transformer" else {"num_kv_heads"}
    written_out = {
        "num_kv_heads": model.key_value_heads, "head_size": model.head_width, "rope_scaling": model.rope_scaling.in_effect,
        "ffn_size": model.feed_forward_width, "expert_ffn_size": model.expert_width,
        "convolution_size": model.convolution_taps, "local_qk_norm": model.has_qk_norm,
        "global_gate": "channel" if model.has_channel_gate else "scalar", "global_activation": model.global_activation or "silu",
    }  # fmt: skip
    return {name: value for name, value in (model.model_dump(mode="json") | written_out).items() if name not in unread}


def model_differences(was: ModelSection, now: ModelSection) -> dict[str, tuple[Any, Any]]:
    """Maps keys to the values of both models, where they differ in a key that both models read."""
    before, after = keys_in_effect(was), keys_in_effect(now)
    different = {name: (before[name], after[name]) for name in after if name in before and before[name] != after[name]}
    if was.num_layers == now.num_layers and was.window_sizes == now.window_sizes:
        different.pop("local_window_size", None)  # the same pattern may be written in two ways
    if was.num_layers == now.num_layers and was.has_rotary == now.has_rotary:
        different.pop("rotary", None)
    if was.num_layers == now.num_layers and was.has_experts == now.has_experts:
        for name in ("moe_every_n_layers", "first_dense_layers"):
            different.pop(name, None)
    return different


def shape_differences(was: ModelSection, now: ModelSection) -> dict[str, tuple[Any, Any]]:
    """The part of `model_differences` that may decide which weights there are and their shapes."""
    gets_or_loses = any((before == 0) != (after == 0) for before, after in zip(was.window_sizes, now.window_sizes, strict=False))
    without_shape = WITHOUT_SHAPE - {"local_window_size"} if gets_or_loses else WITHOUT_SHAPE
    return {name: values for name, values in model_differences(was, now).items() if name not in without_shape}


def settings_towards(was: ModelSection, now: ModelSection) -> list[str]:
    """Settings, as the arguments of `--set`, with which one model computes like another; its sequences keep their length.

    Args:
        was: The model to become.
        now: The model that the settings change.
    """
    before, after = was.model_dump(mode="json"), now.model_dump(mode="json")
    names = [name for name in keys_in_effect(was) if name not in FIRST_VALUES | {"sequence_length"}]
    return [setting for name in names for setting in _settings(f"model.{name}", before[name], after[name])]


def _settings(key: str, was: Any, now: Any) -> Iterator[str]:
    if isinstance(was, dict):
        for name, value in was.items():
            yield from _settings(f"{key}.{name}", value, now[name])
    elif was != now:
        yield shlex.quote(f"{key}={was if isinstance(was, str) else json.dumps(was, separators=(',', ':'))}")
