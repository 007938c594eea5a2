"""AdamW with decay groups.

Source: I. Loshchilov and F. Hutter, "Decoupled weight decay regularization" (2019).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from phase8.config.schema import OptimSection
from phase8.optim.adamw_bf16 import AdamWBf16


def build_optimizer(parameters: Mapping[str, nn.Parameter], section: OptimSection, *, decayed_names: Collection[str]) -> torch.optim.Optimizer:
    """The AdamW that a config asks for; with fp32 moments the fused one of torch, over parameters with weight decay and parameters without.

    Args:
        parameters: Fp32 master weights by name, or this rank's parts of them.
        section: Optimizer section with betas, epsilon and decay. The learning rate is set again before every step.
        decayed_names: Names of the parameters that weight decay applies to.
    """
    if section.state_dtype == "bf16":
        return AdamWBf16(parameters, section, decayed_names=decayed_names)
    groups = [
        {"params": [p for name, p in parameters.items() if name in decayed_names], "weight_decay": section.weight_decay},
        {"params": [p for name, p in parameters.items() if name not in decayed_names], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=section.learning_rate, betas=section.betas, eps=section.eps, fused=True)
