"""Products of decoding, where tokens wait for weights to be read. They have no gradients.

On a GPU few tokens take one kernel, norm and gate included; several take the norm, and a product that includes the gate; more take torch's product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phase8.accelerator import has_kernels
from phase8.kernels.backends import HALF_PRECISIONS, uses_triton
from phase8.kernels.limits import MAX_FEW_TOKENS, MAX_PRODUCT_WIDTH, MAX_SEVERAL_TOKENS
from phase8.kernels.reference import decoding_product as reference
from phase8.kernels.residual_norm import residual_norm


def normed_product(
    x: Tensor, summand: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor, *, is_gated: bool = False, is_wide: bool = False
) -> tuple[Tensor, Tensor]:
    """The stream after the summand, and the product with its norm; arguments and shapes as in the reference of the same name."""
    if _are_few(x, weight):
        from phase8.kernels.gpu import decoding_product as gpu

        return gpu.normed_product(x, summand, norm_weight, eps, weight, is_gated=is_gated, is_wide=is_wide)
    x, normed = residual_norm(x, summand, norm_weight, eps)
    if _are_several(normed, weight):
        from phase8.kernels.gpu import decoding_product_of_several as gpu_of_several

        return x, gpu_of_several.product(normed, weight, is_gated=is_gated, is_wide=is_wide)
    y = product(normed, weight, is_wide=is_wide)
    return x, gated(y) if is_gated else y


def product(x: Tensor, weight: Tensor, *, is_wide: bool = False) -> Tensor:
    """The product x W^T; arguments and shapes as in the reference of the same name."""
    if _are_few(x, weight):
        from phase8.kernels.gpu import decoding_product as gpu

        return gpu.product(x, weight, is_wide=is_wide)
    if _are_several(x, weight):
        from phase8.kernels.gpu import decoding_product_of_several as gpu_of_several

        return gpu_of_several.product(x, weight, is_wide=is_wide)
    if is_wide and has_kernels(x.device.type) and x.element_size() < 4:  # the matrix units accumulate in fp32: no operand need be widened
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return reference.product(x, weight, is_wide=is_wide)


def gated(y: Tensor) -> Tensor:
    """The outputs of a gated layer from those of both its products; argument and shapes as in the reference of the same name."""
    if uses_triton(y) and y.element_size() <= 4:
        from phase8.kernels.gpu import decoding_product as gpu

        return gpu.gated(y)
    return reference.gated(y)


def _are_few(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel of few tokens computes the product: it holds a row of the weight in registers, and reads it once."""
    return uses_triton(x) and x.element_size() <= 4 and len(x) <= MAX_FEW_TOKENS and weight.shape[1] <= MAX_PRODUCT_WIDTH


def _are_several(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel of several tokens computes the product: rows of the weight begin at sixteen bytes, which a thread loads at once."""
    return uses_triton(x) and x.dtype in HALF_PRECISIONS and MAX_FEW_TOKENS < len(x) <= MAX_SEVERAL_TOKENS and weight.shape[1] % 8 == 0
