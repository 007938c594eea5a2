"""Data that one of several ranks cannot read: all ranks learn of it, save, and end with the message of that rank.

A rank by itself raises DataError. Beside others it must not: they would wait for it in a collective, unsaved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from phase8.distributed.collectives import gather_texts
from phase8.errors import DataError

T = TypeVar("T")


class UnreadableData(Exception):
    """Leads from data that some rank cannot read to the checkpoint that is then saved; the training loop catches it.

    Args:
        own: What this rank cannot read; None: another rank cannot.
    """

    def __init__(self, own: DataError | None):
        super().__init__(str(own))
        self.own = own

    def end(self) -> None:
        """Ends the run: the rank that cannot read raises its error, the others wait to be ended by it.

        Raises:
            DataError: What this rank cannot read.
        """
        if self.own is not None:
            raise self.own
        dist.barrier()  # which the rank that raises never joins


def read_together(read: Callable[[], T]) -> T:
    """What this rank reads, once all ranks have read theirs.

    Raises:
        DataError: A process alone cannot read.
        UnreadableData: Some of several ranks cannot.
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
