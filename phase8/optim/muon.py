"""Muon: the momentum of a matrix is replaced by the nearest orthogonal one before it changes the matrix; AdamW for all other parameters.

    M <- mu M + G,   U = G + mu M,   W <- W - lr (decay W + 0.2 sqrt(max(A, B)) O(U))      for matrices A x B

O replaces the singular values of U by ones, up to a third: five steps of an iteration in matrix products alone (Newton-Schulz), in bf16 on GPUs. The
factor gives the update the size of AdamW's, so both share learning rate and decay. Queries, keys and values are one matrix for each head, experts
one each. A step that does not count changes nothing, without a word to the host.

Source: K. Jordan et al., "Muon" (2024); J. Liu et al., "Muon is scalable for LLM training" (2025), for the factor and the decay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from phase8.accelerator import is_accelerator
from phase8.config.schema import OptimSection
from phase8.optim.fused_adamw import BesideAdamW
from phase8.optim.state import ParameterState, is_orthogonalised, muon_state
from phase8.optim.whole_matrices import WholeMatrices

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
UPDATE_SCALE = 0.2
FIRST_MOMENTUM = 0.85  # it rises to `optim.momentum` within `optim.momentum_warmup_steps`
_EPS = 1e-7
_PER_HEAD = ("q", "k", "v")


def orthogonalise(matrix: Tensor) -> Tensor:
    """The matrices of nearly orthogonal rows or columns next to some [..., A, B], in their dtype.

    The iteration f(s) = a s + b s^3 + c s^5 acts on each singular value, which a norm of one keeps below one.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if is_tall else matrix
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + _EPS)
    for _ in range(NUM_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if is_tall else x


class Muon(BesideAdamW):
    """Muon for the matrices of linear layers in blocks, torch's fused AdamW for the rest.

    Args:
        parameters: This rank's parts of all parameters, by name.
        section: Optimizer section.
        wholes: Exchange of the matrices' parts.
        head_size: Size of a head of queries, keys and values.
        decayed_names: Names of the parameters that weight decay applies to.
        dtype: Dtype of the iteration; None: bf16 for matrices on an accelerator, or else their own.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        section: OptimSection,
        *,
        wholes: WholeMatrices,
        head_size: int,
        decayed_names: Sequence[str] | set[str],
        dtype: torch.dtype | None = None,
    ):
        self._matrices = {name: part for name, part in parameters.items() if name in wholes.shapes}
        super().__init__(
            [{"params": list(self._matrices.values()), "weight_decay": section.weight_decay}],
            {},
            rest={name: part for name, part in parameters.items() if name not in wholes.shapes},
            section=section,
            decayed_names=decayed_names,
        )
        self._wholes, self._head_size, self._dtype = wholes, head_size, dtype
        self._last_momentum, self._warmup_steps = section.momentum, section.momentum_warmup_steps

    def declare_state(self, name: str, shape: Sequence[int]) -> ParameterState:
        """A momentum for matrices, what AdamW keeps for the rest."""
        return muon_state(name, shape)

    def _update_own(self) -> None:
        (group,) = self._own_groups
        for name, update in self._wholes.map(self._direction, self._orthogonalised, dtype=self._dtype_of_iteration()):
            part = self._matrices[name]
            scale = UPDATE_SCALE * math.sqrt(max(self._split(name, self._wholes.shapes[name])[-2:]))
            change = group["lr"] * (group["weight_decay"] * part + scale * update.to(part))
            part.sub_(torch.where(self._counts(part), change, torch.zeros_like(change)))

    def _direction(self, name: str) -> Tensor:
        """This rank's part of G + mu M, after the momentum took account of the gradient G."""
        part = self._matrices[name]
        state = self.state[part]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=part.device)
            state["momentum"] = torch.zeros_like(part)
        assert part.grad is not None  # every matrix is used
        gradient = part.grad if self.grad_scale is None else part.grad / self.grad_scale.to(part)
        momentum = self._momentum(state["step"])
        moved = momentum.to(part) * state["momentum"] + gradient
        counts = self._counts(part)
        state["step"] += counts
        state["momentum"].copy_(torch.where(counts, moved, state["momentum"]))
        return gradient + momentum.to(part) * moved

    def _counts(self, part: Tensor) -> Tensor:
        """Whether the step counts, a scalar on the device of a part."""
        return torch.ones((), dtype=torch.bool, device=part.device) if self.found_inf is None else self.found_inf.to(part.device) == 0

    def _momentum(self, steps: Tensor) -> Tensor:
        """The momentum after so many steps, a scalar on their device."""
        if not self._warmup_steps:
            return torch.full_like(steps, self._last_momentum)
        return FIRST_MOMENTUM + (self._last_momentum - FIRST_MOMENTUM) * (steps / self._warmup_steps).clamp(max=1)

    def _orthogonalised(self, name: str, whole: Tensor) -> Tensor:
        return orthogonalise(whole.view(self._split(name, whole.shape))).reshape(whole.shape)

    def _split(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        return shape_apart(name, shape, head_size=self._head_size)

    def _dtype_of_iteration(self) -> torch.dtype:
        if self._dtype is not None:
            return self._dtype
        return torch.bfloat16 if is_accelerator(self._wholes.device.type) else next(iter(self._matrices.values())).dtype


def shape_apart(name: str, shape: Sequence[int], *, head_size: int) -> tuple[int, ...]:
    """The shape of a parameter as matrices that are orthogonalised apart [..., A, B]: a matrix for each head, or for each expert."""
    return (shape[0] // head_size, head_size, *shape[1:]) if has_heads(name) else tuple(shape)


def has_heads(name: str) -> bool:
    """Whether a matrix that Muon orthogonalises is one for each head."""
    return name.split(".")[-2] in _PER_HEAD


def matrices_of(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that Muon orthogonalises, of a model's parameters or their DTensors."""
    return {name: parameter for name, parameter in parameters.items() if is_orthogonalised(name, parameter.shape)}
