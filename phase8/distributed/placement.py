"""Tensors whose parts lie on different ranks: their whole, and the part of a rank."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def placed_like(part: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of something shaped and divided like `whole`, as a DTensor; a plain `whole` has no parts."""
    if not isinstance(whole, DTensor):
        return part
    return DTensor.from_local(part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride())


def own_slice(value: Tensor, whole: Tensor) -> Tensor:
    """Of a tensor of the shape of `whole`, what this rank holds of `whole`."""
    if not isinstance(whole, DTensor):
        return value
    shape, offsets = compute_local_shape_and_global_offset(whole.shape, whole.device_mesh, whole.placements)
    for dim, (length, offset) in enumerate(zip(shape, offsets, strict=True)):
        value = value.narrow(dim, min(offset, value.shape[dim]), length)
    return value


@torch.no_grad()
def gathered(tensors: dict[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors, those that were divided in host memory; a collective of all ranks.

    Args:
        tensors: The same names on every rank.
        keep: This rank wants them; the others help to gather and get nothing.
    """
    whole = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            device = torch.device(tensor.device_mesh.device_type)
            found = placed_like(tensor.to_local().to(device), tensor).full_tensor()
            tensor = found.cpu() if keep else found
        if keep:
            whole[name] = tensor
    return whole
