"""Translates a Llama's config.json into the model section of the equivalent transformer baseline, or refuses it by key and value.

Keys that are not read have no effect: transformers' LlamaForCausalLM (4.x and 5.x) does not compute with them either.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from phase8.checkpoint.huggingface.llama import ROPE_KEYS
from phase8.checkpoint.untrusted import shown, shown_name
from phase8.config.model_section import ModelSection
from phase8.config.rope_scaling import UNSCALED, RopeScaling
from phase8.errors import CheckpointMismatchError

MODEL_TYPE = "llama"
_MOST = 2**63 - 1
_DEFAULT_NORM_EPS, _DEFAULT_ROPE_BASE = 1e-6, 10000.0  # the defaults of transformers' LlamaConfig
_SIZES = {
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "sequence_length": "max_position_embeddings",
    "ffn_size": "intermediate_size",
}
# The values with which the baseline computes; a key may be absent.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "architectures": (["LlamaForCausalLM"], None),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "is_causal": (True,),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "auto_map": (None,),
}
_ROPE_TYPES = {"default": "none", "linear": "linear", "llama3": "llama3"}  # theirs and ours
_TYPE_KEYS = ("rope_type", "type")  # the second is an old name
_ROPE_SECTIONS = ("rope_scaling", "rope_parameters")  # names in 4.x and in 5.x


def model_section_of(config: dict[str, Any], path: Path) -> ModelSection:
    """The model section that computes the same as this Llama; sizes that phase8's defaults give anyway are left out.

    Args:
        config: The content of config.json.
        path: Path of the file, for error messages.

    Raises:
        CheckpointMismatchError: A key is missing, or has a value that the baseline does not support.
    """
    if config.get("model_type") != MODEL_TYPE:
        _refuse(path, f"model_type is {shown(config.get('model_type'))}, but only {MODEL_TYPE!r} and 'phase8' can be read")
    for key, allowed in _ALLOWED.items():
        _check(config, key, allowed, path)
    tie = config.get("tie_word_embeddings", False)
    if type(tie) is not bool:
        _refuse(path, f"tie_word_embeddings is {shown(tie)}, but true or false is needed")
    width, num_heads = _whole(config, "hidden_size", path), _whole(config, "num_attention_heads", path)
    num_kv_heads = num_heads if config.get("num_key_value_heads") is None else _whole(config, "num_key_value_heads", path)
    if num_heads % num_kv_heads:
        _refuse(path, f"num_key_value_heads {shown(num_kv_heads)} does not divide num_attention_heads {shown(num_heads)}")
    base, scaling = _rope(config, path)
    sizes = {ours: _whole(config, theirs, path) for ours, theirs in _SIZES.items()}
    try:
        model = ModelSection(
            block="transformer",
            **sizes,
            num_heads=num_heads,
            num_kv_heads=None if num_kv_heads == num_heads else num_kv_heads,
            head_size=_head_size(config, width, num_heads, path),
            tie_embeddings=tie,
            rope_base=base,
            rope_scaling=scaling,
            norm_eps=_positive(config, "rms_norm_eps", path, default=_DEFAULT_NORM_EPS),
            init_std=_positive(config, "initializer_range", path, default=ModelSection().init_std),
        )
    except ValidationError as error:  # every value has the right type at this point
        problem = error.errors()[0]
        ours = str(problem["loc"][0])
        _refuse(path, f"{_SIZES.get(ours, ours)} is {shown(problem['input'])}, more than a model can have here")
    by_default = model.model_copy(update={"ffn_size": None})
    return by_default if by_default.feed_forward_width == model.ffn_size else model


def _head_size(config: dict[str, Any], width: int, num_heads: int, path: Path) -> int | None:
    """Head size; None where the heads share the width evenly, which is the default."""
    if config.get("head_dim") is None and width % num_heads:
        _refuse(path, f"num_attention_heads {shown(num_heads)} does not divide hidden_size {shown(width)}, and there is no head_dim")
    size = width // num_heads if config.get("head_dim") is None else _whole(config, "head_dim", path)
    if size % 2:
        _refuse(path, f"head_dim is {shown(size)}, but rotary positions need an even one")
    return None if size * num_heads == width else size


def _rope(config: dict[str, Any], path: Path) -> tuple[float, RopeScaling]:
    """Base and scaling of the rotary frequencies, for which there are several possible places."""
    bases = {"rope_theta": config.get("rope_theta")}
    scalings = {}
    for section in _ROPE_SECTIONS:
        rope = config.get(section)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            _refuse(path, f"{section} is {shown(rope)}, but an object or null is needed")
        bases[f"{section}.rope_theta"] = rope.get("rope_theta")
        scalings[section] = _scaling(rope, section, path)
    found = {place: _positive({place: base}, place, path) for place, base in bases.items() if base is not None}
    if len(set(found.values())) > 1:
        _refuse(path, f"{' and '.join(f'{place} {base}' for place, base in found.items())} contradict each other")
    if len(set(scalings.values())) > 1:
        _refuse(path, f"{' and '.join(scalings)} contradict each other")
    scaling = next(iter(scalings.values()), UNSCALED)
    outside = config.get("original_max_position_embeddings")  # 5.x prefers this one
    if scaling.type == "llama3" and outside not in (None, scaling.original_sequence_length):
        _refuse(path, f"original_max_position_embeddings is {shown(outside)}, but {scaling.original_sequence_length} in {next(iter(scalings))}")
    return next(iter(found.values()), _DEFAULT_ROPE_BASE), scaling


def _scaling(rope: dict[str, Any], section: str, path: Path) -> RopeScaling:
    """The scaling that a section of the config describes."""
    types = {key: rope[key] for key in _TYPE_KEYS if key in rope}
    for key, rope_type in types.items():
        if not isinstance(rope_type, str) or rope_type not in _ROPE_TYPES:
            _refuse(path, f"{section}.{key} is {shown(rope_type)}, but the transformer baseline knows {', '.join(_ROPE_TYPES)}")
    if len(set(types.values())) > 1:
        _refuse(path, f"{' and '.join(f'{section}.{key} {rope_type}' for key, rope_type in types.items())} contradict each other")
    rope_type = next(iter(types.values()), "default")
    read = {ours: theirs for ours, theirs in ROPE_KEYS.items() if ours in RopeScaling(type=_ROPE_TYPES[rope_type]).in_effect}
    for name, value in rope.items():
        has_no_effect = name == "partial_rotary_factor" and value in (1, None)
        if name not in (*read.values(), *_TYPE_KEYS, "rope_theta") and not has_no_effect:
            _refuse(path, f"{section}.{shown_name(name)} is {shown(value)}, but the transformer baseline does not read it with rope_type {rope_type}")
    values: dict[str, Any] = {}
    for ours, theirs in read.items():
        read_number = _whole if ours == "original_sequence_length" else _positive
        values[ours] = read_number(rope, theirs, path, shown_as=f"{section}.{theirs}")
    if values.get("factor", 1) < 1:
        _refuse(path, f"{section}.factor is {values['factor']}, but a number of at least 1 is needed")
    try:
        scaling = RopeScaling(type=_ROPE_TYPES[rope_type], **values)
    except ValidationError as error:
        _refuse(path, f"{section} is {shown(rope)}, whose {ROPE_KEYS[str(error.errors()[0]['loc'][0])]} is more than a model can have here")
    if rope_type == "llama3" and scaling.high_frequency_factor <= scaling.low_frequency_factor:
        _refuse(path, f"{section}.high_freq_factor {scaling.high_frequency_factor} is not above low_freq_factor {scaling.low_frequency_factor}")
    return scaling


def _check(config: dict[str, Any], key: str, allowed: tuple[Any, ...], path: Path) -> None:
    if key in config and config[key] not in allowed:
        _refuse(path, f"{key} is {shown(config[key])}, but the transformer baseline needs {shown(allowed[0])}")


def _whole(config: dict[str, Any], key: str, path: Path, *, shown_as: str | None = None) -> int:
    value = config.get(key)
    if type(value) is not int or not 1 <= value <= _MOST:
        _refuse(path, f"{shown_as or key} is {shown(value) if key in config else 'missing'}, but a whole number of at least 1 is needed")
    return value


def _positive(holder: dict[str, Any], key: str, path: Path, *, default: float | None = None, shown_as: str | None = None) -> float:
    value = holder.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        _refuse(path, f"{shown_as or key} is {shown(value)}, but a finite number above 0 is needed")
    return float(value)


def _refuse(path: Path, problem: str) -> NoReturn:
    raise CheckpointMismatchError(f"{path}: {problem}; use another model")
