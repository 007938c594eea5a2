"""Copies in host memory of what autograd keeps for backward, made beside the computation.

| | what the stream of the computation waits for | what is copied meanwhile |
|---|---|---|
| forward, tensor i is kept | the copy of tensor i - 1, whose memory on the device is free from then on | tensor i, to the host |
| backward, tensor i is needed | tensor i, which has been on its way since tensor i + 1 was needed | tensor i - 1, back to the device |

So the device holds two of these tensors at a time. Copies have a stream of their own. Memory of the device is allocated and freed by the stream of
the computation alone, which waits for a copy before it frees what the copy reads or writes: the allocator can reuse it at once, which it could not
after `record_stream`. On a CPU the copies are plain ones, so that the same steps are tested without a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from phase8 import accelerator


@dataclass(eq=False)
class _Copy:
    """A tensor that waits in host memory; autograd owns it.

    Args:
        host: The copy, page-locked where the tensor was on a GPU.
        device: Device of the tensor.
        before: The copy made before this one, which backward needs after it.
        on_device: The tensor itself while it leaves, and from when it is fetched until it is used.
        is_awaited: Whether backward has not had it yet.
        is_leaving: Whether the tensor was last copied to the host, not back.
        moved: End of the last copy; None on a CPU.
    """

    host: Tensor
    device: torch.device
    before: weakref.ref[_Copy] | None
    on_device: Tensor | None
    is_awaited: bool = True
    is_leaving: bool = True
    moved: torch.Event | None = None


class HostCopies:
    """The tensors of one chain of layers that wait in host memory."""

    def __init__(self) -> None:
        self._newest: weakref.ref[_Copy] | None = None
        self._moving: _Copy | None = None
        self._stream: torch.Stream | None = None

    @contextmanager
    def keep(self, x: Tensor) -> Iterator[None]:
        """A context in which what autograd keeps of the memory of `x` waits in host memory; everything else stays where it is.

        Args:
            x: Input of the layer that is called in this context, of any shape.
        """
        memory = x.untyped_storage()._cdata

        def pack(kept: Tensor) -> _Copy | Tensor:
            # A detached tensor, because autograd would never free a node that holds its own result.
            return self._leave(kept) if kept.untyped_storage()._cdata == memory else kept.detach()

        def unpack(kept: _Copy | Tensor) -> Tensor:
            return self._return(kept) if isinstance(kept, _Copy) else kept

        with saved_tensors_hooks(pack, unpack):
            yield

    def _leave(self, x: Tensor) -> _Copy:
        """Begins to copy a tensor to the host."""
        self._settle()
        copy = _Copy(torch.empty_like(x, device="cpu", pin_memory=accelerator.locks_pages(x.device.type)), x.device, self._newest, x.detach())
        self._move(copy, copy.host, x.detach())
        self._newest = weakref.ref(copy)
        return copy

    def _return(self, copy: _Copy) -> Tensor:
        """The tensor on its device again; begins to fetch the one that is needed next."""
        self._settle(needed=copy)
        if copy.on_device is None:
            self._fetch(copy)
            self._settle(needed=copy)
        x, copy.on_device, copy.is_awaited = copy.on_device, None, False
        assert x is not None  # it has just been fetched
        following = None if copy.before is None else copy.before()
        if following is not None and following.is_awaited and following.on_device is None:
            self._fetch(following)
        return x

    def _fetch(self, copy: _Copy) -> None:
        copy.on_device, copy.is_leaving = torch.empty_like(copy.host, device=copy.device), False
        self._move(copy, copy.on_device, copy.host)

    def _move(self, copy: _Copy, to: Tensor, source: Tensor) -> None:
        """Copies after all that the computation has begun so far, beside what it begins from now on."""
        self._moving = copy
        if not accelerator.locks_pages(copy.device.type):
            to.copy_(source)
            return
        if self._stream is None:
            self._stream = accelerator.new_stream(copy.device)
        self._stream.wait_stream(accelerator.current_stream(copy.device))
        with accelerator.on_stream(self._stream):
            to.copy_(source, non_blocking=True)
        copy.moved = self._stream.record_event()

    def _settle(self, needed: _Copy | None = None) -> None:
        """Lets the computation wait for the copy that was begun last; a tensor that has left then frees its memory, unless it is needed."""
        copy, self._moving = self._moving, None
        if copy is None:
            return
        if copy.moved is not None:
            accelerator.current_stream(copy.device).wait_event(copy.moved)
        if copy.is_leaving and copy is not needed:
            copy.on_device = None
