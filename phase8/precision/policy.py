"""The dtypes of computation, without autocast: parameters are fp32 master weights, which layers cast to the dtype of their input.

The residual stream and the matmuls run in the compute dtype; norms, softmax, the Green chain, recurrent states, the loss and every
gradient of a parameter are fp32.
"""

from __future__ import annotations

import torch

from phase8 import accelerator
from phase8.config.schema import PrecisionSection
from phase8.errors import ConfigError
from phase8.precision.formats import OPERAND_DTYPE, NumberFormat
from phase8.precision.fp8 import Fp8

# The keys are the values of precision.dtype.
COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FP8_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
_FORMATS: tuple[NumberFormat, ...] = (OPERAND_DTYPE, Fp8("row"), Fp8("tensor"))
_FORMATS_BY_NAME = {each.name: each for each in _FORMATS}


def compute_dtype(section: PrecisionSection) -> torch.dtype:
    """The dtype of the residual stream and of the operands and results of matmuls."""
    return COMPUTE_DTYPES[section.dtype]


def number_format(section: PrecisionSection) -> NumberFormat:
    """The number format of the linear layers in blocks, but for `precision.bf16_layers` blocks at either end."""
    return OPERAND_DTYPE if section.linear is None else format_named(f"{section.linear}-{section.fp8_scaling}")


def format_named(name: str) -> NumberFormat:
    """The number format with a name, for custom operators, whose arguments can only be tensors and plain values."""
    return _FORMATS_BY_NAME[name]


def require_matrix_units(section: PrecisionSection, device: torch.device) -> None:
    """Refuses a device whose matrix units do not know the format of the linear layers; a CPU computes every format.

    Raises:
        ConfigError: The device has no such matrix units.
    """
    if section.linear is None or not accelerator.is_accelerator(device.type):
        return
    if not accelerator.multiplies_fp8(device.type):
        raise ConfigError(
            f"precision.linear is {section.linear}, which is computed on NVIDIA GPUs and CPUs, not on {device.type}; set precision.linear to null."
        )
    capability = accelerator.compute_capability(device)
    if capability < FP8_CAPABILITY:
        raise ConfigError(
            f"precision.linear is {section.linear}, but {accelerator.name_of(device)} (compute capability {'.'.join(map(str, capability))}) "
            f"has no matrix units for it, which begin with {'.'.join(map(str, FP8_CAPABILITY))}; set precision.linear to null: bf16 and fp32 remain."
        )


def set_matmul_precision(section: PrecisionSection) -> None:
    """Allows or forbids tf32 in fp32 matmuls, for the whole process (a setting of torch)."""
    torch.set_float32_matmul_precision("high" if section.tf32 else "highest")
