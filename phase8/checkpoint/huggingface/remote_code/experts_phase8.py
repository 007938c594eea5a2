"""The feed-forward of a mixture of experts. No expert drops a token, as in phase8's evaluation and generation.

Shapes: N tokens, E experts, k choices of a token, F width of an expert, D model width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_phase8 import Phase8Config
from .layers_phase8 import SwiGLU, WideLinear


class Router(nn.Module):
    """Chooses the experts of a token and their weights, in fp32.

    Args:
        config: Config of the model.
    """

    def __init__(self, config: Phase8Config):
        super().__init__()
        self.scores = WideLinear(config.d_model, config.num_experts, std=config.init_std)
        self.top_k, self.sum_of_weights, self.has_softmax = config.num_experts_per_tok, config.routed_scaling_factor, config.router_score == "softmax"
        # The share of choices of each expert, which only training in phase8 reads, and what is added to scores where experts are chosen.
        self.register_buffer("load", torch.full((config.num_experts,), 1 / config.num_experts))
        self.register_buffer("bias", torch.zeros(config.num_experts))

    def reset_parameters(self) -> None:
        """Begins with even loads, and no bias."""
        nn.init.constant_(self.load, 1 / len(self.load))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and weights [N, k] of tokens [N, D]."""
        logits = self.scores(x)
        scores = logits.softmax(-1) if self.has_softmax else logits.sigmoid()
        chosen = (scores + self.bias).topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if self.top_k > 1:
            weights = self.sum_of_weights * weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        return chosen, weights


class Experts(nn.Module):
    """The experts down(silu(gate(x)) * up(x)), each over the tokens that chose it.

    Args:
        config: Config of the model.
    """

    def __init__(self, config: Phase8Config):
        super().__init__()
        inner = (config.num_experts, config.expert_ffn_size, config.d_model)
        self.gate, self.up = nn.Parameter(torch.empty(inner)), nn.Parameter(torch.empty(inner))
        self.down = nn.Parameter(torch.empty(config.num_experts, config.d_model, config.expert_ffn_size))
        self.stds = config.init_std, config.init_std, config.init_std / math.sqrt(2 * config.num_layers)

    def reset_parameters(self) -> None:
        """Draws normal weights."""
        for weight, std in zip((self.gate, self.up, self.down), self.stds, strict=True):
            nn.init.normal_(weight, std=std)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the outputs of each token's experts [N, D]."""
        y = torch.zeros_like(x, dtype=weights.dtype)
        for expert in chosen.unique().tolist():
            tokens, places = (chosen == expert).nonzero(as_tuple=True)
            rows = x[tokens]
            inner = F.silu(F.linear(rows, self.gate[expert])) * F.linear(rows, self.up[expert])
            y = y.index_add(0, tokens, F.linear(inner, self.down[expert]).to(y.dtype) * weights[tokens, places, None])
        return y.to(x.dtype)


class MixtureOfExperts(nn.Module):
    """The mixture: the experts that a token chooses, and shared experts that compute all tokens.

    Args:
        config: Config of the model.
    """

    def __init__(self, config: Phase8Config):
        super().__init__()
        self.router, self.experts = Router(config), Experts(config)
        shared = config.shared_experts * config.expert_ffn_size
        self.shared = SwiGLU(config, inner=shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, T, D] to [B, T, D]."""
        own = x.flatten(0, -2)
        y = self.experts(own, *self.router(own)).view(x.shape)
        return y if self.shared is None else y + self.shared(x)
