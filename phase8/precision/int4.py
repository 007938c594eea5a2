"""Weights of four bits with a scale for each group of inputs, for trained models: 4.5 bits a weight with groups of 32.

A weight is number * scale, with whole numbers from -8 to 7. The largest number of a group is -8, so its scale has the opposite sign of what is
largest in the group.

Shapes: N tokens, D inputs, F outputs, S inputs in a group, G groups; where S does not divide D, zeros fill the last group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from phase8.precision.weight_format import WeightProduct

GROUP = 32
SMALLEST, LARGEST = -8, 7
_OFFSET = 8  # what is stored is the number plus 8
# Beyond, unpacked weights multiply faster than torch's operator, whose time grows with every token (torch 2.13, a CPU with AVX512).
FEW_TOKENS = 32
_BLOCKS = (64, 32)  # outputs in a block of torch's layout, with AVX512 and with AVX2


@dataclass(frozen=True)
class Int4:
    """Two numbers to a byte.

    `weight` [..., F, G S / 2], uint8: of each group, byte i has the number of input i in its low half and that of input i + S / 2 in its high half.
    `scale` [..., F, G], bf16.

    Args:
        group: Inputs of an output that share a scale, S.
    """

    group: int = GROUP

    @property
    def bits(self) -> int:
        """Bits of a number."""
        return 4

    def tensors(self, shape: Sequence[int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of `weight` and `scale`."""
        *outputs, inputs = shape
        groups = -(-inputs // self.group)
        return {"weight": (torch.uint8, (*outputs, groups * self.group // 2)), "scale": (torch.bfloat16, (*outputs, groups))}

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        """The nearest numbers [..., F, D], two to a byte; every weight is within half a step of its number, but for the rounding of scales."""
        groups = F.pad(weight.float(), (0, -weight.shape[-1] % self.group)).unflatten(-1, (-1, self.group))
        numbers, scale = _numbers(groups)
        low, high = (numbers + _OFFSET).to(torch.uint8).chunk(2, dim=-1)
        return {"weight": (low | high << 4).flatten(-2), "scale": scale}

    def product(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """The product x W^T [..., F] in the dtype of x [..., D], by weights that are unpacked to it."""
        return F.linear(x, self._widened(weight, scale, x))

    def product_of_each(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """The products of tokens with a weight each."""
        return (self._widened(weight, scale, x) @ x[..., None])[..., 0]

    def _widened(self, weight: Tensor, scale: Tensor, x: Tensor) -> Tensor:
        """The weight [..., F, D] in the dtype of x [..., D]."""
        numbers = self.unpacked(weight).to(x.dtype).mul_(scale.to(x.dtype)[..., None])
        return numbers.flatten(-2)[..., : x.shape[-1]]

    def unpacked(self, weight: Tensor) -> Tensor:
        """The numbers by group [..., F, G, S], int8."""
        low, high = _halves(weight.unflatten(-1, (-1, self.group // 2)))
        return torch.cat((low, high), dim=-1)

    def arranged(self, weight: Tensor, scale: Tensor) -> tuple[WeightProduct, Tensor, Tensor]:
        """The numbers in the layout of torch's operator where the device has one that is fast; else what is given."""
        outputs, inputs = weight.shape[0], 2 * weight.shape[1]
        block = block_of_torch() if weight.device.type == "cpu" else None
        if block is None or outputs % block:
            return self, weight, scale
        numbers = self.unpacked(weight).view(outputs, inputs)
        steps = scale.T.contiguous()
        return Int4OfTorch(self.group, block), in_blocks(numbers, block), torch.stack((steps, torch.zeros_like(steps)), dim=-1)


@dataclass(frozen=True)
class Int4OfTorch:
    """Two numbers to a byte in the layout of torch's operator on CPUs; made by `Int4.arranged`, never stored.

    `weight` [F / B, D, B / 2], uint8: of a block of B outputs, byte i of an input has output i in its low half and output i + B / 2 in its high
    half. `scale` [G, F, 2], bf16: the scale, and the value of the number 0, which is 0.

    Args:
        group: Inputs of an output that share a scale.
        block: Outputs in a block, B.
    """

    group: int
    block: int

    def product(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """The product x W^T [..., F] in the dtype of x [..., D].

        That of few tokens is computed in bf16 whatever the dtype of x: in fp32 torch's operator takes 30 times as long, and rounding to bf16 is
        a fiftieth of the rounding of weights to four bits.
        """
        rows = x.reshape(-1, x.shape[-1])
        rows = F.pad(rows, (0, -rows.shape[1] % self.group))
        outputs = scale.shape[1]
        if 0 < len(rows) <= FEW_TOKENS:
            packed = weight.view(outputs, -1)
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.bfloat16().contiguous(), packed, self.group, scale).to(x.dtype)
        else:
            steps = scale[:, None, :, 0].to(x.dtype).contiguous()
            y = rows @ self._unpacked(weight).view(-1, self.group, outputs).to(x.dtype).mul_(steps).flatten(0, 1)
        return y.reshape(*x.shape[:-1], outputs)

    def _unpacked(self, weight: Tensor) -> Tensor:
        """The numbers [D, F], int8."""
        return torch.stack(_halves(weight.transpose(0, 1)), dim=2).flatten(1)


def _numbers(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The whole numbers of groups [..., S], in their dtype, and the scales [...], bf16; a group of zeros has scale 0."""
    positive, negative = groups.amax(dim=-1).clamp(min=0), -groups.amin(dim=-1).clamp(max=0)
    largest, other = torch.maximum(positive, negative), torch.minimum(positive, negative)
    # The other end may have to be as far out as 7.5 steps, where it is rounded to the 7th.
    step = torch.maximum(largest / -SMALLEST, other / (LARGEST + 0.5))
    scale = torch.where(positive > negative, -step, step).bfloat16()
    wide = scale.float()[..., None]
    return torch.where(wide == 0, 0, groups / wide).round_().clamp_(SMALLEST, LARGEST), scale


def _halves(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers in the low and in the high halves of bytes, int8."""
    return (weight & 15).view(torch.int8) - _OFFSET, (weight >> 4).view(torch.int8) - _OFFSET


def in_blocks(numbers: Tensor, block: int) -> Tensor:
    """Numbers [F, D] in torch's layout [F / B, D, B / 2], uint8, for blocks of B outputs."""
    low, high = (numbers + _OFFSET).view(torch.uint8).unflatten(0, (-1, 2, block // 2)).unbind(1)
    return (low | high << 4).transpose(1, 2).contiguous()


@cache
def block_of_torch() -> int | None:
    """Outputs in a block of the layout that torch's operator wants on this CPU; None: it has another layout, without a fast product."""
    numbers = torch.randint(SMALLEST, LARGEST + 1, (2 * _BLOCKS[0], 64), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.int() + _OFFSET, 1).flatten()
    return next((block for block in _BLOCKS if torch.equal(in_blocks(numbers, block).flatten(), expected)), None)
