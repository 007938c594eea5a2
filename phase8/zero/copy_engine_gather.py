"""FSDP's all-gather by copy engines, through peer memory: it takes no multiprocessors from the products that run beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather

from phase8.distributed.peer_memory import Exchange, peer_memory


class CopyEngineGather(AllGather):
    """Gathers the parameters of the modules of one chunk; FSDP calls both methods in turn, and keeps a result until the one after the next begins.

    FSDP gathers for each chunk on streams of their own, which wait for the readers of that chunk's results alone: so no two chunks share places.

    Args:
        group: Ranks that divide the parameters; GPUs of one NVLink domain.
    """

    def __init__(self, group: dist.ProcessGroup):
        self._memory = peer_memory(group.group_name)
        self._places = self._memory.places_of_gathers()
        self._exchange: Exchange | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocates the buffer for the parts of all ranks [size]; FSDP writes this rank's part into its place before the call."""
        (numel,) = size
        self._exchange = self._places.begin((int(numel) // self._memory.size,), dtype)
        return self._exchange.whole()

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> None:
        """Copies this rank's part, which is in the output, to the other ranks, and makes the stream wait for theirs."""
        exchange, self._exchange = self._exchange, None
        assert exchange is not None
        for rank in self._memory.others:
            exchange.place_on(rank).copy_(input_tensor)
            exchange.filled(rank)
        for rank in self._memory.others:
            exchange.of(rank)
