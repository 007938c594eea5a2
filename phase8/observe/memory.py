"""Peak memory of the training process, in bytes.

On an accelerator it is what torch's allocator handed out at most since the last reset. On the CPU it is the largest resident set of the process
since it started: code, libraries and data are in it, and the operating system offers no reset.
"""

from __future__ import annotations

import resource
import sys

import torch

from phase8 import accelerator


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory in use so far on an accelerator, or by the process on the CPU and where torch does not say."""
    if (peak := accelerator.peak_bytes(device)) is not None:
        return peak
    # ru_maxrss counts KiB on Linux and bytes on macOS.
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def reset_peak_memory(device: torch.device) -> None:
    """Start the peak of an accelerator afresh; on the CPU the peak is that of the whole process and stays."""
    accelerator.reset_peak(device)
