"""A pool of processes that make shards; they end when the process that started them does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import ClassVar

import numpy as np

from phase8.data.shards import OnBytes, Shard, ShardCounts, ignore_progress, make_shard
from phase8.errors import DataError

SECONDS_BETWEEN_REPORTS = 1.0
_MOST_PER_CORE = 4

OnDone = Callable[[Shard, ShardCounts], None]


def worker_problems(num_workers: int) -> Iterator[str]:
    """What is wrong with the number of processes that `--workers` asks for; a process each computes all the time and has memory of its own."""
    num_cores = os.cpu_count() or 1
    most = max(_MOST_PER_CORE * num_cores, 16)
    if num_workers < 1:
        yield f"--workers is {num_workers}; it must be at least 1"
    elif num_workers > most:
        yield f"--workers is {num_workers}, but this machine has {num_cores} cores; give one worker for each core, and at most {most}"


def make_shards(shards: Sequence[Shard], *, num_workers: int, on_done: OnDone, on_bytes: OnBytes = ignore_progress) -> None:
    """Makes all shards; with one worker in this process, else in `num_workers` new ones.

    Args:
        shards: The shards to make.
        num_workers: Processes at work at once.
        on_done: Called in this process after each shard, in the order in which they finish.
        on_bytes: Called in this process with the input bytes tokenised so far: after each shard, and every second in between.

    Raises:
        DataError: A shard has a bad input, or a worker was killed. Committed shards are kept.
        StorageError: A shard cannot be written.
    """
    if min(num_workers, len(shards)) <= 1:
        _make_shards_here(shards, on_done, on_bytes)
        return
    context = multiprocessing.get_context("spawn")  # fork would copy the threads of imported libraries
    bytes_done = context.RawArray("q", len(shards))  # each shard has one writer, and a late value does no harm
    counted = np.frombuffer(bytes_done, np.int64)
    with ProcessPoolExecutor(min(num_workers, len(shards)), context, _begin_worker, (bytes_done,)) as pool:
        with sigint_blocked():  # the workers start here and inherit the mask
            futures = {pool.submit(_make_shard_in_worker, i, shard): i for i, shard in enumerate(shards)}
        running = set(futures)
        try:
            while running:
                finished, running = wait(running, SECONDS_BETWEEN_REPORTS, FIRST_COMPLETED)
                for future in finished:
                    i = futures[future]
                    on_done(shards[i], future.result())
                    counted[i] = max(counted[i], shards[i].num_bytes)
                on_bytes(int(counted.sum()))
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, perhaps for lack of memory; run again to go on with what is left, with fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _make_shards_here(shards: Sequence[Shard], on_done: OnDone, on_bytes: OnBytes) -> None:
    bytes_before, bytes_of_shard, reported_seconds = 0, 0, time.monotonic()

    def on_bytes_of_shard(count: int) -> None:
        nonlocal bytes_of_shard, reported_seconds
        bytes_of_shard = count
        if time.monotonic() - reported_seconds > SECONDS_BETWEEN_REPORTS:
            reported_seconds = time.monotonic()
            on_bytes(bytes_before + count)

    for shard in shards:
        on_done(shard, make_shard(shard, on_bytes=on_bytes_of_shard))
        bytes_before += max(bytes_of_shard, shard.num_bytes)
        bytes_of_shard = 0
        reported_seconds = time.monotonic()
        on_bytes(bytes_before)


@contextmanager
def sigint_blocked() -> Iterator[None]:
    """Blocks Ctrl-C, which reaches every process of the terminal, since the parent decides what it means."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """State of a worker process, given at its start, since shared memory cannot be sent with a shard."""

    bytes_done: ClassVar[Sequence[int]]


def _begin_worker(bytes_done: Sequence[int]) -> None:
    _Worker.bytes_done = bytes_done
    threading.Thread(target=exit_with_parent, daemon=True).start()


def _make_shard_in_worker(i: int, shard: Shard) -> ShardCounts:
    return make_shard(shard, on_bytes=partial(_Worker.bytes_done.__setitem__, i))


def exit_with_parent() -> None:
    """Ends this worker when its parent is gone; after a kill -9 it would otherwise wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
