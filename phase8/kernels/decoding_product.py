"""Products of decoding, where a token waits for weights to be read: on a GPU one kernel for few tokens, norm and gate included. No gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from phase8.accelerator import has_kernels
from phase8.kernels.backends import uses_triton
from phase8.kernels.limits import MAX_FEW_TOKENS, MAX_PRODUCT_WIDTH
from phase8.kernels.reference import decoding_product as reference
from phase8.kernels.residual_norm import residual_norm


def normed_product(
    x: Tensor, summand: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor, *, is_gated: bool = False, is_wide: bool = False
) -> tuple[Tensor, Tensor]:
    """The stream after the summand, and the product with its norm; arguments and shapes as in the reference of the same name."""
    if _is_kernel(x, weight):
        from phase8.kernels.gpu import decoding_product as gpu

        return gpu.normed_product(x, summand, norm_weight, eps, weight, is_gated=is_gated, is_wide=is_wide)
    x, normed = residual_norm(x, summand, norm_weight, eps)
    y = product(normed, weight, is_wide=is_wide)
    return x, gated(y) if is_gated else y


def product(x: Tensor, weight: Tensor, *, is_wide: bool = False) -> Tensor:
    """The product x W^T; arguments and shapes as in the reference of the same name."""
    if _is_kernel(x, weight):
        from phase8.kernels.gpu import decoding_product as gpu

        return gpu.product(x, weight, is_wide=is_wide)
    if is_wide and has_kernels(x.device.type) and x.element_size() < 4:  # the matrix units accumulate in fp32: no operand need be widened
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return reference.product(x, weight, is_wide=is_wide)


def gated(y: Tensor) -> Tensor:
    """The outputs of a gated layer from those of both its products; argument and shapes as in the reference of the same name."""
    if uses_triton(y) and y.element_size() <= 4:
        from phase8.kernels.gpu import decoding_product as gpu

        return gpu.gated(y)
    return reference.gated(y)


def _is_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel computes the product: it holds a row of the weight in registers, and reads it once for few tokens."""
    return uses_triton(x) and x.element_size() <= 4 and len(x) <= MAX_FEW_TOKENS and weight.shape[1] <= MAX_PRODUCT_WIDTH
