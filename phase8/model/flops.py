"""Floating-point operations of a forward pass per token: the multiply-adds of linear layers, attention and recurrences, two each.

Element-wise work (norms, activations, rotary, the scalar Green chain, softmax) is not counted, as usual. Linear layers are counted by their
weights in a block built without memory, experts as far as a token chooses them; a mixer declares its other work in `mixing_flops`. A backward
pass costs twice a forward.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import torch
from torch import nn

from phase8.config.model_section import ModelSection
from phase8.distributed.collectives import ALONE
from phase8.model.block import Block
from phase8.model.experts import Experts
from phase8.model.work import BACKWARD_OVER_FORWARD
from phase8.tensor_parallel.linear import Linear


def forward_flops_per_token(model: ModelSection) -> dict[str, float]:
    """Forward FLOPs per token of each part of the model, averaged over the positions of a training sequence."""
    parts: dict[str, float] = {}
    for kind, count in Counter(model.layer_kinds).items():
        for part, flops in _block_flops(model, model.layer_kinds.index(kind)).items():
            parts[part] = parts.get(part, 0) + count * flops
    return parts | {"head": 2 * model.d_model * model.vocab_size}


def training_flops_per_token(model: ModelSection) -> float:
    """FLOPs of forward and backward per token; these are model FLOPs, not hardware FLOPs: recomputation is not counted."""
    return (1 + BACKWARD_OVER_FORWARD) * sum(forward_flops_per_token(model).values())


def layer_flops_per_token(model: ModelSection) -> list[float]:
    """Forward FLOPs per token of each layer."""
    of_kind = {kind: sum(_block_flops(model, model.layer_kinds.index(kind)).values()) for kind in set(model.layer_kinds)}
    return [of_kind[kind] for kind in model.layer_kinds]


@lru_cache(maxsize=1024)
def _block_flops(model: ModelSection, layer: int) -> dict[str, float]:
    """Forward FLOPs per token of each part of a block."""
    with torch.device("meta"):
        block = Block(model, layer, axis=ALONE)
    return {
        "mixer projections": _linear_flops(block.mixer),
        "feed-forward": _linear_flops(block.feed_forward),
        **block.mixer.mixing_flops(model),
    }


def _linear_flops(module: nn.Module) -> float:
    dense = sum(2 * each.weight.numel() for each in module.modules() if isinstance(each, Linear))
    return dense + sum(each.flops_per_token for each in module.modules() if isinstance(each, Experts))
