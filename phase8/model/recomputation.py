"""Recomputation of activations in backward, applied to a built model from outside: the only place that knows its modes.

| mode | what is recomputed | where it is applied |
|---|---|---|
| `full`, one tensor-parallel rank | all of a block | inside the block's call |
| `full`, several ranks | all of a block | around the block's call |
| `selective` | the mixer and its norm | inside the block's call |
| `none`, `budget` | nothing here | `budget` is for torch.compile |

A block recomputes itself inside its call where it can: torch.compile then sees what backward does not need again, the last matrix product. Torch
2.11 would keep what an autograd.Function in there returns, and tensor-parallel layers are such Functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from phase8.model.model import LanguageModel


def apply_recomputation(model: LanguageModel, mode: str, *, every_n_layers: int = 1) -> None:
    """Has blocks of a model, or of a chunk of one, recompute activations in backward.

    Args:
        model: Nothing of it is recomputed yet.
        mode: As in the table.
        every_n_layers: Layers 0, n, 2n, ... of the whole model are recomputed.
    """
    for layer, block in model.blocks.items():
        if int(layer) % every_n_layers:
            continue
        if mode == "selective":
            block.run_mixer = recomputed
        elif mode == "full" and model.axis.size == 1:
            block.run_inside = recomputed
        elif mode == "full":
            block.run_outside = recomputed


def recomputed(function: Callable[..., Any], *arguments: object) -> Any:
    """What the function returns; where gradients are wanted, backward computes it again."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)  # nothing is random
