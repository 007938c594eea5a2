"""FSDP's all-gather by copy engines, through memory of the ranks: the products beside it keep all processors of the GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather

from phase8.distributed.peer_memory import Exchange, peer_memory


class CopyEngineGather(AllGather):
    """Gathers the parameters of one module; FSDP calls the two in turn, and keeps a result until the one after the next begins.

    Args:
        group: The ranks that divide them; GPUs of one NVLink domain.
    """

    def __init__(self, group: dist.ProcessGroup):
        self._memory = peer_memory(group.group_name)
        self._exchange: Exchange | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Where the parts of all ranks will be [size]; FSDP puts the own one in its place before it calls."""
        (numel,) = size
        self._exchange = self._memory.gathering_in_place((int(numel) // self._memory.size,), dtype)
        return self._exchange.whole()

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> None:
        """Brings the own part, which lies in the output, to the other ranks, and lets the stream wait for theirs."""
        exchange, self._exchange = self._exchange, None
        assert exchange is not None
        for rank in self._memory.others:
            exchange.place_on(rank).copy_(input_tensor)
            exchange.filled(rank)
        for rank in self._memory.others:
            exchange.of(rank)
