"""Data that one of several ranks cannot read: all ranks learn of it, save, and end with that rank's message.

A single process raises DataError. One of several ranks must not, since the rest would wait for it in a collective, unsaved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from phase8.distributed.collectives import gather_texts
from phase8.errors import DataError

T = TypeVar("T")


class UnreadableData(Exception):
    """Raised when some rank cannot read its data, so that all ranks save; the training loop catches it.

    Args:
        own: Error of this rank; None: another rank cannot read.
    """

    def __init__(self, own: DataError | None):
        super().__init__(str(own))
        self.own = own

    def end(self) -> None:
        """Ends the run: the rank that cannot read raises its error, and the rest wait to be ended.

        Raises:
            DataError: The error of this rank.
        """
        if self.own is not None:
            raise self.own
        dist.barrier()  # the rank that raised never joins, so this waits until the process is ended


def read_together(read: Callable[[], T]) -> T:
    """Returns what this rank reads, once all ranks have read theirs.

    Raises:
        DataError: A single process cannot read its data.
        UnreadableData: One of several ranks cannot read its data.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return read()
    own: DataError | None = None
    try:
        result = read()
    except DataError as error:
        own = error
    if any(problem is not None for problem in gather_texts(None if own is None else str(own))):
        raise UnreadableData(own)
    return result
