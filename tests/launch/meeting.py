"""What the processes of mpirun run in test_two_nodes.py: they meet, sum their ranks, and say so."""

import os
import sys

import torch
import torch.distributed as dist

from phase8.processes.bootstrap import world_from_environment
from phase8.processes.watch import Limits, running


def main() -> int:
    world = world_from_environment(os.environ)
    with running(world, limits=Limits(timeout_seconds=40.0)) as watch:
        watch.report(step=1, doing="sum of the ranks")
        total = torch.tensor(float(world.rank))
        dist.all_reduce(total)
        print(f"{world.launcher} {world.rank}/{world.world_size} {world.local_rank}/{world.local_world_size} sum {total.item():g}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
