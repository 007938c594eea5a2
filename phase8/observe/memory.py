"""Peak memory of the training process, in bytes.

On CUDA it is what torch's allocator handed out at most since the last reset. On the CPU it is the largest resident set of the process
since it started: code, libraries and data are in it, and the operating system offers no reset.
"""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory in use so far on a CUDA device, or by the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # ru_maxrss counts KiB on Linux and bytes on macOS.
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def reset_peak_memory(device: torch.device) -> None:
    """Start the peak of a CUDA device afresh; on the CPU the peak is that of the whole process and stays."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
