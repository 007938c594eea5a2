"""Number formats without autocast: parameters are fp32 master weights, layers cast them to the dtype of their input.

The residual stream and the matmuls run in the compute dtype; norms, softmax, the Green chain, recurrent states, the loss and every
gradient of a parameter are fp32.
"""

from __future__ import annotations

import torch

from phase8.config.schema import PrecisionSection

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compute_dtype(section: PrecisionSection) -> torch.dtype:
    """Dtype of the residual stream and of the matmuls."""
    return COMPUTE_DTYPES[section.dtype]


def set_matmul_precision(section: PrecisionSection) -> None:
    """Lets fp32 matmuls use tf32, or forbids it, for the whole process (a torch setting)."""
    torch.set_float32_matmul_precision("high" if section.tf32 else "highest")
