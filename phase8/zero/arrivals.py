"""Parts of blocks that lie in host memory, on their way to the device before they are needed.

FSDP fetches parts for a gather of several ranks ahead, but where one rank has a block alone, at the moment of its use, so that the device computes
nothing meanwhile. Here the next block is on its way while one computes: forward the one behind it, backward the one before it. Whoever asks for the
same block again has turned round, at the end of a forward or of a backward.

Copies have a stream of their own. Memory of the device is allocated by the stream of the computation alone, which waits for a block before it reads
or frees it, as in model/host_copies.py. On a CPU the copies are plain ones, so that the same steps are tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from phase8 import accelerator


class Part(NamedTuple):
    """A rank's part of a parameter in host memory.

    Args:
        host: The part.
        dtype: Dtype in which it is wanted on the device.
    """

    host: Tensor
    dtype: torch.dtype


class _Arrived(NamedTuple):
    """A part on the device, or on its way there.

    Args:
        values: The part in the dtype that is wanted.
        version: Version of the part in host memory that is copied.
    """

    values: Tensor
    version: int


class Arrivals:
    """The parts of the blocks of a chunk that lie in host memory.

    A block on its way takes its room in the wanted dtype, and that of its largest part as it lies on the host.
    """

    def __init__(self) -> None:
        self._blocks: list[Sequence[Part]] = []
        self._ahead: dict[Tensor, _Arrived] = {}
        self._block, self._direction = -1, 1
        self._stream: torch.Stream | None = None
        self._end: torch.Event | None = None
        self._room: Tensor | None = None

    def add_block(self, parts: Sequence[Part]) -> int:
        """Adds the next block, and returns its number."""
        self._blocks.append(parts)
        return len(self._blocks) - 1

    def take(self, block: int, host: Tensor, device: torch.device) -> Tensor:
        """A part on a device, in the dtype that is wanted there.

        Args:
            block: Number of the block.
            host: The part in host memory; all parts of a block are taken one after the other.
            device: Device on which the block computes.
        """
        if host not in self._ahead or any(arrived.version != part._version for part, arrived in self._ahead.items()):
            self._begin(block, device)
        self._settle(device)
        values = self._ahead.pop(host).values
        if not self._ahead:
            self._room = None
            self._turn_to(block)
            following = block + self._direction
            if 0 <= following < len(self._blocks):
                self._begin(following, device)
        return values

    def _turn_to(self, block: int) -> None:
        step = block - self._block
        self._direction = -self._direction if step == 0 else (1 if step > 0 else -1)
        self._block = block

    def _begin(self, block: int, device: torch.device) -> None:
        """Begins to copy a block after all that the computation has begun so far, beside what it begins from now on."""
        self._settle(device)
        parts = self._blocks[block]
        self._ahead = {part.host: _Arrived(torch.empty(part.host.shape, dtype=part.dtype, device=device), part.host._version) for part in parts}
        if not accelerator.locks_pages(device.type):
            for host, arrived in self._ahead.items():
                arrived.values.copy_(host)
            return
        # A part is rounded on the device, so it arrives as it lies on the host first.
        self._room = torch.empty(max(part.host.numel() for part in parts), dtype=parts[0].host.dtype, device=device)
        if self._stream is None:
            self._stream = accelerator.new_stream(device)
        self._stream.wait_stream(accelerator.current_stream(device))
        with accelerator.on_stream(self._stream):
            for host, arrived in self._ahead.items():
                wide = self._room[: host.numel()].view_as(host)
                arrived.values.copy_(wide.copy_(host, non_blocking=True))
        self._end = self._stream.record_event()

    def _settle(self, device: torch.device) -> None:
        """Lets the computation wait for what is on its way, whose memory it may then read or free."""
        if self._end is not None:
            accelerator.current_stream(device).wait_event(self._end)
            self._end = None
