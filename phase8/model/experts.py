"""The experts of a layer: as many gated feed-forwards, computed together. Shapes: S rows, E experts, F width of an expert, D model width."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase8.config.model_section import ModelSection
from phase8.expert_parallel.slots import Slots
from phase8.kernels.grouped_product import grouped_product
from phase8.model.experts_step import PreparedExperts
from phase8.model.feed_forward import residual_std
from phase8.tensor_parallel.parameters import ParameterSpec, local


class Experts(nn.Module):
    """The experts down(silu(gate(x)) * up(x)); a rank has some of them, and of these its part of the width.

    Ranks of expert parallelism divide the experts, ranks of tensor parallelism the width F, and ZeRO the model width D, so that no dim is divided
    twice and every rank holds as much, however few experts there are.

    Args:
        model: Model section with widths and number of experts.
    """

    def __init__(self, model: ModelSection):
        super().__init__()
        inner, self.top_k = (model.num_experts, model.expert_width, model.d_model), model.top_k
        self.gate, self.up = nn.Parameter(torch.empty(inner)), nn.Parameter(torch.empty(inner))
        self.down = nn.Parameter(torch.empty(model.num_experts, model.d_model, model.expert_width))
        self._stds = {"gate": model.init_std, "up": model.init_std, "down": residual_std(model)}

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        """Normal values with weight decay, as in a dense feed-forward."""
        widths = {"gate": {"tp": 1, "shard": 2}, "up": {"tp": 1, "shard": 2}, "down": {"tp": 2, "shard": 1}}
        same = {"decay": True, "is_rounded": True}
        return {name: ParameterSpec(std=self._stds[name], divided={"ep": 0, **dims}, **same) for name, dims in widths.items()}

    @property
    def flops_per_token(self) -> float:
        """FLOPs of a forward for each token of the layer, which only the chosen experts compute."""
        return 2 * self.top_k * sum(each.numel() for each in (self.gate, self.up, self.down)) / self.gate.shape[0]

    def forward(self, rows: Tensor, slots: Slots, run: Callable[..., Any]) -> Any:
        """Has the experts of this rank computed; with several tensor-parallel ranks, this rank's summand.

        The exchange of rows is a part of this call, because ZeRO gathers the experts around it and takes one call a forward.

        Args:
            rows: Rows of the experts [S, D].
            slots: Slots of the rows.
            run: `computed_where_experts_are` without its `rows`, `slots` and `experts`.
        """
        return run(rows, slots, partial(self._in_groups, rows.dtype))

    def prepared(self, dtype: torch.dtype) -> PreparedExperts:
        """The experts of one rank for decoding with inputs of a dtype."""
        return PreparedExperts(*(weight.detach().to(dtype) for weight in (self.gate, self.up, self.down)))

    def _in_groups(self, dtype: torch.dtype, count: int) -> list[Callable[[Tensor, Tensor], Tensor]]:
        weights = [local(weight).to(dtype) for weight in (self.gate, self.up, self.down)]
        # Backward of a split copies the gradients.
        groups = [weights] if count == 1 else zip(*(weight.split(len(weight) // count) for weight in weights), strict=True)
        return [partial(_computed, *group) for group in groups]


def _computed(gate: Tensor, up: Tensor, down: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """The rows that experts make of rows [S, D], which come one expert after the other; rows after the last end get any value."""
    inner = F.silu(grouped_product(rows, gate, ends)) * grouped_product(rows, up, ends)
    return grouped_product(inner, down, ends)

