"""Root-mean-square normalisation, computed in fp32.

Source: B. Zhang and R. Sennrich, "Root mean square layer normalization" (2019).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase8.kernels.dtypes import at_least_fp32
from phase8.tensor_parallel.parameters import ParameterSpec, local


class RMSNorm(nn.Module):
    """The norm x / rms(x) over the last dim, times a learned weight.

    Args:
        shape: Shape of the weight; the last dim is normalised.
        eps: Summand of the mean square.
        divided: Axis -> dim of the weight that its ranks divide; None: every rank has the weight whole.
    """

    def __init__(self, *shape: int, eps: float, divided: Mapping[str, int] | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.eps, self.divided = eps, divided or {}

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        """A weight of one, with which the norm begins as a plain normalisation."""
        return {"weight": ParameterSpec(value=1.0, divided=self.divided)}

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `x`; the result has its dtype."""
        return (rms_normalise(at_least_fp32(x), self.eps) * local(self.weight)).to(x.dtype)


def rms_normalise(x: Tensor, eps: float) -> Tensor:
    """Normalises over the last dim, without a weight."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)
