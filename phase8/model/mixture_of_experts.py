"""The feed-forward whose tokens are computed by a few of several experts each, and by shared experts that compute all tokens.

A tensor-parallel rank computes its part of every expert's width for all tokens of the microbatch; ranks of expert parallelism have different experts.
In training an expert takes a limited number of tokens of each sequence, the first ones that choose it, so what it takes depends neither on other
sequences nor on how ranks divide the batch. Without gradients, in evaluation and generation, it takes all.

Shapes: N tokens of a microbatch, n own ones, B sequences of T tokens (of this rank's slice), k choices of a token, E experts, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from phase8.config.model_section import ModelSection
from phase8.distributed.collectives import ALONE, Axis, gather_tokens, scatter_tokens, start_gather
from phase8.exchanges import Exchanges, computed_by_experts, counted, gathered, scattered
from phase8.expert_parallel.exchange import computed_where_experts_are
from phase8.expert_parallel.slots import Slots, compact_slots, from_slots, padded_slots, places_in_sequence, to_slots
from phase8.model.experts import Experts
from phase8.model.experts_step import ExpertsStep
from phase8.model.feed_forward import SwiGLU
from phase8.model.router import BALANCE, Router, Routing, Z
from phase8.precision.formats import NumberFormat

# What a layer measures beside its losses: choices of each expert, dropped choices, and the sums of entropy and imbalance [E + 3].
ROUTING = "routing"


class MixtureOfExperts(nn.Module):
    """The mixture of experts of a layer.

    Args:
        model: Model section.
        axis: Axis of tensor parallelism.
        number_format: Format that computes the products of the shared experts.
        context: Axis of the ranks that share each sequence.
        expert: Axis of the ranks that share the experts.
    """

    def __init__(self, model: ModelSection, *, axis: Axis, number_format: NumberFormat, context: Axis = ALONE, expert: Axis = ALONE):
        super().__init__()
        self.axis, self.context, self.expert = axis, context, expert
        self.section, self.num_experts, self.top_k = model, model.num_experts, model.top_k
        self.router, self.experts = Router(model), Experts(model)
        shared = model.shared_experts * model.expert_width
        is_counted = expert.size > 1 and model.has_counted_rows(context_parallel_size=context.size)
        self.compute = torch.compiler.disable(computed_where_experts_are) if is_counted else computed_where_experts_are
        self.shared = SwiGLU(model, axis=axis, number_format=number_format, inner=shared) if shared else None

    @staticmethod
    def auxiliary_losses(model: ModelSection) -> tuple[str, ...]:
        """Names of the auxiliary losses of a model with experts."""
        return (BALANCE, Z) if model.ffn == "moe" else ()

    def learn_from_routing(self, measured: Tensor, is_valid: Tensor) -> None:
        """Makes the router take account of a step; arguments as of the block's method."""
        self.router.learn_from(measured[: self.num_experts], is_valid)

    def exchanges(self) -> Exchanges:
        """The exchanges of choices, of tokens, of counts between slices, of rows between experts, of the shared experts, and of the output."""
        width = self.section.d_model
        found = gathered(2 * self.top_k, is_wide=True)
        if self.section.capacity_factor is not None:
            found = found.then(counted(self.num_experts))
        if self.shared is not None:
            found = found.then(self.shared.exchanges())
        found = found.then(gathered(width)).then(computed_by_experts(width, num_experts=self.num_experts))
        return found.then(replace(scattered(width), repeated=()))

    def forward(self, x: Tensor, num_tokens: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Applies the layer.

        Args:
            x: Normalised residual stream [B, T, D]; with several tensor-parallel ranks, own tokens [n, D].
            num_tokens: Tokens T of each sequence on this rank.

        Returns:
            The summand for the residual stream, in the shape of x; auxiliary losses by name, and `ROUTING`, what the layer measures.
        """
        own = x.flatten(0, -2)
        routing = self.router(own)
        chosen, weights = self._of_all_tokens(routing)
        chosen = chosen.view(-1, num_tokens, self.top_k)
        # Only training limits what experts take: there gradients are enabled.
        capacity = self.section.expert_capacity(num_tokens * self.context.size) if torch.is_grad_enabled() else None
        is_padded = capacity is not None and self.context.size == 1 and self.expert.size > 1
        slots = self._slots(chosen, capacity, is_padded=is_padded)
        rows = to_slots(gather_tokens(own, self.axis), slots)
        run = partial(self.compute, axis=self.expert, beside=lambda: None if self.shared is None else self.shared(own))
        rows, shared = self.experts(rows, slots, run)
        y = scatter_tokens(from_slots(rows, weights, slots), self.axis)
        sums = torch.stack((self._num_dropped(slots).float(), routing.entropy.float(), routing.imbalance.float()))
        measured = torch.cat((routing.counts.float(), sums))
        return (y if shared is None else y + shared).view(x.shape), {**routing.losses, ROUTING: measured}

    def prepared(self, dtype: torch.dtype) -> ExpertsStep:
        """The layer of one rank for decoding with inputs of a dtype."""
        shared = None if self.shared is None else self.shared.prepared(dtype)
        return ExpertsStep(self.router.scores.prepared(dtype), self.router.choose, self.experts.prepared(dtype), shared)

    def _of_all_tokens(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """Experts and weights of all tokens [N, k]; one collective brings both."""
        if self.axis.size == 1:
            return routing.experts, routing.weights
        both = gather_tokens(torch.cat((routing.experts.to(routing.weights.dtype), routing.weights), dim=-1), self.axis)
        experts, weights = both.split(self.top_k, dim=-1)
        return experts.long(), weights

    def _slots(self, chosen: Tensor, capacity: int | None, *, is_padded: bool) -> Slots:
        """Slots of the choices [B, T, k]."""
        if capacity is None:
            return compact_slots(chosen.flatten(0, 1), None, self.num_experts)
        places, counts = places_in_sequence(chosen, self.num_experts)
        if is_padded:
            return padded_slots(chosen, places, counts, capacity, num_ranks=self.expert.size)
        if self.context.size > 1:
            of_slices = start_gather(counts[None], self.context)()  # [slices, B, E]
            before = of_slices[: self.context.index].sum(0, dtype=counts.dtype)
            places = places + before.gather(1, chosen.flatten(1)).view(chosen.shape)
        return compact_slots(chosen.flatten(0, 1), (places < capacity).flatten(0, 1), self.num_experts)

    def _num_dropped(self, slots: Slots) -> Tensor:
        """Number of dropped choices of this rank's own tokens."""
        return (~slots.is_kept).view(self.axis.size, -1)[self.axis.index].sum()
