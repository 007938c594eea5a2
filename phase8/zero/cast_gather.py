"""FSDP's all-gather of parameters that layers round to a narrower dtype anyway: each rank rounds its part before it is sent.

The gathered numbers are those that a layer would round a gathered fp32 parameter to, and half as many bytes travel. What a rank keeps, what its
optimizer updates and what checkpoints hold stays in the dtype of the parameter. So do gradients: each use of a gathered parameter gives one in the
narrow dtype, as its product computes it, and these are added up over uses, microbatches and ranks in the wide one.

ADR 34 says why neither FSDP's own mixed precision nor a group of a block's linear layers does this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from phase8.division import part_size
from phase8.zero.arrivals import Arrivals, Part


class Owned(NamedTuple):
    """A parameter as an attribute of the module that owns it, where FSDP puts the gathered parameter in its place.

    Args:
        owner: Module that owns the parameter.
        name: Name of the parameter in the module.
        dim: Dim that ZeRO divides.
    """

    owner: nn.Module
    name: str
    dim: int

    @property
    def parameter(self) -> Tensor:
        """The parameter that is there now."""
        return self.owner.get_parameter(self.name)


class CastPart(Tensor):
    """A rank's part of a parameter that is gathered in another dtype; it shares the memory of the part, and what is computed from it is plain.

    Args:
        part: Part, with the shape that the rank holds.
        dtype: Dtype in which it is gathered.
        dim: Dim of the parameter that ZeRO divides.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    gathered_dtype: torch.dtype
    divided_dim: int
    arrivals: tuple[Arrivals, int] | None = None  # what fetches the part ahead where it is offloaded, and the number of its block there

    def __new__(cls, part: Tensor, dtype: torch.dtype, dim: int) -> Self:
        """Makes the tensor, without a copy."""
        self = cast(Self, torch.Tensor._make_subclass(cls, part.detach()))
        self.gathered_dtype, self.divided_dim = dtype, dim
        return self

    def to(self, *arguments: Any, **options: Any) -> CastPart:
        """The same part elsewhere: FSDP copies an offloaded part to the device before it asks for what is sent."""
        if self.arrivals is not None and options == {"non_blocking": True} and isinstance(arguments[0], torch.device):
            arrivals, block = self.arrivals
            return CastPart(arrivals.take(block, self, arguments[0]), self.gathered_dtype, self.divided_dim)
        return CastPart(super().to(*arguments, **options), self.gathered_dtype, self.divided_dim)

    def fsdp_pre_all_gather(
        self, mesh: DeviceMesh, outer_size: torch.Size, outer_stride: tuple[int, ...], module: nn.Module, mp_policy: object
    ) -> tuple[tuple[Tensor], None]:
        """Returns what this rank sends, as many numbers as every other rank; FSDP calls this before a gather."""
        shape, dim = list(outer_size), self.divided_dim
        shape[dim] = part_size(shape[dim], mesh.size())
        if self.dtype == self.gathered_dtype and list(self.shape) == shape:
            return (self.detach(),), None
        sent = torch.empty(shape, dtype=self.gathered_dtype, device=self.device)
        sent.narrow(dim, 0, self.shape[dim]).copy_(self)
        sent.narrow(dim, self.shape[dim], shape[dim] - self.shape[dim]).zero_()
        return (sent,), None

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor, ...], metadata: None, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[()]] | None:
        """Returns the memory into which FSDP has gathered the parameter; from the second gather on (`out`) the parameter is a view of it already."""
        return (gathered[0], ()) if out is None else None


def gather_in(dtype: torch.dtype, parameters: Sequence[Owned], unit: nn.Module, arrivals: Arrivals | None = None) -> None:
    """Makes FSDP gather some parameters of a unit in another dtype; a collective of the ranks that divide the unit.

    Args:
        dtype: Dtype to which the layers of these parameters round them.
        parameters: Some parameters of the unit, which are initialised.
        unit: Module that FSDP has divided but not gathered yet.
        arrivals: What fetches their parts from the host ahead, block by block; None: FSDP fetches them.
    """
    if not parameters:
        return
    assert isinstance(unit, FSDPModule)
    kept, parts = [each.parameter.dtype for each in parameters], []
    for each in parameters:
        sharded = cast(DTensor, each.parameter)
        sharded._local_tensor = CastPart(sharded._local_tensor, dtype, each.dim)
        parts.append(sharded._local_tensor)
    # FSDP makes a gathered parameter once, at the first gather, and autograd reads the dtype of its gradient at the first use.
    unit.unshard()
    for each, dtype_of_gradient in zip(parameters, kept, strict=True):
        each.parameter.grad_dtype = dtype_of_gradient
    unit.reshard()
    if arrivals is not None:
        block = arrivals.add_block([Part(part, dtype) for part in parts])
        for part in parts:
            part.arrivals = arrivals, block
