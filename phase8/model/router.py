"""The router of a mixture of experts: which experts compute a token, with which weights, and what keeps them evenly used.

Scores are computed in fp32. Two means spread tokens over experts:

| means | what it adds | key |
|---|---|---|
| loss | weight * E * sum over experts of (share of choices) * (mean score) | `balance_loss_weight` |
| bias | to an expert's score, where experts are chosen only: rate * sign(mean - choices) more after every step | `router_bias_rate` |

Both look at the choices of the whole global batch, those of the step before: so neither depends on how a batch is divided over ranks and
microbatches, and the loss, which is linear in the tokens, is a sum over tokens like the main loss.

Shapes: n own tokens, E experts, k choices of a token, D model width.

Source: W. Fedus et al., "Switch transformers" (2021); B. Zoph et al., "ST-MoE" (2022), the z loss; DeepSeek-AI, "DeepSeek-V3" (2024), the bias;
Z. Qiu et al., "Demons in the detail" (2025), the share of choices over the global batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase8.config.model_section import ModelSection
from phase8.tensor_parallel.linear import WideLinear

BALANCE, Z = "balance", "router_z"


@dataclass(frozen=True)
class Routing:
    """The choices for some tokens.

    Args:
        experts: Experts of each token, all different [n, k].
        weights: Weight of each of them, fp32 or wider [n, k].
        losses: Auxiliary losses by name, sums over the tokens.
        counts: Number of choices of each expert [E].
        entropy: Sum over the tokens of the entropy of their scores in nats.
        imbalance: Sum over the tokens of what the balance loss weighs: E * sum over experts of (share of choices) * score; 1 each where balanced.
    """

    experts: Tensor
    weights: Tensor
    losses: Mapping[str, Tensor]
    counts: Tensor
    entropy: Tensor
    imbalance: Tensor


class Router(nn.Module):
    """The router of a layer.

    Args:
        model: Model section with experts, choices, scores and weights of losses.
    """

    load: Tensor
    bias: Tensor

    def __init__(self, model: ModelSection):
        super().__init__()
        self.scores = WideLinear(model.d_model, model.num_experts, std=model.init_std)
        self.top_k, self.sum_of_weights, self.has_softmax = model.top_k, model.routed_scaling_factor, model.router_score == "softmax"
        self.balance_weight, self.z_weight, self.bias_rate = model.balance_loss_weight, model.router_z_loss_weight, model.router_bias_rate
        # The share of choices of each expert in the step before, and what is added to scores where experts are chosen.
        self.register_buffer("load", torch.empty(model.num_experts))
        self.register_buffer("bias", torch.empty(model.num_experts))

    def first_buffers(self) -> dict[str, float]:
        """The value of every element of each buffer before the first step."""
        return {"load": 1 / len(self.load), "bias": 0.0}

    def forward(self, x: Tensor) -> Routing:
        """Chooses the experts of own tokens [n, D]."""
        logits = self.scores(x)
        scores, chosen, weights = self.choose(logits)
        shares = scores if self.has_softmax else _normalised(scores)
        imbalance = scores.shape[-1] * (shares.sum(0) @ self.load.to(shares.dtype))
        z = self.z_weight * logits.logsumexp(-1).square().sum()
        with torch.no_grad():
            counts = F.one_hot(chosen, scores.shape[-1]).sum((0, 1))
            entropy = -torch.special.xlogy(shares, shares).sum()
        return Routing(chosen, weights, {BALANCE: self.balance_weight * imbalance, Z: z}, counts, entropy, imbalance.detach())

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [n, E], chosen experts [n, k] and their weights [n, k] from the logits of own tokens [n, E]."""
        scores = logits.softmax(-1) if self.has_softmax else logits.sigmoid()
        chosen = (scores + self.bias.to(scores.dtype)).topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if self.top_k > 1:  # of a single choice the weight itself is the way by which the router learns
            weights = self.sum_of_weights * _normalised(weights)
        return scores, chosen, weights

    @torch.no_grad()
    def learn_from(self, counts: Tensor, is_valid: Tensor) -> None:
        """Takes account of the choices of a step.

        Args:
            counts: Choices of each expert in the whole global batch [E].
            is_valid: Scalar on the device; False: the step does not count, and nothing changes.
        """
        total = counts.sum()
        self.load.copy_(torch.where(is_valid & (total > 0), counts / total.clamp(min=1), self.load.to(counts.dtype)))
        if self.bias_rate:
            self.bias.add_(self.bias_rate * torch.sign(counts.mean() - counts).to(self.bias.dtype) * is_valid)


def _normalised(scores: Tensor) -> Tensor:
    """Scores over their sum; sigmoids may all be zero."""
    return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
