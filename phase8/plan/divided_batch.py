"""Global batches of layouts: which data-parallel ranks cannot divide the batch of a config, and the nearest batch that they can."""

from __future__ import annotations

import math
from collections.abc import Iterable

from phase8.config.batch import run_topology
from phase8.config.dotted import replaced
from phase8.config.schema import RunConfig
from phase8.plan.layouts import microbatches

_BATCH = "train.global_batch_size"


def nearest_batch(layouts: Iterable[RunConfig], *, world_size: int) -> int | None:
    """The batch, in sequences, nearest to that of some layouts with which one of them can run; None: none of them can.

    Args:
        layouts: Layouts of one config, which states its global batch.
        world_size: Number of GPUs.
    """
    batch, found = 0, set()
    for layout in layouts:
        batch = _batch_of(layout)
        nearest = _nearest_multiple(batch, of=_data_parallel_size(layout, world_size))
        if nearest not in found and _can_run(layout, nearest, world_size):
            found.add(nearest)
    return min(found, key=lambda each: (abs(each - batch), -each), default=None)


def about_batch(best: RunConfig, asked: int, layouts: Iterable[RunConfig], *, world_size: int) -> str | None:
    """A sentence about layouts that cannot divide the batch of a config among their data-parallel ranks; None: all that could run can.

    Args:
        best: A layout that is suggested.
        asked: Sequences of a step by the config.
        layouts: All layouts of the config.
        world_size: Number of GPUs.
    """
    if _batch_of(best) != asked:
        gpus = "one GPU" if world_size == 1 else f"{world_size} GPUs"
        return (
            f"no layout of {gpus} can divide a batch of {asked:,} sequences among its data-parallel ranks: these have {_BATCH} {_batch_of(best)}, "
            "the nearest that one can divide"
        )
    by_size: dict[int, list[RunConfig]] = {}
    for layout in layouts:
        by_size.setdefault(_data_parallel_size(layout, world_size), []).append(layout)
    common = _nearest_multiple(asked, of=math.lcm(*by_size))
    left_out = [size for size in sorted(by_size) if asked % size and any(_can_run(layout, common, world_size) for layout in by_size[size])]
    if not left_out:
        return None
    *others, last = map(str, left_out)
    listed = f"{', '.join(others)} or {last}" if others else last
    return (
        f"left out are layouts of {listed} data-parallel ranks, which cannot divide a batch of {asked:,} sequences; with {_BATCH}={common}, the "
        "nearest that all can divide, they are compared, too"
    )


def _batch_of(config: RunConfig) -> int:
    assert config.train.global_batch_size is not None
    return config.train.global_batch_size


def _data_parallel_size(layout: RunConfig, world_size: int) -> int:
    return run_topology(layout.parallel, world_size=world_size).data_parallel_size


def _nearest_multiple(number: int, *, of: int) -> int:
    """The multiple, at least once, that is nearest to a number; the larger of two."""
    return max((2 * number + of) // (2 * of), 1) * of


def _can_run(layout: RunConfig, batch: int, world_size: int) -> bool:
    return any(True for _ in microbatches(replaced(layout, {_BATCH: batch}), world_size=world_size))
