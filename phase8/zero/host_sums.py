"""Sums of gradients over microbatches that lie in host memory, without a pass of the host.

Where an offloaded parameter has a gradient already, FSDP waits for the next one to be copied, through memory that is not page-locked, and adds it on
the host. Here the sum so far comes back to the device, which adds it to what a block has just computed. FSDP then finds no gradient, and copies the
new sum to the host as it does the first one, while other blocks compute. Both directions of the link are in use at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def add_on_device(model: nn.Module) -> None:
    """Makes FSDP add what the host has of gradients before it sends sums there: the same numbers bit for bit. Called after a forward.

    Args:
        model: Model whose offloaded units FSDP has divided.
    """
    for unit in model.modules():
        group = unit._get_fsdp_state()._fsdp_param_group if isinstance(unit, FSDPModule) else None
        if group is not None and group._all_reduce_hook is None:
            # FSDP frees what it has summed in the stream in which it sums over shards, so that is where it has to be read. A sum over replicas, which
            # has a stream of its own, is kept until it has been read.
            stream = None if group._is_hsdp else group.comm_ctx.reduce_scatter_stream
            unit.set_all_reduce_hook(_adding(group.fsdp_params), stream=stream)


def _adding(parameters: Sequence[Any]) -> Callable[[Tensor], None]:
    sizes = [each.padded_sharded_param_size.numel() for each in parameters]

    def add(summed: Tensor) -> None:
        """Adds to what FSDP has summed over ranks, flat: the parts of the unit's parameters, each with the room of the largest rank's."""
        if sum(sizes) != summed.numel():
            return  # some parameter has no gradient this time, and FSDP adds on the host
        for each, values in zip(parameters, summed.split(sizes), strict=True):
            if each.sharded_param.grad is not None:
                so_far = cast(DTensor, each.sharded_param.grad)._local_tensor
                values[: so_far.numel()].view_as(so_far).add_(so_far.to(values.device, non_blocking=True))
                each.sharded_param.grad = None

    return add
