"""AdamW whose moments of matrices have sixteen bits: 8 bytes a parameter of weights and moments instead of 12. Vectors and scalars keep fp32.

A moment changes by less than the last of its eight significant bits in most steps. So it is rounded at random, up or down, by chances that make the
result right on average. The chance comes from the bits of the moment itself and the number of the step, not from a generator: ranks agree, whatever
their layout, and a run that goes on from a checkpoint goes on bit for bit.

Source: I. Loshchilov and F. Hutter, "Decoupled weight decay regularization" (2019); P. Zamirai et al., "Revisiting BFloat16 training" (2020).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from phase8.config.schema import OptimSection
from phase8.kernels.backends import uses_triton
from phase8.optim.fused_adamw import BesideAdamW, decay_groups
from phase8.optim.state import ParameterState, adamw_bf16_state, has_short_moments

# Numbers that are updated at once: their moments in fp32 stay in the cache of a GPU.
CHUNK = 1 << 22
_DROPPED = 0xFFFF  # the bits of an fp32 number that bf16 has no room for
_ALL_BUT_SIGNS = 0x1FFFF  # what is left of a number that was moved by 15 bits
# Odd numbers with which products spread all bits of a factor (the golden ratio, and a constant of MurmurHash3).
_OF_NUMBER, _OF_STEP = 0x9E3779B1 - (1 << 32), 0x85EBCA6B - (1 << 32)


def rounded_at_random(x: Tensor, step: Tensor) -> Tensor:
    """The bf16 number below or above each number of x in absolute value, the nearer one with the greater chance; exact numbers stay.

    Args:
        x: Numbers, fp32.
        step: Number of the step, a scalar; the same numbers are rounded in another way in another step.
    """
    bits = x.view(torch.int32)
    chance = (mixed(bits, step) >> 16) & _DROPPED
    return ((bits + chance) & ~_DROPPED).view(torch.float32).to(torch.bfloat16)


def mixed(bits: Tensor, step: Tensor) -> Tensor:
    """Bits that look random, int32, made from those of numbers and from the number of the step; the highest ones depend on all of them."""
    spread = (bits ^ (step.to(torch.int32) * _OF_STEP)) * _OF_NUMBER
    return (spread ^ ((spread >> 15) & _ALL_BUT_SIGNS)) * _OF_STEP


@functools.cache
def compiled_rounding() -> Callable[[Tensor, Tensor], Tensor]:
    """`rounded_at_random` in one kernel for all lengths: on a GPU its dozen operations cost more than the rest of the step."""
    return torch.compile(rounded_at_random, dynamic=True, fullgraph=True)


class AdamWBf16(BesideAdamW):
    """AdamW with moments of matrices in bf16, torch's fused AdamW for the rest.

    Args:
        parameters: This rank's parts of all parameters, by name.
        section: Optimizer section.
        decayed_names: Names of the parameters that weight decay applies to.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], section: OptimSection, *, decayed_names: Collection[str]):
        matrices = {name: part for name, part in parameters.items() if has_short_moments(part.shape)}
        super().__init__(
            decay_groups(matrices, section, decayed_names=decayed_names),
            {"betas": section.betas, "eps": section.eps},
            rest={name: part for name, part in parameters.items() if name not in matrices},
            section=section,
            decayed_names=decayed_names,
        )

    moment_dtype = torch.bfloat16

    def declare_state(self, name: str, shape: Sequence[int]) -> ParameterState:
        """Moments in bf16 for matrices, what AdamW keeps for the rest."""
        return adamw_bf16_state(name, shape)

    def _update_own(self) -> None:
        for group in self._own_groups:
            for part in group["params"]:
                if part.grad is not None:
                    self._update(part, part.grad, group)

    def _update(self, part: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[part]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=part.device)
            state |= {key: torch.zeros_like(part, dtype=self.moment_dtype) for key in ("exp_avg", "exp_avg_sq")}
        state["step"] += 1
        rows = max(CHUNK // max(math.prod(part.shape[1:]), 1), 1)
        pieces = (each.split(rows) for each in (part.detach(), gradient, state["exp_avg"], state["exp_avg_sq"]))
        for weights, gradients, *moments in zip(*pieces, strict=True):
            wide = [moment.to(part.dtype) for moment in self._widened(*moments)]
            torch._fused_adamw_(
                [weights], [gradients], [wide[0]], [wide[1]], [], [state["step"]],
                amsgrad=False, lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"],
                maximize=False, grad_scale=self.grad_scale, found_inf=self.found_inf,
            )  # fmt: skip
            for moment, short in zip(moments, self._shortened(*(value.float().flatten() for value in wide), step=state["step"]), strict=True):
                short = short.view_as(moment)
                # A step that does not count leaves a moment as it is, even one that widening has rounded.
                moment.copy_(short if self.found_inf is None else torch.where(self.found_inf == 0, short, moment))
        if self.found_inf is not None:
            state["step"] -= self.found_inf

    def _widened(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers that both moments of a piece stand for, fp32 or of fewer bits."""
        return first, second

    def _shortened(self, first: Tensor, second: Tensor, *, step: Tensor) -> tuple[Tensor, Tensor]:
        """Both moments as they are kept, rounded at random from fp32 [n]."""
        rounded = compiled_rounding() if uses_triton(first) else rounded_at_random
        return rounded(first, step), rounded(second, step)
