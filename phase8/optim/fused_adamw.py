"""Torch's fused AdamW, alone or for the rest of the parameters beside an optimizer of some.

Source: I. Loshchilov and F. Hutter, "Decoupled weight decay regularization" (2019).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from phase8.config.schema import OptimSection


def decay_groups(parameters: Mapping[str, nn.Parameter], section: OptimSection, *, decayed_names: Collection[str]) -> list[dict[str, Any]]:
    """Two groups of parameters: those with weight decay and those without; either may be empty."""
    decays = [[part for name, part in parameters.items() if (name in decayed_names) is decayed] for decayed in (True, False)]
    return [{"params": part, "weight_decay": decay} for part, decay in zip(decays, (section.weight_decay, 0.0), strict=True)]


def fused_adamw(parameters: Mapping[str, nn.Parameter], section: OptimSection, *, decayed_names: Collection[str]) -> torch.optim.AdamW:
    """The fused AdamW of torch over two groups, parameters with weight decay and parameters without; arguments as of `build_optimizer`."""
    groups = decay_groups(parameters, section, decayed_names=decayed_names)
    return torch.optim.AdamW(groups, lr=section.learning_rate, betas=section.betas, eps=section.eps, fused=True)


class BesideAdamW(torch.optim.Optimizer):
    """An optimizer of some parameters, with torch's fused AdamW for the rest. Whoever sets a learning rate or reads state finds both in one object.

    Like torch's fused optimizers it has `grad_scale`, by which gradients are divided, and `found_inf`, which skips the step where it is not zero.

    Args:
        groups: Groups of its own parameters.
        defaults: Options of these groups.
        rest: All other parameters by name.
        section: Optimizer section.
        decayed_names: Names of the parameters that weight decay applies to.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        defaults: dict[str, Any],
        *,
        rest: Mapping[str, nn.Parameter],
        section: OptimSection,
        decayed_names: Collection[str],
    ):
        # Counters are on the device of their parameter, as of a fused AdamW.
        super().__init__(groups, {"lr": section.learning_rate, "capturable": True} | defaults)
        self._own_groups = list(self.param_groups)
        self._adamw = fused_adamw(rest, section, decayed_names=decayed_names)
        self.param_groups.extend(self._adamw.param_groups)
        self._adamw.state = self.state
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Updates all parameters that have gradients; `closure` is not called."""
        self._adamw.grad_scale, self._adamw.found_inf = self.grad_scale, self.found_inf
        self._adamw.step()
        self._update_own()

    def _update_own(self) -> None:
        """Updates its own parameters."""
        raise NotImplementedError
