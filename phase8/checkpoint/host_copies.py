"""Copies of a run's tensors in host memory that is taken once: taking and page-locking it costs more than the copies do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from phase8.distributed.placement import held_part, placed_like

# Torch rounds page-locked memory up to a power of two, so tensors share slabs of such a size.
SLAB_BYTES = 2**30
ALIGNMENT_BYTES = 64


class HostCopies:
    """Copies one set of tensors at a time; the next one overwrites it.

    Args:
        device: Where the tensors live; memory for those of a GPU is page-locked.
        slab_bytes: Memory that is taken at once; a tensor that is larger gets as much as it needs.
    """

    def __init__(self, device: torch.device, *, slab_bytes: int = SLAB_BYTES):
        self._device, self._slab_bytes = device, slab_bytes
        self._slabs: list[Tensor] = []

    def reserve(self, sizes: Iterable[int]) -> None:
        """Takes the memory for tensors of so many bytes, in the order in which they will come."""
        self._places(sizes)

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of this rank, of DTensors its parts, as they are now; good until the next call."""
        own = {name: held_part(tensor).detach() for name, tensor in tensors.items()}
        places = self._places(part.nbytes for part in own.values())
        copies = {}
        for (name, part), place in zip(own.items(), places, strict=True):
            copy = place.view(part.dtype).view(part.shape)
            copies[name] = placed_like(copy.copy_(part, non_blocking=True), tensors[name])
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return copies

    def _places(self, sizes: Iterable[int]) -> list[Tensor]:
        """Bytes for each tensor, one behind the other; slabs that are missing are taken."""
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
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
