"""The dtypes of computation, without autocast: parameters are fp32 master weights, which layers cast to the dtype of their input.

The residual stream and the matmuls run in the compute dtype; norms, softmax, the Green chain, recurrent states, the loss and every
gradient of a parameter are fp32.
"""

from __future__ import annotations

import torch

from phase8.config.schema import PrecisionSection
from phase8.precision.formats import OPERAND_DTYPE, NumberFormat

# The keys of both tables are the values of precision.dtype.
COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUMBER_FORMATS: dict[str, NumberFormat] = {"fp32": OPERAND_DTYPE, "bf16": OPERAND_DTYPE}
_FORMATS_BY_NAME = {each.name: each for each in NUMBER_FORMATS.values()}


def compute_dtype(section: PrecisionSection) -> torch.dtype:
    """The dtype of the residual stream and of the operands and results of matmuls."""
    return COMPUTE_DTYPES[section.dtype]


def number_format(section: PrecisionSection) -> NumberFormat:
    """The number format that computes the products of the linear layers in blocks."""
    return NUMBER_FORMATS[section.dtype]


def format_named(name: str) -> NumberFormat:
    """The number format with a name, for custom operators, whose arguments can only be tensors and plain values."""
    return _FORMATS_BY_NAME[name]


def set_matmul_precision(section: PrecisionSection) -> None:
    """Allows or forbids tf32 in fp32 matmuls, for the whole process (a setting of torch)."""
    torch.set_float32_matmul_precision("high" if section.tf32 else "highest")
