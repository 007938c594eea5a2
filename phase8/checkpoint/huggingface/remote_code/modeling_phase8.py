"""A language model of Phase 8 blocks for transformers: attention to a window beside a gated recurrence, with a state of constant size.

Masked tokens are as if they were not there: they are moved behind the others of their row, where a causal model does not see them.

Shapes: B batch, T tokens of a piece, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .cache_phase8 import LayerState, Phase8Cache
from .configuration_phase8 import Phase8Config
from .experts_phase8 import MixtureOfExperts
from .layers_phase8 import Linear, Mixer, RMSNorm, SwiGLU
from .operations_phase8 import Piece, rotary_angles

# Earlier releases of transformers call the cache past_key_values, in outputs and arguments.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
# Weights with which the model computes in fp32, whatever its dtype, by a component of their name.
IN_FP32 = (
    "norm", "mixer_norm", "feed_forward_norm", "qk_norm", "scalars", "decay_bias", "gate_bias", "skip", "chain", "score", "router",
    "embedding_scalar",
)  # fmt: skip


class EmbeddingScalar(nn.Module):
    """The learned number s of a block whose input is x + s * e, where e is the output of the embedding."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the number to zero, with which the block is one without it."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """The block's input [B, T, D]."""
        return torch.addcmul(x, embedded, self.weight.to(x.dtype))


class Phase8Block(GradientCheckpointingLayer):
    """One block: x + mixer(norm(x)), then x + feed_forward(norm(x)).

    Args:
        config: Config of the model.
        layer: Number of the layer.
    """

    def __init__(self, config: Phase8Config, layer: int):
        super().__init__()
        self.embedding_scalar = EmbeddingScalar() if config.embedding_scalars else None
        self.mixer_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.mixer = Mixer(config, layer)
        self.feed_forward_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        rank = config.low_rank_rank if config.ffn == "low_rank_swiglu" else 0
        self.feed_forward = MixtureOfExperts(config) if config.has_experts(layer) else SwiGLU(config, inner=config.ffn_size, rank=rank)

    def forward(self, x: Tensor, piece: Piece, state: LayerState | None, embedded: Tensor) -> Tensor:
        """Applies the block to the stream [B, T, D], and advances the state; `embedded` is the output of the embedding."""
        x = x if self.embedding_scalar is None else self.embedding_scalar(x, embedded)
        x = x + self.mixer(self.mixer_norm(x), piece, state)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Phase8PreTrainedModel(PreTrainedModel):
    """What transformers asks about the model."""

    config_class = Phase8Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _is_stateful = True  # no way back to earlier tokens
    _no_split_modules = ["Phase8Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012

    def post_init(self) -> None:
        """Names the weights that stay in fp32; earlier releases of transformers refuse names that the model does not have."""
        components = {component for name, _ in self.named_parameters() for component in name.split(".")}
        self._keep_in_fp32_modules_strict = sorted(components.intersection(IN_FP32))
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        loaded = [(each, each.clone()) for each in own if hasattr(each, "_is_hf_initialized")]
        if len(loaded) == len(own):
            return
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()
        for each, value in loaded:
            each.copy_(value)


class Phase8Model(Phase8PreTrainedModel):
    """The stack of blocks between embedding and head.

    Args:
        config: Config of the model.
    """

    def __init__(self, config: Phase8Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Phase8Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Phase8Cache | None = None,
        past_key_values: Phase8Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Final hidden states of a sequence, or of a piece of one.

        Args:
            input_ids: Token ids [B, T].
            attention_mask: False for tokens that are to be as if they were not there [B, T or more]; its last T columns are for this piece.
            position_ids: Positions, which follow from the mask: others than consecutive ones are refused.
            inputs_embeds: Vectors instead of ids [B, T, D].
            cache: State after the earlier pieces; it advances.
            past_key_values: The same, by its former name.
            use_cache: Whether a state is kept; None: as in the config, but not in training.
            output_hidden_states: Whether the stream before each block and the result are returned as well.
            kwargs: What transformers passes beside these; it has no effect.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given.shape[1] == 0:
            raise ValueError("the input has no token; give at least one, such as the one that ends a document, with which texts begin too")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if use_cache and cache is None and not (self.gradient_checkpointing and self.training):
            cache = Phase8Cache(self.config.num_layers)
        if cache is not None and self.gradient_checkpointing and self.training:
            raise ValueError("layers that are computed again in backward would advance the cache again; leave it out, or disable checkpointing")
        if cache is not None and not isinstance(cache, Phase8Cache):
            raise ValueError(f"the cache is a {type(cache).__name__}, but this model keeps a Phase8Cache; leave it out")
        num_columns = x.shape[1]
        mask = _own_columns(attention_mask, num_columns)
        order = None if mask is None else mask.int().argsort(dim=1, descending=True, stable=True)
        _check_positions(position_ids, order, mask)
        piece = self._piece(num_columns, None if mask is None else mask.sum(1), cache, x.device)
        x = x if order is None else x.take_along_dim(order[..., None], dim=1)
        streams, embedded = [], x
        for layer, block in enumerate(self.layers):
            streams.append(x)
            x = block(x, piece, None if cache is None else cache.layers[layer], embedded)
        x = self.norm(x)
        if cache is not None:
            cache.advance(num_columns, piece.lengths, piece.seen)
        back = None if order is None else order.argsort(dim=1)[..., None]
        x, *streams = (each if back is None else each.take_along_dim(back, dim=1) for each in ((x, *streams) if output_hidden_states else (x,)))
        return BaseModelOutputWithPast(
            last_hidden_state=x, hidden_states=(*streams, x) if output_hidden_states else None, **{CACHE: cache if use_cache else None}
        )

    def _piece(self, num_columns: int, lengths: Tensor | None, cache: Phase8Cache | None, device: torch.device) -> Piece:
        config = self.config
        seen = torch.zeros(1, dtype=torch.long, device=device) if cache is None else cache.seen_before(device)
        positions = seen[:, None] + torch.arange(num_columns, device=device)
        return Piece(seen, lengths, rotary_angles(positions, config.head_size, base=config.rope_base, scaling=config.rotary_scaling))


class Phase8ForCausalLM(Phase8PreTrainedModel, GenerationMixin):
    """The model with its head.

    Args:
        config: Config of the model.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: Phase8Config):
        super().__init__(config)
        self.model = Phase8Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = Linear(config.d_model, config.vocab_size, std=config.init_std)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Phase8Cache | None = None,
        past_key_values: Phase8Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and with labels the mean cross-entropy of the next tokens.

        Args:
            input_ids: As in `Phase8Model.forward`.
            attention_mask: As there.
            position_ids: As there.
            inputs_embeds: As there.
            cache: As there.
            past_key_values: As there.
            labels: Token ids [B, T], which are shifted here; -100 where there is nothing to predict.
            use_cache: As there.
            output_hidden_states: As there.
            return_dict: Whether the result has names; None: as in the config.
            logits_to_keep: Number of last tokens whose logits are computed, or their places; 0: all.
            kwargs: Arguments of the loss, such as `num_items_in_batch`.
        """
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            cache=cache,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, kept])
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=found.hidden_states, **{CACHE: found.get(CACHE)})
        return result.to_tuple() if return_dict is False else result

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The tokens that the cache has not read, and their mask."""
        cache = kwargs.get(CACHE)
        num_read = 0 if cache is None else cache.get_seq_length()
        # Where a prompt came as vectors, or its ids belong to an earlier call, `input_ids` holds less than the cache has read.
        total = next(each.shape[-1] for each in (attention_mask, position_ids, input_ids) if each is not None)
        inputs: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": use_cache, CACHE: cache, "logits_to_keep": logits_to_keep or 0}
        if inputs_embeds is not None and num_read == 0:
            return inputs | {"inputs_embeds": inputs_embeds}
        return inputs | {"input_ids": input_ids[:, input_ids.shape[1] - (total - num_read) :]}

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}, but this model keeps a state of its own; leave it out"
            )
        if generation_config.use_cache and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = Phase8Cache(self.config.num_layers)


def _own_columns(attention_mask: Tensor | None, num_columns: int) -> Tensor | None:
    """The mask of this piece [B, T]; None: all its tokens count."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] < num_columns:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, but a number per token is needed, [batch, {num_columns} or more]")
    mask = attention_mask[:, -num_columns:].bool()
    return None if mask.all() else mask


def _check_positions(position_ids: Tensor | None, order: Tensor | None, mask: Tensor | None) -> None:
    """Refuses positions that are not consecutive, such as those of several documents in a row, which would see each other."""
    if position_ids is None or position_ids.shape[-1] < 2:
        return
    steps = position_ids if order is None else position_ids.expand(order.shape).take_along_dim(order, dim=1)
    is_wrong = steps.diff(dim=-1) != 1
    if mask is not None:
        is_wrong = is_wrong & (torch.arange(1, mask.shape[1], device=mask.device) < mask.sum(1, keepdim=True))
    if is_wrong.any():
        raise ValueError("position_ids are not consecutive, but documents in one row cannot be kept apart; give one document per row")
