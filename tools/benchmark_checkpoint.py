"""Times a save and a load of weights and AdamW state by several ranks, against torch's FileSystemWriter and dd on the same disk.

    torchrun --standalone --nproc_per_node=4 tools/benchmark_checkpoint.py --directory DIR

The ranks divide phase8_1b by ZeRO 3 on the CPU; nothing is trained, the moments are random. Rounds alternate between the three. Every save ends
on the disk (fsync); dd writes and reads one file per rank, all at once. Before each load the page cache is dropped, which needs root; without,
a load measures memory, not the disk. A load by phase8 starts with weights and without moments, as a run does; FileSystemReader overwrites both.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import phase8.early_interrupt  # noqa: F401  # first: later imports take time
from phase8.checkpoint.load import open_checkpoint
from phase8.checkpoint.save import save_checkpoint
from phase8.checkpoint.state import flat_state, restore_state
from phase8.checkpoint.step_directories import step_directory_name
from phase8.config.arguments import path_argument
from phase8.config.load import load_config
from phase8.distributed.mesh import build_mesh
from phase8.distributed.placement import held_part
from phase8.errors import ConfigError
from phase8.formatting import format_bytes
from phase8.terminal import run_door
from phase8.topology import Topology
from phase8.train.engine.train_state import TrainState, build_train_state

ROOT = Path(__file__).resolve().parent.parent
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
DD_BLOCK_BYTES = 16 * 2**20


def main() -> int:
    """Runs the command line and returns the exit code."""
    return run_door(_run)


def _run() -> int:
    arguments = _parser().parse_args()
    if not dist.is_torchelastic_launched():
        raise ConfigError("one process is not several; start tools/benchmark_checkpoint.py with torchrun --standalone --nproc_per_node=4.")
    warnings.filterwarnings("ignore", category=FutureWarning)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    config = load_config(ROOT / "configs" / "phase8_1b.yaml", ["zero.stage=3", *arguments.overrides])
    mesh = build_mesh(Topology(1, size, 1, 1), device_type="cpu", shard_size=size)
    train_state = build_train_state(config, mesh=mesh, device=torch.device("cpu"), dtype=torch.bfloat16)
    _invent_moments(train_state)
    num_bytes = _sum(sum(held_part(tensor).nbytes for tensor in _state(train_state).values()))
    _say(f"{format_bytes(num_bytes)} in {len(_state(train_state))} tensors, {size} ranks, {os.cpu_count()} cores, torch {torch.__version__}")
    _say(f"{'round':>5} {'what':<18} {'save':>8} {'GB/s':>6} {'load':>8} {'GB/s':>6}")
    directory: Path = arguments.directory
    for number in range(arguments.rounds):
        for name, (save, load) in _contestants(train_state, directory, num_bytes=num_bytes, rank=rank).items():
            saved = _seconds(save)
            is_cold = _drop_caches()
            loaded = _seconds(load)
            speeds = [f"{seconds:6.2f} s {num_bytes / seconds / 1e9:6.2f}" for seconds in (saved, loaded)]
            _say(f"{number:5} {name:<18} {' '.join(speeds)}" + ("" if is_cold else " warm"))
            dist.barrier()
            if rank == 0:
                shutil.rmtree(directory / name)
            dist.barrier()
    dist.destroy_process_group()
    return 0


def _contestants(
    train_state: TrainState, directory: Path, *, num_bytes: int, rank: int
) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Save and load of each, collectives of all ranks."""
    ours, theirs, dd = (directory / name for name in ("phase8", "FileSystemWriter", "dd"))

    def load_ours() -> None:
        train_state.optimizer.state.clear()
        restore_state(open_checkpoint(ours / step_directory_name(1)), train_state.stage.module, train_state.optimizer, train_state.shards.parts)

    file, count = dd / str(rank), num_bytes // dist.get_world_size() // DD_BLOCK_BYTES
    options = [f"bs={DD_BLOCK_BYTES}", "status=none"]

    def write_file() -> None:
        dd.mkdir(parents=True, exist_ok=True)
        subprocess.run(["dd", "if=/dev/zero", f"of={file}", f"count={count}", "conv=fsync", *options], check=True)

    return {
        "dd": (write_file, lambda: subprocess.run(["dd", f"if={file}", "of=/dev/null", *options], check=True)),
        "FileSystemWriter": (
            lambda: dcp.save(_state(train_state), storage_writer=dcp.FileSystemWriter(theirs, sync_files=True)),
            lambda: dcp.load(_state(train_state), storage_reader=dcp.FileSystemReader(theirs)),
        ),
        "phase8": (lambda: save_checkpoint(ours, step=1, tensors=_state(train_state), metadata={}, attachments={}), load_ours),
    }


def _invent_moments(train_state: TrainState) -> None:
    generator = torch.Generator().manual_seed(dist.get_rank())
    for part in train_state.shards.parts.values():
        moments = {name: torch.empty_like(part).uniform_(generator=generator) for name in ("exp_avg", "exp_avg_sq")}
        train_state.optimizer.state[part] = {"step": torch.tensor(1.0), **moments}


def _state(train_state: TrainState) -> dict[str, torch.Tensor]:
    return flat_state(train_state.stage.module, train_state.optimizer, train_state.shards.parts)


def _sum(number: int) -> int:
    total = torch.tensor(number)
    dist.all_reduce(total)
    return int(total)


def _seconds(work: Callable[[], object]) -> float:
    """Seconds until all ranks have finished."""
    dist.barrier()
    begin = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - begin


def _drop_caches() -> bool:
    """Drops the page cache; returns whether loads read from the disk again."""
    os.sync()
    dist.barrier()
    if not os.access(DROP_CACHES, os.W_OK):
        return False
    if dist.get_rank() == 0:
        DROP_CACHES.write_text("3")
    dist.barrier()
    return True


def _say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", required=True, type=path_argument, metavar="DIR", help="on the disk to measure; it gets three directories")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of all three (3)")
    parser.add_argument("--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="other sizes, as in pretraining")
    return parser


if __name__ == "__main__":
    sys.exit(main())
