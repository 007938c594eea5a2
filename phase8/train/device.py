"""The device of this process."""

from __future__ import annotations

import os
import platform
import shutil

import torch
import torch.distributed as dist

from phase8 import accelerator
from phase8.config.schema import RunConfig, ZeroSection
from phase8.distributed.collectives import gather_texts
from phase8.errors import ConfigError
from phase8.plan.candidates import Device
from phase8.plan.whole_config import count_parameters, shapes_only
from phase8.processes.bootstrap import World
from phase8.processes.host_memory import available_bytes

_SAVED_BYTES_PER_PARAMETER = 12  # the weight and both moments of AdamW
_WORTH_SAVING_ASIDE_BYTES = 4e9  # a smaller checkpoint is written in the time of a step or two


def device_type(name: str) -> str:
    """The type of device for `--device`: `auto` takes the GPU if there is one, and an accelerator of another kind is named, as torch names its type.

    Raises:
        ConfigError: torch finds no such device on this machine, or the name has the number of one.
    """
    found = accelerator.present()
    if name == "auto":
        return found if found is not None and accelerator.has_kernels(found) else accelerator.CPU
    kind, colon, _ = name.partition(":")
    if colon and kind in (accelerator.CPU, found):
        raise ConfigError(f"--device is {name}, but a type without a number is needed, since each process takes the device of its place; use {kind}.")
    if name not in (accelerator.CPU, found):
        there = "cpu only" if found is None else f"cpu and {found}"
        raise ConfigError(
            f"--device is {name}, but torch finds {there} on this machine; use --device {found or accelerator.CPU}, or install a driver and a build "
            f"or an extension of torch for {name}."
        )
    return name


def select_device(name: str, *, local_rank: int = 0) -> torch.device:
    """The device for `--device`. On a host with several processes, each takes an accelerator of its own.

    Raises:
        ConfigError: torch finds no such device on this machine, or it lacks what every step needs.
    """
    chosen = device_type(name)
    return accelerator.take(chosen, local_rank=local_rank) if accelerator.is_accelerator(chosen) else torch.device(chosen)


def this_device(device: torch.device, config: RunConfig) -> Device:
    """The planner's facts about the device, measured before the run uses it."""
    if not accelerator.is_accelerator(device.type):
        return Device(device.type, "CPU", 0, 0, can_compile=False)
    free, total = accelerator.free_and_total_bytes(device) or (0, 0)
    can_compile = accelerator.has_kernels(device.type) and any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang"))
    found = Device(device.type, accelerator.name_of(device), memory_bytes=free, total_bytes=total, can_compile=can_compile)
    return found.limited_to(config.train.device_memory_gib)


def name_device_for_deepspeed(device: torch.device) -> None:
    """Names the type of device, and the place of this process on its host where torchrun did not, in the environment, where DeepSpeed looks for them.

    A collective of all ranks.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    hosts = gather_texts(platform.node())
    place = hosts[: dist.get_rank()].count(platform.node()) if device.index is None else device.index
    os.environ.setdefault("LOCAL_RANK", str(place))


def limit_memory(device: torch.device, limit_gib: float | None) -> None:
    """Limits torch's allocator to a share of the device's memory."""
    if accelerator.is_accelerator(device.type) and limit_gib is not None:
        accelerator.limit_memory(device, limit_gib * 2**30)


def host_settings(config: RunConfig, device_type: str) -> dict[str, object]:
    """Values for the automatic settings that concern the host."""
    num_cores, copies_itself = len(os.sched_getaffinity(0)), accelerator.locks_pages(device_type)
    return {
        # One process keeps up with a GPU whose steps are short; a second one hides its delays.
        "data.num_workers": min(2, num_cores // 4) if accelerator.is_accelerator(device_type) else 0,
        "data.pin_memory": copies_itself,
        "checkpoint.asynchronous": copies_itself and _is_worth_saving_aside(_saved_bytes(config)),
    }


def _is_worth_saving_aside(num_bytes: int) -> bool:
    """Whether a checkpoint is large enough to be written from a copy, and the copy takes less than half of what the host has left."""
    available = available_bytes()
    return num_bytes >= _WORTH_SAVING_ASIDE_BYTES and (available is None or num_bytes <= available / 2)


def _saved_bytes(config: RunConfig) -> int:
    return _SAVED_BYTES_PER_PARAMETER * count_parameters(shapes_only(config))


def share_cores(zero: ZeroSection, world: World, device: torch.device) -> None:
    """Gives a rank on an accelerator its share of the host's cores if its optimizer runs on the host.

    torchrun sets OMP_NUM_THREADS to 1 unless the user has set it: right for ranks that launch kernels, but not for AdamW on the host.
    """
    is_left_to_torchrun = world.launcher == "torchrun" and os.environ.get("OMP_NUM_THREADS") == "1"
    if accelerator.is_accelerator(device.type) and zero.offload_optimizer != "none" and is_left_to_torchrun:
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // world.local_world_size, 1))


def device_name(device: torch.device) -> str:
    """The vendor's name of the device."""
    if accelerator.is_accelerator(device.type):
        return accelerator.name_of(device)
    return f"CPU, {torch.get_num_threads()} threads"


def visible_gpus() -> list[str]:
    """The GPUs of this process, by the names that the variable takes which hides the rest."""
    given, number = os.environ.get(accelerator.VISIBLE_GPUS), accelerator.count(accelerator.GPU)
    names = [name.strip() for name in given.split(",")] if given is not None else list(map(str, range(number)))
    return names[:number]


def environment_with_gpu(name: str | None) -> dict[str, str]:
    """The environment of a process that sees only one GPU of `visible_gpus`; None: it sees all that this process sees."""
    return {**os.environ, **({} if name is None else {accelerator.VISIBLE_GPUS: name})}


def require_determinism() -> None:
    """Makes torch refuse operations without a deterministic implementation; must be called before the first use of the GPU."""
    # cuBLAS is deterministic only with a fixed workspace size, which it reads from the environment.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
