"""Processes that make shards, and that end when the one that started them does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from phase8.data.shards import Shard, ShardCounts, make_shard
from phase8.errors import DataError


def make_shards(shards: Sequence[Shard], *, num_workers: int, on_done: Callable[[Shard, ShardCounts], None]) -> None:
    """Makes all shards; with one worker in this process, else in `num_workers` new ones.

    Args:
        shards: What to make.
        num_workers: Processes at work at once.
        on_done: Called in this process after each shard, in the order in which they finish.

    Raises:
        DataError: A shard has a bad input, or a worker was killed. What was committed stays.
        StorageError: The place cannot be written.
    """
    if min(num_workers, len(shards)) <= 1:
        for shard in shards:
            on_done(shard, make_shard(shard))
        return
    context = multiprocessing.get_context("spawn")  # fork would copy the threads of whatever was imported
    with ProcessPoolExecutor(min(num_workers, len(shards)), mp_context=context, initializer=_begin_worker) as pool:
        with _sigint_blocked():  # the workers start here and inherit it
            futures = {pool.submit(make_shard, shard): shard for shard in shards}
        try:
            for future in as_completed(futures):
                on_done(futures[future], future.result())
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, perhaps for lack of memory; run again to go on with what is left, with fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Ctrl-C reaches every process of the terminal, but what it means is for the parent to decide."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker() -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Ends this worker when its parent is gone: otherwise it would wait for work for ever after a kill -9."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
