"""AdamW whose moments of matrices have eight bits each: 6 bytes a parameter of weights and moments instead of 12. Vectors and scalars keep fp32.

| moment | what is kept of it | range | distance of neighbours |
|---|---|---|---|
| second | the number: six bits of exponent, two of mantissa | zero, and 2^-56 to 2^8: gradients of 3.7e-9 to 15 | 14 to 25 % of the number |
| first | its ratio to the root of the second: sign, three bits of exponent, four of mantissa | -15.5 to 15.5 | 3 to 6 %, 1/128 near zero |

The ratio is what AdamW moves a weight by, and the decays bound it (`config/validate.py`), so every number has a scale of its own that takes no
memory. Scales of blocks, as in the usual 8-bit optimizers, would depend on how ranks divide a matrix. Both numbers are rounded at random, right on
average, as in adamw_bf16.py. A second moment below the range becomes its smallest number, never zero, so that no ratio grows beyond bounds.

Source: T. Dettmers et al., "8-bit optimizers via block-wise quantization" (2022), whose dynamic exponents these follow in spirit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phase8.optim.adamw_bf16 import AdamWBf16, mixed
from phase8.optim.state import ParameterState, adamw_fp8_state

# Bits of an fp32 number that the second moment has no room for.
_DROPPED_BITS = 21
_DROPPED = (1 << _DROPPED_BITS) - 1
_BELOW = (127 - 56) << 2  # bits that are kept of 2^-56, which the code 0 would be, were it not zero
_LARGEST_SQUARE, _LARGEST_RATIO = 255, 127
_SIGN = 128
_MANTISSA_BITS, _FIRST_EXPONENT, _LAST_EXPONENT = 4, -3, 3
_BEYOND = 16.0  # the first ratio that is too large
_BITS_OF_CHANCE = 24
# What chances are made of: not the last bits, which depend on the order in which ranks add up, nor those of a ratio near zero, which are all noise.
_NOISE_BITS, _FINE = 8, 1 << 16


def unpacked(ratios: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """The moments that two codes, uint8, stand for, fp32."""
    second = _square_of(squares.to(torch.int32))
    code = ratios.to(torch.int32)
    magnitude = code & _LARGEST_RATIO
    row = (magnitude >> _MANTISSA_BITS).clamp(min=1)  # numbers with one exponent; those of the smallest one reach down to zero
    ratio = (magnitude - ((row - 1) << _MANTISSA_BITS)).float() * _power_of_two(row - 1 + _FIRST_EXPONENT - _MANTISSA_BITS)
    return torch.where(code >= _SIGN, -ratio, ratio) * second.sqrt(), second


def packed(first: Tensor, second: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of moments, uint8.

    Args:
        first: First moments, fp32.
        second: Second moments, fp32, not negative.
        step: Number of the step, a scalar; the same numbers are rounded in another way in another step.
    """
    bits = second.view(torch.int32)
    chance = (mixed(bits >> _NOISE_BITS, step) >> (32 - _DROPPED_BITS)) & _DROPPED
    square = (((bits + chance) >> _DROPPED_BITS) - _BELOW).clamp(1, _LARGEST_SQUARE)
    square = torch.where(second == 0, torch.zeros_like(square), square)
    ratio = (first / _square_of(square).sqrt().clamp(min=torch.finfo(torch.float32).tiny)).clamp(-_BEYOND, _BEYOND)
    exponent = (((ratio.view(torch.int32) >> 23) & 0xFF) - 127).clamp(_FIRST_EXPONENT, _LAST_EXPONENT)
    chance = (mixed((ratio * _FINE).to(torch.int32), step) >> (32 - _BITS_OF_CHANCE)) & ((1 << _BITS_OF_CHANCE) - 1)
    steps = (ratio.abs() * _power_of_two(_MANTISSA_BITS - exponent) + chance.float() * 2.0**-_BITS_OF_CHANCE).floor().to(torch.int32)
    magnitude = (((exponent - _FIRST_EXPONENT) << _MANTISSA_BITS) + steps).clamp(max=_LARGEST_RATIO)
    return torch.where(ratio < 0, magnitude + _SIGN, magnitude).to(torch.uint8), square.to(torch.uint8)


class AdamWFp8(AdamWBf16):
    """AdamW with moments of matrices in eight bits; arguments as of `AdamWBf16`."""

    moment_dtype = torch.uint8
    widen, shorten = staticmethod(unpacked), staticmethod(packed)

    def declare_state(self, name: str, shape: Sequence[int]) -> ParameterState:
        """Codes of moments for matrices, what AdamW keeps for the rest."""
        return adamw_fp8_state(name, shape)


def _square_of(code: Tensor) -> Tensor:
    """The second moment of a code, int32."""
    return torch.where(code == 0, torch.zeros_like(code), (code + _BELOW) << _DROPPED_BITS).view(torch.float32)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2 to the power of an exponent, int32, fp32."""
    return ((exponent + 127) << 23).view(torch.float32)
