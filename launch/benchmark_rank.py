"""One rank of `tools/benchmark.py parallel`: torchrun starts it, and it writes its figures to a file.

Exit codes as in launch/pretrain.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

from phase8.config.load import load_config
from phase8.imports import imports_that_stay
from phase8.terminal import run_door


def main() -> int:
    """Runs the command line and returns the exit code."""
    return run_door(_measure)


def _measure() -> int:
    arguments = _parser().parse_args()
    config = load_config(arguments.config)
    # Imported late, as in launch/pretrain.py.
    with imports_that_stay():
        from phase8.benchmark.rank import measure_rank
        from phase8.data.staging import write_json
        from phase8.processes.bootstrap import world_from_environment
        from phase8.processes.watch import Limits, running
        from phase8.train.device import select_device, share_cores

    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    world = world_from_environment(os.environ)
    directory: Path = arguments.directory
    (directory / f"{world.rank}.pid").write_text(str(os.getpid()))
    device = select_device(arguments.device, local_rank=world.local_rank)
    share_cores(config.zero, world, device)
    limits = Limits(timeout_seconds=config.parallel.timeout_seconds)
    with running(world, device_type=device.type, limits=limits, hang_directory=directory / "hang") as watch:
        figures = measure_rank(
            config,
            world=world,
            device=device,
            num_steps=arguments.iterations,
            directory=directory,
            report=lambda step, doing: watch.report(step=step, doing=doing),
        )
        write_json(directory / f"{world.rank}.json", asdict(figures))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="what to train, the layout included")
    parser.add_argument("--directory", required=True, type=Path, metavar="DIR", help="where all ranks write")
    parser.add_argument("--iterations", required=True, type=int, metavar="N", help="measured steps")
    parser.add_argument("--device", required=True, metavar="TYPE", help="type of the device of each rank, as torch names it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
