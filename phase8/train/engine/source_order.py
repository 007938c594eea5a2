"""The order of a compiled block's work, where it is the order in which the block is written."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._inductor.scheduler import BaseSchedulerNode


def in_source_order(nodes: Sequence[BaseSchedulerNode]) -> list[BaseSchedulerNode]:
    """Sorts the kernels of a graph: of those whose inputs are ready, the one comes first whose earliest operation does.

    Torch's scheduler puts a kernel of several fused operations where the earliest of them was, and all that any of them needs before it: a wait for
    other ranks, and the work behind it, come before what was written to be done meanwhile, and on each rank in another way.

    Args:
        nodes: Nodes of inductor's scheduler after fusion.
    """
    nodes = sorted(nodes, key=lambda node: node.min_order)
    position_of_writer = {name: position for position, node in enumerate(nodes) for name in node.get_buffer_names()}
    num_missing, readers = [0] * len(nodes), defaultdict(list)
    for position, node in enumerate(nodes):
        writers = {position_of_writer[need.name] for need in node.unmet_dependencies if need.name in position_of_writer} - {position}
        num_missing[position] = len(writers)
        for writer in writers:
            readers[writer].append(position)
    ready = [position for position, missing in enumerate(num_missing) if missing == 0]  # a heap, because it is sorted
    order = []
    while ready:
        position = heapq.heappop(ready)
        order.append(nodes[position])
        for reader in readers[position]:
            num_missing[reader] -= 1
            if num_missing[reader] == 0:
                heapq.heappush(ready, reader)
    assert len(order) == len(nodes)
    return order
