"""The AdamW that a config asks for."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from phase8.config.schema import OptimSection
from phase8.optim.adamw_bf16 import AdamWBf16
from phase8.optim.adamw_fp8 import AdamWFp8
from phase8.optim.fused_adamw import fused_adamw


def build_optimizer(parameters: Mapping[str, nn.Parameter], section: OptimSection, *, decayed_names: Collection[str]) -> torch.optim.Optimizer:
    """Builds AdamW: with fp32 moments the fused one of torch, or with shorter moments of matrices.

    Args:
        parameters: Fp32 master weights by name, or this rank's parts of them.
        section: Optimizer section with betas, epsilon and decay. The learning rate is set again before every step.
        decayed_names: Names of the parameters that weight decay applies to.
    """
    if section.state_dtype != "fp32":
        kind = {"bf16": AdamWBf16, "fp8": AdamWFp8}[section.state_dtype]
        return kind(parameters, section, decayed_names=decayed_names)
    return fused_adamw(parameters, section, decayed_names=decayed_names)
