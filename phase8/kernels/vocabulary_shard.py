"""Output head and cross-entropy of a process that holds some rows of the head."""

from __future__ import annotations

import torch
from torch import Tensor

from phase8.kernels.backends import uses_triton
from phase8.kernels.reference import vocabulary_shard as reference
from phase8.kernels.reference.vocabulary_shard import Exchange


def shard_cross_entropy_gradients(
    hidden: Tensor, weight: Tensor, columns: Tensor, exchange: Exchange, *, chunk_tokens: int, needs_gradients: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Arguments and results as in the reference with this name. It is not an operator, since the caller decides what happens between the kernels."""
    implementation = reference.shard_cross_entropy_gradients
    has_kernel = weight.dtype in (hidden.dtype, torch.float32) and hidden.dtype != torch.float64 and uses_triton(hidden)
    if hidden.numel() and weight.numel() and has_kernel:
        from phase8.kernels.gpu.vocabulary_shard import shard_cross_entropy_gradients as implementation
    return implementation(hidden, weight, columns, exchange, chunk_tokens=chunk_tokens, needs_gradients=needs_gradients)
