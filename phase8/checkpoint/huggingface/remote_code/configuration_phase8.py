"""The config of a Phase 8 model, or of a transformer with parts that no Llama has; the keys are those of phase8's section `model`."""

from __future__ import annotations

from typing import Any, TypeVar

from transformers import PretrainedConfig

_Value = TypeVar("_Value")
_DEFAULTS: dict[str, Any] = {
    "block": "phase8",  # or transformer: full causal attention
    "d_model": 512,
    "num_layers": 8,
    "num_heads": 8,
    "num_kv_heads": 8,  # of the transformer; other blocks have num_heads
    "head_size": 64,
    "vocab_size": 16384,
    "sequence_length": 512,  # of training; longer ones work
    "low_rank_rank": 0,
    "local_window_size": [128, 128, 128, 2048],  # a list is repeated over the layers, here and in `rotary`
    "global_tokens": 0,
    "score": "dot",  # or lorentz
    "local_qk_norm": True,
    "global_path": "linear",  # or delta, none
    "chain": "none",  # or decay, gate, both
    "global_gate": "channel",  # or scalar
    "global_gate_activation": "sigmoid",  # or silu
    "global_skip": False,
    "global_activation": "silu",  # or none, silu_with_values
    "value_activation": "none",  # or silu
    "decay_floor": None,
    "memory_tokens": [2.0, 500.0],
    "convolution_size": 4,
    "ffn": "swiglu",  # or low_rank_swiglu, moe
    "ffn_size": 1408,
    "num_experts": 8,
    "num_experts_per_tok": 2,  # top_k in phase8, which means something else to `generate`
    "expert_ffn_size": 1408,
    "shared_experts": 0,
    "moe_every_n_layers": 1,
    "first_dense_layers": 0,
    "router_score": "softmax",  # or sigmoid
    "routed_scaling_factor": 1.0,
    "embedding_scalars": False,
    "rotary": True,
    "rope_base": 10000.0,
    "rotary_scaling": {"type": "none"},  # or linear, llama3; rope_scaling in phase8, which transformers reads otherwise
    "norm_eps": 1e-5,
    "init_std": 0.02,
    # What only training in phase8 reads: here no expert drops a token, and routers learn from the loss alone.
    "capacity_factor": 1.25,
    "balance_loss_weight": 0.01,
    "router_z_loss_weight": 0.001,
    "router_bias_rate": 0.0,
}


class Phase8Config(PretrainedConfig):
    """Widths and parts of the model; see `_DEFAULTS` for the keys.

    Args:
        kwargs: Values of these keys, and of those that transformers knows.
    """

    model_type = "phase8"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "head_dim": "head_size",
        "intermediate_size": "ffn_size",
        "max_position_embeddings": "sequence_length",
        "initializer_range": "init_std",
    }

    def __init__(self, **kwargs: Any):
        for name, default in _DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, default))
        self.use_cache = kwargs.pop("use_cache", True)
        super().__init__(**{"tie_word_embeddings": False, **kwargs})

    @property
    def attention_width(self) -> int:
        """Width H * K of queries."""
        return self.num_heads * self.head_size

    @property
    def key_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.num_kv_heads if self.block == "transformer" else self.num_heads

    def window_of(self, layer: int) -> int | None:
        """Tokens that the attention of a layer sees, the token itself included; 0: it has no attention; None: it sees all."""
        return None if self.block == "transformer" else _of_layer(self.local_window_size, layer)

    def has_global_path(self, layer: int) -> bool:
        """Whether a layer has a recurrence: where others have no window, layers with one leave it to them."""
        if self.block == "transformer" or self.global_path == "none":
            return False
        windows = [self.window_of(each) for each in range(self.num_layers)]
        return not (0 in windows and windows[layer])

    def has_rotary(self, layer: int) -> bool:
        """Whether queries and keys of a layer have rotary positions."""
        return _of_layer(self.rotary, layer)

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward of a layer is a mixture of experts."""
        since = layer - self.first_dense_layers
        return self.ffn == "moe" and since >= 0 and since % self.moe_every_n_layers == 0


def _of_layer(value: _Value | list[_Value], layer: int) -> _Value:
    return value[layer % len(value)] if isinstance(value, list) else value
