"""Pretrains a model from a config: `python launch/pretrain.py --config configs/quickstart.yaml`.

Exit codes: 0 finished, or stopped by Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 after saving; 1 a bug; 2 config or command line;
3 data or tokenizer; 4 checkpoint; 5 storage; 6 training diverged; 7 a rank hangs, is lost or cannot be reached; 8 copies of a weight differ
between ranks; 9 too little memory of the device or the host; 130 interrupted before there was anything to save, or by a second Ctrl-C;
141 the reader of the output has gone (--dry-run only; training goes on without its output). torchrun itself exits with 1; the exit
code of the rank that failed first is in its summary.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

import phase8.early_interrupt  # noqa: F401  # first: later imports take time
from phase8.config.arguments import add_device_option, path_argument, require_world_size, resume_argument
from phase8.config.describe import describe_schema
from phase8.config.load import load_config
from phase8.errors import ConfigError
from phase8.imports import imports_that_stay
from phase8.processes.bootstrap import World, world_from_environment
from phase8.terminal import make_console, output_is_the_product, run_door

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"


def main() -> int:
    """Runs the command line and returns the exit code."""
    return run_door(_run)


def _run() -> int:
    arguments = _parser().parse_args()
    if arguments.world_size is not None and not arguments.dry_run:
        raise ConfigError(f"--world-size {arguments.world_size} is for --dry-run: a run has the processes that were started; leave it out.")
    if arguments.dry_run:
        world_size = 1 if arguments.world_size is None else arguments.world_size
        require_world_size(world_size)
        _dry_run(load_config(arguments.config, arguments.set), world_size)
    else:
        _train(arguments)
    return 0


def _dry_run(config, world_size: int) -> None:
    with imports_that_stay():
        from phase8.plan.dry_run import dry_run

    with output_is_the_product():
        dry_run(config, world_size=world_size, console=make_console())


def _train(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.set)
    # Imported late: a mistake in the config is answered before torch is loaded.
    with imports_that_stay():
        from phase8.config.validate import validate
        from phase8.distributed.collectives import gather_texts
        from phase8.observe.banner import print_line
        from phase8.processes.exit import one_voice
        from phase8.processes.watch import Limits, running
        from phase8.train.build import build_run
        from phase8.train.device import select_device, share_cores
        from phase8.train.loop import train
        from phase8.train.memory_limits import retry_with_less_memory
        from phase8.train.restart import resume_after_restart
        from phase8.train.run_directory import run_directory

    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives of NCCL that a hang record shows
    world = world_from_environment(os.environ)
    with one_voice(world):
        validate(config, world_size=world.world_size)
        device = select_device(arguments.device, local_rank=world.local_rank)
        share_cores(config.zero, world, device)
    limits = Limits(timeout_seconds=config.parallel.timeout_seconds)
    directory = run_directory(config.run)
    watched = running(world, device_type=device.type, limits=limits, hang_directory=directory.path / "hang")
    with watched as watch, directory.tell_interrupts():
        console = make_console(quiet=world.rank != 0)
        agents = {agent for agent in gather_texts(world.agent) if agent is not None}
        resume = resume_after_restart(arguments.resume, directory, agents=agents)

        def attempt(refused: list[dict[str, object]], resume: str) -> None:
            ranks = {"world_size": world.world_size, "ranks_of_host": world.local_world_size}
            run = build_run(config, device=device, resume=resume, console=console, **ranks, agents=agents, refused=refused)
            train(run, resume_command=_resume_command(world), report=lambda step, doing: watch.report(step=step, doing=doing))

        retry_with_less_memory(attempt, directory, resume=resume, is_alone=world.world_size == 1, say=lambda text: print_line(text, console))


def _resume_command(world: World) -> str:
    """The command line that continues this run from its newest checkpoint on as many ranks."""
    words = list(sys.argv)
    if "--resume" in words:
        position = words.index("--resume")
        del words[position : position + 2]
    is_torchrun_of_one_host = world.launcher == "torchrun" and world.world_size == world.local_world_size
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={world.world_size}"] if is_torchrun_of_one_host else []
    command = shlex.join([sys.executable, *torchrun, *(word for word in words if not word.startswith("--resume="))])
    others = "" if world.world_size == 1 or torchrun else f"  # started as before, in {world.world_size} processes"
    return command + others


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Config keys, their defaults and [what they take]:\n" + describe_schema(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # `_resume_command` knows the options by their full names
    )
    parser.add_argument("--config", type=path_argument, default=DEFAULT_CONFIG, metavar="FILE", help="YAML file, or a name in configs/ (quickstart)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="a.b=c", help="override config keys")
    add_device_option(parser)
    parser.add_argument(
        "--resume",
        type=resume_argument,
        default="auto",
        metavar="auto|none|DIR",
        help="auto: newest good checkpoint of the run; none: start anew; or a checkpoint",
    )
    parser.add_argument("--dry-run", action="store_true", help="print topology, parameters, FLOPs, memory and problems, and stop")
    parser.add_argument("--world-size", type=int, metavar="N", help="processes that --dry-run plans for (default: 1)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
