"""Copies of a run's tensors in host memory that is allocated once: allocating and page-locking cost more than copying."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from phase8 import accelerator
from phase8.distributed.placement import held_part, placed_like

# Torch rounds page-locked memory up to a power of two, so tensors share slabs of such a size.
SLAB_BYTES = 2**30
ALIGNMENT_BYTES = 64


class HostCopies:
    """Copies one set of tensors at a time; each set overwrites the one before.

    Args:
        device: Device of the tensors; memory for tensors of a GPU is page-locked.
        slab_bytes: Memory allocated at a time; a larger tensor gets a slab of its own size.
    """

    def __init__(self, device: torch.device, *, slab_bytes: int = SLAB_BYTES):
        self._device, self._slab_bytes = device, slab_bytes
        self._slabs: list[Tensor] = []

    def reserve(self, sizes: Iterable[int]) -> None:
        """Allocates memory for tensors of these sizes, in the order in which `copy` will see them."""
        self._places(sizes)

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies this rank's tensors (the local parts of DTensors) as they are now; the copies stay valid until the next call."""
        own = {name: held_part(tensor).detach() for name, tensor in tensors.items()}
        places = self._places(part.nbytes for part in own.values())
        copies = {}
        for (name, part), place in zip(own.items(), places, strict=True):
            copy = place.view(part.dtype).view(part.shape)
            copies[name] = placed_like(copy.copy_(part, non_blocking=True), tensors[name])
        accelerator.synchronize(self._device)
        return copies

    def free(self) -> None:
        """Gives the memory back; copies that somebody still has keep theirs."""
        self._slabs.clear()

    def _places(self, sizes: Iterable[int]) -> list[Tensor]:
        """Assigns each tensor its bytes, one after the other; allocates the slabs that are missing."""
        places, slab, begin = [], 0, 0
        for size in sizes:
            while slab < len(self._slabs) and begin + size > len(self._slabs[slab]):
                slab, begin = slab + 1, 0
            if slab == len(self._slabs):
                self._slabs.append(self._take(max(size, self._slab_bytes)))
            places.append(self._slabs[slab][begin : begin + size])
            begin += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return places

    def _take(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=accelerator.locks_pages(self._device.type))
