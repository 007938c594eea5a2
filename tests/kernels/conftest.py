"""Kernels on a machine without a GPU: Triton's interpreter runs them, so that every kernel test has a device.

The variable is set while pytest collects, before any kernel module is imported: Triton reads it when a kernel is decorated, those of
its own standard library included. It stays set for the process (Triton reads it again when a kernel is launched); on a CPU
torch.compile does not use Triton, so nothing else notices.
"""

import importlib.util
import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("triton was imported before tests/kernels/conftest.py could set TRITON_INTERPRET: import kernels inside functions.")
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def kernel_device():
    """Where Triton kernels run in this process: the GPU, or the CPU through the interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Memory that torch.empty hands out is full of NaN, so that what a kernel does not write shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)
