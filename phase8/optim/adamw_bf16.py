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
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from phase8 import accelerator
from phase8.accelerator import CPU
from phase8.config.schema import OptimSection
from phase8.kernels.backends import has_triton
from phase8.optim.fused_adamw import BesideAdamW, decay_groups
from phase8.optim.passage import Passage
from phase8.optim.state import ParameterState, adamw_bf16_state, has_short_moments
from phase8.page_locked import is_locked, locked

# Numbers that a CPU updates at once.
CHUNK = 1 << 22
_MOMENTS = ("exp_avg", "exp_avg_sq")
Moments = tuple[Tensor, Tensor]
Widen = Callable[[Tensor, Tensor], Moments]
Shorten = Callable[[Tensor, Tensor, Tensor], Moments]
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


class Scalars(NamedTuple):
    """Numbers that change from step to step, scalars on the device of what is updated.

    Args:
        rate: Learning rate.
        step: Number of the step, from 1.
        scale: What gradients are divided by; None: nothing.
        found_inf: The step counts where it is 0; None: it counts.
    """

    rate: Tensor
    step: Tensor
    scale: Tensor | None
    found_inf: Tensor | None


class Rule(NamedTuple):
    """What AdamW does to the parameters of a group.

    Args:
        betas: Decays of both moments.
        eps: Epsilon.
        decay: Weight decay.
    """

    betas: tuple[float, float]
    eps: float
    decay: float


def update(
    weights: Tensor, gradients: Tensor, moments: Moments, scalars: Scalars, *, rule: Rule, widen: Widen, shorten: Shorten
) -> None:
    """Takes a step of AdamW in place, from the moments as they are kept to the moments as they are kept: one kernel where it is compiled.

    Args:
        weights: Weights, fp32 [n], like all that follow.
        gradients: Their gradients.
        moments: Both moments as they are kept.
        scalars: Numbers of the step.
        rule: Numbers of the group.
        widen: Makes fp32 of moments as they are kept.
        shorten: The inverse, given the number of the step.
    """
    rate, step, scale, found_inf = scalars
    gradients = gradients if scale is None else gradients / scale
    first, second = widen(*moments)
    first = torch.lerp(first.float(), gradients, 1 - rule.betas[0])
    second = rule.betas[1] * second.float() + (1 - rule.betas[1]) * gradients.square()
    corrected, root = first / (1 - rule.betas[0] ** step), (second / (1 - rule.betas[1] ** step)).sqrt()
    changed = weights * (1 - rate * rule.decay) - rate * corrected / (root + rule.eps)
    for kept, new in zip((weights, *moments), (changed, *shorten(first, second, step)), strict=True):
        # A step that does not count leaves everything as it is, even a moment that widening has rounded.
        kept.copy_(new if found_inf is None else torch.where(found_inf == 0, new, kept))


def updating_device(part: Tensor) -> torch.device | None:
    """The device that updates a part in one kernel: its own, or the GPU of a part in page-locked host memory; None: the host does it in pieces.

    The cores of a host need many times as long as the link to the device: for moments of eight bits 16 of them took 15 s for ten billion parameters.
    """
    device = accelerator.own_gpu() if part.device.type == CPU and part.dtype == torch.float32 and is_locked(part) else part.device
    return device if has_triton(device) else None


@functools.cache
def compiled_update(rule: Rule, widen: Widen, shorten: Shorten) -> Callable[[Tensor, Tensor, Moments, Scalars], None]:
    """`update` in one kernel for all lengths. As operations on a GPU it takes phase8_1b 150 ms instead of the 7 that its memory traffic needs."""
    return torch.compile(functools.partial(update, rule=rule, widen=widen, shorten=shorten), dynamic=True, fullgraph=True)


def as_they_are(first: Tensor, second: Tensor) -> Moments:
    """Moments in bf16 stand for themselves."""
    return first, second


def both_rounded_at_random(first: Tensor, second: Tensor, step: Tensor) -> Moments:
    """Both moments in bf16; arguments as of `rounded_at_random`."""
    return rounded_at_random(first, step), rounded_at_random(second, step)


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
    widen: ClassVar[Widen] = staticmethod(as_they_are)
    shorten: ClassVar[Shorten] = staticmethod(both_rounded_at_random)

    def declare_state(self, name: str, shape: Sequence[int]) -> ParameterState:
        """Moments in bf16 for matrices, what AdamW keeps for the rest."""
        return adamw_bf16_state(name, shape)

    def _update_own(self) -> None:
        passage: Passage | None = None
        for group in self._own_groups:
            parts = [part for part in group["params"] if part.grad is not None]
            some = next((part for part in parts if part.numel()), None)  # a rank may have nothing of a small matrix
            device = None if some is None else updating_device(some)
            scalars_at = None if device is None else self._scalars(group["lr"], device)
            if device is not None and passage is None and parts[0].device.type == CPU:
                passage = Passage(device, largest=max(part.numel() for each in self._own_groups for part in each["params"]))
            for part in parts:
                state = self._counted_state(part, None if passage is None else device)
                if scalars_at is None:
                    self._update_in_pieces(part.detach(), part.grad, (state["exp_avg"], state["exp_avg_sq"]), state["step"], group)
                else:
                    self._update_at_once(part.detach(), part.grad, state, scalars_at, group, passage)
                if self.found_inf is not None:
                    state["step"] -= self.found_inf
        if passage is not None:
            passage.finish()

    def _scalars(self, rate: float | Tensor, device: torch.device) -> Callable[..., Scalars]:
        """What makes the numbers of the step on a device, given `step`, which each parameter counts."""
        scale, found_inf = (None if number is None else number.to(device) for number in (self.grad_scale, self.found_inf))
        # A tensor, by which compiled code does not change from step to step.
        rate = rate if isinstance(rate, Tensor) else torch.full((), rate, device=device)
        return functools.partial(Scalars, rate=rate, scale=scale, found_inf=found_inf)

    def _counted_state(self, part: nn.Parameter, device: torch.device | None) -> dict[str, Tensor]:
        """The state of a parameter, which is made at its first step, with this step counted.

        Args:
            part: Parameter.
            device: Device to which its moments, in host memory, are sent; None: they are not sent.
        """
        state = self.state[part]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=part.device)
            state |= {key: torch.zeros_like(part, dtype=self.moment_dtype) for key in _MOMENTS}
        if device is not None:  # also those that a checkpoint brought
            state |= {key: locked(state[key], device) for key in _MOMENTS}
        state["step"] += 1
        return state

    def _update_at_once(
        self,
        part: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        scalars_at: Callable[..., Scalars],
        group: dict[str, Any],
        passage: Passage | None,
    ) -> None:
        run = compiled_update(Rule(tuple(group["betas"]), group["eps"], group["weight_decay"]), self.widen, self.shorten)
        if passage is None:
            moments = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
            run(part.view(-1), gradient.reshape(-1), moments, scalars_at(step=state["step"]))
            return
        scalars = scalars_at(step=torch.full((), state["step"].item(), device=passage.device))

        def compute(weights: Tensor, first: Tensor, second: Tensor, gradients: Tensor) -> None:
            run(weights, gradients, (first, second), scalars)

        passage.take(compute, (part, state["exp_avg"], state["exp_avg_sq"]), (gradient,))

    def _update_in_pieces(self, part: Tensor, gradient: Tensor, moments: Moments, step: Tensor, group: dict[str, Any]) -> None:
        """As `update`, by torch's fused AdamW on a CPU, for so many numbers that their moments in fp32 stay in its cache."""
        rows = max(CHUNK // max(math.prod(part.shape[1:]), 1), 1)
        pieces = (each.split(rows) for each in (part, gradient, *moments))
        for weights, gradients, *short in zip(*pieces, strict=True):
            wide = [moment.to(part.dtype) for moment in self.widen(*short)]
            torch._fused_adamw_(
                [weights], [gradients], [wide[0]], [wide[1]], [], [step],
                amsgrad=False, lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"],
                maximize=False, grad_scale=self.grad_scale, found_inf=self.found_inf,
            )  # fmt: skip
            for moment, new in zip(short, self.shorten(*(value.float().flatten() for value in wide), step), strict=True):
                new = new.view_as(moment)
                moment.copy_(new if self.found_inf is None else torch.where(self.found_inf == 0, new, moment))
