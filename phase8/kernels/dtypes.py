"""The one dtype rule of the operations: arithmetic that accumulates runs in fp32, or in fp64 when the input is fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or unchanged when it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
