"""Host memory from and to which a GPU copies by itself, at the full speed of the bus and beside other work."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from phase8 import accelerator
from phase8.formatting import format_bytes
from phase8.terminal import warn

_ALIGNMENT = 256  # bytes
_OWN_PAGES = 1 << 25  # bytes from which on an allocation shares no page with others


class PageLocked:
    """Uninitialised tensors in host memory, in one piece whose pages are locked while this object lives.

    torch's own page-locked tensors take powers of two, half as much again for most matrices.

    Args:
        like: Tensors by name whose shapes and dtypes these have. Pages are locked if they are on a GPU; where the system does not allow it, they
            are not, which is said and slow.
    """

    def __init__(self, like: Mapping[str, Tensor]):
        ends, num_bytes = [], 0
        for tensor in like.values():
            num_bytes = math.ceil(num_bytes / _ALIGNMENT) * _ALIGNMENT + tensor.nbytes
            ends.append(num_bytes)
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        self.tensors = {
            name: memory[end - tensor.nbytes : end].view(tensor.dtype).view(tensor.shape)
            for (name, tensor), end in zip(like.items(), ends, strict=True)
        }
        if num_bytes and any(accelerator.locks_pages(tensor.device.type) for tensor in like.values()) and _locks(memory):
            weakref.finalize(self, accelerator.unlock_pages, memory)


def is_locked(tensor: Tensor) -> bool:
    """Whether a GPU copies from and to a tensor in host memory by itself."""
    return tensor.is_pinned()


def locked(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor in host memory whose pages are locked while it lives, if the device copies from such: itself if it is large, a copy if it is small."""
    if not accelerator.locks_pages(device.type) or is_locked(tensor):
        return tensor
    if tensor.nbytes < _OWN_PAGES:
        return tensor.pin_memory()
    if _locks(memory := tensor.detach()):  # a view would hold its tensor, which then lived for ever
        weakref.finalize(tensor, accelerator.unlock_pages, memory)
    return tensor


def _locks(memory: Tensor) -> bool:
    """Locks the pages of a tensor if the system allows it."""
    error = accelerator.lock_pages(memory)
    if error != 0:
        warn(f"{format_bytes(memory.nbytes)} of host memory for what is offloaded cannot be page-locked (error {error}): copies will be slow.")
    return error == 0
