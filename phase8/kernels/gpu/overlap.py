"""Kernels of a decoding step that begin while the one before them ends: they read what no kernel of the step writes, then wait for its results.

A step is a hundred short kernels, of which each would otherwise wait for its launch and for its first bytes. A kernel calls `await_results` before
it reads or writes anything that other kernels of the step do; all kernels before the last one have ended by then.

Source: NVIDIA, "CUDA C++ programming guide", programmatic dependent launch.
"""

import torch
import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

OLDEST_CAPABILITY = (9, 0)
IS_WANTED = True


def overlap_options(device: torch.device) -> dict[str, bool]:
    """Options of a launch: whether the kernel waits by itself for the one before it."""
    overlaps = IS_WANTED and device.type == "cuda" and torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY
    return {"OVERLAPS": overlaps, **({"launch_pdl": True} if overlaps else {})}


@triton.jit
def await_results():
    """Waits until the kernels before this one have ended; from then on the next kernel may begin."""
    gdc_wait()
    gdc_launch_dependents()
