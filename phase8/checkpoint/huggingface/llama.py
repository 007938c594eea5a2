"""The transformer baseline under the names of `transformers`' LlamaForCausalLM: the same computation, so its loaders read our weights.

Source: the parameters and config.json of transformers' Llama (4.x and 5.x).

Shapes: V vocabulary, D model width, N heads times head size, M heads of keys times head size, F width of the feed-forward.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from phase8.config.model_section import ModelSection

_IN_A_LAYER = {
    "mixer_norm": "input_layernorm",
    "mixer.q": "self_attn.q_proj",
    "mixer.k": "self_attn.k_proj",
    "mixer.v": "self_attn.v_proj",
    "mixer.out": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
_OUTSIDE = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
# The keys of `model.rope_scaling` that are not `type`.
ROPE_KEYS = {
    "factor": "factor",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "original_sequence_length": "original_max_position_embeddings",
}
_LAYER = re.compile(r"blocks\.(\d+)\.(.+)")


def reasons_against(model: ModelSection) -> Iterator[str]:
    """Differences between a model and Llama, one key and value each; empty if the model is a Llama."""
    if model.block != "transformer":
        yield f"model.block {model.block}"
    if model.convolution_taps > 1:
        yield f"a convolution of {model.convolution_taps} taps (model.convolution_size)"
    if model.has_qk_norm:
        yield "a norm of queries and keys (model.local_qk_norm)"
    if model.embedding_scalars:
        yield "blocks that add the embedding (model.embedding_scalars)"
    if model.silu_of_values != "none":
        yield "an activation of values (model.value_activation)"
    if not all(model.has_rotary):
        yield "layers without positions (model.rotary)"
    if model.low_rank_rank:
        yield f"matrices of rank {model.low_rank_rank} (model.low_rank_rank)"
    if model.ffn != "swiglu":
        yield f"model.ffn {model.ffn}"


def llama_name(name: str) -> str:
    """Llama's name of a parameter of the model."""
    owner = name.removesuffix(".weight")
    if (found := _LAYER.fullmatch(owner)) is not None:
        return f"model.layers.{found[1]}.{_IN_A_LAYER[found[2]]}.weight"
    return f"{_OUTSIDE[owner]}.weight"


def llama_tensors(model: ModelSection) -> Iterator[tuple[str, list[int]]]:
    """Yields name and shape of every parameter, lazily: an unchecked number of layers costs nothing.

    Args:
        model: A model without `reasons_against`.
    """
    D, N, M, F, V = model.d_model, model.attention_width, model.key_value_width, model.feed_forward_width, model.vocab_size
    shapes = {
        "mixer_norm": [D],
        "mixer.q": [N, D],
        "mixer.k": [M, D],
        "mixer.v": [M, D],
        "mixer.out": [D, N],
        "feed_forward_norm": [D],
        "feed_forward.gate": [F, D],
        "feed_forward.up": [F, D],
        "feed_forward.down": [D, F],
    }
    yield "embedding.weight", [V, D]
    for layer in range(model.num_layers):
        for name, shape in shapes.items():
            yield f"blocks.{layer}.{name}.weight", shape
    yield "norm.weight", [D]
    if not model.tie_embeddings:
        yield "head.weight", [V, D]


def llama_config(model: ModelSection, *, dtype: str) -> dict[str, object]:
    """The config.json of a Llama.

    Args:
        model: A model without `reasons_against`.
        dtype: Dtype of the weights, by its name in torch.
    """
    scaling = model.rope_scaling.in_effect
    rope = {"rope_type": "default"}
    if (rope_type := scaling.pop("type")) != "none":
        rope = {"rope_type": rope_type} | {ROPE_KEYS[key]: value for key, value in scaling.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.feed_forward_width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.head_width,
        "hidden_act": "silu",
        "initializer_range": model.init_std,
        "max_position_embeddings": model.sequence_length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_base,
        **({"rope_scaling": rope} if rope_type != "none" else {}),  # its place in 4.x
        "rope_parameters": rope | {"rope_theta": model.rope_base},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": dtype,
    }
