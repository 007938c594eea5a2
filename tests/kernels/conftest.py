"""Kernels on a machine without a GPU: Triton's interpreter runs them, so that every kernel test has a device."""

import importlib.util

import pytest
import torch


@pytest.fixture
def kernel_device():
    """Where Triton kernels run in this process: the GPU, or the CPU through the interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Memory that torch.empty and torch.empty_like hand out is full of NaN, so that what a kernel does not write shows."""

    def poisoned(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return made

    for make in (torch.empty, torch.empty_like):
        monkeypatch.setattr(torch, make.__name__, poisoned(make))
