"""Types of devices: what torch offers on each, and which of the library's fast paths run there.

This is the only module outside `kernels/gpu` that names a vendor's runtime. What torch has for every accelerator is asked of the module of the
device's type (`torch.get_device_module`); what a module lacks has a default. The fast paths are written for NVIDIA GPUs; elsewhere the way beside
them is taken:

| capability | elsewhere |
|---|---|
| `has_kernels` | plain torch references; attention by torch; experts one after the other; no setting is measured or compiled unless asked for |
| `records_steps` | the host launches every operation of a step |
| `multiplies_fp8` | refused |
| `reaches_peers` | collectives of the device's backend |
| `locks_pages` | plain copies between host and device |

Callers ask by the type of a device, a string, so that the answers are constants where torch.compile traces them.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from phase8.errors import ConfigError

CPU = "cpu"
# Type of the device for which the fast paths are written, and of the GPUs that are planned for where there is none.
GPU = "cuda"
# Messages of torch for errors without a class of their own: out of page-locked host memory, and out of host memory.
_PAGES_NOT_LOCKED = re.compile(r"CUDA error: out of memory|cudaHostAlloc|cudaHostRegister", re.IGNORECASE)
_HOST_TOO_SMALL = re.compile(r"can't allocate memory|not enough memory|Cannot allocate memory", re.IGNORECASE)
# The environment variable that names the GPUs which a process sees.
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
_NO_ACCELERATORS = (CPU, "meta")

Graph = torch.cuda.CUDAGraph


# What there is.


def present() -> str | None:
    """Type of the accelerator that torch finds on this machine; None: there is none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type


def is_accelerator(device_type: str) -> bool:
    """Whether tensors of a device lie in memory of its own, where work is queued."""
    return device_type not in _NO_ACCELERATORS


def count(device_type: str) -> int:
    """Number of devices of an accelerator's type that this process sees."""
    return int(torch.get_device_module(device_type).device_count())


def in_words(device_type: str, number: int) -> str:
    """A number of devices of a type."""
    return f"{number} usable {'GPUs' if device_type == GPU else f'devices of type {device_type}'}"


# Capabilities.


def has_kernels(device_type: str) -> bool:
    """Whether the Triton kernels, flash-attn and torch's grouped product may run there, and the planner has been measured there."""
    return device_type == GPU


def records_steps(device_type: str) -> bool:
    """Whether a whole step can be recorded as a graph and replayed."""
    return device_type == GPU


def multiplies_fp8(device_type: str) -> bool:
    """Whether torch multiplies scaled matrices of eight-bit floats there (a meta tensor stands for one on a GPU)."""
    return device_type in (GPU, "meta")


def reaches_peers(device_type: str) -> bool:
    """Whether devices may read and write each other's memory."""
    return device_type == GPU


def locks_pages(device_type: str) -> bool:
    """Whether the device copies from and to page-locked host memory by itself, beside other work."""
    return device_type == GPU


# A device.


def take(device_type: str, *, local_rank: int) -> torch.device:
    """The accelerator of this process, which becomes the current one: the one of its place among the processes of the host.

    Raises:
        ConfigError: The accelerator lacks what every step needs.
    """
    module = torch.get_device_module(device_type)
    if local_rank < count(device_type):  # too many processes are refused at the rendezvous
        set_current(torch.device(device_type, local_rank))
    device = torch.device(device_type, module.current_device() if hasattr(module, "current_device") else torch.accelerator.current_device_index())
    if not has_kernels(device_type):
        _require_wide_floats(device)
    return device


def _require_wide_floats(device: torch.device) -> None:
    try:
        torch.ones((), dtype=torch.float64, device=device).item()
    except (TypeError, RuntimeError) as error:  # the first one is what torch raises where a type of device has none
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"--device is {device.type}, which has no float64 ({reason}), but sums of losses and angles of positions are float64; use --device cpu."
        ) from None


def set_current(device: torch.device) -> None:
    """Makes a device the current one of this thread."""
    module = torch.get_device_module(device)
    if hasattr(module, "set_device"):
        module.set_device(device)
    else:
        torch.accelerator.set_device_index(device)


def own_gpu() -> torch.device:
    """The current GPU of this thread."""
    return torch.device(GPU, torch.cuda.current_device())


def name_of(device: torch.device | str) -> str:
    """The vendor's name of an accelerator; of a type: of its current one."""
    module = torch.get_device_module(device)
    if not hasattr(module, "get_device_name"):
        return str(device)
    return str(module.get_device_name() if isinstance(device, str) else module.get_device_name(device))


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Generation and variant of a GPU that `has_kernels`."""
    return torch.cuda.get_device_capability(device)


def synchronize(device: torch.device) -> None:
    """Waits until an accelerator has done all that was queued; a CPU is done at once."""
    if has_kernels(device.type):
        torch.cuda.synchronize(device)
    elif is_accelerator(device.type):
        torch.accelerator.synchronize(device)


# Memory.


def free_and_total_bytes(device: torch.device) -> tuple[int, int] | None:
    """Memory of an accelerator that is free, and all of it; None: torch does not say."""
    module = torch.get_device_module(device)
    return module.mem_get_info(device) if hasattr(module, "mem_get_info") else None


def peak_bytes(device: torch.device) -> int | None:
    """Largest memory of tensors on an accelerator since `reset_peak`; None: torch does not say."""
    module = torch.get_device_module(device)
    return int(module.max_memory_allocated(device)) if is_accelerator(device.type) and hasattr(module, "max_memory_allocated") else None


def reset_peak(device: torch.device) -> None:
    """Starts `peak_bytes` afresh."""
    module = torch.get_device_module(device)
    if is_accelerator(device.type) and hasattr(module, "reset_peak_memory_stats"):
        module.reset_peak_memory_stats(device)


def num_cache_flushes(device: torch.device) -> int | None:
    """How often torch found no memory for a tensor, gave back what it keeps for later ones, and asked anew; None: torch does not say."""
    module, name = torch.get_device_module(device), "memory_stats_as_nested_dict"  # `memory_stats` sorts hundreds of numbers, in every step
    return getattr(module, name)(device).get("num_alloc_retries") if is_accelerator(device.type) and hasattr(module, name) else None


def give_back_memory(device_type: str | None) -> None:
    """Gives memory that torch keeps for later tensors back to the accelerator, and page-locked memory to the host; None, or a CPU: there is none."""
    if device_type is None or not is_accelerator(device_type):
        return
    module = torch.get_device_module(device_type)
    if hasattr(module, "empty_cache"):
        module.empty_cache()
    if locks_pages(device_type):  # torch keeps as much as was ever in use at once, such as offloaded weights and their gradients
        if hasattr(torch.accelerator, "empty_host_cache"):
            torch.accelerator.empty_host_cache()
        else:  # torch 2.11
            torch._C._host_emptyCache()


Memory = Literal["device", "page-locked", "host"]


def memory_that_ran_out(error: BaseException) -> Memory | None:
    """Which memory an error says is used up; None: it is another error."""
    if isinstance(error, torch.OutOfMemoryError):
        return "device"
    if isinstance(error, MemoryError):
        return "host"
    if not isinstance(error, RuntimeError):
        return None
    return "page-locked" if _PAGES_NOT_LOCKED.search(str(error)) else "host" if _HOST_TOO_SMALL.search(str(error)) else None


def limit_memory(device: torch.device, num_bytes: float) -> None:
    """Limits torch to so much of the memory of an accelerator.

    Raises:
        ConfigError: torch has no such limit there.
    """
    module = torch.get_device_module(device)
    if not (hasattr(module, "set_per_process_memory_fraction") and hasattr(module, "get_device_properties")):
        raise ConfigError(f"train.device_memory_gib is set, but torch limits no memory on {device.type}; leave it out.")
    total = module.get_device_properties(device).total_memory
    module.set_per_process_memory_fraction(min(num_bytes / total, 1.0), device)


# Random numbers.


def generator_state(device: torch.device) -> Tensor | None:
    """State of an accelerator's random generator, uint8 on the host; None: on a CPU, or where torch has none."""
    module = torch.get_device_module(device)
    return module.get_rng_state(device).cpu() if is_accelerator(device.type) and hasattr(module, "get_rng_state") else None


def set_generator_state(device: torch.device, state: Tensor) -> None:
    """Sets what `generator_state` returned."""
    torch.get_device_module(device).set_rng_state(state, device)


# Queues of a GPU, for what `locks_pages`, `reaches_peers` or `records_steps`.


def new_stream(device: torch.device | None = None, *, priority: int = 0) -> torch.Stream:
    """A stream of a GPU (None: the current one) of its own; a lower number comes first."""
    return torch.cuda.Stream(device, priority=priority)


def current_stream(device: torch.device | None = None) -> torch.Stream:
    """The stream to which work is queued on a GPU; None: on the current one."""
    return torch.cuda.current_stream(device)


def on_stream(stream: torch.Stream) -> AbstractContextManager[None]:
    """A context in which work is queued to a stream."""
    return torch.cuda.stream(stream)


def timing_event() -> torch.Event:
    """An event that knows its time."""
    return torch.cuda.Event(enable_timing=True)


def recording(graph: Graph) -> AbstractContextManager[None]:
    """A context in which work is recorded, not done. Other threads, such as those that lock pages for the next batches, go on meanwhile."""
    return _Recording(graph)


class _Recording(AbstractContextManager[None]):
    """A recording whose errors are raised as they are.

    Where work of another stream is not waited for, as after an error in the middle of a step of several ranks, torch's context raises an error of its
    own in their place when it ends, and leaves its stream the current one.
    """

    def __init__(self, graph: Graph):
        self._context, self._stream = torch.cuda.graph(graph, capture_error_mode="thread_local"), torch.cuda.current_stream()

    def __enter__(self) -> None:
        self._context.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._context.__exit__(kind, error, trace)
        except RuntimeError:
            torch.cuda.set_stream(self._stream)
            if error is None:
                raise


def is_recording() -> bool:
    """Whether the current stream is being recorded."""
    return torch.cuda.is_current_stream_capturing()


# Host memory of a GPU that `locks_pages`.


def lock_pages(memory: Tensor) -> int:
    """Locks the pages of a tensor on the host; returns the number of the error, 0 without one."""
    error = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if error != 0:
        _forget_last_error()
    return error


def _forget_last_error() -> None:
    """Takes the error of a call that torch does not check from the runtime, which would raise it at the next kernel; a kernel is torch's only way."""
    with suppress(RuntimeError):
        torch.empty(1, device=own_gpu()).fill_(0)


def unlock_pages(memory: Tensor) -> None:
    """Undoes `lock_pages`, after all copies."""
    torch.cuda.synchronize()  # a copy may be on its way
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


# Libraries.


def allow_cudnn_attention(is_allowed: bool) -> None:
    """Whether torch's attention may be cuDNN's, which it otherwise prefers to what is registered with it."""
    torch.backends.cuda.enable_cudnn_sdp(is_allowed)


def collectives(device_type: str) -> str:
    """The backends of a process group: gloo for tensors on the host, and torch's default one for those of an accelerator.

    Raises:
        ConfigError: No backend of collectives is known for the accelerator.
    """
    if not is_accelerator(device_type):
        return "gloo"
    try:
        return f"{CPU}:gloo,{device_type}:{dist.get_default_backend_for_device(device_type)}"
    except ValueError:
        raise ConfigError(
            f"--device is {device_type}, for which no backend of torch.distributed is registered; start one process, or use --device cpu."
        ) from None


def records_collectives_of_nccl(device_type: str) -> bool:
    """Whether the last collectives of a process are in the flight recorder of NCCL, which has one of its own."""
    return collectives(device_type).endswith(":nccl")
