"""The device of this process."""

from __future__ import annotations

import os
import shutil

import torch

from phase8.config.schema import RunConfig, ZeroSection
from phase8.errors import ConfigError
from phase8.plan.candidates import Device
from phase8.plan.whole_config import count_parameters, shapes_only
from phase8.processes.bootstrap import World
from phase8.processes.host_memory import available_bytes

_SAVED_BYTES_PER_PARAMETER = 12  # the weight and both moments of AdamW
_WORTH_SAVING_ASIDE_BYTES = 4e9  # a smaller checkpoint is written in the time of a step or two


def select_device(name: str, *, local_rank: int = 0) -> torch.device:
    """The device for `--device`; `auto` takes the GPU if there is one. On a host with several processes, each takes its own GPU.

    Raises:
        ConfigError: `cuda` was given without a usable GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but torch finds no usable GPU; use --device cpu, or install a CUDA build of torch and its driver.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank < torch.cuda.device_count():  # too many processes are refused at the rendezvous
        torch.cuda.set_device(local_rank)
    return torch.device("cuda", torch.cuda.current_device())


def this_device(device: torch.device, config: RunConfig) -> Device:
    """The planner's facts about the device, measured before the run uses it."""
    if device.type != "cuda":
        return Device("cpu", "CPU", 0, 0, can_compile=False)
    free, total = torch.cuda.mem_get_info(device)
    can_compile = any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang"))
    found = Device("cuda", torch.cuda.get_device_name(device), memory_bytes=free, total_bytes=total, can_compile=can_compile)
    return found.limited_to(config.train.device_memory_gib)


def name_device_for_deepspeed(device: torch.device) -> None:
    """Names the type of device, and the place of this process where no launcher did, in the environment, where DeepSpeed looks for them."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")


def limit_memory(device: torch.device, limit_gib: float | None) -> None:
    """Limits torch's allocator to a share of the device's memory."""
    if device.type == "cuda" and limit_gib is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(limit_gib * 2**30 / total, 1.0), device)


def host_settings(config: RunConfig, device_type: str) -> dict[str, object]:
    """Values for the automatic settings that concern the host."""
    num_cores, is_gpu = len(os.sched_getaffinity(0)), device_type == "cuda"
    return {
        # One process keeps up with a GPU whose steps are short; a second one hides its delays.
        "data.num_workers": min(2, num_cores // 4) if is_gpu else 0,
        "data.pin_memory": is_gpu,
        "checkpoint.asynchronous": is_gpu and _is_worth_saving_aside(_saved_bytes(config)),
    }


def _is_worth_saving_aside(num_bytes: int) -> bool:
    """Whether a checkpoint is large enough to be written from a copy, and the copy takes less than half of what the host has left."""
    available = available_bytes()
    return num_bytes >= _WORTH_SAVING_ASIDE_BYTES and (available is None or num_bytes <= available / 2)


def _saved_bytes(config: RunConfig) -> int:
    return _SAVED_BYTES_PER_PARAMETER * count_parameters(shapes_only(config))


def share_cores(zero: ZeroSection, world: World, device: torch.device) -> None:
    """Gives a rank on a GPU its share of the host's cores if its optimizer runs on the host.

    torchrun sets OMP_NUM_THREADS to 1 unless the user has set it: right for ranks that launch kernels, but not for AdamW on the host.
    """
    is_left_to_torchrun = world.launcher == "torchrun" and os.environ.get("OMP_NUM_THREADS") == "1"
    if device.type == "cuda" and zero.offload_optimizer != "none" and is_left_to_torchrun:
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // world.local_world_size, 1))


def device_name(device: torch.device) -> str:
    """The vendor's name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def visible_gpus() -> list[str]:
    """The GPUs of this process, by the names that CUDA_VISIBLE_DEVICES takes."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in given.split(",")] if given is not None else list(map(str, range(torch.cuda.device_count())))
    return names[: torch.cuda.device_count()]


def environment_with_gpu(name: str | None) -> dict[str, str]:
    """The environment of a process that sees only one GPU of `visible_gpus`; None: it sees all that this process sees."""
    return {**os.environ, **({} if name is None else {"CUDA_VISIBLE_DEVICES": name})}


def require_determinism() -> None:
    """Makes torch refuse operations without a deterministic implementation; must be called before the first use of the GPU."""
    # cuBLAS is deterministic only with a fixed workspace size, which it reads from the environment.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
