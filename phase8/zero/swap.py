"""The place on NVMe disks for what DeepSpeed offloads there."""

from __future__ import annotations

import atexit
import platform
import shutil
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from phase8.config.schema import ZeroSection
from phase8.errors import StorageError
from phase8.formatting import format_bytes


class Swap(NamedTuple):
    """The place for what is offloaded to NVMe.

    Args:
        directory: Directory on the disk of this host.
        largest_parameter: Numbers of the largest parameter.
    """

    directory: Path
    largest_parameter: int


def swapped_bytes(zero: ZeroSection, num_elements: int, *, is_bf16: bool) -> int:
    """Bytes that a rank with so many numbers of the parameters keeps on NVMe: master weights, both moments and gradients, and parameters."""
    per_number = 16 * (zero.offload_optimizer == "nvme") + (2 if is_bf16 else 4) * (zero.offload_params == "nvme")
    return per_number * num_elements


def fresh_swap_directory(parent: Path, name: str, *, num_bytes: int) -> Path:
    """Makes an empty directory for a run on this host, and removes it when the process ends; a collective of all ranks.

    What a killed run of this name has left there is removed.

    Args:
        parent: Directory on the disk.
        name: Name of the run.
        num_bytes: Bytes that this rank will keep there.

    Raises:
        StorageError: The directory cannot be made, or the disk has too little room for the ranks of this host.
    """
    directory = parent / f"{name}.swap"
    wanted: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
    dist.all_gather_object(wanted, (platform.node(), num_bytes))
    needed = sum(each for host, each in wanted if host == platform.node())
    if dist.get_node_local_rank(0) == 0:
        try:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"zero.nvme_path: {directory} cannot be made ({error.strerror}); name a directory that can be written.") from error
        if (free := shutil.disk_usage(parent).free) < needed:
            shutil.rmtree(directory, ignore_errors=True)
            raise StorageError(
                f"zero.nvme_path: {format_bytes(needed)} will be offloaded to {parent}, which has {format_bytes(free)} free; make room there, "
                "or name a directory on a larger disk."
            )
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
    dist.barrier()
    return directory
