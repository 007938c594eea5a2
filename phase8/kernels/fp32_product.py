"""Products of fp32 matrices on a CPU by the faster of the two libraries that torch has for them (ADR 46).

torch multiplies fp32 matrices by MKL, and tensors in the layout of oneDNN by oneDNN. Everything else is `torch.mm`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase8.kernels.backends import prefers_onednn

# Multiply-adds below which the copies into and out of oneDNN's layout cost more than they gain.
FEWEST_MULTIPLICATIONS = 1 << 20


def takes_products(x: Tensor) -> bool:
    """Whether products of `x` with large matrices are computed here, so that an operation with gradients of its own may use them."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling() and prefers_onednn()


def fp32_product(left: Tensor, right: Tensor) -> Tensor:
    """The product of two matrices of one dtype, on any device; not differentiable.

    Args:
        left: [N, D].
        right: [D, F].

    Returns:
        [N, F].
    """
    # Subclasses, as of fake tensors, have no memory in another layout.
    is_plain = type(left) in (Tensor, nn.Parameter) and type(right) in (Tensor, nn.Parameter)
    if is_plain and takes_products(left) and left.numel() * right.shape[1] >= FEWEST_MULTIPLICATIONS:
        return F.linear(left.to_mkldnn(), right.T).to_dense()
    return torch.mm(left, right)
