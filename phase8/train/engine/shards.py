"""The parts of a model's parameters that this rank's optimizer updates, as plain tensors, since every update is element by element.

A plain parameter is its own part. The part of a DTensor shares its memory, or, where the optimizer is offloaded, is a copy in host memory that
is written back after each step. On a GPU these copies and their gradients are page-locked, once for the whole run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from phase8.distributed.collectives import ALONE, Axis, add_up_over, sum_over
from phase8.distributed.placement import held_part, is_of_divided_experts
from phase8.optim.clip import gradient_norm
from phase8.page_locked import PageLocked


class Shards:
    """This rank's parts of all parameters, by parameter name.

    Args:
        model: Model that has been divided over the ranks.
        tensor_axis: Axis of tensor parallelism, whose ranks divide some parameters and have the rest whole.
        holders: Axes along which ranks hold different parts of the model; the norm is summed over them in this order.
        experts: Axis along which ranks hold different experts but the same part of all else.
        offload: Whether the parts, and with them the optimizer's state, lie in host memory.
        copies: Names of the parameters that another rank counts in the gradient norm.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tensor_axis: Axis,
        holders: Sequence[Axis],
        experts: Axis = ALONE,
        offload: bool = False,
        copies: Collection[str] = (),
    ):
        self.tensor_axis, self.holders, self.experts, self.offload, self.copies = tensor_axis, holders, experts, offload, copies
        self.whole: dict[str, nn.Parameter] = dict(model.named_parameters())
        held = {name: held_part(parameter).detach() for name, parameter in self.whole.items()} if offload else {}
        # The memory in which parts and gradients lie, where the optimizer is offloaded.
        self._on_host, self._gradients_on_host = PageLocked(held), PageLocked(held)
        self.parts: dict[str, nn.Parameter] = {name: self._part(name, parameter) for name, parameter in self.whole.items()}
        self._gradients: dict[str, Tensor | None] = {}

    def take_gradients(self) -> None:
        """Gives each part its gradient, fully summed; one that goes to the host is there when the device has come to this point."""
        sums = self._sums_of_summands()
        for name, parameter in self.whole.items():
            part, summed = self.parts[name], sums.get(name, parameter.grad)
            gradient = self._gradients[name] = None if summed is None else held_part(summed)
            if self.offload and gradient is not None:
                part.grad = self._gradients_on_host.tensors[name].copy_(gradient, non_blocking=True)
            elif part is not parameter:
                part.grad = gradient

    def drop_gradients(self) -> None:
        """Frees all gradients; where they lie on the host stays for the next ones."""
        self._gradients.clear()
        for parameter in (*self.whole.values(), *self.parts.values()):
            parameter.grad = None

    def gradient_norm(self) -> Tensor:
        """The norm of the gradient of the whole model, the same on every rank; a scalar where the gradients were before they went to the host."""
        axes = [axis for axis in self.holders if axis.size > 1]
        if not axes and self.experts.size == 1:
            return gradient_norm(self._gradients.values())
        counted = {name: gradient for name, gradient in self._gradients.items() if name not in self.copies}
        of_experts = {name: counted.pop(name) for name in list(counted) if self.experts.size > 1 and is_of_divided_experts(self.whole[name])}
        divided = {name for name in counted if not self._is_whole_on_tensor_axis(self.whole[name])}
        squares = gradient_norm(gradient for name, gradient in counted.items() if name in divided).square()
        repeated = gradient_norm(gradient for name, gradient in counted.items() if name not in divided).square()
        squares = squares + repeated / self.tensor_axis.size
        if self.experts.size > 1:
            squares = squares + sum_over(gradient_norm(of_experts.values()).square().to(self._device), self.experts).to(squares.device)
        for axis in axes:
            squares = sum_over(squares.to(self._device), axis)
        return squares.sqrt()

    @torch.no_grad()
    def write_back(self) -> None:
        """Copies updated parts from host memory to the parameters on the device, if the optimizer is offloaded, before what the device does next."""
        if self.offload:
            for name, parameter in self.whole.items():
                held_part(parameter).copy_(self.parts[name], non_blocking=True)

    @torch.no_grad()
    def read_again(self) -> None:
        """Copies the parameters to their parts in host memory after they got other values, if the optimizer is offloaded."""
        if self.offload:
            for name, parameter in self.whole.items():
                self.parts[name].copy_(held_part(parameter))

    def _sums_of_summands(self) -> dict[str, Tensor]:
        """Sums the gradients of which each tensor-parallel rank has a summand, all of them in one collective."""
        gradients = {name: parameter.grad for name, parameter in self.whole.items() if isinstance(parameter.grad, DTensor)}
        summands = {name: held_part(grad) for name, grad in gradients.items() if grad.placements != self.whole[name].placements}
        if not summands:
            return {}
        total = torch.cat([each.flatten() for each in summands.values()])
        add_up_over(total, self.tensor_axis)
        parts = total.split([each.numel() for each in summands.values()])
        return {name: part.view_as(each) for (name, each), part in zip(summands.items(), parts, strict=True)}

    @property
    def _device(self) -> torch.device:
        """The device on which collectives expect their tensors."""
        return next(iter(self.whole.values())).device

    def _part(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        if self.offload:
            return nn.Parameter(self._on_host.tensors[name].copy_(held_part(parameter).detach()))
        return nn.Parameter(held_part(parameter).detach()) if isinstance(parameter, DTensor) else parameter

    def _is_whole_on_tensor_axis(self, parameter: nn.Parameter) -> bool:
        return self.tensor_axis.size > 1 and isinstance(parameter, DTensor) and parameter.placements[-1].is_replicate()
