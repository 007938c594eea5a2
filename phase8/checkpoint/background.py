"""Saving aside: training waits for the copy to host memory only, a thread writes the copy.

One save is under way at a time: a second one waits for the first. Of several ranks each has such a thread, and the threads agree among
themselves over a group of their own; a collective of theirs on a group that training uses, too, would meet the wrong partner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from phase8.checkpoint.host_copies import HostCopies

Save = Callable[[dict[str, Tensor]], Path]


class BackgroundSaver:
    """Copies tensors and saves the copies.

    Args:
        device: Where the tensors live.
    """

    def __init__(self, device: torch.device):
        # Every thread has a current GPU of its own, at first the first one: page-locking memory would take space on it.
        choose = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="phase8-save", initializer=choose[0], initargs=choose[1])
        self._copies = HostCopies(device)
        self._saving: Future[Path] | None = None

    def prepare(self, sizes: Sequence[int]) -> None:
        """Takes memory for tensors of so many bytes, aside; otherwise the first save takes it."""
        self._thread.submit(self._copies.reserve, sizes)

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of live tensors in host memory; the tensors may change as soon as this returns.

        Raises:
            MemoryError, RuntimeError: There is too little memory.
        """
        return self._thread.submit(self._copies.copy, tensors).result()  # on the thread: behind `prepare`

    def start(self, copies: dict[str, Tensor], save: Save) -> None:
        """Begins to save.

        Args:
            copies: From `copy`.
            save: Writes its argument, on the thread.
        """
        assert self._saving is None  # the end of the last one was not awaited
        self._saving = self._thread.submit(save, copies)

    def finished(self, *, wait: bool) -> Path | None:
        """The checkpoint that has been saved since the last call.

        Args:
            wait: Until the save under way has ended; else None while it goes on.

        Raises:
            Exception: What ended the save before it was complete.
        """
        if self._saving is None or not (wait or self._saving.done()):
            return None
        saving, self._saving = self._saving, None
        return saving.result()

    def close(self) -> None:
        """Waits for what is under way."""
        self._thread.shutdown(wait=True)
