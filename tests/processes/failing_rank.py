"""What the processes of test_failures.py run: all-reduces under `running`, until some ranks do what the command line says."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from phase8.imports import imports_that_stay

with imports_that_stay():
    import torch
    import torch.distributed as dist

    from phase8.errors import DataError, Phase8Error, describe_error
    from phase8.processes.bootstrap import world_from_environment
    from phase8.processes.exit import one_voice
    from phase8.processes.watch import Limits, running

ALL = -1


def misbehave(how, begun):
    """Late enough for the place of this rank to be known to the others."""
    if how == "fine":
        return
    time.sleep(0.5)
    if how == "error":
        raise DataError("shard 7 of the corpus is truncated; copy it again.")
    if how == "bug":
        [][1]
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "hold":  # as the launch of a kernel behind a full queue does: PyDLL keeps the interpreter's lock
        begun.touch()
        ctypes.PyDLL(None).sleep(3600)
    if how == "hang":
        begun.touch()
        time.sleep(3600)


def main() -> int:
    how, who, hang_directory = sys.argv[1], set(map(int, sys.argv[2].split(","))), Path(sys.argv[3])
    limits = Limits(timeout_seconds=float(sys.argv[4]), heartbeat_seconds=5.0, tick_seconds=0.2)
    world = world_from_environment(os.environ)
    try:
        with one_voice(world, still_seconds=5.0):
            if how == "before" and who & {world.rank, ALL}:
                raise DataError("the corpus is missing; prepare it.")
            with running(world, limits=limits, hang_directory=hang_directory) as watch:
                value = torch.ones(3)
                for step in range(1, 4):
                    watch.report(step=step, doing="forward of microbatch 0")
                    if step == 2 and world.rank in who and how != "late":
                        misbehave(how, hang_directory.with_suffix(".begun"))
                    watch.report(step=step, doing="reduction of gradients")
                    dist.all_reduce(value)
                if how == "late" and world.rank in who:
                    misbehave("error", hang_directory.with_suffix(".begun"))
                print(f"rank {world.rank}: {value.sum().item():g}", flush=True)
    except Phase8Error as error:
        print(describe_error(error), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
