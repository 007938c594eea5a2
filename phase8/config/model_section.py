"""The section of the config that describes the model, and what follows from its keys: widths, and what differs from layer to layer."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import BeforeValidator, Field

from phase8.config.rope_scaling import UNSCALED, RopeScaling, null_is_unscaled
from phase8.config.section import Section, key
from phase8.config.values import (
    GlobalPathName,
    LayerCount,
    NegativeFloat,
    NonNegativeFloat,
    NonNegativeInt,
    OptionalWidth,
    PositiveFloat,
    SiluOfValues,
    TapCount,
    TokenCount,
    Width,
)

_Value = TypeVar("_Value")
Windows = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1, strict=False)]
Switches = Annotated[tuple[bool, ...], Field(min_length=1, strict=False)]


class LayerKind(NamedTuple):
    """The properties in which layers of a model differ in cost.

    Args:
        window: Window of the local path.
        has_experts: Whether the feed-forward is a mixture of experts.
    """

    window: int
    has_experts: bool = False


class ModelSection(Section):
    """The model. Shapes follow docs: H * K = attention width, K = head size."""

    block: Literal["phase8", "transformer"] = key("phase8", "phase8, or the full causal attention baseline")
    d_model: Width = key(512, "width D of the residual stream")
    num_layers: LayerCount = key(8, "number of blocks")
    num_heads: Width = key(8, "number of heads H")
    num_kv_heads: Width | None = key(
        None, "transformer: number of heads of keys and values, each shared by as many heads of queries (grouped-query attention); null: num_heads"
    )
    head_size: Width | None = key(None, "size K of a head, even; null: d_model / num_heads")
    vocab_size: TokenCount = key(16384, "number of token ids; the tokenizer and the data must stay below it")
    sequence_length: TokenCount = key(512, "tokens T of a training sequence")
    low_rank_rank: OptionalWidth = key(0, "rank R of the mixer's linears (and of the feed-forward's with ffn: low_rank_swiglu); 0: dense")
    local_window_size: NonNegativeInt | Windows = key(
        (128, 128, 128, 2048),
        "window W of the local path, in tokens, the token itself included; a list is repeated over the layers. 0: the layer is the global path "
        "alone; then the layers that have a window are windows alone",
    )
    global_tokens: NonNegativeInt = key(0, "first G tokens of the sequence that every later token sees")
    score: Literal["lorentz", "dot"] = key("dot", "score of the local path: hyperbolic distance or scaled dot product")
    local_qk_norm: bool | None = key(
        None,
        "queries and keys of the window (transformer: of the attention) are normalised and scaled by a learned number per head; the Lorentz score "
        "cannot have it; null: true for the dot score, false for the transformer, which is a Llama then",
    )
    global_path: GlobalPathName = key(
        "linear",
        "recurrence beside the window: delta replaces what a key holds, linear adds to it; none: the window alone, without gate and chain",
    )
    chain: Literal["both", "decay", "gate", "none"] = key("none", "what the Green chain modulates: the decay, the gate, both, or no chain")
    global_gate: Literal["scalar", "channel"] | None = key(
        None,
        "gate of the global path: a number per head and token, or one per channel, by a low-rank product whose rank is the head size; null: channel, "
        "but scalar in a model with low_rank_rank",
    )
    global_gate_activation: Literal["sigmoid", "silu"] = key("sigmoid", "function that makes the gate of the global path from its logits")
    global_skip: bool = key(False, "the global path adds the value of a token, times a learned number per head, to what it reads, before its norm")
    global_activation: Literal["none", "silu", "silu_with_values"] | None = key(
        None,
        "activation of the global path's queries and keys, between convolution and normalisation; silu_with_values: of the values that it reads, "
        "too; null: silu",
    )
    value_activation: Literal["none", "silu"] = key(
        "none", "activation of the values, after the convolution: of both paths, or of the transformer's attention"
    )
    decay_floor: NegativeFloat | None = key(
        None, "lowest logarithm of the global path's decay, which is the floor times a sigmoid, -5 for example; null: minus a softplus, without floor"
    )
    memory_tokens: Annotated[tuple[PositiveFloat, PositiveFloat], Field(strict=False)] = key(
        (2.0, 500.0), "tokens that the first and the last head of the global path remember at initialisation; on a logarithmic scale between"
    )
    convolution_size: TapCount | None = key(None, "taps of the causal convolution on q, k, v; 1: none; null: 4 (phase8), 1 (transformer)")
    ffn: Literal["swiglu", "low_rank_swiglu", "moe"] = key("swiglu", "feed-forward of the block; moe: each token goes to a few of several experts")
    ffn_size: Width | None = key(None, "width F of the feed-forward; null: 8/3 d_model rounded up to a multiple of 64")
    num_experts: Width = key(8, "experts E of a feed-forward with ffn: moe")
    top_k: Width = key(2, "experts that compute each token")
    expert_ffn_size: Width | None = key(None, "width of an expert; null: that of the dense feed-forward, ffn_size")
    shared_experts: NonNegativeInt = key(0, "experts that compute every token, beside the chosen ones: one dense feed-forward of as many widths")
    capacity_factor: PositiveFloat | None = key(
        1.25, "tokens that an expert takes of a sequence in training, as a multiple of an even share; it drops later ones; null: all tokens"
    )
    moe_every_n_layers: LayerCount = key(1, "distance n of the layers with experts; the layers between them are dense")
    first_dense_layers: NonNegativeInt = key(0, "number of first layers that are dense")
    router_score: Literal["softmax", "sigmoid"] = key("softmax", "function that makes scores of experts from the router's logits")
    routed_scaling_factor: PositiveFloat = key(1.0, "sum of the weights with which the outputs of a token's experts are added, if top_k is above 1")
    balance_loss_weight: NonNegativeFloat = key(0.01, "weight of the loss that spreads tokens over experts; even layers add this much")
    router_z_loss_weight: NonNegativeFloat = key(0.001, "weight of the loss that keeps the router's logits small")
    router_bias_rate: NonNegativeFloat = key(
        0.0, "change per step of a bias by which experts with fewer tokens are chosen more often, as in DeepSeek-V3; 0: no bias"
    )
    tie_embeddings: bool = key(False, "use the embedding as the output head")
    embedding_scalars: bool = key(False, "every block's input is the stream plus the embedding's output times a learned number of the block")
    rotary: bool | Switches = key(
        True, "rotary positions of the window's queries and keys (transformer: of the attention's); a list is repeated over the layers"
    )
    rope_base: PositiveFloat = key(10000.0, "base of the rotary frequencies")
    rope_scaling: Annotated[RopeScaling, BeforeValidator(null_is_unscaled)] = key(UNSCALED, "scaling of the rotary frequencies")
    norm_eps: PositiveFloat = key(1e-5, "epsilon of every RMS norm")
    init_std: PositiveFloat = key(0.02, "standard deviation of the initial weights")

    @property
    def num_streams(self) -> int:
        """Number of tensors [N, D] that go from stage to stage for N tokens: the residual stream, and the embedding's output if blocks add it."""
        return 2 if self.embedding_scalars else 1

    @property
    def head_width(self) -> int:
        """Size K of one head."""
        return self.head_size if self.head_size is not None else self.d_model // self.num_heads

    @property
    def attention_width(self) -> int:
        """Width H * K of q, and of k and v unless queries share them."""
        return self.num_heads * self.head_width

    @property
    def key_value_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.num_kv_heads if self.num_kv_heads is not None else self.num_heads

    @property
    def key_value_width(self) -> int:
        """Width of k and v."""
        return self.key_value_heads * self.head_width

    @property
    def queries_per_key(self) -> int:
        """Number of heads of queries that share a head of keys and values."""
        return self.num_heads // self.key_value_heads

    @property
    def window_sizes(self) -> tuple[int, ...]:
        """Window of the local path in each layer."""
        return _windows(self.local_window_size, self.num_layers)

    @property
    def has_rotary(self) -> tuple[bool, ...]:
        """Whether queries and keys of each layer have rotary positions."""
        return _switches(self.rotary, self.num_layers)

    def of_window(self, window: int) -> ModelSection:
        """The section of the layers that have this window: where others have none, these layers leave the global path to them."""
        alternates = window > 0 and 0 in self.window_sizes
        return self.model_copy(update={"local_window_size": window} | ({"global_path": "none"} if alternates else {}))

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        return _layer_kinds(self.window_sizes, self.has_experts)

    def of_kind(self, kind: LayerKind) -> ModelSection:
        """The section of the layers of a kind, with experts in every layer or in none."""
        if self.ffn != "moe":
            return self.of_window(kind.window)
        experts = {"first_dense_layers": 0, "moe_every_n_layers": 1} if kind.has_experts else {"ffn": "swiglu"}
        return self.of_window(kind.window).model_copy(update=experts)

    @property
    def has_global_path(self) -> bool:
        """Whether the blocks have a global path beside the local one."""
        return self.block == "phase8" and self.global_path != "none"

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys of a window, or of the transformer's attention, are normalised."""
        return self.local_qk_norm if self.local_qk_norm is not None else self.block == "phase8" and self.score == "dot"

    @property
    def has_channel_gate(self) -> bool:
        """Whether the gate of the global path is one per channel."""
        gate = self.global_gate if self.global_gate is not None else ("scalar" if self.low_rank_rank else "channel")
        return self.has_global_path and gate == "channel"

    @property
    def has_silu(self) -> bool:
        """Whether queries and keys of the global path go through SiLU."""
        return self.has_global_path and self.global_activation != "none"

    @property
    def silu_of_values(self) -> SiluOfValues:
        """Which values go through SiLU."""
        if self.value_activation == "silu":
            return "all"
        return "global" if self.has_global_path and self.global_activation == "silu_with_values" else "none"

    @property
    def scalars_per_head(self) -> int:
        """Numbers that the global path computes for each head and token: decay step, scalar gate, potential of the chain, share of the delta rule."""
        if not self.has_global_path:
            return 0
        return 1 + (not self.has_channel_gate) + (self.chain != "none") + (self.global_path == "delta")

    @property
    def feed_forward_rank(self) -> int:
        """Rank of the feed-forward's low-rank pairs; 0: full matrices."""
        return self.low_rank_rank if self.ffn == "low_rank_swiglu" else 0

    @property
    def feed_forward_width(self) -> int:
        """Width F of the feed-forward."""
        return self.ffn_size if self.ffn_size is not None else -(-8 * self.d_model // (3 * 64)) * 64

    @property
    def expert_width(self) -> int:
        """Width of an expert."""
        return self.expert_ffn_size if self.expert_ffn_size is not None else self.feed_forward_width

    @property
    def has_experts(self) -> tuple[bool, ...]:
        """Whether the feed-forward of each layer is a mixture of experts."""
        with_experts = range(self.first_dense_layers, self.num_layers, self.moe_every_n_layers) if self.ffn == "moe" else range(0)
        return _marked(with_experts, self.num_layers)

    def expert_capacity(self, length: int) -> int | None:
        """Choices that an expert takes of a sequence of this many tokens in training; None: all."""
        if self.capacity_factor is None:
            return None
        return min(math.ceil(self.capacity_factor * self.top_k * length / self.num_experts), length)

    def rows_per_token(self, length: int, *, is_padded: bool) -> float:
        """Rows that experts compute, over the tokens of sequences of this length: as many as a token chooses, or with padding all slots."""
        capacity = self.expert_capacity(length)
        return self.top_k if capacity is None or not is_padded else self.num_experts * capacity / length

    @property
    def numbers_of_routing(self) -> int:
        """Numbers that a layer with experts measures in a step: choices of each expert, dropped choices, and the sums of entropy and imbalance."""
        return self.num_experts + 3

    def has_counted_rows(self, *, context_parallel_size: int) -> bool:
        """Whether ranks that share experts exchange as many rows as tokens choose, which the host has to know; otherwise the same number always."""
        return self.ffn == "moe" and (self.capacity_factor is None or context_parallel_size > 1)

    @property
    def convolution_taps(self) -> int:
        """Taps of the causal convolution on q, k and v."""
        if self.convolution_size is not None:
            return self.convolution_size
        return 4 if self.block == "phase8" else 1


def _over_layers(value: _Value | tuple[_Value, ...], num_layers: int) -> tuple[_Value, ...]:
    """The value of each layer; a list is repeated."""
    pattern = value if isinstance(value, tuple) else (value,)
    return tuple(pattern[layer % len(pattern)] for layer in range(num_layers))


# Models and plans ask for these in every layer, so they are made once. A section cannot keep them: a copy with other keys would keep them, too.
@lru_cache(maxsize=64)
def _windows(window: int | tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    return _over_layers(window, num_layers)


@lru_cache(maxsize=64)
def _switches(switch: bool | tuple[bool, ...], num_layers: int) -> tuple[bool, ...]:
    return _over_layers(switch, num_layers)


@lru_cache(maxsize=64)
def _marked(layers: range, num_layers: int) -> tuple[bool, ...]:
    """Whether each layer is one of `layers`."""
    return tuple(layer in layers for layer in range(num_layers))


@lru_cache(maxsize=64)
def _layer_kinds(windows: tuple[int, ...], has_experts: tuple[bool, ...]) -> tuple[LayerKind, ...]:
    """The kind of each layer."""
    return tuple(map(LayerKind, windows, has_experts))
