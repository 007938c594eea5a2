"""Tensors in host memory that the device changes, piece by piece: one piece is computed while the next arrives and the last one returns.

What costs many operations a number, such as AdamW with moments of eight bits, is bound by the cores of the host there, and by the link here, of
which both directions are in use at once. Memory of the device is allocated by the stream of the computation alone, as in zero/arrivals.py. On a
CPU the copies are plain ones, so that the same steps are tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from phase8 import accelerator

# Numbers of a piece, for which a copy takes the full speed of the link, and pieces that are on the device at once.
PIECE = 1 << 23
_NUM_PLACES = 3


class _Place:
    """Room for one piece on the device.

    Args:
        like: Tensors whose dtypes the piece has.
        num_elements: Numbers of each.
        device: The device.
    """

    def __init__(self, like: Sequence[Tensor], num_elements: int, device: torch.device):
        self.tensors = [torch.empty(num_elements, dtype=each.dtype, device=device) for each in like]
        self.returned: torch.Event | None = None  # when the last piece has left it


class Passage:
    """The way of tensors through a device and back; `finish` ends it.

    Args:
        device: The device.
        largest: Elements of the largest tensor.
    """

    def __init__(self, device: torch.device, *, largest: int):
        self.device, self._has_streams = device, accelerator.locks_pages(device.type)
        self._room = min(PIECE, largest)
        self._there, self._back = (accelerator.new_stream(device), accelerator.new_stream(device)) if self._has_streams else (None, None)
        self._places: list[_Place] = []
        self._num_pieces = 0

    def take(self, compute: Callable[..., None], changed: Sequence[Tensor], read: Sequence[Tensor]) -> None:
        """Lets the device change tensors element by element.

        Args:
            compute: Called with a piece of all tensors in this order, flat, on the device; changes those of `changed` in place.
            changed: Contiguous tensors in host memory of equally many elements; they have their new values after `finish`.
            read: The same, which are only read.
        """
        flat = [tensor.reshape(-1) for tensor in (*changed, *read) if tensor.numel()]
        for pieces in zip(*(tensor.split(self._room) for tensor in flat), strict=True):
            self._take_piece(compute, pieces, num_changed=len(changed))

    def finish(self) -> None:
        """Waits until all that was changed is back, and frees the room on the device."""
        if self._back is not None:
            self._back.synchronize()
        self._places.clear()

    def _take_piece(self, compute: Callable[..., None], pieces: Sequence[Tensor], *, num_changed: int) -> None:
        place = self._next_place(pieces)
        there = [room[: piece.numel()] for room, piece in zip(place.tensors, pieces, strict=True)]
        with self._on(self._there):
            if self._there is not None and place.returned is not None:
                self._there.wait_event(place.returned)
            for room, piece in zip(there, pieces, strict=True):
                room.copy_(piece, non_blocking=True)
        self._follow(self._current(), self._there)
        compute(*there)
        self._follow(self._back, self._current())
        with self._on(self._back):
            for room, piece in zip(there[:num_changed], pieces[:num_changed], strict=True):
                piece.copy_(room, non_blocking=True)
        place.returned = None if self._back is None else self._back.record_event()

    def _next_place(self, pieces: Sequence[Tensor]) -> _Place:
        """The place whose piece was sent back longest ago."""
        if not self._places:
            self._places = [_Place(pieces, self._room, self.device) for _ in range(_NUM_PLACES)]
            self._follow(self._there, self._current())  # what had this memory before may still be computed with
        self._num_pieces += 1
        return self._places[self._num_pieces % _NUM_PLACES]

    def _current(self) -> torch.Stream | None:
        return accelerator.current_stream(self.device) if self._has_streams else None

    @staticmethod
    def _follow(later: torch.Stream | None, earlier: torch.Stream | None) -> None:
        """Lets one stream wait for what is queued to another."""
        if later is not None and earlier is not None:
            later.wait_stream(earlier)

    @staticmethod
    def _on(stream: torch.Stream | None) -> AbstractContextManager[None]:
        return nullcontext() if stream is None else accelerator.on_stream(stream)
