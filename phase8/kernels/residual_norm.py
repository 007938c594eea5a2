"""The residual stream and its norm in decoding, where a token is too few numbers for several passes: on a GPU one kernel. It has no gradients."""

from __future__ import annotations

from torch import Tensor

from phase8.kernels.backends import uses_triton
from phase8.kernels.limits import MAX_NORM_WIDTH
from phase8.kernels.reference import residual_norm as reference


def residual_norm(x: Tensor, summand: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The stream after the summand, and its norm; arguments and shapes as in the reference of the same name."""
    if uses_triton(x) and x.element_size() <= 4 and x.shape[1] <= MAX_NORM_WIDTH:
        from phase8.kernels.gpu import residual_norm as gpu

        return gpu.residual_norm(x, summand, weight, eps)
    return reference.residual_norm(x, summand, weight, eps)
