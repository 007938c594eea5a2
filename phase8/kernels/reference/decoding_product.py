"""Products of decoding: few tokens with large weights, after the norm of the residual stream or alone.

Shapes: B tokens, D width of the input, F width of the output.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from phase8.kernels.dtypes import at_least_fp32
from phase8.kernels.reference.residual_norm import residual_norm


def normed_product(
    x: Tensor, summand: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor, *, is_gated: bool = False, is_wide: bool = False
) -> tuple[Tensor, Tensor]:
    """Adds a summand to the residual stream, normalises it, and multiplies.

    Args:
        x: Residual stream [B, D].
        summand: What is added to it [B, D]; None: nothing.
        norm_weight: Weight of the norm, fp32 or wider [D].
        eps: Summand of the mean square.
        weight: Weight in the dtype of x [F, D].
        is_gated: Whether the first half of the outputs gates the second, as in `gated`.
        is_wide: As for `product`; not where the outputs are gated.

    Returns:
        The stream [B, D], and the product of its norm [B, F], or gated [B, F / 2].
    """
    x, normed = residual_norm(x, summand, norm_weight, eps)
    y = product(normed, weight, is_wide=is_wide)
    return x, gated(y) if is_gated else y


def product(x: Tensor, weight: Tensor, *, is_wide: bool = False) -> Tensor:
    """The product x W^T.

    Args:
        x: Tokens [B, D].
        weight: Weight in the dtype of x [F, D].
        is_wide: Whether the result is fp32, or wider, and not rounded to the dtype of x.

    Returns:
        y [B, F].
    """
    return F.linear(at_least_fp32(x), at_least_fp32(weight)) if is_wide else F.linear(x, weight)


def gated(y: Tensor) -> Tensor:
    """The outputs of a gated layer [B, F] from those of both its products [B, 2 F]: silu(first half) * second half."""
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up
