"""Asynchronous saving: training waits only while its tensors are copied to host memory; a thread writes the copy to disk.

One save runs at a time; a second one waits for the first. Every rank has such a thread, and the threads agree over a process group of
their own: a collective on a group that training uses as well would be matched with the wrong partner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from phase8.accelerator import is_accelerator, set_current
from phase8.checkpoint.host_copies import HostCopies

Save = Callable[[dict[str, Tensor]], Path]


class BackgroundSaver:
    """Copies tensors and saves the copies.

    Args:
        device: Device of the tensors.
    """

    def __init__(self, device: torch.device):
        # Every thread has its own current device, at first number 0; page-locking memory would otherwise allocate there.
        choose = (set_current, (device,)) if is_accelerator(device.type) else (None, ())
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="phase8-save", initializer=choose[0], initargs=choose[1])
        self._copies = HostCopies(device)
        self._saving: Future[Path] | None = None

    def prepare(self, sizes: Sequence[int]) -> None:
        """Allocates memory for tensors of these sizes in the background; without this call, the first save does."""
        self._thread.submit(self._copies.reserve, sizes)

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies live tensors to host memory; the tensors may change as soon as this returns.

        Raises:
            MemoryError, RuntimeError: There is too little memory.
        """
        return self._thread.submit(self._copies.copy, tensors).result()  # on the thread, so that it runs after `prepare`

    def start(self, copies: dict[str, Tensor], save: Save) -> None:
        """Starts a save in the background.

        Args:
            copies: The result of `copy`.
            save: Writes its argument; called on the thread.
        """
        assert self._saving is None  # `finished` has returned for the save before
        self._saving = self._thread.submit(save, copies)

    def finished(self, *, wait: bool) -> Path | None:
        """Returns the checkpoint that has been saved since the last call.

        Args:
            wait: Wait until the running save has ended; otherwise return None while it runs.

        Raises:
            Exception: The error that ended the save.
        """
        if self._saving is None or not (wait or self._saving.done()):
            return None
        saving, self._saving = self._saving, None
        return saving.result()

    def close(self) -> None:
        """Waits for the running save, and frees the memory of the copies."""
        self._thread.shutdown(wait=True)
        self._copies.free()
