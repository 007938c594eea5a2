"""Selects the implementation of each operation and the reason for it; no other module decides this.

The choice applies to the whole process, not to a model: `select_kernels` makes it once, when a run is built; without a call it is `auto`.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from phase8 import accelerator
from phase8.kernels.toolchain import prepare_toolchain

OLDEST_CAPABILITY = (8, 0)  # Ampere: bf16 and tf32 in the matrix units
HALF_PRECISIONS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """An implementation and the reason for choosing it.

    Args:
        name: `triton` or `reference` for the project's own operations; for attention, what computes it.
        reason: Text for the banner.
    """

    name: str
    reason: str


SDPA = "torch scaled_dot_product_attention"
# Torch's grouped product reads 16 bytes at once, and is a kernel on these generations of GPUs only; elsewhere it reads on the host how many rows
# there are.
GROUPED = "torch's grouped product"
_GROUPED_ALIGNED_BYTES, _GROUPED_GENERATIONS = 16, (9, 10)
ONEDNN = "oneDNN"
_MAKER_OF_MKL = "GenuineIntel"
_NOT_NVIDIA = "the Triton kernels are written for NVIDIA GPUs"


@dataclass
class _Selection:
    """Arguments and result of `select_kernels`.

    This is the one mutable value of the module (ADR 9): autograd and compiled graphs pass only tensors to an operator.
    """

    wanted: Literal["auto", "reference"] = "auto"
    attention: Backend = Backend(SDPA, "nothing else was asked for")


_selection = _Selection()


def select_kernels(wanted: Literal["auto", "reference"], device: torch.device) -> None:
    """Decides for this process; must be called before anything is compiled for the GPU.

    Args:
        wanted: `auto`: the fastest implementation that device and installation allow; `reference`: plain torch.
        device: Device of the model.
    """
    _selection.wanted = wanted
    kernel_backend(device)
    _selection.attention = _select_attention(wanted, device)


def needs_no_operator(x: Tensor) -> bool:
    """Whether the reference may be called as it is: on a CPU without gradients. A process's first call of an operator imports torch's compiler."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and torch.is_inference_mode_enabled()


def keeps_for_backward(x: Tensor) -> bool:
    """Whether autograd of a reference is faster than its operator: on a CPU it keeps what the operator's backward would compute again."""
    return x.device.type == "cpu"


@functools.cache
def fp32_backend() -> Backend:
    """The library that multiplies large fp32 matrices on a CPU."""
    if not torch.backends.mkl.is_available():
        return Backend("torch's own library", "this torch has no MKL")
    if not torch.backends.mkldnn.is_available():
        return Backend("MKL", "this torch has no oneDNN")
    if (capability := torch.backends.cpu.get_cpu_capability()) != "AVX512":
        return Backend("MKL", f"torch uses {capability} of this processor, not AVX512")
    if _MAKER_OF_MKL in _processor():
        return Backend("MKL", "the processor is its maker's")
    return Backend(ONEDNN, "MKL leaves half of AVX-512 idle on processors of other makers than its own")


def prefers_onednn() -> bool:
    """Whether oneDNN multiplies fp32 matrices faster than MKL."""
    return fp32_backend().name == ONEDNN


def _processor() -> str:
    """What the system says of its processor, the maker's name among it."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return platform.processor()


def uses_triton(x: Tensor) -> bool:
    """Whether Triton kernels run on this tensor, judging by its device; dtypes and shapes are checked by the operator."""
    return has_triton(x.device)


def has_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on a device."""
    return accelerator.has_kernels(device.type) and kernel_backend(device).name == "triton"


def kernel_backend(device: torch.device) -> Backend:
    """The implementation of the project's own operations."""
    if not accelerator.has_kernels(device.type):
        return Backend("reference", _NOT_NVIDIA if accelerator.is_accelerator(device.type) else "the Triton kernels need a GPU")
    # Checked whatever is wanted: it also prepares the assembler, which torch.compile needs as well.
    found = _gpu_backend(device)
    return Backend("reference", f"train.kernels is reference ({found.reason})") if _selection.wanted == "reference" else found


@functools.cache
def _gpu_backend(device: torch.device) -> Backend:
    if torch.version.hip is not None:
        return Backend("reference", _NOT_NVIDIA)
    capability = accelerator.compute_capability(device)
    if capability < OLDEST_CAPABILITY:
        return Backend("reference", f"compute capability {capability[0]}.{capability[1]} is below {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]}")
    toolchain = prepare_toolchain(capability)
    return Backend("triton" if toolchain.usable else "reference", toolchain.reason)


def expert_backend(device: torch.device, dtype: torch.dtype, widths: tuple[int, ...]) -> Backend:
    """What computes the products of experts, and why; with `GROUPED` the device counts rows, otherwise the host.

    Args:
        device: Device of the model.
        dtype: Dtype of the rows.
        widths: Inner and outer width of the weights.
    """
    kernels = kernel_backend(device)
    if kernels.name != "triton":
        return Backend("one expert after the other", kernels.reason)
    if dtype != torch.bfloat16:
        return Backend("one expert after the other", f"torch's grouped product takes bf16, not {str(dtype).removeprefix('torch.')}")
    if any(width * dtype.itemsize % _GROUPED_ALIGNED_BYTES for width in widths):
        multiple = _GROUPED_ALIGNED_BYTES // dtype.itemsize
        return Backend("one expert after the other", f"torch's grouped product needs multiples of {multiple}, not {widths}")
    if (generation := accelerator.compute_capability(device)[0]) not in _GROUPED_GENERATIONS:
        return Backend("one expert after the other", f"torch's grouped product is for Hopper and Blackwell, not compute capability {generation}")
    return Backend(GROUPED, "bf16 on a GPU that has it")


def attention_backend(device: torch.device, *, dtype: torch.dtype, masked: bool) -> Backend:
    """The implementation of full causal attention and of dot-product windows, where torch's scaled_dot_product_attention is called.

    Args:
        device: Device of the model.
        dtype: Dtype of queries, keys and values.
        masked: Whether a mask is passed, because documents do not see each other.
    """
    if not accelerator.has_kernels(device.type):
        return Backend(SDPA, "flash-attn needs a GPU")
    if masked:
        return Backend(SDPA, "flash-attn takes no document mask")
    if dtype not in HALF_PRECISIONS:
        return Backend(SDPA, "flash-attn takes bf16 and fp16 only")
    return _selection.attention


def _select_attention(wanted: str, device: torch.device) -> Backend:
    """Makes torch's scaled_dot_product_attention use flash-attn 3 or 4 where one is installed; torch itself contains neither."""
    _use_flash_attention(None)
    if wanted == "reference" or not accelerator.has_kernels(device.type):
        return Backend(SDPA, "train.kernels is reference" if wanted == "reference" else "flash-attn needs a GPU")
    packages = installed_flash_attention()
    generation = choose_flash_attention(accelerator.compute_capability(device), packages)
    if generation is not None:
        name = f"flash-attn {packages[generation]}"
        try:
            _use_flash_attention(f"FA{generation}")
        except (ImportError, RuntimeError) as error:
            return Backend(SDPA, f"{name} is installed but cannot be loaded ({error})")
        return Backend(f"{name} through {SDPA}", "installed")
    if 2 in packages:
        return Backend(SDPA, f"it contains the kernels of the installed flash-attn {packages[2]}")
    return Backend(SDPA, "no newer flash-attn that fits this GPU and this torch is installed")


def choose_flash_attention(capability: tuple[int, int], packages: dict[int, str]) -> int | None:
    """The best installed generation of flash-attn for a GPU among those that torch does not contain; None: there is none.

    Args:
        capability: Compute capability of the GPU.
        packages: Version of each installed generation that this torch supports.
    """
    fitting = {9: (3, 4), 10: (4,)}.get(capability[0], ())
    return next((generation for generation in fitting if generation in packages), None)


def installed_flash_attention() -> dict[int, str]:
    """Version of each installed generation of flash-attn, 3 and 4 only if this torch supports them; nothing is imported."""
    packages = {}
    known = nn.attention.list_flash_attention_impls() if "list_flash_attention_impls" in vars(nn.attention) else []
    if find_spec("flash_attn_interface") is not None and "FA3" in known:
        packages[3] = _version("flash_attn_3") or "3"
    if (found := _version("flash-attn-4")) is not None and "FA4" in known:
        packages[4] = found
    if (found := _version("flash-attn")) is not None:
        packages[2] = found
    return packages


def _use_flash_attention(implementation: str | None) -> None:
    """Registers FA3 or FA4 as torch's flash attention, ahead of cuDNN's, which torch would prefer; None: undoes that."""
    if "activate_flash_attention_impl" not in vars(nn.attention):
        return
    if implementation is not None:
        nn.attention.activate_flash_attention_impl(implementation)
        accelerator.allow_cudnn_attention(False)
    elif nn.attention.current_flash_attention_impl() is not None:
        nn.attention.restore_flash_attention_impl()
        accelerator.allow_cudnn_attention(True)


def apex_hint() -> str | None:
    """A hint about an installed package called apex, which is never used; None without one. Nothing is imported."""
    spec = PathFinder.find_spec("apex")
    if spec is None:
        return None
    is_from_nvidia = any((Path(folder) / "optimizers").is_dir() for folder in spec.submodule_search_locations or ())
    if is_from_nvidia:
        return "NVIDIA apex is installed and not used: torch's fused AdamW updates a whole group in one kernel as well"
    return "the installed package apex is not NVIDIA's, which only its source repository offers, and is ignored"


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
