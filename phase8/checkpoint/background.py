"""Saving aside: training waits for the copy to host memory only, a thread writes the copy.

One save is under way at a time: a second one waits for the first. Of several ranks each has such a thread, and the threads agree among
themselves over a group of their own; a collective of theirs on a group that training uses, too, would meet the wrong partner.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

Save = Callable[[dict[str, Tensor]], Path]


class BackgroundSaver:
    """Copies tensors and saves the copies.

    Args:
        device: Where the tensors live; those of a GPU are copied into page-locked memory, which is kept for the next save.
    """

    def __init__(self, device: torch.device):
        on_gpu = device.type == "cuda"
        options = StagingOptions(use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu)
        self._stager, self._thread = DefaultStager(options), ThreadPoolExecutor(max_workers=1, thread_name_prefix="phase8-save")
        self._saving: Future[Path] | None = None

    @property
    def is_busy(self) -> bool:
        """A save has begun whose end nobody has heard of."""
        return self._saving is not None

    def start(self, tensors: dict[str, Tensor], save: Save) -> float:
        """Begins to save; the tensors may change as soon as this returns.

        Args:
            tensors: Live ones.
            save: Writes its argument, on the thread.

        Returns:
            Seconds that the caller was held up.
        """
        assert self._saving is None  # the end of the last one was not awaited
        begin = time.perf_counter()
        copies = self._stager.stage(dict(tensors))
        self._saving = self._thread.submit(save, copies)
        return time.perf_counter() - begin

    def finished(self, *, wait: bool) -> Path | None:
        """The checkpoint that has been saved since the last call.

        Args:
            wait: Until the save under way has ended; else None while it goes on.

        Raises:
            StorageError: It could not be saved.
        """
        if self._saving is None or not (wait or self._saving.done()):
            return None
        saving, self._saving = self._saving, None
        return saving.result()

    def close(self) -> None:
        """Waits for what is under way and gives the memory back."""
        self._thread.shutdown(wait=True)
        self._stager.close()
