"""Models that are no Llama, under names and keys of the code that is exported with them (`remote_code/`).

| in phase8 | there |
|---|---|
| `embedding`, `norm`, `head` | `model.embed_tokens`, `model.norm`, `lm_head` |
| `blocks.<n>.<name>` | `model.layers.<n>.<name>` |
| a key of the section `model` that the model reads, derived defaults filled in | the same key, but for `_RENAMED` |
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from phase8.checkpoint.untrusted import shown
from phase8.config.model_keys import keys_in_effect
from phase8.config.model_section import ModelSection
from phase8.errors import CheckpointMismatchError

MODEL_TYPE = "phase8"
CODE = Path(__file__).with_name("remote_code")
CODE_FILES = tuple(CODE / f"{name}_phase8.py" for name in ("cache", "configuration", "experts", "layers", "modeling", "operations"))
# What a user of transformers looks for under another name, or what has another meaning under ours.
_RENAMED = {"tie_embeddings": "tie_word_embeddings", "top_k": "num_experts_per_tok", "rope_scaling": "rotary_scaling"}
# What exports of earlier releases lack; their models have the default.
_LATER_KEYS = frozenset({"embedding_scalars", "global_gate_activation", "global_skip", "value_activation"})
_OUTSIDE = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_LAYER = re.compile(r"blocks\.([0-9]+)\.(.+)")
_EXPORTED_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,8})\.([a-z_.]+)")
_OWNERS = {theirs: ours for ours, theirs in _OUTSIDE.items()}
# Parameters with which the model computes in fp32 whatever its dtype, by a component of their name; `modeling_phase8.py` says the same.
_IN_FP32 = frozenset({
    "norm", "mixer_norm", "feed_forward_norm", "qk_norm", "scalars", "decay_bias", "gate_bias", "skip", "chain", "score", "router",
    "embedding_scalar",
})  # fmt: skip


def exported_name(name: str) -> str:
    """Exported name of a parameter of the model."""
    if (found := _LAYER.fullmatch(name)) is not None:
        return f"model.layers.{found[1]}.{found[2]}"
    owner, _, parameter = name.rpartition(".")
    return f"{_OUTSIDE[owner]}.{parameter}"


def own_name(key: str) -> str | None:
    """The parameter with an exported name; None: no parameter has it."""
    if (found := _EXPORTED_LAYER.fullmatch(key)) is not None:
        return f"blocks.{found[1]}.{found[2]}"
    owner, _, parameter = key.rpartition(".")
    return f"{_OWNERS[owner]}.{parameter}" if owner in _OWNERS else None


def stays_in_fp32(name: str) -> bool:
    """Whether a parameter keeps its dtype where the weights of products are rounded to another."""
    return not _IN_FP32.isdisjoint(name.split("."))


def exported_config(model: ModelSection, *, dtype: str) -> dict[str, Any]:
    """The config.json of a model.

    Args:
        model: Its section.
        dtype: Dtype of the weights of products, by its name in torch.
    """
    keys = {_RENAMED.get(name, name): value for name, value in keys_in_effect(model).items()}
    return {
        "architectures": ["Phase8ForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": "configuration_phase8.Phase8Config",
            "AutoModel": "modeling_phase8.Phase8Model",
            "AutoModelForCausalLM": "modeling_phase8.Phase8ForCausalLM",
        },
        **keys,
        "torch_dtype": dtype,
    }


def section_of(config: dict[str, Any], path: Path) -> ModelSection:
    """The model section that a config.json describes; keys of transformers have no effect on the model.

    Args:
        config: Its content.
        path: Path of the file, for error messages.

    Raises:
        CheckpointMismatchError: A key is missing, or has a value that no model has.
    """
    keys = {name: config[key] for name in ModelSection.model_fields if (key := _RENAMED.get(name, name)) in config}
    try:
        model = ModelSection(**keys)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        name = str(problem["loc"][0])
        raise CheckpointMismatchError(
            f"{path}: {_RENAMED.get(name, name)} is {shown(problem['input'])}, which no model here has ({problem['msg']}); use another copy"
        ) from None
    read = keys_in_effect(model)
    if missing := [_RENAMED.get(name, name) for name in read if name not in keys and name not in _LATER_KEYS]:
        raise CheckpointMismatchError(f"{path} lacks {missing[0]}, with which the model computes; use another copy")
    # transformers writes all keys; what the model does not read has its default.
    return ModelSection(**{name: value for name, value in keys.items() if name in read})
