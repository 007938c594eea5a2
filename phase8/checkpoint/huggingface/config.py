"""Translates a Llama's config.json into the model section of the equivalent transformer baseline, or refuses it by key and value.

Keys that are not read have no effect: transformers' LlamaForCausalLM (4.x and 5.x) does not compute with them either.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from phase8.checkpoint.untrusted import shown, shown_name
from phase8.config.model_section import ModelSection
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
_ALLOWED_IN_ROPE: dict[str, tuple[Any, ...]] = {"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (1, None)}
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
    if config.get("num_key_value_heads") not in (None, num_heads):
        found = f"num_key_value_heads is {shown(config['num_key_value_heads'])} and num_attention_heads {shown(num_heads)}"
        _refuse(path, f"{found}, but the transformer baseline has no grouped-query attention and needs as many of both")
    sizes = {ours: _whole(config, theirs, path) for ours, theirs in _SIZES.items()}
    try:
        model = ModelSection(
            block="transformer",
            **sizes,
            num_heads=num_heads,
            head_size=_head_size(config, width, num_heads, path),
            tie_embeddings=tie,
            rope_base=_rope_base(config, path),
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


def _rope_base(config: dict[str, Any], path: Path) -> float:
    """Base of the rotary frequencies, for which there are three possible keys."""
    places = {"rope_theta": config}
    for section in _ROPE_SECTIONS:
        rope = config.get(section)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            _refuse(path, f"{section} is {shown(rope)}, but an object or null is needed")
        for key, value in rope.items():
            if key != "rope_theta" and value not in _ALLOWED_IN_ROPE.get(key, ()):
                _refuse(path, f"{section}.{shown_name(key)} is {shown(value)}, but the transformer baseline does not scale rotary positions")
        places[f"{section}.rope_theta"] = rope
    bases = {
        place: _positive(holder, "rope_theta", path, shown_as=place)
        for place, holder in places.items()
        if holder.get("rope_theta") is not None
    }
    if len(set(bases.values())) > 1:
        _refuse(path, f"{' and '.join(f'{place} {base}' for place, base in bases.items())} contradict each other")
    return next(iter(bases.values()), _DEFAULT_ROPE_BASE)


def _check(config: dict[str, Any], key: str, allowed: tuple[Any, ...], path: Path) -> None:
    if key in config and config[key] not in allowed:
        _refuse(path, f"{key} is {shown(config[key])}, but the transformer baseline needs {shown(allowed[0])}")


def _whole(config: dict[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if type(value) is not int or not 1 <= value <= _MOST:
        _refuse(path, f"{key} is {shown(value) if key in config else 'missing'}, but a whole number of at least 1 is needed")
    return value


def _positive(holder: dict[str, Any], key: str, path: Path, *, default: float | None = None, shown_as: str | None = None) -> float:
    value = holder.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        _refuse(path, f"{shown_as or key} is {shown(value)}, but a finite number above 0 is needed")
    return float(value)


def _refuse(path: Path, problem: str) -> NoReturn:
    raise CheckpointMismatchError(f"{path}: {problem}; use another model")
