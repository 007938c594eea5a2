"""Recomputation of activations in backward, applied to a model after it is built; only this module knows the modes.

| mode | what is recomputed | where it is applied |
|---|---|---|
| `full`, one tensor-parallel rank | all of a block | inside the block's call |
| `full`, several ranks | all of a block | around the block's call |
| `selective` | the mixer and its norm | inside the block's call |
| `none`, `budget` | nothing here | nowhere (`budget` is carried out by torch.compile) |

A block recomputes itself inside its call where it can: torch.compile then sees that backward does not need the last matrix product again and
leaves it out. Torch 2.11 would keep the result of an autograd.Function inside the call, and tensor-parallel layers are such Functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from phase8.model.model import LanguageModel


def apply_recomputation(model: LanguageModel, mode: str, *, every_n_layers: int = 1) -> None:
    """Makes blocks of a model, or of a chunk, recompute their activations in backward.

    Args:
        model: Model without recomputation so far.
        mode: Mode from the table.
        every_n_layers: Distance n of the recomputed layers 0, n, 2n, ... of the whole model.
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
    """Calls the function and returns what it returns; where gradients are enabled, backward calls it again instead of keeping activations."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)  # nothing is random
